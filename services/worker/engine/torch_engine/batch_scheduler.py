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
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.worker.engine.interface import EngineRequest
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from shared.errors import Rejected


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. ``computed`` tokens have their keys and values cached."""

    request: EngineRequest
    number: int = 0  # order of arrival
    tokens: list[int] = field(init=False)  # prompt, then output
    computed: int = 0
    prefill_end: int = field(init=False)  # tokens before this one are prefilled, not decoded
    row: int | None = None  # in the KV block table while running

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_tokens, *self.request.output_tokens]
        self.prefill_end = len(self.tokens)

    @property
    def output_count(self) -> int:
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def tokens_max(self) -> int:
        return len(self.request.prompt_tokens) + self.request.sampling.output_tokens_max

    @property
    def tokens_pending(self) -> int:
        prefill = max(0, self.prefill_end - self.computed)
        return prefill + self.tokens_max - len(self.tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + count)`` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step yields the sequence's next token."""
        return self.start + self.count == len(self.sequence.tokens)


class BatchScheduler:
    def __init__(
        self, kv: KvBlocks, *, batch_tokens_max: int, running_max: int, waiting_max: int
    ) -> None:
        assert batch_tokens_max >= running_max, "each running request decodes in every step"
        self.kv = kv
        self.preemptions = 0
        self._batch_tokens_max = batch_tokens_max
        self._running_max = running_max
        self._waiting_max = waiting_max
        self._running: list[Sequence] = []  # oldest first, all older than those waiting
        self._waiting: deque[Sequence] = deque()
        self._live: dict[str, Sequence] = {}
        self._arrivals = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def live_max(self) -> int:
        """A free row counts as room in the queue, since the next step will take from it."""
        return self._running_max + self._waiting_max

    @property
    def tokens_pending(self) -> int:
        return sum(sequence.tokens_pending for sequence in self._live.values())

    def __contains__(self, key: str) -> bool:
        return key in self._live

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises Rejected when the queue is full or it can never be run."""
        assert sequence.request.key not in self._live, sequence.request.key
        capacity = self.kv.total * self.kv.block_tokens
        if sequence.tokens_max - 1 > capacity:  # the last token is never computed
            detail = f"{sequence.tokens_max} tokens exceed the KV cache of {capacity} tokens"
            raise Rejected("too_long", detail)
        if len(self._live) >= self.live_max:
            raise Rejected("overloaded", f"{len(self._waiting)} requests are waiting already")
        self._arrivals += 1
        sequence.number = self._arrivals
        self._waiting.append(sequence)
        self._live[sequence.request.key] = sequence

    def remove(self, key: str) -> bool:
        """Forget a sequence, ended or aborted, and free its blocks; False if unknown."""
        sequence = self._live.pop(key, None)
        if sequence is None:
            return False
        if sequence.row is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._release(sequence)
        return True

    def schedule(self) -> list[Chunk]:
        """The next step's work. Call ``commit`` with each chunk once it is computed."""
        chunks = self._decodes()
        budget = self._batch_tokens_max - len(chunks)
        decoding = {id(chunk.sequence) for chunk in chunks}
        for sequence in self._running:
            if budget and id(sequence) not in decoding:
                chunks.append(_next_chunk(sequence, budget))
                budget -= chunks[-1].count
        while budget and (sequence := self._admit()) is not None:
            chunks.append(_next_chunk(sequence, budget))
            budget -= chunks[-1].count
        return chunks

    def commit(self, chunk: Chunk) -> None:
        assert chunk.sequence.computed == chunk.start, chunk
        chunk.sequence.computed += chunk.count

    def check(self) -> None:
        self.kv.check()
        ages = [sequence.number for sequence in (*self._running, *self._waiting)]
        assert ages == sorted(set(ages)), "requests out of order"
        assert len(ages) == len(self._live) <= self.live_max
        assert len(self._running) <= self._running_max
        blocks = 0
        for sequence in self._running:
            assert sequence.row is not None, sequence
            assert sequence.computed < len(sequence.tokens) <= sequence.tokens_max, sequence
            need = max(sequence.computed, sequence.prefill_end)
            blocks += self.kv.blocks_for(need)
        assert blocks == self.kv.used, "blocks held do not match the tokens computed"
        for sequence in self._waiting:
            assert sequence.row is None, sequence
            assert sequence.computed == 0, sequence

    def _decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self._running):
            one_left = len(sequence.tokens) - sequence.computed == 1
            if sequence.row is not None and one_left and self._make_room(sequence):
                chunks.append(_next_chunk(sequence, 1))
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Grow by the next token, preempting the youngest; False if that was itself."""
        assert sequence.row is not None
        while not self.kv.grow(sequence.row, tokens=len(sequence.tokens)):
            victim = self._running.pop()
            self._release(victim)
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
        # One spare block for each running request: else the newcomer would soon be preempted.
        spare = self.kv.free - len(self._running)
        if self._running and self.kv.blocks_for(len(sequence.tokens)) > spare:
            return None
        sequence.row = self.kv.open()
        grown = self.kv.grow(sequence.row, tokens=len(sequence.tokens))
        assert grown, "a request alone must fit: add refuses the others"
        self._running.append(self._waiting.popleft())
        return sequence

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.kv.close(sequence.row)
        sequence.row = None


def _next_chunk(sequence: Sequence, budget: int) -> Chunk:
    count = min(budget, len(sequence.tokens) - sequence.computed)
    return Chunk(sequence, sequence.computed, count)
