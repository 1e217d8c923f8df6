"""``oserve adopt`` and ``oserve release``: a person puts a plan into force, and lets it go again.

The scheduler is asked by rpc; it checks the plan, gives it its id, and from then on wishes for
nothing else. The switcher then walks to it as to any other plan, which is what is waited for.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Self

import msgspec
from rich.console import Console

from deploy.status import find_mesh
from deploy.why import WhichMesh
from deploy.why_plan import in_words
from loadgen.planning.plan_file import read_plan
from shared import subjects
from shared.bus import Bus, BusConfig, Delivery, NatsBus, Subscription
from shared.errors import BusUnavailable, DeadlineExceeded
from shared.messages.base import M, Message, decode, encode
from shared.messages.plans import (
    DeploymentPlan,
    PinAnswer,
    PinPlan,
    PlanInForce,
    ReleasePlan,
    SwitchEnded,
)
from shared.subjects import Subject

ANSWER_S = 5.0
_CONNECT_S = 2.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a wait for a plan ended: it is in force as ``epoch``, or ``failure`` says why not."""

    plan_id: str
    epoch: int = 0
    failure: str = ""


def run_adopt(file: Path, which: WhichMesh, *, wait_s: float) -> int:
    """Pin the plan in ``file`` and wait up to ``wait_s`` until it is in force; 0: do not wait. The
    exit code. Raises ConfigInvalid."""
    plan = read_plan(file)
    return _run("adopt", which, lambda bus: adopt(bus, plan, wait_s=wait_s))


def run_release(which: WhichMesh) -> int:
    """Let the scheduler plan again; the exit code. Raises ConfigInvalid."""
    return _run("release", which, release)


async def adopt(bus: Bus, plan: DeploymentPlan, *, wait_s: float) -> int:
    """The exit code. Raises BusUnavailable, DeadlineExceeded."""
    console = _console()
    async with Watch(bus) as watch:
        answer = await ask(bus, subjects.PIN_PLAN, PinPlan(plan=plan))
        if answer.wrong:
            return _refused("adopt", answer)
        plan_id = answer.plan_id
        console.print(
            f"pinned {plan_id}: {in_words(plan.replicas)}; the scheduler keeps to it until "
            "`oserve release`"
        )
        if wait_s <= 0.0:
            return 0
        waiting = f"waiting for {plan_id} to be in force, up to {wait_s:g} s"
        with console.status(waiting) if console.is_terminal else nullcontext():
            outcome = await watch.until_in_force(plan_id, wait_s=wait_s)
    if outcome.failure:
        _console(stderr=True).print(f"oserve adopt: {outcome.failure}")
        return 1
    console.print(f"{plan_id} is in force as epoch {outcome.epoch}")
    return 0


async def release(bus: Bus) -> int:
    """The exit code. Raises BusUnavailable, DeadlineExceeded."""
    answer = await ask(bus, subjects.RELEASE_PLAN, ReleasePlan())
    if answer.wrong:
        return _refused("release", answer)
    _console().print(
        f"released: the scheduler plans again; in force until then: {answer.plan_id or 'nothing'}"
    )
    return 0


async def ask(bus: Bus, subject: Subject[M], question: Message) -> PinAnswer:
    """What the scheduler says. Raises BusUnavailable, DeadlineExceeded."""
    try:
        answer = await bus.request(subject.pattern, encode(question), timeout_s=ANSWER_S)
    except BusUnavailable as error:
        raise BusUnavailable(f"no scheduler runs, see `oserve status`: {error}") from error
    return decode(answer, PinAnswer)


class Watch:
    """Hears which plan is in force and how switches end, from before a plan is asked for."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._in_force: PlanInForce | None = None
        self._failed: dict[str, SwitchEnded] = {}
        self._news = asyncio.Event()
        self._subscriptions: list[Subscription] = []

    async def __aenter__(self) -> Self:
        for subject, handler in (
            (subjects.PLAN_IN_FORCE, self._on_plan_in_force),
            (subjects.SWITCH_ENDED, self._on_switch_ended),
        ):
            self._subscriptions.append(await self._bus.subscribe(subject.pattern, handler))
        return self

    async def __aexit__(self, *_: object) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    async def until_in_force(self, plan_id: str, *, wait_s: float) -> Outcome:
        """In force, rolled back, or neither within ``wait_s``."""
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    self._news.clear()
                    outcome = self._outcome(plan_id)
                    if outcome is not None:
                        return outcome
                    await self._news.wait()
        except TimeoutError:
            return Outcome(plan_id=plan_id, failure=self._late(plan_id, wait_s))

    def _outcome(self, plan_id: str) -> Outcome | None:
        seen = self._in_force
        if seen is not None and seen.plan.plan_id == plan_id:
            return Outcome(plan_id=plan_id, epoch=seen.epoch)
        failed = self._failed.get(plan_id)
        if failed is None:
            return None
        return Outcome(
            plan_id=plan_id,
            failure=(
                f"the switch to {plan_id} failed after {failed.took_s:.1f} s and was rolled back: "
                f"{failed.detail}; it stays pinned and is tried again: `oserve release` ends that"
            ),
        )

    def _late(self, plan_id: str, wait_s: float) -> str:
        seen = self._in_force
        if seen is None:
            return f"nobody said which plan is in force within {wait_s:g} s: is a switcher running?"
        doing = (
            "the switch to it is under way"
            if seen.switching_to == plan_id
            else f"{seen.plan.plan_id or 'the empty plan'} is in force"
        )
        return (
            f"{plan_id} is pinned, but not in force after {wait_s:g} s: {doing}; "
            "`oserve why not-switching` tells more"
        )

    def _on_plan_in_force(self, delivery: Delivery) -> None:
        self._in_force = decode(delivery.payload, PlanInForce)
        self._news.set()

    def _on_switch_ended(self, delivery: Delivery) -> None:
        ended = decode(delivery.payload, SwitchEnded)
        if not ended.succeeded:
            self._failed[ended.plan_id] = ended
            self._news.set()


def _refused(command: str, answer: PinAnswer) -> int:
    console = _console(stderr=True)
    console.print(f"oserve {command}: the scheduler refuses:")
    for wrong in answer.wrong:
        console.print(f"  {wrong}")
    return 1


def _console(*, stderr: bool = False) -> Console:
    """Prints what it is given as it is."""
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def _run(command: str, which: WhichMesh, work: Callable[[Bus], Awaitable[int]]) -> int:
    async def connected(config: BusConfig) -> int:
        bus = NatsBus(msgspec.structs.replace(config, connect_timeout_s=_CONNECT_S))
        await bus.connect(name=f"oserve-{command}")
        try:
            return await work(bus)
        finally:
            await bus.close()

    try:
        config, _ = find_mesh(
            topology=which.topology, data_dir=which.data_dir, bus_url=which.bus_url
        )
        return asyncio.run(connected(config))
    except BusUnavailable as error:
        cause = f"{error}"
    except DeadlineExceeded as error:
        cause = f"{error}: the scheduler is busy or hangs, see `oserve status` and its log"
    _console(stderr=True).print(f"oserve {command}: {cause}")
    return 1
