"""Continuous batching by numbers alone: which requests run, what a step computes, what it takes.

It decides as vLLM's V1 scheduler does, so that queues, preemptions and step times are those of
the replica it stands for. Each running request decodes one token a step; what is left of the step's
token budget goes to prefills in order of arrival (chunked prefill, Agrawal et al., Sarathi, 2023);
when KV blocks run out the youngest request is preempted, waits at the front of the queue and is
recomputed (Kwon et al., PagedAttention, 2023). Blocks for a whole prompt are reserved on admission,
with one to spare for each request that runs: else the newcomer would soon be preempted.

Steps in which nothing but counts changes are planned and performed as one, whatever their number,
and no step looks at every sequence: a request costs O(log n) in all.

There is no clock: whoever drives this calls ``plan``, lets the time pass, then calls ``advance``.
Requests may come and go in mid-plan. The plan still takes the time that it was made with; so that
they make a difference from the end of the step they fell into, perform the plan to there only
(``steps_until``) and ask for the next.
"""

from collections.abc import Sequence as SequenceOf
from heapq import heappop

from services.worker.engine.batching_takeover import TakeoverState
from services.worker.engine.batching_types import (
    PREFILL,
    WAITING,
    Chunk,
    Plan,
    PrefillWork,
    Progress,
    Sequence,
    StepTimes,
)  # fmt: skip
from shared.cost.limits import EngineLimits
from shared.cost.step import pairs
from shared.errors import Rejected


class Batch(TakeoverState):
    """The batch scheduler of one replica."""

    def __init__(
        self,
        limits: EngineLimits,
        step_times: StepTimes,
        *,
        kv_blocks: int,
        kv_blocks_full: int = 0,
        prefix_caching: bool = False,
    ) -> None:
        """``kv_blocks_full``: how many ``grow`` makes of ``kv_blocks``; 0: as many."""
        super().__init__(
            limits,
            kv_blocks=kv_blocks,
            kv_blocks_full=kv_blocks_full,
            prefix_caching=prefix_caching,
        )
        self._times = step_times

    def add(  # what makes a request
        self,
        key: str,
        *,
        prompt_tokens: int,
        output_tokens: int,
        earlier_tokens: int = 0,
        hashes: SequenceOf[int] = (),
        hash_tokens: int = 0,
    ) -> Sequence:
        """Queue a request that makes ``output_tokens`` in all, of which an earlier attempt made
        ``earlier_tokens``. ``hashes`` are of consecutive pieces of ``hash_tokens`` tokens (0: of
        one KV block each), each hash standing for everything up to its end.

        Raises Rejected with code ``too_long``, ``overloaded`` or ``invalid`` (the key is live
        already), and ConfigInvalid for ``hash_tokens`` shorter than a KV block.
        """
        assert prompt_tokens > 0, key
        assert 0 <= earlier_tokens < output_tokens, key
        tokens_max = prompt_tokens + output_tokens
        if key in self.sequences or key in self.held or key in self.entering:
            raise Rejected("invalid", f"request {key} is live already")
        self.check_length(tokens_max)
        if len(self.sequences) >= self._live_max:
            raise Rejected("overloaded", f"{len(self.waiting)} requests are waiting already")
        self._arrivals += 1
        sequence = Sequence(
            key,
            number=self._arrivals,
            prompt=prompt_tokens,
            known=prompt_tokens + earlier_tokens,
            tokens_max=tokens_max,
        )
        if self._caching and hashes:
            self._set_hashes(sequence, hashes, hash_tokens)
        self.sequences[key] = self.waiting[key] = sequence
        self._pending += tokens_max
        return sequence

    def abort(self, key: str) -> bool:
        """Forget a request at once and free its blocks; False if it is not known."""
        sequence = self.sequences.get(key)
        if sequence is None:
            return self.unhold(key)
        self.finish(sequence)
        return True

    def finish(self, sequence: Sequence) -> None:
        """End a live request before its length does: an end token, a stop string."""
        if sequence.phase == WAITING:
            del self.waiting[sequence.key]
            self._end(sequence)
        else:
            self._finish_running(sequence)

    def plan(self) -> Plan | None:
        """What comes next; None if there is nothing to do, or ``stuck``. More than one step only if
        in all of them the same requests decode, and nobody could join. The same plan again until it
        is performed."""
        plan = self._plan
        if plan is not None:
            return plan
        if self.entering:
            self._enter()
        if not self.sequences:
            return None
        if self.held:
            self._make_room(self.kv.due(self.steps_total))
        preempted: list[Sequence] = []
        while self.kv.due(self.steps_total) > self.kv.free:
            self.kv.cache.shrink(0)  # older requests have taken all there was
            preempted.append(self._preempt())
        chunks: list[Chunk] = []
        if self.partials or (self.waiting and not preempted):
            chunks = self._chunks()
        if not chunks and not self.decoding:
            return None  # the last that ran has outgrown a cache that has yet to grow
        plan = self._plan = self._mixed(chunks, preempted) if chunks else self._leap(preempted)
        return plan

    def steps_until(self, elapsed_ps: int) -> tuple[int, int]:
        """See Plan.steps_until; of the plan being performed."""
        plan = self.plan()
        assert plan is not None, "there is nothing to do"
        return plan.steps_until(elapsed_ps)

    def advance(self, steps: int | None = None) -> Progress:
        """Perform the first ``steps`` steps of the plan (all if None), and drop the rest."""
        plan = self.plan()
        assert plan is not None, "there is nothing to do"
        steps = plan.steps if steps is None else steps
        assert 1 <= steps <= plan.steps, f"the plan has {plan.steps} steps"
        self._plan = None
        batch = self.decoding
        progress = Progress(steps, batch, plan.preempted)
        if batch:
            grown = self.kv.growth(self.steps_total, steps, batch)
            if grown:
                self.kv.take(grown)
            made = batch * steps
            self.context += made
            self.output_tokens_total += made
            self._pending -= made
        self.steps_total += steps
        ends = self.ends
        while ends and ends[0][0] <= self.steps_total:
            _, serial, sequence = heappop(ends)
            if sequence.serial == serial:
                progress.ended.append(sequence)
                self._finish_running(sequence)
        for sequence, count in plan.chunks:
            if sequence.phase != PREFILL:
                continue  # aborted since
            sequence.computed += count
            self.prefill_tokens_total += count
            self._pending -= count
            if sequence.computed == sequence.known:
                self._join(sequence, progress)
        return progress

    def _leap(self, preempted: list[Sequence]) -> Plan:
        """Decode until the first request ends, or blocks run out. Meanwhile nobody can be admitted
        who cannot be now: free blocks only become fewer."""
        ends, batch = self.ends, self.decoding
        while ends[0][2].serial != ends[0][1]:
            heappop(ends)
        steps = ends[0][0] - self.steps_total
        steps = self.kv.steps_that_fit(self.steps_total, steps, batch)
        times = self._times.decode(batch)
        return Plan(
            steps,
            times.total_ps(self.context, steps),
            preempted=preempted,
            times=times,
            context=self.context,
        )

    def _mixed(self, chunks: list[Chunk], preempted: list[Sequence]) -> Plan:
        """One step with prefill in it."""
        tokens = attended = ending = context = 0
        for sequence, count in chunks:
            done = sequence.computed
            tokens += count
            attended += pairs(done, count)
            context += done + count
            ending += done + count == sequence.known
        work = PrefillWork(tokens, len(chunks), attended, ending, context)
        batch = self.decoding
        duration_ps = self._times.step_ps(batch, self.context + batch, work)
        return Plan(1, duration_ps, preempted=preempted, chunks=chunks)

    def _chunks(self) -> list[Chunk]:
        """The prompts that share what decodes leave of the token budget."""
        budget = self.limits.batch_tokens_max - self.decoding
        chunks: list[Chunk] = []
        if self.kv.cache.idle_blocks:  # decodes come first, and may need what would be found here
            self.kv.cache.shrink(self.kv.free - self.kv.due(self.steps_total))
        begun = list(self.partials)  # one, but for those that came with part of their KV
        sequence = begun.pop(0) if begun else self._admit()
        while sequence is not None:
            count = min(budget, sequence.known - sequence.computed)
            chunks.append((sequence, count))
            budget -= count
            if sequence.hashes:
                self._publish(sequence, sequence.computed + count)
            if not budget:
                break
            sequence = begun.pop(0) if begun else self._admit()
        return chunks

    def _admit(self) -> Sequence | None:
        """The first that waits, if there is room for all it holds."""
        if not self.waiting or not self._has_place():
            return None
        sequence = next(iter(self.waiting.values()))
        kv = self.kv
        blocks = kv.blocks_of(sequence.known)
        if blocks > kv.total:
            return None  # it waits until the KV cache has grown
        room = kv.free - kv.due(self.steps_total)
        if kv.cache.idle_blocks:
            kv.cache.shrink(room)
        room -= len(self.running)
        matched = kv.cache.match(sequence.hashes) if sequence.hashes else []
        if self.running and blocks > room:  # what others use already costs no room
            blocks_new = blocks - sum(cached.blocks for cached in matched if cached.refs)
            if blocks_new > room:
                return None
        elif self.held:
            self._make_room(blocks)
        if matched:
            kv.take(kv.cache.refer(matched))
            sequence.held, sequence.shared = matched, sum(cached.blocks for cached in matched)
            # The last token is computed in any case, and with it, as in vLLM, all of its block.
            size = kv.block_tokens
            found = min(sequence.shared, (sequence.known - 1) // size) * size
            sequence.computed = found
            self.hit_tokens_total += found
            self._pending -= found
        kv.take(blocks - sequence.shared)
        del self.waiting[sequence.key]
        self.running[sequence.key] = sequence
        self.partials.append(sequence)
        self._admissions += 1
        sequence.admission = self._admissions
        sequence.phase = PREFILL
        return sequence
