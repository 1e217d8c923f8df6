"""What the leading rank tells the others of a step: a few integers for each request in it.

Followers have no batch scheduler. They keep a copy of the KV block table, of which a plan holds
what has changed, and build the same batch from it as the leader.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.torch_engine.batch_scheduler import Chunk
from services.worker.engine.torch_engine.kv_cache import BlockTable, KvBlocks

Ints = npt.NDArray[np.int64]
_WIRE = np.dtype("<i4")
_HEADER = 3  # chunks, tokens, blocks
_CHUNK_FIELDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Chunks of a step, an entry each: ``counts`` tokens of the request in row ``rows`` of the
    block table, from position ``starts``; ``samples`` is 1 where its next token is wanted. Their
    ``tokens`` lie one after another."""

    rows: Ints
    starts: Ints
    counts: Ints
    samples: Ints
    tokens: Ints


class PlanWriter:
    """The leader's side. Remembers which blocks of each row it has told."""

    def __init__(self, kv: KvBlocks) -> None:
        self._kv = kv
        self._told = [(0, 0)] * len(kv.table)  # admission, blocks

    def plan(self, chunks: list[Chunk]) -> StepPlan:
        tokens: list[int] = []
        for chunk in chunks:
            tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        rows = [chunk.row for chunk in chunks]
        return StepPlan(
            rows=np.array(rows, dtype=np.int64),
            starts=np.array([chunk.start for chunk in chunks], dtype=np.int64),
            counts=np.array([chunk.count for chunk in chunks], dtype=np.int64),
            samples=np.array([chunk.samples for chunk in chunks], dtype=np.int64),
            tokens=np.array(tokens, dtype=np.int64),
        )

    def encode(self, plan: StepPlan, chunks: list[Chunk]) -> bytes:
        """The plan of ``chunks`` for a PlanReader that has read all before it."""
        firsts: list[int] = []
        numbers: list[int] = []
        blocks: list[int] = []
        for chunk in chunks:
            row, admission = chunk.row, chunk.sequence.admission
            told_admission, told = self._told[row]
            first = told if told_admission == admission else 0
            count = self._kv.count(row)
            self._told[row] = admission, count
            firsts.append(first)
            numbers.append(count - first)
            if count > first:
                blocks += self._kv.table[row, first:count].tolist()
        header = np.array([len(chunks), len(plan.tokens), len(blocks)])
        parts = (
            header, plan.rows, plan.starts, plan.counts, plan.samples,
            np.array(firsts), np.array(numbers), plan.tokens, np.array(blocks, dtype=np.int64),
        )  # fmt: skip
        return np.concatenate(parts).astype(_WIRE).tobytes()


class PlanReader:
    """A follower's side: turns bytes into plans and keeps ``table`` as the leader's."""

    def __init__(self, table: BlockTable) -> None:
        self.table = table

    def decode(self, data: bytes) -> StepPlan:
        whole: Ints = np.frombuffer(data, dtype=_WIRE).astype(np.int64)
        chunks, tokens, blocks = whole[:_HEADER].tolist()
        assert len(whole) == _HEADER + _CHUNK_FIELDS * chunks + tokens + blocks, len(data)
        fields = whole[_HEADER : _HEADER + _CHUNK_FIELDS * chunks].reshape(_CHUNK_FIELDS, chunks)
        rest = whole[_HEADER + _CHUNK_FIELDS * chunks :]
        rows, starts, counts, samples, firsts, numbers = fields
        told = rest[tokens:]
        at = 0
        for row, first, number in zip(
            rows.tolist(), firsts.tolist(), numbers.tolist(), strict=True
        ):
            if number:
                self.table.table[row, first : first + number] = told[at : at + number]
                at += number
        return StepPlan(
            rows=rows, starts=starts, counts=counts, samples=samples, tokens=rest[:tokens]
        )


def plan_bytes_max(table: BlockTable, *, batch_tokens_max: int) -> int:
    """No plan is longer: at most each row has a chunk, which tells all its blocks."""
    rows, width = table.table.shape
    return _WIRE.itemsize * (_HEADER + rows * (_CHUNK_FIELDS + width) + batch_tokens_max)
