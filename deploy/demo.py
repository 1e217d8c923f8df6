"""``make demo``: a mesh, two minutes of a real trace, two changes of shape, and a killed worker.

While the trace runs, two single-GPU replicas become one of two GPUs, then two again, as
``oserve switch`` does it; later a worker is killed. Ends with 0 only if every request completed and
both switches were live. The load is fitted to the machine: first a batch of the trace's requests
all at once tells how many per second the mesh can finish, then the trace is replayed at a third of
that rate, so that its bursts, and the loss of one of two replicas, hurt but are bearable.
"""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console

from deploy.local import LocalMesh
from deploy.status import LISTEN_S
from deploy.switch import plan_for, switch_to
from deploy.switch_view import in_short
from deploy.switch_watch import SwitchOutcome
from loadgen.client import Progress
from loadgen.replay import write_outputs
from loadgen.report import Mark, Report
from loadgen.report_table import report_tables
from loadgen.run import GENERATOR, ReplayOptions, load_arrivals, replay_arrivals
from loadgen.workload.arrivals import Selection
from loadgen.workload.records import TraceRecord
from shared.bus import NatsBus
from shared.errors import OServeError

TOPOLOGY = Path(__file__).with_name("topologies") / "laptop.toml"
OUTPUTS = Path(".oserve/demo")
TRACE = "azure2023_code_conv.csv.gz"
TRACES = "../shared/traces"  # where the project's traces lie beside a checkout
TRACE_START_S = 600.0
LENGTH_SCALE = 1 / 8  # the trace is of large models: a tiny one on a CPU gets smaller prompts
INPUT_TOKENS_MAX = 3000  # with the output, within the model's context
OUTPUT_TOKENS_MAX = 256
CALIBRATION_REQUESTS = 96
UTILISATION = 0.3  # on average: the trace has bursts of three times its mean
RATE_SCALE_MAX = 8.0  # beyond, two minutes would show the load generator rather than the mesh
PROGRESS_S = 10.0
VICTIM = "worker-n0-g0"
SWITCHES = (("tp2*1", 0.25), ("tp1*2", 0.5))  # to what, after which part of the trace
KILL_AT = 0.75  # of the trace: by then both GPUs have a replica of their own again
SWITCH_TIMEOUT_S = 60.0
BUSY = 3  # requests in flight, at least, when a switch is asked for: the trace comes in bursts
BUSY_POLL_S = 0.01
BUSY_PART = 0.1  # of the trace: for so long that is waited for

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__)
    parser.add_argument("--duration", type=float, default=120.0, help="seconds of the trace")
    parser.add_argument("--out", type=Path, default=OUTPUTS, help="folder of report and picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        completed = asyncio.run(_demo(arguments.duration, arguments.out))
    except OServeError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if completed else 1)


async def _demo(duration_s: float, out: Path) -> bool:
    say("starting the mesh: broker, 2 torch workers, 2 routers, ingress, and the control plane")
    overrides = [f"up.data_dir={out / 'mesh'}"]
    async with LocalMesh(TOPOLOGY, overrides=overrides, port=0, say=say) as mesh:
        say(f"ready at {mesh.url}; logs in {mesh.log_dir}")
        options = _options(mesh.url, duration_s)
        capacity_rps = await _capacity_rps(options)
        arrivals, scale = _fitted(options, capacity_rps, duration_s)
        say(
            f"the mesh finishes {capacity_rps:.1f} requests/s of this trace when pressed; "
            f"replaying {len(arrivals)} requests in {duration_s:g} s (rate x {scale:.2f})"
        )
        started_s = time.time()
        report, story = await _replay(mesh, options, arrivals, duration_s)
        retried = _retried(mesh.log_dir / "ingress-0.log", since_s=started_s)
    console.print(report_tables(report))
    for path in write_outputs(report, report=out / "report.json", picture=out / "report.png"):
        say(f"written: {path}")
    return _verdict(report, story, retried)


class Story(msgspec.Struct):
    """What was done to the mesh while the trace ran."""

    marks: list[Mark] = msgspec.field(default_factory=list[Mark])
    switches: list[SwitchOutcome] = msgspec.field(default_factory=list[SwitchOutcome])


def _verdict(report: Report, story: Story, retried: int) -> bool:
    """Say how it went; whether all of it went well."""
    for outcome in story.switches:
        say(in_short(outcome))
    live = [outcome for outcome in story.switches if outcome.succeeded and outcome.way == "live"]
    told = [outcome.report for outcome in live if outcome.report is not None]
    say(
        f"{len(live)} of {len(SWITCHES)} switches were live: {sum(t.moved for t in told)} requests "
        f"moved live, {sum(t.replayed for t in told)} replayed"
    )
    verdict = "every" if report.all_completed else "not every"
    say(f"{verdict} request completed; {retried} took another attempt, {VICTIM} having been killed")
    return report.all_completed and len(live) == len(SWITCHES)


def _options(url: str, duration_s: float) -> ReplayOptions:
    """The trace beside the checkout if there is one, else the built-in workload."""
    trace = Path(os.environ.get("OSERVE_TRACES", TRACES)) / TRACE
    real = trace.exists()
    say(f"trace: {trace}" if real else f"no {trace}: using the built-in workload")
    selection = Selection(
        start_s=TRACE_START_S if real else 0.0,
        duration_s=duration_s,
        length_scale=LENGTH_SCALE,
        input_tokens_max=INPUT_TOKENS_MAX,
        output_tokens_max=OUTPUT_TOKENS_MAX,
    )
    return ReplayOptions(trace=str(trace) if real else GENERATOR, url=url, selection=selection)


async def _capacity_rps(options: ReplayOptions) -> float:
    """Requests per second when the mesh always has some waiting. The first ones warm it up."""
    records = load_arrivals(options)
    stride = max(1, len(records) // CALIBRATION_REQUESTS)  # the mix of the whole window
    sample = records[::stride][:CALIBRATION_REQUESTS]
    at_once = [msgspec.structs.replace(record, timestamp_s=0.0) for record in sample]
    await replay_arrivals(at_once[: len(at_once) // 8 + 1], options)
    report = await replay_arrivals(at_once, options)
    if not report.all_completed:
        raise OServeError(f"not every request completed while calibrating: {report.errors}")
    return report.throughput_rps


def _fitted(
    options: ReplayOptions, capacity_rps: float, duration_s: float
) -> tuple[list[TraceRecord], float]:
    """The trace's requests at the rate that fits, and the scale that makes it so."""
    offered_rps = len(load_arrivals(options)) / duration_s
    scale = min(RATE_SCALE_MAX, UTILISATION * capacity_rps / offered_rps)
    selection = msgspec.structs.replace(options.selection, rate_scale=scale)
    return load_arrivals(msgspec.structs.replace(options, selection=selection)), scale


async def _replay(
    mesh: LocalMesh, options: ReplayOptions, arrivals: list[TraceRecord], duration_s: float
) -> tuple[Report, Story]:
    progress, story = Progress(), Story()
    bus = NatsBus(msgspec.structs.replace(mesh.topology.bus, url=mesh.bus_url))
    await bus.connect(name="oserve-demo")
    try:
        async with asyncio.TaskGroup() as tasks:
            shown = tasks.create_task(_show(progress, len(arrivals)))
            told = tasks.create_task(_tell(mesh, bus, story, progress, duration_s))
            report = await replay_arrivals(arrivals, options, progress=progress)
            await told
            shown.cancel()
    finally:
        await bus.close()
    return msgspec.structs.replace(report, marks=tuple(story.marks)), story


async def _tell(
    mesh: LocalMesh, bus: NatsBus, story: Story, progress: Progress, duration_s: float
) -> None:
    """Switch there and back, then kill: each when its part of the trace is over."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for to, part in SWITCHES:
        due_s = began_s + part * duration_s
        await asyncio.sleep(max(0.0, due_s - LISTEN_S - loop.time()))
        plan = await plan_for(bus, to)
        await _until_busy(progress, until_s=due_s + BUSY_PART * duration_s)
        say(f"switching to {to}, with {progress.in_flight} requests in flight")
        at_s = loop.time() - began_s
        outcome = await switch_to(bus, plan, timeout_s=SWITCH_TIMEOUT_S)
        story.switches.append(outcome)
        story.marks.append(Mark(at_s, f"switch to {outcome.plan or to}", "switch"))
        say(in_short(outcome))
    await asyncio.sleep(max(0.0, began_s + KILL_AT * duration_s - loop.time()))
    say(f"SIGKILL to {VICTIM} (pid {mesh.pids()[VICTIM]})")
    mesh.kill(VICTIM)
    story.marks.append(Mark(loop.time() - began_s, f"SIGKILL {VICTIM}"))


async def _until_busy(progress: Progress, *, until_s: float) -> None:
    while progress.in_flight < BUSY and asyncio.get_running_loop().time() < until_s:  # noqa: ASYNC110  # a count
        await asyncio.sleep(BUSY_POLL_S)


class _Line(msgspec.Struct):
    """What we want to know of a line in the ingress's log."""

    event: str
    time_s: float
    attempts: int = 0


def _retried(log: Path, *, since_s: float) -> int:
    """Requests with more than one attempt, as the ingress says in its line for each request."""
    lines = [line for line in log.read_bytes().splitlines() if line.startswith(b"{")]
    ended = [msgspec.json.decode(line, type=_Line) for line in lines]
    return sum(line.attempts > 1 and line.time_s >= since_s for line in ended)


async def _show(progress: Progress, offered: int) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        say(
            f"{progress.completed} of {offered} completed, {progress.in_flight} in flight, "
            f"{progress.failed} failed"
        )


def say(text: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
