"""Many switches in a row under load, and what every process holds before and after."""

import asyncio
import os
from pathlib import Path

import msgspec

from loadgen.bench.environment import Environment, environment
from loadgen.bench.rig import Rig
from loadgen.bench.switch_load import MODEL_ID, READY_TIMEOUT_S, Load, topology
from loadgen.bench.switching import Switching, plan_of

WARM_SWITCHES = 20  # caches, allocators and connection pools have their size by then
SETTLE_S = 3.0  # without load, before anything is counted
G0, G1 = "n0-g0", "n0-g1"
ROUND = (
    (("tp1", (G0,)), ("tp1", (G1,))),
    (("tp2", (G0, G1)),),
    (("tp1pp2", (G0, G1)),),
    (("tp2", (G0, G1)),),
)


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """By one process: resident bytes, open descriptors, threads, child processes."""

    rss_bytes: int
    fds: int
    threads: int
    children: int


class Endured(msgspec.Struct, frozen=True, kw_only=True):
    benchmark: str
    switches: int
    live: int
    moved: int
    replayed: int
    requests: int
    requests_lost: int
    pause_p99_s: float  # the worst of all
    before: dict[str, Held]  # after the first WARM_SWITCHES
    after: dict[str, Held]
    environment: Environment


async def endurance(path: Path, *, switches: int) -> Endured:
    """Raises SwitchFailed if one of them does not come into force."""
    plans = [plan_of(shapes, model_id=MODEL_ID) for shapes in ROUND]
    with Rig(mesh=topology(path, gpus=2), pinned=False, ready_timeout_s=READY_TIMEOUT_S) as rig:
        async with Switching(rig.bus_url) as switching:
            await switching.to(plans[0])
            requests = lost = 0
            async with Load(rig.url) as load:
                reports = [
                    (await switching.to(plans[number % len(plans)])).ended.report
                    for number in range(1, WARM_SWITCHES + 1)
                ]
            requests, lost = len(load.results), load.lost
            await asyncio.sleep(SETTLE_S)
            before = {name: held(process.pid) for name, process in rig.processes.items()}
            async with Load(rig.url) as load:
                reports += [
                    (await switching.to(plans[number % len(plans)])).ended.report
                    for number in range(WARM_SWITCHES + 1, switches + 1)
                ]
            requests, lost = requests + len(load.results), lost + load.lost
            await asyncio.sleep(SETTLE_S)
            after = {name: held(process.pid) for name, process in rig.processes.items()}
    told = [report for report in reports if report is not None]
    return Endured(
        benchmark="switch_endurance",
        switches=len(reports),
        live=sum(report.way == "live" for report in told),
        moved=sum(report.moved for report in told),
        replayed=sum(report.replayed for report in told),
        requests=requests,
        requests_lost=lost,
        pause_p99_s=max((report.pause_p99_s for report in told), default=0.0),
        before=before,
        after=after,
        environment=environment(),
    )


def held(pid: int) -> Held:
    """As /proc says; raises FileNotFoundError when the process is gone."""
    folder = Path("/proc") / str(pid)
    pages = int((folder / "statm").read_text().split()[1])
    tasks = list((folder / "task").iterdir())
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    return Held(
        rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        fds=len(list((folder / "fd").iterdir())),
        threads=len(tasks),
        children=children,
    )
