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
released. Those that are only copied ahead still run elsewhere: they give way to whoever needs their
blocks or rows, the newest first, since they can be copied again. The others stand still everywhere,
and give way to nobody: a running request that finds no block waits for them, once nobody younger
runs. It waits no longer than the switch, whose deadlines end in a release, or a rollback.
"""

from collections import deque
from collections.abc import Iterator, Mapping

from services.worker.engine.interface import LiveState
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.engine.torch_engine.seats import Seats
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
        self.kv, self._seats = kv, Seats(kv)
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
        first, ahead = self._running[0] if self._running else self._waiting[0], self._ahead()
        needed, free = kv.blocks_for(len(first.tokens)), kv.free + self._seats.blocks(ahead)
        if first.row is None:
            no_row = held and not (kv.free_rows or ahead)
            return no_row or needed > (free if held else kv.total)
        due = first.one_left and not first.in_flight
        return held and due and needed > kv.count(first.row) + free

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
        return [sequence.state(self.kv) for sequence in (*self._running, *self._waiting)]

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
            self._seats.release(sequence)
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
            self._seats.release(sequence)

    def take(self, state: LiveState, *, ahead: bool = False) -> list[int] | None:
        """Hold a request that another replica hands over, and reserve blocks for all its tokens;
        the blocks in order. Taken again, with more tokens, it keeps those it has; where more are
        lacking, with ``ahead`` it is as it was. None, and it is not held, where a row or blocks are
        lacking; with ``computed`` 0 it is held without any."""
        key = state.request.key
        assert key not in self._live, key
        sequence = self._held.get(key) or Sequence(state.request)
        former = sequence.tokens
        sequence.request = state.request  # the tokens of an earlier one were stand-ins
        sequence.tokens = [*state.request.prompt_tokens, *state.output_tokens]
        sequence.ahead = ahead
        reserve = self._reserve if ahead else self._find
        if state.computed and not reserve(sequence):
            if ahead and sequence.row is not None:
                sequence.tokens = former
                return self.kv.blocks(sequence.row)
            self.forget_held(key)
            return None
        sequence.prefill_end, sequence.computed = len(sequence.tokens), state.computed
        if not state.computed and sequence.row is not None:
            self._seats.release(sequence)
        self._held[key] = sequence
        return [] if sequence.row is None else self.kv.blocks(sequence.row)

    def forget_held(self, key: str) -> bool:
        """Free what a held request has; False if there is none."""
        sequence = self._held.pop(key, None)
        if sequence is not None and sequence.row is not None:
            self._seats.release(sequence)
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
            if self._give_way(sequence):
                continue
            victim = self._running[-1]
            if victim.in_flight or (victim is sequence and (self._ending or self._held)):
                return False
            self._running.pop()
            self._seats.release(victim)
            victim.computed, victim.prefill_end = 0, len(victim.tokens)
            self._waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _admit(self) -> Sequence | None:
        if not self._waiting or len(self._running) >= self._running_max:
            return None
        sequence = self._waiting[0]
        if not self._find(sequence):
            others = self._running or self._ending or self._held
            small = self.kv.total < self.kv.total_full  # it may have to wait for more
            assert others or small, "a request alone must fit: add refuses the others"
            return None
        self._running.append(self._waiting.popleft())
        return sequence

    def _reserve(self, sequence: Sequence) -> bool:
        # One block stays for each running request: else a newcomer would soon be preempted.
        return self._seats.reserve(sequence, len(self._running))

    def _find(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, and a row, held requests giving way; False if too few."""
        while not self._reserve(sequence):
            if not self._give_way(sequence):
                return False
        return True

    def _ahead(self) -> list[Sequence]:
        """The held requests that give way, oldest first."""
        return [held for held in self._held.values() if held.ahead and held.row is not None]

    def _give_way(self, sequence: Sequence) -> bool:
        """Forget the newest held request that is only copied ahead, if all of them together have
        what ``sequence`` lacks; False if not."""
        ahead, spare = self._ahead(), len(self._running)
        if not ahead or self._seats.lacking(sequence, spare) > self._seats.blocks(ahead):
            return False
        return self.forget_held(ahead[-1].request.key)
