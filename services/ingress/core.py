"""Ingress core: owns every open request until its last byte.

    ROUTING -> SUBMITTED -> STREAMING -> ENDED
       ^  \\        |            |
       |   BACKING_OFF <--------+        refused, stalled, lost, gap: next attempt with the
       +-------+                         tokens so far, elsewhere if there is an elsewhere

Assumed of the network: any message may be lost, late, repeated or reordered. So every phase has
a deadline (``Sweep``), attempts are numbered, and a silent stream is probed: submitted again under
the same attempt, which a worker that still runs it merely acknowledges, and one that has settled
it does not answer. In a live switch another replica takes the attempt over (handover.py), and it
goes on. Chunks are the data plane's (intake.py); what they say of attempts comes as events. Pure.
"""

from collections.abc import Iterable, Iterator

from services.ingress.config import IngressConfig
from services.ingress.events import (
    Acknowledged,
    Arrived,
    AttemptLost,
    ClientGone,
    Finished,
    IngressEvent,
    LeaderHeard,
    LossReason,
    Reconnected,
    ReplicaRestarted,
    RequestFailed,
    StaleChunk,
    Sweep,
    TakenOver,
)
from services.ingress.handover import Leaders, rehome, settle
from services.ingress.journey import HELD, Home, Journey
from services.ingress.outgoing import aborts, question, submission
from services.ingress.patience import lost, wants_probe
from shared import subjects
from shared.core import Ask, Effect, Log, Start
from shared.messages.requests import AbortRequest, FailureCode, RouteReply

INPUTS = (subjects.ROUTE_REPLY, subjects.TOKEN_CHUNKS, subjects.PLAN_IN_FORCE)

BACKOFF_S_MIN, BACKOFF_S_MAX = 0.02, 1.0
FREE_MOVES = 2  # moves before backing off: most losses are one dead replica
PROBE_GROWTH = 2.0
RECHECK_S = 0.5  # after the broker is back: workers may find it again later than we do


class IngressCore:
    def __init__(self, config: IngressConfig, *, ingress_id: str) -> None:
        self._config = config
        self._ingress_id = ingress_id
        self._reply_to = subjects.ROUTE_REPLY.of(ingress_id=ingress_id).pattern
        self._journeys: dict[str, Journey] = {}
        self.leaders = Leaders()

    def step(  # noqa: C901  # one case per event
        self, event: IngressEvent, now_s: float
    ) -> list[Effect]:
        match event:
            case RouteReply():
                effects = self._on_route(event, now_s)
            case Acknowledged():
                effects = self._on_acknowledged(event, now_s)
            case Finished():
                effects = self._on_finished(event)
            case Arrived(journey=journey):
                self._journeys[journey.request_id] = journey
                effects = self._route(journey, now_s)
            case TakenOver():
                effects = self._on_taken_over(event, now_s)
            case LeaderHeard():
                effects = self._on_leader_heard(event)
            case AttemptLost():
                effects = self._on_lost(event, now_s)
            case ReplicaRestarted():
                effects = self._on_restarted(event, now_s)
            case Reconnected():
                effects = self._on_reconnected(now_s)
            case ClientGone():
                effects = self._on_client_gone(event, now_s)
            case StaleChunk():
                effects = self._on_stale_chunk(event)
            case Sweep():
                effects = self._on_sweep(event, now_s)
        return list(effects)

    def check(self) -> None:
        for id_, journey in self._journeys.items():
            assert journey.live, id_
            assert journey.request_id == id_, id_
            assert len(journey.tokens) <= journey.sampling.output_tokens_max, id_
            assert journey.moves <= self._config.attempts_max, id_

    def journey(self, request_id: str) -> Journey | None:
        return self._journeys.get(request_id)

    def journeys(self) -> Iterator[Journey]:
        return iter(self._journeys.values())

    @property
    def open_requests(self) -> int:
        return len(self._journeys)

    def _route(self, journey: Journey, now_s: float) -> Iterable[Effect]:
        journey.phase = "routing"
        journey.due_s = now_s + self._config.route_s
        yield Ask(subjects.ROUTE.pattern, question(journey), self._reply_to)

    def _on_route(self, reply: RouteReply, now_s: float) -> Iterable[Effect]:
        journey = self._journeys.get(reply.request_id)
        if journey is None or journey.phase != "routing" or reply.attempt != journey.attempt:
            return
        if reply.failure is not None:
            yield from self._on_no_route(journey, reply, now_s)
            return
        settle(journey, Home(reply.replica_id, reply.leader_id))
        self.leaders.learn(reply.replica_id, reply.leader_id)
        journey.epoch, journey.request_type = reply.epoch, reply.request_type
        journey.incarnation = ""
        journey.phase = "submitted"
        if journey.accepted_s is None:
            journey.submitted_s = now_s
        journey.due_s = now_s + self._config.accept_s
        yield submission(journey, ingress_id=self._ingress_id)

    def _on_no_route(self, journey: Journey, reply: RouteReply, now_s: float) -> Iterable[Effect]:
        code = reply.failure
        assert code is not None
        started = bool(journey.tokens)
        patience_s = self._config.request_s if started else self._config.first_route_s
        hopeless = code in ("unknown_model", "too_long", "invalid")
        overloaded = code == "overloaded" and not started
        if hopeless or overloaded or journey.sought_s(now_s) > patience_s:
            yield from self._fail(journey, now_s, code, reply.reason, reply.retry_after_s or 1.0)
            return
        yield from self._back_off(journey, now_s, reason=reply.reason)

    def _on_acknowledged(self, event: Acknowledged, now_s: float) -> Iterable[Effect]:
        journey = self._journeys.get(event.request_id)
        if journey is None or event.attempt != journey.attempt:
            return
        if journey.phase == "submitted":
            journey.incarnation = event.incarnation
            self._accepted(journey, now_s)
        elif journey.phase == "streaming" and event.incarnation != journey.incarnation:
            yield from self._move(journey, now_s, "incarnation", "its worker was restarted")
        else:
            journey.probing = False

    def _accepted(self, journey: Journey, now_s: float) -> None:
        journey.phase, journey.heard_s = "streaming", now_s
        journey.probe_s, journey.probing = self._config.probe_s, False
        if journey.accepted_s is None:
            journey.accepted_s = now_s

    def _on_taken_over(self, event: TakenOver, now_s: float) -> Iterable[Effect]:
        journey = self._journeys.get(event.request_id)
        if journey is None or event.attempt != journey.attempt or journey.phase not in HELD:
            return
        home = Home(event.replica_id, event.leader_id or self.leaders.of(event.replica_id))
        fields = {"request_id": journey.request_id, "attempt": journey.attempt}
        fields |= {"from_replica_id": journey.replica_id, "replica_id": home.replica_id}
        yield Log("request.taken_over", fields, "debug")
        rehome(journey, home, event.incarnation, now_s)
        self._accepted(journey, now_s)

    def _on_leader_heard(self, event: LeaderHeard) -> Iterable[Effect]:
        self.leaders.learn(event.replica_id, event.leader_id)
        for journey in self._journeys.values():
            if journey.replica_id == event.replica_id and not journey.leader_id:
                journey.leader_id = event.leader_id
        return ()

    def _on_lost(self, event: AttemptLost, now_s: float) -> Iterable[Effect]:
        journey = self._journeys.get(event.request_id)
        if journey is None or event.attempt != journey.attempt or journey.phase not in HELD:
            return
        if event.reason in ("refused", "failed"):
            journey.phase = "routing"  # its worker holds nothing of it: no abort is needed
        if event.failure in ("too_long", "invalid"):
            yield from self._fail(journey, now_s, event.failure, event.detail, 0.0)
            return
        overloaded = event.failure == "overloaded" and not journey.tokens
        if overloaded and journey.moves >= FREE_MOVES:
            yield from self._fail(journey, now_s, "overloaded", event.detail, 1.0)
            return
        yield from self._move(journey, now_s, event.reason, event.detail)

    def _on_restarted(self, event: ReplicaRestarted, now_s: float) -> Iterable[Effect]:
        for journey in list(self._journeys.values()):
            mine = journey.replica_id == event.replica_id and journey.phase == "streaming"
            if mine and journey.incarnation != event.incarnation:
                yield from self._move(journey, now_s, "incarnation", "its worker was restarted")

    def _on_reconnected(self, now_s: float) -> Iterable[Effect]:
        """Who stays silent is probed soon, instead of after the patience of a quiet stream."""
        for journey in self._journeys.values():
            journey.probe_s = min(journey.probe_s, now_s - journey.heard_s + RECHECK_S)
        return ()

    def _move(
        self, journey: Journey, now_s: float, reason: LossReason, detail: str
    ) -> Iterable[Effect]:
        """Give up the present attempt and start the next."""
        fields = {"request_id": journey.request_id, "attempt": journey.attempt}
        fields |= {"replica_id": journey.replica_id, "reason": reason, "detail": detail}
        yield Log("request.moved", fields | {"tokens": len(journey.tokens)})
        if journey.phase == "streaming":
            journey.seeking_s = now_s
        if journey.phase in HELD:
            yield from aborts(journey, now_s)
        if reason != "gap":  # a lost message says nothing against the replica
            journey.exclude(journey.replica_id)
        journey.phase = "routing"
        journey.attempt += 1
        journey.moves += 1
        if journey.moves >= self._config.attempts_max:
            yield from self._fail(
                journey, now_s, "engine", f"gave up after {journey.moves} attempts", 1.0
            )
        elif len(journey.tokens) >= journey.sampling.output_tokens_max:
            # Only the message that said so was lost: nothing is left to generate.
            yield Start("finish", Finished(journey.request_id, "length"))
        elif journey.moves <= FREE_MOVES:
            yield from self._route(journey, now_s)
        else:
            yield from self._back_off(journey, now_s, reason=detail)

    def _back_off(self, journey: Journey, now_s: float, *, reason: str) -> Iterable[Effect]:
        if now_s >= journey.deadline_s:
            yield from self._fail(journey, now_s, "deadline", reason, 1.0)
            return
        journey.phase, journey.trouble = "backing_off", reason
        waited_s = now_s - journey.arrived_s
        journey.due_s = now_s + min(BACKOFF_S_MAX, max(BACKOFF_S_MIN, waited_s / 4))

    def _on_finished(self, event: Finished) -> Iterable[Effect]:
        journey = self._journeys.pop(event.request_id, None)
        if journey is not None:
            journey.phase, journey.finish = "ended", event.finish
        return ()

    def _on_client_gone(self, event: ClientGone, now_s: float) -> Iterable[Effect]:
        journey = self._journeys.pop(event.request_id, None)
        if journey is None:
            return
        if journey.phase in HELD:
            yield from aborts(journey, now_s)
        journey.phase, journey.finish = "ended", "abort"

    def _on_stale_chunk(self, event: StaleChunk) -> Iterable[Effect]:
        if leader_id := self.leaders.of(event.replica_id):
            stale = AbortRequest(
                request_id=event.request_id, attempt=event.attempt, replica_id=event.replica_id
            )
            yield subjects.ABORT_REQUEST.send(stale, worker_id=leader_id)

    def _fail(
        self, journey: Journey, now_s: float, code: FailureCode, detail: str, retry_after_s: float
    ) -> Iterable[Effect]:
        del self._journeys[journey.request_id]
        if journey.phase in HELD:
            yield from aborts(journey, now_s)
        journey.phase, journey.finish = "ended", "failed"
        yield Start("fail", RequestFailed(journey.request_id, code, detail, retry_after_s))

    def _on_sweep(self, event: Sweep, now_s: float) -> Iterable[Effect]:
        for journey in list(self._journeys.values()):
            if now_s >= journey.deadline_s:
                detail = f"not done within {self._config.request_s:g} s"
                yield from self._fail(journey, now_s, "deadline", detail, 1.0)
            elif journey.phase == "streaming":
                yield from self._sweep_streaming(journey, event.heard, now_s)
            elif now_s >= journey.due_s:
                yield from self._sweep_due(journey, now_s)

    def _sweep_streaming(
        self, journey: Journey, heard: dict[str, float], now_s: float
    ) -> Iterable[Effect]:
        heard_s = heard.get(journey.replica_id, 0.0)
        loss = lost(journey, self._config, heard_s=heard_s, now_s=now_s)
        if loss is not None:
            yield from self._move(journey, now_s, *loss)
        elif wants_probe(journey, now_s):
            journey.probe_s *= PROBE_GROWTH
            journey.probing, journey.due_s = True, now_s + self._config.accept_s
            yield submission(journey, ingress_id=self._ingress_id)

    def _sweep_due(self, journey: Journey, now_s: float) -> Iterable[Effect]:
        if journey.phase == "submitted":
            detail = f"not acknowledged within {self._config.accept_s:g} s"
            yield from self._move(journey, now_s, "unacknowledged", detail)
            return
        if not journey.tokens and journey.sought_s(now_s) > self._config.first_route_s:
            detail = journey.trouble or "no router answered: is one running, and the broker up?"
            yield from self._fail(journey, now_s, "no_replica", detail, 1.0)
            return
        yield from self._route(journey, now_s)
