"""``python -m loadgen.bench.bench_switch``: changes of shape under load, as JSON lines.

Real processes, the torch engine on CPU, 8 streams in a closed loop on a checkpoint of random
weights of at least 0.5 GB. Each change is made there and back, ``--rounds`` times, live; then once
by draining, stopping and loading from disk, and last the workers are killed and started anew, as
where nothing can be moved. Told are requests lost, the pause of requests that were taken over, how
long nobody got a token, bytes against the least possible, and what the copies reached against a
plain copy between two processes under the same load. ``--part endurance``: 200 switches in a row on
the tiny checkpoint, and what every process holds before and after.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen.bench.environment import Environment, environment
from loadgen.bench.plain_copy import plain_copy_bytes_per_s
from loadgen.bench.rig import Rig
from loadgen.bench.switch_endurance import endurance
from loadgen.bench.switch_load import MODEL_ID, READY_TIMEOUT_S, STREAMS, Load, topology
from loadgen.bench.switching import Seen, Switching, plan_of
from services.worker.engine.torch_engine.make_model import make_model
from shared.messages.plans import DeploymentPlan, SwitchReport

SETTLE_S = 4.0  # of load between two switches
RESTART_S = 25.0  # within which killed workers serve again
MODEL = "medium"
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
    """One switch. ``outage_s``: the longest time without a token for anyone while it was under
    way, ``wait_s``: the longest that any request waited for its next token (or first one), and
    ``usual_wait_s`` the same in as long a time before it."""

    way: str
    took_s: float
    pause_p50_s: float
    pause_p99_s: float
    outage_s: float
    wait_s: float
    usual_wait_s: float
    moved: int
    replayed: int
    bytes_moved: int
    bytes_bound: int
    bytes_in_place: int
    copy_bytes_per_s: float  # of the workers that fetched weights from others; 0: none did
    phase_s: dict[str, float]


class Restarted(msgspec.Struct, frozen=True, kw_only=True):
    """Stop, load from disk, start, as without any way to move what runs: all workers killed and
    started anew under the same load. Requests are replayed by the ingress."""

    outage_s: float
    wait_s: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    benchmark: str
    case: str
    model: str
    weight_bytes: int
    streams: int
    requests: int
    requests_lost: int
    live: tuple[Switched, ...]
    reload: Switched
    restart: Restarted
    pause_p99_s: float  # the worst of the live switches
    outage_ratio: float  # of the restart's over the live switches' median
    outage_ratio_reload: float  # the same for the reload, which drains first
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
                await asyncio.sleep(SETTLE_S)
                killed_s = load.now_s
                await asyncio.to_thread(rig.restart, [f"worker-{gpu}" for gpu in gpus])
                await asyncio.sleep(RESTART_S)
    switched = [_told(timed, load) for timed in live]
    reloaded = _told(reload, load)
    over_s = killed_s + RESTART_S
    restarted = Restarted(
        outage_s=load.outage_s(killed_s, over_s), wait_s=load.wait_s(killed_s, over_s)
    )
    rates = [one.copy_bytes_per_s for one in switched if one.copy_bytes_per_s]
    outage_s = statistics.median(one.outage_s for one in switched)
    return Measured(
        benchmark="switch",
        case=case,
        model=path.name,
        weight_bytes=_weight_bytes(path),
        streams=STREAMS,
        requests=len(load.results),
        requests_lost=load.lost,
        live=tuple(switched),
        reload=reloaded,
        restart=restarted,
        pause_p99_s=max(one.pause_p99_s for one in switched),
        outage_ratio=restarted.outage_s / outage_s,
        outage_ratio_reload=reloaded.outage_s / outage_s,
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
    began_s, over_s = timed.began_s, timed.over_s
    return Switched(
        way=report.way,
        took_s=timed.seen.ended.took_s,
        pause_p50_s=report.pause_p50_s,
        pause_p99_s=report.pause_p99_s,
        outage_s=load.outage_s(began_s, over_s),
        wait_s=load.wait_s(began_s, over_s),
        usual_wait_s=load.wait_s(began_s - min(over_s - began_s, SETTLE_S), began_s),
        moved=report.moved,
        replayed=report.replayed,
        bytes_moved=sum(report.bytes_by_link.values()),
        bytes_bound=report.bytes_bound,
        bytes_in_place=report.bytes_in_place,
        copy_bytes_per_s=_copy_bytes_per_s(timed.seen),
        phase_s=report.phase_s,
    )


def _copy_bytes_per_s(seen: Seen) -> float:
    """The median over the workers that fetched weights from others; 0 if none did."""
    rates: list[float] = []
    for one in seen.prepared:
        own = ("", one.worker_id)
        fetched = sum(n for source, n in one.bytes_by_source.items() if source not in own)
        if fetched and one.took_s:
            rates.append(sum(one.bytes_by_source.values()) / one.took_s)
    return statistics.median(rates) if rates else 0.0


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _print(measured: msgspec.Struct) -> None:
    sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
