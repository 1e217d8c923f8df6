"""Counts the blocks of a paged KV cache (Kwon et al., PagedAttention, 2023) without a loop.

A decoding sequence holds ``offset + step`` tokens after engine step ``step``, so it needs a new
block in the steps that find ``offset + step`` at a multiple of the block size: always the same ones
modulo that size. Counting sequences by that remainder tells how many blocks any step needs, and
hence how many steps the free ones last, whatever the number of sequences.
"""

from services.worker.engine.prefix_cache import PrefixCache


class KvBlocks:
    """``used`` of ``total`` blocks belong to sequences; shared ones count once."""

    __slots__ = ("_due", "block_tokens", "cache", "total", "used")

    def __init__(self, total: int, *, block_tokens: int) -> None:
        self.total = total
        self.block_tokens = block_tokens
        self.used = 0
        self.cache = PrefixCache()
        self._due = [0] * block_tokens  # decoding sequences, by when they need a new block

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    @property
    def free(self) -> int:
        """Idle cached blocks included."""
        return self.total - self.used

    def take(self, blocks: int) -> None:
        self.used += blocks
        assert self.used <= self.total, "more KV blocks in use than there are"
        if self.cache.idle_blocks:
            self.cache.shrink(self.total - self.used)

    def give(self, blocks: int) -> None:
        self.used -= blocks
        assert self.used >= 0, "more KV blocks given back than were taken"

    def join(self, offset: int) -> None:
        """A sequence decodes from now on."""
        self._due[-offset % self.block_tokens] += 1

    def part(self, offset: int) -> None:
        """It does so no more."""
        self._due[-offset % self.block_tokens] -= 1

    def due(self, step: int) -> int:
        """Blocks that the step after ``step`` needs."""
        return self._due[step % self.block_tokens]

    def growth(self, step: int, steps: int, batch: int) -> int:
        """Blocks that ``steps`` steps of ``batch`` decoding sequences need, ``step`` being done."""
        size = self.block_tokens
        rounds, rest = divmod(steps, size)
        blocks = rounds * batch  # in ``size`` steps each sequence needs exactly one
        if rest:
            at = step % size
            blocks += sum(self._due[at : at + rest])
            if at + rest > size:
                blocks += sum(self._due[: at + rest - size])
        return blocks

    def steps_that_fit(self, step: int, steps: int, batch: int) -> int:
        """How many of ``steps`` steps of ``batch`` decoding sequences find the blocks they need."""
        size, free = self.block_tokens, self.total - self.used
        if batch * (steps // size + 1) <= free:
            return steps
        rounds, left = divmod(free, batch)
        fit = rounds * size
        for at in range(step, step + size):  # left < batch: one more round would not fit
            left -= self._due[at % size]
            if left < 0:
                break
            fit += 1
        return min(fit, steps)

    def check(self, offsets: list[int]) -> None:
        """``offsets`` of the sequences that decode."""
        due = [0] * self.block_tokens
        for offset in offsets:
            due[-offset % self.block_tokens] += 1
        assert due == self._due, "growth of the KV cache is miscounted"
        assert 0 <= self.used <= self.total, "more KV blocks in use than there are"
        assert 0 <= self.cache.idle_blocks <= self.total - self.used, "cached blocks beyond memory"
