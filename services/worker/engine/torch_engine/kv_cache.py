"""Bookkeeping of the paged KV cache (Kwon et al., PagedAttention, 2023): who owns which block.

Knows no tensors. Each running request has a row in ``table`` that lists its blocks in order;
the table is one array so that a step gathers it without walking over requests.
"""

import numpy as np
import numpy.typing as npt

from shared.errors import Rejected


class BlockTable:
    """Which blocks each row has, in order: ``table`` [rows, blocks of the longest row]. ``blocks``:
    as many as there may ever be."""

    def __init__(self, *, blocks: int, block_tokens: int, rows: int, row_tokens_max: int) -> None:
        self.block_tokens = block_tokens
        # int64 is what torch indexes with; a narrower table would be converted every step.
        width = min(blocks, self.blocks_for(row_tokens_max))
        self.table: npt.NDArray[np.int64] = np.zeros((rows, width), dtype=np.int64)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


class KvBlocks(BlockTable):
    """A pool of equal blocks and the rows that own them: ``total`` now, ``total_full`` once it is
    extended."""

    def __init__(
        self,
        *,
        blocks: int,
        block_tokens: int,
        rows: int,
        row_tokens_max: int,
        blocks_full: int = 0,
    ) -> None:
        """``blocks`` to begin with; ``blocks_full`` where they may become more."""
        self.total, self.total_full = blocks, max(blocks, blocks_full)
        super().__init__(
            blocks=self.total_full,
            block_tokens=block_tokens,
            rows=rows,
            row_tokens_max=row_tokens_max,
        )
        self._counts = [0] * rows
        self._free = list(range(blocks - 1, -1, -1))
        self._free_rows = list(range(rows - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    @property
    def reach(self) -> int:
        """No block from this number on is in use."""
        owned = [self.table[row, :count].max() for row, count in enumerate(self._counts) if count]
        return int(max(owned, default=-1)) + 1

    def extend(self) -> None:
        """All that there may be are there from now on. Those that were are used first."""
        self._free = [*range(self.total_full - 1, self.total - 1, -1), *self._free]
        self.total = self.total_full

    def check_length(self, tokens_max: int) -> None:
        """Raises Rejected if a request of so many tokens never fits. One that does not fit before
        ``extend`` waits for it."""
        if not self.fits_ever(tokens_max):
            capacity = self.total_full * self.block_tokens
            detail = f"{tokens_max} tokens exceed the KV cache of {capacity} tokens"
            raise Rejected("too_long", detail)

    def fits_ever(self, tokens_max: int) -> bool:
        return tokens_max - 1 <= self.total_full * self.block_tokens  # the last is never computed

    def count(self, row: int) -> int:
        """How many blocks ``row`` has."""
        return self._counts[row]

    def blocks(self, row: int) -> list[int]:
        """They, in order."""
        return self.table[row, : self._counts[row]].tolist()

    def open(self) -> int:
        """A free row without blocks. The caller bounds how many are open."""
        return self._free_rows.pop()

    def grow(self, row: int, *, tokens: int) -> bool:
        """Make room for ``tokens`` in ``row``; False, and nothing changed, if blocks run out."""
        have, need = self._counts[row], self.blocks_for(tokens)
        if need - have > len(self._free):
            return False
        for index in range(have, need):
            self.table[row, index] = self._free.pop()
        self._counts[row] = max(have, need)
        return True

    def close(self, row: int) -> None:
        """Give back the row and its blocks."""
        assert row not in self._free_rows, f"row {row} closed twice"
        self._free.extend(self.table[row, : self._counts[row]].tolist())
        self._counts[row] = 0
        self._free_rows.append(row)

    def check(self) -> None:
        """Every block has exactly one owner: a row or the free list."""
        owned = [
            block
            for row, count in enumerate(self._counts)
            for block in self.table[row, :count].tolist()
        ]
        assert sorted(owned + self._free) == list(range(self.total)), "KV blocks leaked or shared"
        assert all(self._counts[row] == 0 for row in self._free_rows), "closed row owns blocks"
        assert len(set(self._free_rows)) == len(self._free_rows), "row freed twice"
