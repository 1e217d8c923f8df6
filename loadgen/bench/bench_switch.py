"""``python -m loadgen.bench.bench_switch``: changes of shape under load, as JSON lines.

Real processes, the torch engine on CPU, 8 streams in a closed loop on a checkpoint of random
weights of at least 0.5 GB. Each change is made there and back, ``--rounds`` times, live; then once
by stop, reload from disk and start, on the same mesh. Told are requests lost, the pause of requests
that were taken over, the longest silence of any stream around the switch, bytes against the least
possible, and what the copies reached against a plain copy between two processes under the same
load. ``--part endurance``: 200 switches in a row on the tiny checkpoint, and what every process
holds before and after.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from time import monotonic
from typing import Self

import msgspec

from loadgen.bench.environment import Environment, environment
from loadgen.bench.plain_copy import plain_copy_bytes_per_s
from loadgen.bench.rig import Rig
from loadgen.bench.switching import Seen, Switching, plan_of
from loadgen.client import ClientOptions, Progress, closed_loop
from loadgen.results import OK, RequestResult
from loadgen.workload.records import TraceRecord
from services.worker.engine.torch_engine.make_model import make_model
from shared.mesh import EngineSpec, MeshConfig, NodeSpec, ReplicaWish
from shared.messages.plans import DeploymentPlan, SwitchReport
from shared.models import ModelSpec

STREAMS = 8
INPUT_TOKENS, OUTPUT_TOKENS = 96, 160
MODEL_ID = "bench"
SETTLE_S = 4.0  # of load between two switches
MODEL = "medium"
READY_TIMEOUT_S = 120.0
Shapes = Sequence[tuple[str, Sequence[str]]]
G0, G1, G2, G3 = (f"n0-g{i}" for i in range(4))
CASES: dict[str, tuple[Shapes, Shapes]] = {
    "2 x tp1 <-> tp2": ((("tp1", (G0,)), ("tp1", (G1,))), (("tp2", (G0, G1)),)),
    "tp2 <-> pp2": ((("tp2", (G0, G1)),), (("tp1pp2", (G0, G1)),)),
    "4 x tp1 <-> tp2 + 2 x tp1": (
        (("tp1", (G0,)), ("tp1", (G1,)), ("tp1", (G2,)), ("tp1", (G3,))),
        (("tp2", (G0, G1)), ("tp1", (G2,)), ("tp1", (G3,))),
    ),
}


class Switched(msgspec.Struct, frozen=True, kw_only=True):
    """One switch. ``silence_s``: the longest that any stream waited for its next token while the
    switch was under way, and ``usual_silence_s`` in as long a time before it."""

    way: str
    took_s: float
    pause_p50_s: float
    pause_p99_s: float
    silence_s: float
    usual_silence_s: float
    moved: int
    replayed: int
    bytes_moved: int
    bytes_bound: int
    bytes_in_place: int
    copy_bytes_per_s: float  # of the workers that fetched weights from others; 0: none did
    phase_s: dict[str, float]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    benchmark: str
    case: str
    model: str
    weight_bytes: int
    streams: int
    requests: int
    requests_lost: int
    live: tuple[Switched, ...]
    reload: tuple[Switched, ...]
    pause_p99_s: float  # the worst of the live switches
    silence_ratio: float  # median silence by reload over median silence live
    bytes_ratio: float  # moved over the bound, worst
    plain_copy_bytes_per_s: float  # between two processes, under the same load
    copy_ratio: float  # median of the live switches' over it; 0 where nothing moves
    environment: Environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("cases", "endurance"), default="cases")
    parser.add_argument("--rounds", type=int, default=3, help="there and back, live")
    parser.add_argument("--switches", type=int, default=200, help="of the endurance part")
    parser.add_argument("--model", default=MODEL, help="a size that make-model knows")
    parser.add_argument("--case", choices=tuple(CASES), help="only this one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oserve-switch-") as folder:
        if arguments.part == "endurance":
            from loadgen.bench.switch_endurance import endurance  # noqa: PLC0415  # its own part

            path = Path(folder) / "tiny"
            make_model(path, "tiny")
            _print(asyncio.run(endurance(path, switches=arguments.switches)))
            return 0
        path = Path(folder) / arguments.model
        make_model(path, arguments.model)
        lost = 0
        for case in [arguments.case] if arguments.case else CASES:
            measured = asyncio.run(_measure(case, path, rounds=arguments.rounds))
            lost += measured.requests_lost
            _print(measured)
    return min(lost, 1)


@dataclass(frozen=True, slots=True)
class Timed:
    """A switch, and when it began and was over, on the load's clock."""

    seen: Seen
    began_s: float
    over_s: float


class Load:
    """``STREAMS`` streams in a closed loop, for as long as the ``async with`` lasts."""

    def __init__(self, url: str) -> None:
        self._options = ClientOptions(url=url, model=MODEL_ID, timeout_s=300.0)
        self._progress = Progress()
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

    def silence_s(self, from_s: float, to_s: float) -> float:
        """The longest that a stream waited for its next token, of the waits that touch the span."""
        longest_s = 0.0
        for result in self.results:
            for before_s, after_s in pairwise(result.chunk_times_s):
                if after_s > from_s and before_s < to_s:
                    longest_s = max(longest_s, after_s - before_s)
        return longest_s

    async def _run(self) -> None:
        self.results = await closed_loop(
            self._records(), self._options, concurrency=STREAMS, progress=self._progress
        )

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


def same_ids(plan: DeploymentPlan, other: DeploymentPlan) -> DeploymentPlan:
    """``other`` with ids of ``plan``: two replicas of one id cannot stand side by side, so that the
    way there is by stop and start."""
    ids = [spec.replica_id for spec in plan.replicas]
    renamed = {
        spec.replica_id: replica_id for spec, replica_id in zip(other.replicas, ids, strict=False)
    }
    specs = tuple(
        msgspec.structs.replace(spec, replica_id=renamed.get(spec.replica_id, spec.replica_id))
        for spec in other.replicas
    )
    rows = {
        name: {renamed.get(replica_id, replica_id): share for replica_id, share in row.items()}
        for name, row in other.weights.items()
    }
    return DeploymentPlan(plan_id="", replicas=specs, weights=rows)


async def _measure(case: str, path: Path, *, rounds: int) -> Measured:
    here, there = CASES[case]
    gpus = sorted({gpu for _, named in here for gpu in named})
    first, second = plan_of(here, model_id=MODEL_ID), plan_of(there, model_id=MODEL_ID)
    mesh = topology(path, gpus=len(gpus))
    with Rig(mesh=mesh, pinned=False, ready_timeout_s=READY_TIMEOUT_S) as rig:
        async with Switching(rig.bus_url) as switching:
            await switching.to(first)
            async with Load(rig.url) as load:
                there_and_back = [plan for _ in range(rounds) for plan in (second, first)]
                live = [await _switched(switching, load, plan) for plan in there_and_back]
                plain = await asyncio.to_thread(plain_copy_bytes_per_s)
                reload = await _switched(switching, load, same_ids(first, second))
                await _switched(switching, load, first)
    switched = tuple(_told(timed, load) for timed in live)
    reloaded = (_told(reload, load),)
    rates = [one.copy_bytes_per_s for one in switched if one.copy_bytes_per_s]
    return Measured(
        benchmark="switch",
        case=case,
        model=path.name,
        weight_bytes=_weight_bytes(path),
        streams=STREAMS,
        requests=len(load.results),
        requests_lost=load.lost,
        live=switched,
        reload=reloaded,
        pause_p99_s=max(one.pause_p99_s for one in switched),
        silence_ratio=reloaded[0].silence_s / statistics.median(one.silence_s for one in switched),
        bytes_ratio=max(one.bytes_moved / max(1, one.bytes_bound) for one in switched),
        plain_copy_bytes_per_s=plain,
        copy_ratio=statistics.median(rates) / plain if rates else 0.0,
        environment=environment(),
    )


async def _switched(switching: Switching, load: Load, plan: DeploymentPlan) -> Timed:
    await asyncio.sleep(SETTLE_S)
    began_s = load.now_s
    seen = await switching.to(plan)
    return Timed(seen, began_s, load.now_s)


def _told(timed: Timed, load: Load) -> Switched:
    report = timed.seen.ended.report or SwitchReport()
    fetched = [
        (
            sum(
                n for source, n in one.bytes_by_source.items() if source not in ("", one.worker_id)
            ),
            one,
        )
        for one in timed.seen.prepared
    ]
    rates = [n / one.took_s for n, one in fetched if n and one.took_s]
    span_s = timed.over_s - timed.began_s
    return Switched(
        way=report.way,
        took_s=timed.seen.ended.took_s,
        pause_p50_s=report.pause_p50_s,
        pause_p99_s=report.pause_p99_s,
        silence_s=load.silence_s(timed.began_s, timed.over_s),
        usual_silence_s=load.silence_s(timed.began_s - min(span_s, SETTLE_S), timed.began_s),
        moved=report.moved,
        replayed=report.replayed,
        bytes_moved=sum(report.bytes_by_link.values()),
        bytes_bound=report.bytes_bound,
        bytes_in_place=report.bytes_in_place,
        copy_bytes_per_s=statistics.median(rates) if rates else 0.0,
        phase_s=report.phase_s,
    )


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _print(measured: msgspec.Struct) -> None:
    sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
