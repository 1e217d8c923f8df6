"""`oserve adopt` and `oserve release`: what is asked of the scheduler, and what is waited for."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from deploy.adopt import Outcome, Watch, adopt, release
from shared import subjects
from shared.bus import Delivery
from shared.bus_memory import MemoryBus
from shared.errors import BusUnavailable
from shared.messages.base import Message, decode, encode
from shared.messages.plans import (
    DeploymentPlan,
    PinAnswer,
    PinPlan,
    PlanInForce,
    ReleasePlan,
    ReplicaSpec,
    SwitchEnded,
)
from shared.subjects import Subject

PLAN = DeploymentPlan(
    plan_id="plan-of-the-file",
    replicas=(ReplicaSpec(replica_id="r0", model_id="m", parallelism="tp1pp1", gpus=("g0",)),),
)
PINNED = PinAnswer(plan_id="plan-pinned", epoch=4)


class FakeMesh:
    """A scheduler that gives one answer, and the switcher's words on cue."""

    def __init__(self, answer: PinAnswer) -> None:
        self.bus, self.asked = MemoryBus(), list[Message]()
        self._answer = answer
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        for subject in (subjects.PIN_PLAN, subjects.RELEASE_PLAN):
            await self.bus.subscribe(subject.pattern, self._answering(subject))

    def _answering(self, subject: Subject[PinPlan] | Subject[ReleasePlan]) -> Callable[..., None]:
        def on_question(delivery: Delivery) -> None:
            self.asked.append(decode(delivery.payload, subject.message))
            reply = self.bus.publish(delivery.reply_to, encode(self._answer))
            self._tasks.append(asyncio.ensure_future(reply))

        return on_question

    async def in_force(self, plan_id: str, *, epoch: int, switching_to: str = "") -> None:
        plan = DeploymentPlan(plan_id=plan_id)
        said = PlanInForce(epoch=epoch, plan=plan, switching_to=switching_to)
        await self.bus.publish(subjects.PLAN_IN_FORCE.pattern, encode(said))

    async def ended(self, plan_id: str, *, detail: str = "") -> None:
        event = SwitchEnded(
            epoch=5, plan_id=plan_id, succeeded=not detail, took_s=2.5, detail=detail
        )
        await self.bus.publish(subjects.SWITCH_ENDED.pattern, encode(event))


def _run(scenario: Callable[[FakeMesh], Awaitable[None]], answer: PinAnswer = PINNED) -> None:
    async def main() -> None:
        mesh = FakeMesh(answer)
        await mesh.start()
        await scenario(mesh)

    asyncio.run(main())


async def _waited(mesh: FakeMesh, *said: Awaitable[None], wait_s: float = 5.0) -> Outcome:
    """What a wait for the pinned plan says, when the mesh has ``said`` this meanwhile."""
    async with Watch(mesh.bus) as watch:
        for each in said:
            await each
        return await watch.until_in_force("plan-pinned", wait_s=wait_s)


def test_the_plan_of_the_file_is_asked_for_and_awaited(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan in force before would be taken for the one adopted, or another plan be sent."""

    async def scenario(mesh: FakeMesh) -> None:
        async def switch() -> None:
            while not mesh.asked:
                await asyncio.sleep(0)
            await mesh.in_force("plan-before", epoch=4, switching_to="plan-pinned")
            await mesh.ended("plan-pinned")
            await mesh.in_force("plan-pinned", epoch=5)

        code, _ = await asyncio.gather(adopt(mesh.bus, PLAN, wait_s=5.0), switch())
        assert code == 0
        assert mesh.asked == [PinPlan(plan=PLAN)]

    _run(scenario)
    shown = capsys.readouterr().out
    assert "pinned plan-pinned: 1 x tp1" in shown
    assert "plan-pinned is in force as epoch 5" in shown


def test_a_refusal_names_everything_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """A person would mend one mistake at a time, or believe that the plan was taken."""

    async def scenario(mesh: FakeMesh) -> None:
        assert await adopt(mesh.bus, PLAN, wait_s=5.0) == 1

    _run(scenario, PinAnswer(wrong=("g0 is unknown", "m has [no] replica")))
    shown = capsys.readouterr()
    assert "g0 is unknown" in shown.err
    assert "m has [no] replica" in shown.err, "rich must not take it for a style"
    assert shown.out == ""


def test_without_a_wait_nothing_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A script that adopts and goes on would hang."""

    async def scenario(mesh: FakeMesh) -> None:
        assert await adopt(mesh.bus, PLAN, wait_s=0.0) == 0

    _run(scenario)
    assert "pinned plan-pinned" in capsys.readouterr().out


def test_a_switch_that_fails_ends_the_wait() -> None:
    """A person would wait for five minutes for a plan that cannot be, and not learn why. Another
    plan's failure is none of ours."""

    async def scenario(mesh: FakeMesh) -> None:
        outcome = await _waited(
            mesh,
            mesh.ended("plan-other", detail="not ours"),
            mesh.in_force("plan-before", epoch=4),
            mesh.ended("plan-pinned", detail="r0 failed: out of memory"),
        )
        assert "r0 failed: out of memory" in outcome.failure
        assert "`oserve release`" in outcome.failure

    _run(scenario)


def test_a_plan_that_is_in_force_already_needs_no_switch() -> None:
    """Adopting the same file twice would fail the second time."""

    async def scenario(mesh: FakeMesh) -> None:
        outcome = await _waited(mesh, mesh.in_force("plan-pinned", epoch=7))
        assert outcome == Outcome(plan_id="plan-pinned", epoch=7)

    _run(scenario)


@pytest.mark.parametrize(
    ("switching_to", "said"),
    [("plan-pinned", "is under way"), ("", "plan-before is in force")],
)
def test_a_wait_has_an_end_and_says_where_things_stand(switching_to: str, said: str) -> None:
    """The command would hang, or say only that time is up."""

    async def scenario(mesh: FakeMesh) -> None:
        told = mesh.in_force("plan-before", epoch=4, switching_to=switching_to)
        outcome = await _waited(mesh, told, wait_s=0.05)
        assert said in outcome.failure

    _run(scenario)


def test_silence_is_said() -> None:
    """A mesh without a switcher would look like a slow one."""

    async def scenario(mesh: FakeMesh) -> None:
        assert "is a switcher running?" in (await _waited(mesh, wait_s=0.05)).failure

    _run(scenario)


def test_release_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan would stay pinned for ever."""

    async def scenario(mesh: FakeMesh) -> None:
        assert await release(mesh.bus) == 0
        assert mesh.asked == [ReleasePlan()]

    _run(scenario)
    assert "the scheduler plans again" in capsys.readouterr().out


def test_no_scheduler_no_pin() -> None:
    """The answer would be a subject that nobody knows, instead of what is not running."""

    async def main() -> None:
        with pytest.raises(BusUnavailable, match="no scheduler runs, see `oserve status`"):
            await adopt(MemoryBus(), PLAN, wait_s=1.0)

    asyncio.run(main())
