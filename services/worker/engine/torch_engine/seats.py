"""Gives requests their rows and blocks of the KV cache, and takes them back."""

from collections.abc import Iterable

from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.engine.torch_engine.sequences import Sequence


class Seats:
    """What of ``kv`` which request has."""

    def __init__(self, kv: KvBlocks) -> None:
        self._kv = kv
        self._admissions = 0

    def blocks(self, sequences: Iterable[Sequence]) -> int:
        """How many they have."""
        return sum(self._kv.count(one.row) for one in sequences if one.row is not None)

    def lacking(self, sequence: Sequence, spare: int) -> int:
        """Blocks for its tokens that it does not have and that are not free, where ``spare`` ones
        are to stay free."""
        needed = self._kv.blocks_for(len(sequence.tokens))
        if sequence.row is not None:
            needed -= self._kv.count(sequence.row)
        return needed - max(0, self._kv.free - spare)

    def reserve(self, sequence: Sequence, spare: int) -> bool:
        """Blocks for all its tokens, and a row if it has none; False, and nothing changed, if
        there are too few."""
        no_row = sequence.row is None and not self._kv.free_rows
        if no_row or self.lacking(sequence, spare) > 0:
            return False
        if sequence.row is None:
            sequence.row = self._kv.open()
            self._admissions += 1
            sequence.admission = self._admissions
        grown = self._kv.grow(sequence.row, tokens=len(sequence.tokens))
        assert grown, sequence
        return True

    def release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._kv.close(sequence.row)
        sequence.row = None
