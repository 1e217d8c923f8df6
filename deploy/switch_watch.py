"""Hears how a switch goes, from before it is asked for until it has ended."""

import asyncio
from collections.abc import Callable
from typing import Self

import msgspec

from shared import subjects
from shared.bus import Bus, Delivery, Subscription
from shared.messages.base import decode
from shared.messages.plans import (
    PlanInForce,
    SwitchEnded,
    SwitchProgress,
    SwitchReport,
    SwitchStarted,
    SwitchWay,
)

SILENT_S = 5.0
"""In force for so long, and nobody said how the switch ended: that word was lost."""


class SwitchOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended. ``failure`` says why not; ``report`` is None where nobody told."""

    plan_id: str = ""
    plan: str = ""  # in words
    epoch: int = 0
    succeeded: bool = False
    way: SwitchWay | None = None
    why: str = ""  # why it was not live, or was staged
    took_s: float = 0.0
    failure: str = ""
    timed_out: bool = False
    report: SwitchReport | None = None


class SwitchWatch:
    """``on_progress`` is told of each step forward of any switch under way."""

    def __init__(
        self, bus: Bus, *, on_progress: Callable[[SwitchProgress], None] | None = None
    ) -> None:
        self._bus, self._on_progress_said = bus, on_progress
        self._in_force: PlanInForce | None = None
        self._in_force_s = 0.0  # when the plan in force was first heard to be so
        self._started: dict[str, SwitchStarted] = {}
        self._ended: dict[str, SwitchEnded] = {}
        self._phase: SwitchProgress | None = None
        self._news = asyncio.Event()
        self._subscriptions: list[Subscription] = []

    async def __aenter__(self) -> Self:
        for subject, handler in (
            (subjects.PLAN_IN_FORCE, self._on_plan_in_force),
            (subjects.SWITCH_STARTED, self._on_started),
            (subjects.SWITCH_PROGRESS, self._on_progress),
            (subjects.SWITCH_ENDED, self._on_ended),
        ):
            self._subscriptions.append(await self._bus.subscribe(subject.pattern, handler))
        return self

    async def __aexit__(self, *_: object) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    @property
    def in_force(self) -> PlanInForce | None:
        return self._in_force

    async def until_heard(self, *, wait_s: float) -> PlanInForce | None:
        """The plan in force, as soon as somebody says it; None if nobody does."""
        try:
            async with asyncio.timeout(wait_s):
                while self._in_force is None:
                    await self._next()
        except TimeoutError:
            return None
        return self._in_force

    async def until_ended(self, plan_id: str, *, wait_s: float) -> SwitchOutcome:
        """In force with its report, rolled back, or neither within ``wait_s``."""
        try:
            async with asyncio.timeout(wait_s):
                while (outcome := self._outcome(plan_id)) is None:
                    await self._next()
                return outcome
        except TimeoutError:
            return self._late(plan_id, wait_s)

    async def _next(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _outcome(self, plan_id: str) -> SwitchOutcome | None:
        started, ended, seen = self._started.get(plan_id), self._ended.get(plan_id), self._in_force
        if ended is not None:
            report = ended.report
            way = report.way if report is not None else started.way if started else None
            return SwitchOutcome(
                plan_id=plan_id,
                epoch=ended.epoch,
                succeeded=ended.succeeded,
                way=way,
                why=started.why if started is not None else "",
                took_s=ended.took_s,
                failure="" if ended.succeeded else _rolled_back(ended),
                report=report,
            )
        if seen is None or seen.plan.plan_id != plan_id or seen.switching_to:
            return None
        if started is not None and _now_s() - self._in_force_s < SILENT_S:
            return None  # its end has still to be told
        way = started.way if started is not None else None
        return SwitchOutcome(plan_id=plan_id, epoch=seen.epoch, succeeded=True, way=way)

    def _late(self, plan_id: str, wait_s: float) -> SwitchOutcome:
        seen, phase = self._in_force, self._phase
        if phase is not None and phase.plan_id == plan_id:
            why = f"it is {phase.phase}, {phase.elapsed_s:.1f} s after its start"
        elif seen is None:
            why = "nobody says which plan is in force: is a switcher running?"
        else:
            why = f"{seen.plan.plan_id or 'the empty plan'} is in force"
        detail = (
            f"not switched to {plan_id} within {wait_s:g} s: {why}; it stays pinned and goes on "
            "being tried: `oserve release` ends that, `oserve why not-switching` tells more"
        )
        return SwitchOutcome(plan_id=plan_id, failure=detail, timed_out=True)

    def _on_plan_in_force(self, delivery: Delivery) -> None:
        said = decode(delivery.payload, PlanInForce)
        if self._in_force is None or self._in_force.plan.plan_id != said.plan.plan_id:
            self._in_force_s = _now_s()
        self._in_force = said
        self._news.set()

    def _on_started(self, delivery: Delivery) -> None:
        started = decode(delivery.payload, SwitchStarted)
        self._started[started.plan_id] = started
        self._news.set()

    def _on_progress(self, delivery: Delivery) -> None:
        self._phase = decode(delivery.payload, SwitchProgress)
        if self._on_progress_said is not None:
            self._on_progress_said(self._phase)

    def _on_ended(self, delivery: Delivery) -> None:
        ended = decode(delivery.payload, SwitchEnded)
        self._ended[ended.plan_id] = ended
        self._news.set()


def _rolled_back(ended: SwitchEnded) -> str:
    return (
        f"the switch to {ended.plan_id} failed after {ended.took_s:.1f} s and was rolled back: "
        f"{ended.detail or 'no reason was given'}; it stays pinned and is tried again: "
        "`oserve release` ends that"
    )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
