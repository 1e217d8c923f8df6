"""`oserve switch`: what is asked of the mesh, what is waited for, and what a person is told."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from deploy import switch_watch
from deploy.switch import EXIT_FAILED, EXIT_LATE, EXIT_SWITCHED, run_switch, switch, tell
from deploy.switch_view import Bar, amount, in_short, report_lines
from deploy.switch_watch import SwitchOutcome, SwitchWatch
from deploy.why import WhichMesh
from loadgen.planning.plan_file import write_plan
from shared import subjects
from shared.bus import Delivery
from shared.bus_memory import MemoryBus
from shared.errors import BusUnavailable, ConfigInvalid
from shared.hardware import GpuSpec
from shared.messages.base import Message, decode, encode
from shared.messages.plans import (
    DeploymentPlan,
    PinAnswer,
    PinPlan,
    PlanInForce,
    ReplicaSpec,
    SwitchEnded,
    SwitchProgress,
    SwitchReport,
    SwitchStarted,
)
from shared.messages.replicas import WorkerReport

BEFORE = DeploymentPlan(
    plan_id="plan-before",
    replicas=tuple(
        ReplicaSpec(replica_id=f"r{i}", model_id="m", parallelism="tp1pp1", gpus=(f"n0-g{i}",))
        for i in range(2)
    ),
    weights={"*": {"r0": 0.5, "r1": 0.5}},
)
MIB = 1 << 20
REPORT = SwitchReport(
    way="live",
    bytes_by_link={"n0-g1>n0-g0": 3 * MIB, "n0-g0>n0-g1": MIB, "disk>n0-g0": MIB},
    bytes_bound=4 * MIB,
    bytes_in_place=8 * MIB,
    cache_bytes=2 * MIB,
    cache_ahead_bytes=MIB,
    phase_s={"preparing": 0.5, "pausing": 0.004, "taking": 0.02},
    moved=7,
    replayed=1,
    pause_p50_s=0.03,
    pause_p99_s=0.05,
    notes=("r1's KV cache did not fit",),
)


class FakeMesh:
    """Workers, a switcher and a scheduler that say what they are told to."""

    def __init__(self, *, wrong: tuple[str, ...] = ()) -> None:
        self.bus, self.asked = MemoryBus(), list[DeploymentPlan]()
        self._wrong = wrong
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.bus.subscribe(subjects.PIN_PLAN.pattern, self._on_pin)

    def _on_pin(self, delivery: Delivery) -> None:
        self.asked.append(decode(delivery.payload, PinPlan).plan)
        answer = PinAnswer(plan_id="plan-pinned", epoch=4, wrong=self._wrong)
        reply = self.bus.publish(delivery.reply_to, encode(answer))
        self._tasks.append(asyncio.ensure_future(reply))

    async def say(self, subject: str, message: Message) -> None:
        await self.bus.publish(subject, encode(message))

    async def introduce(self, *, gpus: int = 2) -> None:
        """What a mesh says anyway."""
        for index in range(gpus):
            report = WorkerReport(
                worker_id=f"n0-g{index}",
                incarnation="i",
                node_id="n0",
                gpu=GpuSpec(gpu_id=f"n0-g{index}"),
                models=("m",),
            )
            publish = subjects.WORKER_REPORT.send(report, worker_id=report.worker_id)
            await self.say(publish.subject, report)
        await self.in_force(BEFORE, epoch=4)

    async def in_force(self, plan: DeploymentPlan, *, epoch: int, switching_to: str = "") -> None:
        said = PlanInForce(epoch=epoch, plan=plan, switching_to=switching_to)
        await self.say(subjects.PLAN_IN_FORCE.pattern, said)

    async def pinned(self) -> None:
        while not self.asked:
            await asyncio.sleep(0)

    async def started(self, plan_id: str = "plan-pinned", *, why: str = "") -> None:
        started = SwitchStarted(epoch=5, plan_id=plan_id, why=why, way="reload" if why else "live")
        await self.say(subjects.SWITCH_STARTED.pattern, started)

    async def progress(self, phase: str, done: int = 0, *, plan_id: str = "plan-pinned") -> None:
        said = SwitchProgress(
            epoch=5,
            plan_id=plan_id,
            phase=phase,
            bytes_done=done,
            bytes_total=4 * MIB,
            elapsed_s=0.5,
        )
        await self.say(subjects.SWITCH_PROGRESS.pattern, said)

    async def ended(
        self,
        plan_id: str = "plan-pinned",
        *,
        detail: str = "",
        report: SwitchReport | None = REPORT,
    ) -> None:
        event = SwitchEnded(
            epoch=5,
            plan_id=plan_id,
            succeeded=not detail,
            took_s=1.25,
            detail=detail,
            report=report,
        )
        await self.say(subjects.SWITCH_ENDED.pattern, event)


Story = Callable[[FakeMesh], Awaitable[None]]


def _switched(
    to: str,
    story: Story,
    *,
    wrong: tuple[str, ...] = (),
    timeout_s: float = 5.0,
    seen: list[SwitchProgress] | None = None,
) -> tuple[SwitchOutcome, FakeMesh]:
    """How a switch ends when the mesh's side of it is ``story``."""

    async def main() -> tuple[SwitchOutcome, FakeMesh]:
        mesh = FakeMesh(wrong=wrong)
        await mesh.start()
        on_progress = None if seen is None else seen.append
        asking = asyncio.ensure_future(
            switch(mesh.bus, to, timeout_s=timeout_s, listen_s=0.02, on_progress=on_progress)
        )
        await asyncio.sleep(0)
        outcome, _ = await asyncio.gather(asking, story(mesh))
        return outcome, mesh

    return asyncio.run(main())


async def _live(mesh: FakeMesh) -> None:
    await mesh.introduce()
    await mesh.pinned()
    await mesh.started()
    await mesh.progress("preparing", MIB)
    await mesh.in_force(BEFORE, epoch=4, switching_to="plan-pinned")
    await mesh.in_force(DeploymentPlan(plan_id="plan-pinned"), epoch=5)
    await mesh.ended()


def test_shapes_become_a_plan_and_the_switch_is_awaited() -> None:
    """The command would end while the switch is under way, or ask for another plan."""
    seen: list[SwitchProgress] = []
    outcome, mesh = _switched("tp2*1", _live, seen=seen)
    (asked,) = mesh.asked
    assert [(one.parallelism, one.gpus) for one in asked.replicas] == [
        ("tp2pp1", ("n0-g0", "n0-g1"))
    ]
    assert (outcome.succeeded, outcome.way, outcome.epoch) == (True, "live", 5)
    assert outcome.report == REPORT
    assert outcome.plan == "1 x tp2"
    assert [said.phase for said in seen] == ["preparing"]


def test_a_plan_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """Weights that a person wrote would be replaced."""
    plan = msgspec.structs.replace(BEFORE, weights={"*": {"r0": 0.25, "r1": 0.75}})
    write_plan(plan, tmp_path / "plan.toml")
    _, mesh = _switched(str(tmp_path / "plan.toml"), _live)
    assert mesh.asked[0].weights == plan.weights
    assert mesh.asked[0].replicas == plan.replicas


def test_a_refusal_says_everything_that_is_wrong() -> None:
    """A person would mend one mistake at a time, or believe that it went well."""
    outcome, _ = _switched("tp2", FakeMesh.introduce, wrong=("n0-g0 is unknown", "too late"))
    assert outcome.failure == "the scheduler refuses: n0-g0 is unknown; too late"
    assert tell(outcome, as_json=True) == EXIT_FAILED


def test_too_many_gpus_are_refused_before_anybody_is_asked() -> None:
    """The scheduler would say that GPUs are unknown, which nobody has named."""
    with pytest.raises(ConfigInvalid, match="needs 4 GPUs, 2 are there for m: ask for fewer"):
        _switched("tp4*1", FakeMesh.introduce)


def test_a_rollback_says_why() -> None:
    """A person would take the old shape for the new one. Another switch's end is none of ours."""

    async def story(mesh: FakeMesh) -> None:
        await mesh.introduce()
        await mesh.pinned()
        await mesh.ended("plan-other")
        await mesh.started()
        await mesh.ended(detail="n0-g1 did not pause in time")

    outcome, _ = _switched("tp2", story)
    assert not outcome.succeeded
    assert "rolled back: n0-g1 did not pause in time" in outcome.failure
    assert "`oserve release`" in outcome.failure
    assert tell(outcome, as_json=False) == EXIT_FAILED


def test_a_reload_is_told_as_one() -> None:
    """Someone would believe that nobody noticed."""

    async def story(mesh: FakeMesh) -> None:
        await mesh.introduce()
        await mesh.pinned()
        await mesh.started(why="the engine tells no model shape")
        await mesh.ended(report=None)

    outcome, _ = _switched("tp2", story)
    assert (outcome.way, outcome.why) == ("reload", "the engine tells no model shape")
    assert "why: the engine tells no model shape" in "\n".join(report_lines(outcome))


def test_what_is_in_force_already_needs_no_switch() -> None:
    """The command would wait for an end that never comes."""

    async def story(mesh: FakeMesh) -> None:
        await mesh.introduce()
        await mesh.pinned()
        await mesh.in_force(DeploymentPlan(plan_id="plan-pinned"), epoch=4)

    outcome, _ = _switched("tp1*2", story)
    assert (outcome.succeeded, outcome.way) == (True, None)
    assert "no switch was needed" in next(report_lines(outcome))


def test_a_lost_word_of_the_end_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One lost message, and a script would fail although the plan is in force."""
    monkeypatch.setattr(switch_watch, "SILENT_S", 0.0)

    async def story(mesh: FakeMesh) -> None:
        await mesh.introduce()
        await mesh.pinned()
        await mesh.started()
        await mesh.in_force(DeploymentPlan(plan_id="plan-pinned"), epoch=5)

    outcome, _ = _switched("tp2", story)
    assert (outcome.succeeded, outcome.way, outcome.report) == (True, "live", None)


def test_in_force_is_not_the_end_while_the_old_replicas_are_retired() -> None:
    """The report would be missed: the plan is in force before the switch has ended."""

    async def story(mesh: FakeMesh) -> None:
        await mesh.introduce()
        await mesh.pinned()
        await mesh.started()
        await mesh.in_force(DeploymentPlan(plan_id="plan-pinned"), epoch=5)
        for _ in range(20):
            await asyncio.sleep(0)
        await mesh.ended()

    outcome, _ = _switched("tp2", story)
    assert outcome.report == REPORT


def test_time_that_is_up_is_told_apart_and_says_where_things_stand() -> None:
    """A script could not tell a slow switch from one that was refused."""

    async def story(mesh: FakeMesh) -> None:
        await mesh.introduce()
        await mesh.pinned()
        await mesh.started()
        await mesh.progress("preparing")

    outcome, _ = _switched("tp2", story, timeout_s=0.05)
    assert outcome.timed_out
    assert "it is preparing" in outcome.failure
    assert tell(outcome, as_json=True) == EXIT_LATE


def test_without_a_switcher_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan would be pinned that nobody can walk to."""
    monkeypatch.setattr("deploy.switch.LATE_S", 0.02)
    with pytest.raises(BusUnavailable, match="no switcher says which plan is in force"):
        asyncio.run(switch(MemoryBus(), "tp2", timeout_s=1.0, listen_s=0.0))


def test_nobody_in_force_is_told_at_the_end() -> None:
    """A dead switcher would look like a slow switch."""

    async def main() -> SwitchOutcome:
        async with SwitchWatch(MemoryBus()) as watch:
            return await watch.until_ended("plan-pinned", wait_s=0.01)

    assert "is a switcher running?" in asyncio.run(main()).failure


def test_bad_shapes_need_no_mesh_to_be_told() -> None:
    """The first error would be that no mesh runs, the second that the shape is misspelt."""
    with pytest.raises(ConfigInvalid, match="--to = 'tpx'"):
        run_switch("tpx", WhichMesh(), model_id="", timeout_s=1.0, as_json=False)


OUTCOME = SwitchOutcome(
    plan_id="plan-pinned",
    plan="1 x tp2",
    epoch=5,
    succeeded=True,
    way="live",
    took_s=1.25,
    report=REPORT,
)


def test_the_report_says_all_that_matters(capsys: pytest.CaptureFixture[str]) -> None:
    """A person would not know what the switch cost, or whom it hurt."""
    assert tell(OUTCOME, as_json=False) == EXIT_SWITCHED
    shown = capsys.readouterr().out
    for said in (
        "1 x tp2 is in force as epoch 5: live switch in 1.25 s",
        "7 moved, 1 replayed, paused 30 ms p50, 50 ms p99",
        "5.0 MiB moved (bound 4.0 MiB, 1.25 x), 1.0 MiB of it from disk, 8.0 MiB in place",
        "KV cache 2.0 MiB, 1.0 MiB ahead of the pause",
        "3.0 MiB  n0-g1 -> n0-g0",
        "preparing 500 ms, pausing 4 ms, taking 20 ms",
        "note       r1's KV cache did not fit",
    ):
        assert said in shown


def test_programs_get_json(capsys: pytest.CaptureFixture[str]) -> None:
    """A script would have to read tables."""
    assert tell(OUTCOME, as_json=True) == EXIT_SWITCHED
    assert msgspec.json.decode(capsys.readouterr().out, type=SwitchOutcome) == OUTCOME


def test_in_short_it_is_one_line() -> None:
    """The demo would hide how its switches went, or fill the screen."""
    assert in_short(OUTCOME).startswith("live switch to 1 x tp2 in 1.25 s: 7 moved, 1 replayed")
    failed = SwitchOutcome(failure="it was rolled back: why")
    assert in_short(failed) == "it was rolled back: why"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_a_terminal_and_in_a_log(terminal: bool) -> None:  # a parameter
    """A log would be filled with bars, or a terminal stay still."""
    text = io.StringIO()
    with Bar(Console(file=text, force_terminal=terminal, width=100, color_system=None)) as bar:
        for phase, done in (("preparing", MIB), ("preparing", 2 * MIB), ("taking", 4 * MIB)):
            bar.show(
                SwitchProgress(
                    epoch=5,
                    plan_id="p",
                    phase=phase,
                    bytes_done=done,
                    bytes_total=4 * MIB,
                    elapsed_s=0.5,
                )
            )
    shown = text.getvalue()
    assert "taking" in shown
    if not terminal:
        assert shown.splitlines() == [
            "   0.50 s  preparing, 1.0 MiB of 4.0 MiB",
            "   0.50 s  taking, 4.0 MiB of 4.0 MiB",
        ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")]
)
def test_amounts(count: int, text: str) -> None:
    """Bytes would be read in the wrong unit."""
    assert amount(count) == text
