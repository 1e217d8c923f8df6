"""Continuous batching (Yu et al., Orca, 2022) with chunked prefill (Agrawal et al., Sarathi, 2023).

Pure: decides which tokens of which requests the next step computes, and owns the KV blocks.
Rules, in this order:
1. Each decoding request gets one token. If blocks run out, the youngest running request is
   preempted: it loses its blocks, goes back to the front of the queue and is recomputed later.
   The oldest is therefore never disturbed, and everything ends.
2. Prefills that have begun get what is left of the token budget, oldest first.
3. Waiting requests are admitted in order while budget, rows and blocks last.
A request's blocks for all its known tokens are reserved on admission, so that a prefill once begun
is not starved half-way by those behind it.

With pipeline stages several steps are under way at once (micro-batches), each of other requests. A
request in flight keeps its blocks until its step has ended, whatever becomes of it.

Requests that another replica hands over are *held*: they have blocks, and do not run until they are
released. They never give way: a running request that finds no block waits for those, once nobody
younger runs. It waits no longer than the switch, whose deadlines end in a release, or a rollback.
"""

from collections import deque
from collections.abc import Iterator, Mapping

from services.worker.engine.interface import LiveState
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.engine.torch_engine.sequences import Chunk, Sequence
from shared.errors import Rejected


class BatchScheduler:
    def __init__(
        self,
        kv: KvBlocks,
        *,
        batch_tokens_max: int,
        running_max: int,
        waiting_max: int,
        micro_batches: int = 1,
    ) -> None:
        """``micro_batches``: how many steps may be under way at once; they share
        ``batch_tokens_max``."""
        assert batch_tokens_max >= running_max, "each running request decodes in every step"
        self.kv = kv
        self.preemptions = 0
        self._micro_batches = micro_batches
        self._step_tokens_max = -(-batch_tokens_max // micro_batches)
        self._running_max = running_max
        self._waiting_max = waiting_max
        self._running: list[Sequence] = []  # oldest first, all older than those waiting
        self._waiting: deque[Sequence] = deque()
        self._live: dict[str, Sequence] = {}
        self._ending: list[Sequence] = []  # removed while in flight
        self._held: dict[str, Sequence] = {}
        self._arrivals = 0
        self._admissions = 0
        self._live_bound = self.live_max

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def stuck(self) -> bool:
        """Nothing can be computed until the KV cache grows, or held requests are let go."""
        if self._ending or len(self._running) > 1 or not (self._running or self._waiting):
            return False
        kv, held = self.kv, bool(self._held)
        first = self._running[0] if self._running else self._waiting[0]
        needed = kv.blocks_for(len(first.tokens))
        if first.row is None:
            return needed > (kv.free if held else kv.total) or (held and not kv.free_rows)
        due = first.one_left and not first.in_flight
        return held and due and needed > kv.count(first.row) + kv.free

    @property
    def live_max(self) -> int:
        """A free row counts as room in the queue, since the next step will take from it."""
        return self._running_max + self._waiting_max

    @property
    def tokens_pending(self) -> int:
        return sum(sequence.tokens_pending for sequence in self._live.values())

    @property
    def held(self) -> Mapping[str, Sequence]:
        """Requests taken over that do not run yet, oldest first."""
        return self._held

    def __contains__(self, key: str) -> bool:
        return key in self._live or key in self._held

    def __iter__(self) -> Iterator[str]:
        """Of those that are not held."""
        return iter(self._live)

    def is_live(self, sequence: Sequence) -> bool:
        """False once it was removed, even if its key came back since."""
        return self._live.get(sequence.request.key) is sequence

    def states(self) -> list[LiveState]:
        """Of those that are not held, oldest first."""
        return [self._state(sequence) for sequence in (*self._running, *self._waiting)]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises Rejected when the queue is full or it can never be run."""
        assert sequence.request.key not in self, sequence.request.key
        self.kv.check_length(sequence.tokens_max)
        if len(self._live) >= self.live_max:
            raise Rejected("overloaded", f"{len(self._waiting)} requests are waiting already")
        self._arrivals += 1
        sequence.number = self._arrivals
        self._waiting.append(sequence)
        self._live[sequence.request.key] = sequence

    def remove(self, key: str) -> bool:
        """Forget a sequence, ended, aborted or held, and free its blocks, if it is in flight once
        its step has ended; False if unknown."""
        if self.forget_held(key):
            return True
        sequence = self._live.pop(key, None)
        if sequence is None:
            return False
        if sequence.row is None:
            self._waiting.remove(sequence)
            return True
        self._running.remove(sequence)
        if sequence.in_flight:
            self._ending.append(sequence)
        else:
            self._release(sequence)
        return True

    def schedule(self) -> list[Chunk]:
        """The next step's work, of sequences that are not in flight. Call ``commit`` with each
        chunk once it is computed."""
        chunks = self._decodes()
        budget = self._step_tokens_max - len(chunks)
        for sequence in self._running:
            pending = len(sequence.tokens) - sequence.computed
            if budget and pending > 1 and not sequence.in_flight:
                chunks.append(sequence.next_chunk(budget))
                budget -= chunks[-1].count
        while budget and (sequence := self._admit()) is not None:
            chunks.append(sequence.next_chunk(budget))
            budget -= chunks[-1].count
        return chunks

    def commit(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert sequence.in_flight, chunk
        assert sequence.computed == chunk.start, chunk
        sequence.computed += chunk.count
        sequence.in_flight = False
        if sequence in self._ending:
            self._ending.remove(sequence)
            self._release(sequence)

    def take(self, state: LiveState) -> list[int] | None:
        """Hold a request that another replica hands over, and reserve blocks for all its tokens;
        the blocks in order. Taken again, with more tokens, it keeps those it has. None, and it is
        not held, where a row or blocks are lacking; with ``computed`` 0 it is held without any."""
        key = state.request.key
        assert key not in self._live, key
        sequence = self._held.get(key) or Sequence(state.request)
        sequence.request = state.request  # the tokens of an earlier one were stand-ins
        sequence.tokens = [*state.request.prompt_tokens, *state.output_tokens]
        sequence.prefill_end = len(sequence.tokens)
        sequence.computed = state.computed
        if state.computed and not self._reserve(sequence):
            self.forget_held(key)
            return None
        if not state.computed and sequence.row is not None:
            self._release(sequence)
        self._held[key] = sequence
        return [] if sequence.row is None else self.kv.blocks(sequence.row)

    def forget_held(self, key: str) -> bool:
        """Free what a held request has; False if there is none."""
        sequence = self._held.pop(key, None)
        if sequence is not None and sequence.row is not None:
            self._release(sequence)
        return sequence is not None

    def release_held(self, *, keep: bool) -> list[Sequence]:
        """The held requests run from now on, before those that wait; or they are forgotten. They
        are returned, and may exceed ``live_max``."""
        released = list(self._held.values())
        if not keep:
            for sequence in released:
                self.forget_held(sequence.request.key)
            return released
        self._held.clear()
        self._running += [sequence for sequence in released if sequence.row is not None]
        self._waiting.extendleft(s for s in reversed(released) if s.row is None)
        self._live.update((sequence.request.key, sequence) for sequence in released)
        for number, sequence in enumerate((*self._running, *self._waiting), start=1):
            sequence.number = number
        self._arrivals = len(self._live)
        self._live_bound = max(self.live_max, len(self._live))
        return released

    def check(self) -> None:
        self.kv.check()
        ages = [sequence.number for sequence in (*self._running, *self._waiting)]
        assert ages == sorted(set(ages)), "requests out of order"
        assert len(ages) == len(self._live) <= self._live_bound
        assert not self._live.keys() & self._held.keys(), "a held request runs"
        assert len(self._running) <= self._running_max
        blocks = 0
        for sequence in self._running:
            assert sequence.row is not None, sequence
            assert sequence.computed < len(sequence.tokens) <= sequence.tokens_max, sequence
            known = len(sequence.tokens) if sequence.in_flight else sequence.computed
            blocks += self.kv.blocks_for(max(known, sequence.prefill_end))
        for sequence in (*self._ending, *self._held.values()):
            if sequence.row is not None:
                blocks += self.kv.blocks_for(len(sequence.tokens))
        assert blocks == self.kv.used, "blocks held do not match the tokens computed"
        for sequence in self._waiting:
            assert sequence.row is None, sequence
            assert sequence.computed == 0, sequence

    def _decodes(self) -> list[Chunk]:
        """Those that are due are shared out evenly over the steps under way."""
        share = -(-len(self._running) // self._micro_batches)
        chunks: list[Chunk] = []
        for sequence in list(self._running):
            if len(chunks) == share:
                break
            due = sequence.row is not None and sequence.one_left and not sequence.in_flight
            if due and self._make_room(sequence):
                chunks.append(sequence.next_chunk(1))
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Grow by the next token, preempting the youngest; False if that was itself, or if blocks
        will be free without it."""
        assert sequence.row is not None
        while not self.kv.grow(sequence.row, tokens=len(sequence.tokens)):
            victim = self._running[-1]
            if victim.in_flight or (victim is sequence and (self._ending or self._held)):
                return False
            self._running.pop()
            self._release(victim)
            victim.computed, victim.prefill_end = 0, len(victim.tokens)
            self._waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _admit(self) -> Sequence | None:
        if not self._waiting or len(self._running) >= self._running_max or not self.kv.free_rows:
            return None
        sequence = self._waiting[0]
        if not self._reserve(sequence):
            others = self._running or self._ending or self._held
            small = self.kv.total < self.kv.total_full  # it may have to wait for more
            assert others or small, "a request alone must fit: add refuses the others"
            return None
        self._running.append(self._waiting.popleft())
        return sequence

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, and a row if it has none; False, and nothing changed, if
        there are too few."""
        needed = self.kv.blocks_for(len(sequence.tokens))
        if sequence.row is not None:
            needed -= self.kv.count(sequence.row)
        # One spare block for each running request: else the newcomer would soon be preempted.
        spare = self.kv.free - len(self._running)
        if needed > max(0, spare) or (sequence.row is None and not self.kv.free_rows):
            return False
        if sequence.row is None:
            sequence.row = self.kv.open()
            self._admissions += 1
            sequence.admission = self._admissions
        grown = self.kv.grow(sequence.row, tokens=len(sequence.tokens))
        assert grown, sequence
        return True

    def _state(self, sequence: Sequence) -> LiveState:
        count = self.kv.blocks_for(sequence.computed)
        return LiveState(
            request=sequence.request,
            output_tokens=sequence.output_tokens,
            computed=sequence.computed,
            blocks=[] if sequence.row is None else self.kv.blocks(sequence.row)[:count],
            admission=sequence.admission,
        )

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.kv.close(sequence.row)
        sequence.row = None
