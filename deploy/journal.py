"""What a running mesh says now and what its journal remembers, read once to answer a question.

The journal keeps events for ``bus.journal_age_s_max`` and within ``bus.journal_bytes_max``, and a
question reads a bounded number of the newest of each kind. Events that today's code cannot read (of
another version of the mesh) are left out, and counted.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Generic

import msgspec

from deploy.status import MeshStatus, ask_mesh
from shared import subjects
from shared.bus import Bus, BusConfig, Delivery, NatsBus
from shared.messages.base import M, decode
from shared.messages.demand import DemandReport
from shared.messages.plans import PlanKept, PlanProposed, SwitchEnded, SwitchStarted
from shared.messages.replicas import (
    ReplicaDrained,
    ReplicaFailed,
    ReplicaReport,
    ReplicaStarted,
    ReplicaStopped,
)
from shared.subjects import Subject

PLANS_MAX = 2000  # proposals and switches, of each: corrections of weights are such, too
KEPT_MAX = 500
WINDOWS_MAX = 2000
REPLICA_EVENTS_MAX = 500  # of each kind, of one replica
LISTEN_S = 3.0  # to one replica: long enough for a rate
_CONNECT_S = 2.0
ReplicaEvent = ReplicaStarted | ReplicaDrained | ReplicaStopped | ReplicaFailed
_OF_REPLICAS: tuple[Subject[Any], ...] = (
    subjects.REPLICA_STARTED,
    subjects.REPLICA_DRAINED,
    subjects.REPLICA_STOPPED,
    subjects.REPLICA_FAILED,
)


@dataclass(frozen=True, slots=True)
class Past(Generic[M]):
    """An event, and when the broker took it, unix seconds."""

    at_s: float
    message: M


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one replica did while it was listened to for ``listened_s``: its newest report, and
    what it served; None where it reported less than twice."""

    report: ReplicaReport
    listened_s: float
    requests_rps: float | None = None
    output_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """All that an answer is made of: the newest events of each kind, the oldest of them first.
    ``replica`` holds those of the one replica that was asked for."""

    now_s: float
    status: MeshStatus
    proposed: tuple[Past[PlanProposed], ...] = ()
    kept: tuple[Past[PlanKept], ...] = ()
    started: tuple[Past[SwitchStarted], ...] = ()
    ended: tuple[Past[SwitchEnded], ...] = ()
    demand: tuple[Past[DemandReport], ...] = ()
    replica: tuple[Past[ReplicaEvent], ...] = ()
    load: Load | None = None
    unreadable: int = 0

    @property
    def empty(self) -> bool:
        return not (self.proposed or self.kept or self.started or self.ended)


async def read_mesh(config: BusConfig, *, url: str, replica_id: str = "") -> Journal:
    """Ask the mesh and read its journal; with ``replica_id`` that replica's events as well, after
    listening to it. Raises BusUnavailable."""
    bus = NatsBus(msgspec.structs.replace(config, connect_timeout_s=_CONNECT_S))
    await bus.connect(name="oserve-why")
    try:
        listening = listen(bus, replica_id) if replica_id else _nothing()
        status, load = await asyncio.gather(ask_mesh(config, url=url), listening)
        return await read_journal(bus, status, now_s=time.time(), replica_id=replica_id, load=load)
    finally:
        await bus.close()


async def _nothing() -> None:
    return None


async def read_journal(
    bus: Bus, status: MeshStatus, *, now_s: float, replica_id: str = "", load: Load | None = None
) -> Journal:
    """The events that explain ``status``. Raises BusUnavailable."""
    reader = _Reader(bus)
    ended = await reader.newest(subjects.SWITCH_ENDED, PLANS_MAX)
    replica: list[Past[ReplicaEvent]] = []
    for subject in _OF_REPLICAS if replica_id else ():
        replica += await reader.newest(subject.of(replica_id=replica_id), REPLICA_EVENTS_MAX)
    return Journal(
        now_s=now_s,
        status=status,
        proposed=await reader.newest(subjects.PLAN_PROPOSED, PLANS_MAX),
        kept=await reader.newest(subjects.PLAN_KEPT, KEPT_MAX),
        started=await reader.newest(subjects.SWITCH_STARTED, PLANS_MAX),
        ended=ended,
        demand=await reader.newest(subjects.DEMAND_REPORT, WINDOWS_MAX),
        replica=tuple(sorted(replica, key=lambda past: past.at_s)),
        load=load,
        unreadable=reader.unreadable,
    )


class _Reader:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.unreadable = 0

    async def newest(self, subject: Subject[M], limit: int) -> tuple[Past[M], ...]:
        found: list[Past[M]] = []
        for kept in await self._bus.history(subject.wildcard, limit=limit):
            try:
                found.append(Past(kept.at_s, decode(kept.payload, subject.message)))
            except (msgspec.ValidationError, msgspec.DecodeError):
                self.unreadable += 1
        return tuple(found)


async def listen(bus: Bus, replica_id: str, *, listen_s: float = LISTEN_S) -> Load | None:
    """Listen to one replica's reports; None if there were none. Raises BusUnavailable."""
    subject = subjects.REPLICA_REPORT.of(replica_id=replica_id)
    ends: list[tuple[float, ReplicaReport]] = []  # the first and the newest report

    def on_message(delivery: Delivery) -> None:
        ends[1:] = [(time.monotonic(), decode(delivery.payload, subject.message))]

    subscription = await bus.subscribe(subject.pattern, on_message)
    await asyncio.sleep(listen_s)
    await subscription.unsubscribe()
    return load_of(ends)


def load_of(reports: list[tuple[float, ReplicaReport]]) -> Load | None:
    """What the first and the last of ``reports`` (monotonic seconds, report) say of the time
    between. A leader that restarted in between counts anew: then there is no rate."""
    if not reports:
        return None
    (began_s, first), (ended_s, last) = reports[0], reports[-1]
    took_s = ended_s - began_s
    if took_s <= 0.0 or first.incarnation != last.incarnation:
        return Load(report=last, listened_s=took_s)
    return Load(
        report=last,
        listened_s=took_s,
        requests_rps=max(0, last.requests_total - first.requests_total) / took_s,
        output_tokens_per_s=max(0, last.output_tokens_total - first.output_tokens_total) / took_s,
    )
