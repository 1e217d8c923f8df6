"""Asks a running mesh for plans, and hears how the switches to them go."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

import msgspec

from shared import subjects
from shared.bus import BusConfig, Delivery, NatsBus, Subscription
from shared.errors import OServeError
from shared.hardware import Parallelism
from shared.messages.base import decode, encode
from shared.messages.plans import (
    DeploymentPlan,
    PinAnswer,
    PinPlan,
    PlanInForce,
    ReplicaSpec,
    SwitchEnded,
    SwitchProgress,
    SwitchStarted,
)
from shared.messages.replicas import ReplicaPrepared, RequestsTaken

ANSWER_S = 5.0
News = SwitchStarted | SwitchProgress | ReplicaPrepared | RequestsTaken | SwitchEnded


class SwitchFailed(OServeError):
    """The plan was refused, rolled back, or is not in force in time."""


def plan_of(shapes: Sequence[tuple[str, Sequence[str]]], *, model_id: str) -> DeploymentPlan:
    """Replicas of these shapes on these GPUs, requests by GPUs. An id is the shape and the GPUs, so
    that none is ever used for two different replicas."""
    specs = tuple(
        ReplicaSpec(
            replica_id=f"{shape}-{'-'.join(gpus)}",
            model_id=model_id,
            parallelism=str(Parallelism.parse(shape)),
            gpus=tuple(gpus),
        )
        for shape, gpus in shapes
    )
    total = sum(len(spec.gpus) for spec in specs)
    row = {spec.replica_id: len(spec.gpus) / total for spec in specs}
    return DeploymentPlan(plan_id="", replicas=specs, weights={"*": row})


class PlanRefused(SwitchFailed):
    """Nothing was begun: the scheduler says that the plan cannot be."""


class AlreadyInForce(SwitchFailed):
    """There is nothing to switch."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One switch, from its wish to its end."""

    started: SwitchStarted | None
    ended: SwitchEnded
    prepared: tuple[ReplicaPrepared, ...]


class Switching:
    """Use with ``async with``."""

    def __init__(self, bus_url: str) -> None:
        self._bus = NatsBus(msgspec.structs.replace(BusConfig(), url=bus_url))
        self._subscriptions: list[Subscription] = []
        self._ended: dict[str, SwitchEnded] = {}
        self._started: dict[str, SwitchStarted] = {}
        self._prepared: list[ReplicaPrepared] = []
        self._news = asyncio.Event()
        self.in_force: PlanInForce | None = None
        self.on_news: Callable[[News], None] | None = None  # told at once, in the bus's callback

    async def __aenter__(self) -> Self:
        await self._bus.connect(name="switching")
        for subject, handler in (
            (subjects.PLAN_IN_FORCE, self._on_plan),
            (subjects.SWITCH_STARTED, self._on_started),
            (subjects.SWITCH_ENDED, self._on_ended),
            (subjects.SWITCH_PROGRESS, self._on_progress),
            (subjects.REPLICA_PREPARED, self._on_prepared),
            (subjects.REQUESTS_TAKEN, self._on_taken),
        ):
            self._subscriptions.append(await self._bus.subscribe(subject.wildcard, handler))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._bus.close()

    async def to(self, plan: DeploymentPlan, *, timeout_s: float = 60.0) -> Seen:
        """Pin ``plan`` and wait until the switch to it has ended. Raises SwitchFailed, or what it
        says more exactly: PlanRefused, AlreadyInForce."""
        self._prepared.clear()
        self._ended.clear()
        self._started.clear()
        payload = encode(PinPlan(plan=plan))
        reply = await self._bus.request(subjects.PIN_PLAN.pattern, payload, timeout_s=ANSWER_S)
        answer = decode(reply, PinAnswer)
        if answer.wrong:
            raise PlanRefused("refused: " + "; ".join(answer.wrong))
        if answer.plan_id not in self._started and self._serves(answer.plan_id):
            raise AlreadyInForce(f"{answer.plan_id} is in force already")
        try:
            async with asyncio.timeout(timeout_s):
                while (ended := self._ended.get(answer.plan_id)) is None:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise SwitchFailed(f"{answer.plan_id} did not end in {timeout_s:g} s") from None
        if not ended.succeeded:
            raise SwitchFailed(f"{answer.plan_id} was rolled back: {ended.detail}")
        started = self._started.get(answer.plan_id)
        return Seen(started=started, ended=ended, prepared=tuple(self._prepared))

    def _serves(self, plan_id: str) -> bool:
        said = self.in_force
        return said is not None and said.plan.plan_id == plan_id and not said.switching_to

    def _on_plan(self, delivery: Delivery) -> None:
        self.in_force = decode(delivery.payload, PlanInForce)
        self._news.set()

    def _on_started(self, delivery: Delivery) -> None:
        started = decode(delivery.payload, SwitchStarted)
        self._started[started.plan_id] = started
        self._tell(started)

    def _on_ended(self, delivery: Delivery) -> None:
        ended = decode(delivery.payload, SwitchEnded)
        self._ended[ended.plan_id] = ended
        self._tell(ended)

    def _on_progress(self, delivery: Delivery) -> None:
        self._tell(decode(delivery.payload, SwitchProgress))

    def _on_prepared(self, delivery: Delivery) -> None:
        prepared = decode(delivery.payload, ReplicaPrepared)
        self._prepared.append(prepared)
        self._tell(prepared)

    def _on_taken(self, delivery: Delivery) -> None:
        self._tell(decode(delivery.payload, RequestsTaken))

    def _tell(self, news: News) -> None:
        if self.on_news is not None:
            self.on_news(news)
        self._news.set()
