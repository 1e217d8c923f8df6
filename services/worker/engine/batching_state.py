"""The requests of one replica and what they hold, by numbers alone; batching.py decides on it.

No operation here looks at every sequence: those that decode are counted. Their tokens follow from
one step counter, their block needs from remainders (kv_blocks.py), their ends from a heap.
"""

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from heapq import heapify, heappush

from services.worker.engine.batching_types import (
    DECODE,
    ENDED,
    HELD,
    PREFILL,
    WAITING,
    Plan,
    Progress,
    Sequence,
)  # fmt: skip
from services.worker.engine.interface import EngineLoad
from services.worker.engine.kv_blocks import KvBlocks
from shared.cost.limits import EngineLimits
from shared.errors import ConfigInvalid, Rejected

_STALE_ENDS = 64  # places in the heap of ends that may be out of date, beyond as many as are valid


class BatchState:
    """``sequences`` are the live requests by key, ``running`` those that hold KV blocks, oldest
    first, all of them older than those ``waiting``. Counters (``*_total``) only grow."""

    def __init__(
        self, limits: EngineLimits, *, kv_blocks: int, kv_blocks_full: int, prefix_caching: bool
    ) -> None:
        """``kv_blocks`` to begin with, ``kv_blocks_full`` (at least as many) after ``grow``."""
        assert limits.batch_tokens_max >= limits.running_max, "every running request may decode"
        self.limits = limits
        self.kv = KvBlocks(kv_blocks, block_tokens=limits.block_tokens)
        self.sequences: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.decoding = 0  # of those running, how many decode
        self.context: int = 0  # tokens in the cache of those that decode
        self.steps_total: int = 0
        self.output_tokens_total: int = 0
        self.preemptions = 0
        self.prefill_tokens_total: int = 0  # computed; those found in the prefix cache are hits
        self.hit_tokens_total: int = 0
        self._caching = prefix_caching
        self.blocks_full = max(kv_blocks, kv_blocks_full)
        self._live_max = limits.running_max + limits.waiting_max
        self.partials: list[Sequence] = []  # their prefill has begun: always the youngest
        self.held: dict[str, Sequence] = {}
        self.entering: dict[str, Sequence] = {}
        self.taken_total = 0  # let go on after they had been held
        self.ends: list[tuple[int, int, Sequence]] = []  # heap: step, serial, sequence
        self._plan: Plan | None = None
        self._arrivals = self._serials = 0
        self._admissions: int = 0
        self._pending: int = 0  # tokens to prefill and to make

    def computed(self, sequence: Sequence) -> int:
        """How many of its tokens are in the KV cache, by the steps performed so far."""
        if sequence.phase == DECODE:
            return sequence.offset + self.steps_total
        return sequence.computed

    def check_length(self, tokens_max: int) -> None:
        """Raises Rejected if a request of so many tokens never fits. One that does not fit yet
        waits for the KV cache to grow."""
        capacity = self.blocks_full * self.limits.block_tokens
        if tokens_max - 1 > capacity:  # the last is never computed
            detail = f"{tokens_max} tokens exceed the KV cache of {capacity} tokens"
            raise Rejected("too_long", detail)

    def grow(self) -> None:
        """Give the KV cache its full size; a plan under way stays as it is."""
        self.kv.total = self.blocks_full

    @property
    def stuck(self) -> bool:
        """Nobody runs, and who waits first has to wait until the KV cache grows."""
        if self.running or self.entering or not self.waiting or self.kv.total >= self.blocks_full:
            return False
        first = next(iter(self.waiting.values()))
        return self.kv.blocks_of(first.known) > self.kv.total

    def made(self, sequence: Sequence) -> int:
        """How many output tokens it has, those of earlier attempts included."""
        if sequence.phase == DECODE:
            return sequence.offset + self.steps_total + 1 - sequence.prompt_tokens
        return sequence.known - sequence.prompt_tokens

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self.running),
            waiting=len(self.waiting) + len(self.entering),
            tokens_pending=self._pending,
            kv_blocks_used=self.kv.used,
            kv_blocks_total=self.kv.total,
        )

    def check(self) -> None:
        """Assert that what is counted is what counting anew finds. O(sequences)."""
        limits, running = self.limits, list(self.running.values())
        ages = [sequence.number for sequence in (*running, *self.waiting.values())]
        assert ages == sorted(set(ages)), "requests out of order"
        assert len(ages) == len(self.sequences) <= self._live_max + self.taken_total
        assert len(running) <= limits.running_max
        decoding = [sequence for sequence in running if sequence.phase == DECODE]
        assert len(decoding) == self.decoding
        assert self.context == sum(map(self.computed, decoding)), "context is miscounted"
        pending = sum(
            sequence.tokens_max - self.computed(sequence) - (sequence.phase == DECODE)
            for sequence in self.sequences.values()
        )
        assert pending == self._pending, "pending tokens are miscounted"
        for sequence in running:
            assert sequence.phase in (PREFILL, DECODE), sequence.key
            assert 0 <= self.computed(sequence) < sequence.tokens_max - 1, sequence.key
            assert sequence.phase == DECODE or sequence.computed < sequence.known, sequence.key
        for sequence in self.waiting.values():
            assert sequence.phase == WAITING, sequence.key
            assert sequence.computed == sequence.shared == len(sequence.held) == 0, sequence.key
        count = len(self.partials)
        assert self.partials == running[len(running) - count :], "prefills out of order"
        standing = self._standing()
        assert all(sequence.phase == HELD for sequence in standing)
        assert not self.sequences.keys() & {sequence.key for sequence in standing}
        ends = [end for end in self.ends if end[2].serial == end[1]]
        assert sorted(end[2].number for end in ends) == [s.number for s in decoding], "ends lost"
        self._check_blocks(running, decoding)

    def _check_blocks(self, running: list[Sequence], decoding: list[Sequence]) -> None:
        kv, refs = self.kv, dict[int, int]()
        private, shared = 0, dict[int, int]()
        for sequence in running:
            blocks = kv.blocks_of(self._reserved(sequence))
            assert sequence.shared == sum(cached.blocks for cached in sequence.held) <= blocks
            private += blocks - sequence.shared
            for cached in sequence.held:
                refs[cached.hash] = refs.get(cached.hash, 0) + 1
                shared[cached.hash] = cached.blocks
        private += sum(
            kv.blocks_of(self._reserved(sequence))
            for sequence in self._standing()
            if sequence.computed
        )
        assert kv.used == private + sum(shared.values()), "KV blocks leaked"
        kv.check([sequence.offset for sequence in decoding])
        kv.cache.check(refs)

    def _set_hashes(self, sequence: Sequence, hashes: SequenceOf[int], hash_tokens: int) -> None:
        """Those of whole pieces of the tokens known now."""
        hash_tokens = hash_tokens or self.kv.block_tokens
        if hash_tokens < self.kv.block_tokens:
            raise ConfigInvalid(
                field="hash_tokens",
                value=hash_tokens,
                remedy=f"hash at least one KV block of {self.kv.block_tokens} tokens at a time",
            )
        sequence.hashes = hashes[: sequence.known // hash_tokens]
        sequence.hash_tokens = hash_tokens

    def _publish(self, sequence: Sequence, computed: int) -> None:
        """Let others find the blocks of its first ``computed`` tokens. As in vLLM this is when
        their step is planned: who shares them can be computed in that same step."""
        hashes, piece = sequence.hashes, sequence.hash_tokens
        upto = min(len(hashes), computed // piece)
        if upto > len(sequence.held):
            size = self.kv.block_tokens
            ends = (
                range(upto + 1) if piece == size else [i * piece // size for i in range(upto + 1)]
            )
            sequence.shared += self.kv.cache.publish(hashes, sequence.held, upto=upto, ends=ends)

    def _join(self, sequence: Sequence, progress: Progress) -> None:
        """Its prefill is done, and has made a token: it decodes from now on, or has ended."""
        if sequence in self.partials:
            self.partials.remove(sequence)
        if sequence.started:
            progress.resumed.append(sequence)
        else:
            sequence.started = True
            progress.first.append(sequence)
        self.output_tokens_total += 1
        self._pending -= 1
        self._decode(sequence)
        if sequence.known + 1 == sequence.tokens_max:
            progress.ended.append(sequence)
            self._finish_running(sequence)

    def _decode(self, sequence: Sequence) -> None:
        """All it knows but one token is computed: it decodes from the next step on."""
        sequence.phase = DECODE
        sequence.offset = sequence.computed - self.steps_total
        self.kv.join(sequence.offset)
        self.decoding += 1
        self.context += sequence.computed
        self._serials += 1
        sequence.serial = self._serials
        if len(self.ends) > 2 * self.decoding + _STALE_ENDS:
            self.ends = [end for end in self.ends if end[2].serial == end[1]]
            heapify(self.ends)
        end_step = sequence.tokens_max - 1 - sequence.offset
        heappush(self.ends, (end_step, sequence.serial, sequence))

    def _preempt(self) -> Sequence:
        """Take the youngest running request's blocks; it keeps its tokens."""
        key, sequence = self.running.popitem()
        self._release(sequence)
        self._pending += sequence.computed + (sequence.phase == DECODE)
        sequence.phase = WAITING
        sequence.computed = 0
        self.waiting[key] = sequence
        self.waiting.move_to_end(key, last=False)
        self.preemptions += 1
        return sequence

    def _finish_running(self, sequence: Sequence) -> None:
        del self.running[sequence.key]
        self._release(sequence)
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._pending -= sequence.tokens_max - sequence.computed - (sequence.phase == DECODE)
        del self.sequences[sequence.key]
        sequence.phase = ENDED

    def _release(self, sequence: Sequence) -> None:
        """It decodes no more, and holds no blocks."""
        blocks = self.kv.blocks_of(self._reserved(sequence)) - sequence.shared
        if sequence.phase == DECODE:
            sequence.computed = computed = sequence.offset + self.steps_total
            sequence.known = computed + 1
            sequence.serial = -1
            self.kv.part(sequence.offset)
            self.decoding -= 1
            self.context -= computed
        elif sequence in self.partials:
            self.partials.remove(sequence)
        if sequence.held:
            blocks += self.kv.cache.leave(sequence.held)
            sequence.held, sequence.shared = [], 0
        self.kv.give(blocks)

    def _reserved(self, sequence: Sequence) -> int:
        """Tokens that a running sequence has KV blocks for: a prompt is reserved as a whole."""
        if sequence.phase == DECODE:
            return sequence.offset + self.steps_total
        if sequence.phase == HELD and self._decodes_next(sequence):
            return sequence.computed
        return sequence.known

    def _decodes_next(self, sequence: Sequence) -> bool:
        """Of one that is held: whether it has made a token, and all but that is computed."""
        return sequence.started and sequence.computed == sequence.known - 1

    def _standing(self) -> list[Sequence]:
        """Those that are held or about to join."""
        return [*self.held.values(), *self.entering.values()]
