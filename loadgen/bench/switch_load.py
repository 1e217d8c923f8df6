"""Streams in a closed loop against a mesh of torch workers, while its shape changes."""

import asyncio
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from time import monotonic
from typing import Self

from loadgen.client import ClientOptions, closed_loop
from loadgen.results import OK, RequestResult
from loadgen.workload.records import TraceRecord
from shared.mesh import EngineSpec, MeshConfig, NodeSpec, ReplicaWish
from shared.models import ModelSpec

MODEL_ID = "bench"
STREAMS = 8
INPUT_TOKENS, OUTPUT_TOKENS = 96, 160
READY_TIMEOUT_S = 120.0


class Load:
    """``STREAMS`` streams in a closed loop, for as long as the ``async with`` lasts."""

    def __init__(self, url: str) -> None:
        self._options = ClientOptions(url=url, model=MODEL_ID, timeout_s=300.0)
        self.results: list[RequestResult] = []
        self._over = False

    async def __aenter__(self) -> Self:
        self._origin_s = monotonic()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await self._task

    @property
    def now_s(self) -> float:
        return monotonic() - self._origin_s

    @property
    def lost(self) -> int:
        return sum(result.error_code != OK for result in self.results)

    def wait_s(self, from_s: float, to_s: float) -> float:
        """The longest that any request waited for its next token, the first one included, of the
        waits that touch the span."""
        longest_s = 0.0
        for result in self.results:
            for before_s, after_s in pairwise((result.sent_s or 0.0, *result.chunk_times_s)):
                if after_s > from_s and before_s < to_s:
                    longest_s = max(longest_s, after_s - before_s)
        return longest_s

    def outage_s(self, from_s: float, to_s: float) -> float:
        """The longest time in which no request at all got a token, of those that touch the span."""
        times_s = sorted(at for result in self.results for at in result.chunk_times_s)
        spans = ((one, two) for one, two in pairwise(times_s) if two > from_s and one < to_s)
        return max((two - one for one, two in spans), default=0.0)

    async def _run(self) -> None:
        self.results = await closed_loop(self._records(), self._options, concurrency=STREAMS)

    def _records(self) -> Iterator[TraceRecord]:
        for number in count():
            if self._over:
                return
            yield TraceRecord(
                timestamp_s=0.0,
                input_tokens=INPUT_TOKENS,
                output_tokens=OUTPUT_TOKENS,
                hash_ids=(number,),
            )


def topology(path: Path, *, gpus: int) -> MeshConfig:
    """``gpus`` CPU devices of one node, a replica on each to begin with."""
    return MeshConfig(
        name="switch",
        model=ModelSpec(model_id=MODEL_ID, path=str(path), context_tokens_max=1024),
        engine=EngineSpec(
            kind="torch",
            torch={
                "dtype": "float32",
                "threads": 1,
                "kv_memory_bytes": 256 << 20,
                "running_max": 16,
            },
        ),
        nodes=(NodeSpec(node_id="n0", gpus=gpus),),
        replicas=tuple(ReplicaWish(replica_id=f"r{i}") for i in range(gpus)),
    )
