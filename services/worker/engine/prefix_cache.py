"""Which computed prompt blocks are shared, and which are kept in case somebody asks again.

As in vLLM (``vllm/v1/core/block_pool.py``): a block is found by the hash of all tokens up to its
end; while a sequence refers to it, it is counted once, however many share it; afterwards it stays
until its place is needed, the least recently used going first, and of one prompt the end before
the beginning. A ``CachedBlocks`` stands for the KV blocks that one hash covers: one, where hashes
are of single blocks, more for traces that hash longer pieces, and none where a piece ends no block.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class CachedBlocks:
    """What one hash finds. ``refs`` sequences refer to it."""

    __slots__ = ("blocks", "hash", "refs")

    def __init__(self, hash_: int, blocks: int) -> None:
        self.hash = hash_
        self.blocks = blocks
        self.refs = 1


class PrefixCache:
    """``idle_blocks`` are those nobody refers to: they count as free, and leave when needed."""

    __slots__ = ("_found", "_idle", "idle_blocks")

    def __init__(self) -> None:
        self._found: dict[int, CachedBlocks] = {}
        self._idle: OrderedDict[int, CachedBlocks] = OrderedDict()  # least recently used first
        self.idle_blocks = 0

    def __len__(self) -> int:
        return len(self._found)

    def match(self, hashes: Sequence[int]) -> list[CachedBlocks]:
        """The longest run of hashes from the start that are here."""
        matched: list[CachedBlocks] = []
        found = self._found
        for hash_ in hashes:
            cached = found.get(hash_)
            if cached is None:
                break
            matched.append(cached)
        return matched

    def refer(self, matched: Iterable[CachedBlocks]) -> int:
        """One more sequence uses these; the number of blocks that were idle until now."""
        woken = 0
        for cached in matched:
            if not cached.refs:
                del self._idle[cached.hash]
                woken += cached.blocks
            cached.refs += 1
        self.idle_blocks -= woken
        return woken

    def publish(
        self, hashes: Sequence[int], held: list[CachedBlocks], *, upto: int, ends: Sequence[int]
    ) -> int:
        """Make a sequence's own blocks findable, from where ``held`` ends to its ``upto``th hash,
        with that sequence as their first user; ``ends[i]`` of its blocks lie before its hash
        ``i``. Stops at a hash that finds others already: the rest stay its own. The number of
        blocks published."""
        found = self._found
        first = len(held)
        for i in range(first, upto):
            hash_ = hashes[i]
            if hash_ in found:
                break
            cached = found[hash_] = CachedBlocks(hash_, ends[i + 1] - ends[i])
            held.append(cached)
        return ends[len(held)] - ends[first]

    def leave(self, held: Sequence[CachedBlocks]) -> int:
        """One sequence less uses these; the number of blocks that are idle now."""
        slept = 0
        for cached in reversed(held):
            cached.refs -= 1
            if not cached.refs:
                self._idle[cached.hash] = cached
                slept += cached.blocks
        self.idle_blocks += slept
        return slept

    def shrink(self, room: int) -> None:
        """Forget idle blocks, least recently used first, until at most ``room`` are left."""
        while self.idle_blocks > room:
            hash_, cached = self._idle.popitem(last=False)
            del self._found[hash_]
            self.idle_blocks -= cached.blocks

    def check(self, refs: dict[int, int]) -> None:
        """Assert that each hash has the users that ``refs`` counts by hash, and idle ones none."""
        assert refs == {h: c.refs for h, c in self._found.items() if c.refs}, "lost references"
        idle = {h for h, c in self._found.items() if not c.refs}
        assert idle == set(self._idle), "an idle block is in use, or lost"
        assert self.idle_blocks == sum(c.blocks for c in self._idle.values())
