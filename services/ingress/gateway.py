"""Between HTTP and the bus: feeds the intake what arrives, and performs the effects.

Runs on one event loop and steps the core directly, without an inbox: every caller is already a
callback of that loop, and a step takes microseconds.
"""

import asyncio
import logging
from collections import deque

from services.ingress.choices import Choice
from services.ingress.config import IngressConfig
from services.ingress.events import AttemptLost, Reconnected
from services.ingress.intake import Intake
from services.ingress.journey import Journey
from services.ingress.outbox import Outbox
from services.ingress.reader import Reader
from shared import subjects
from shared.bus import Delivery
from shared.core import Ask, Log, Publish
from shared.errors import PayloadTooLarge
from shared.messages.base import DataMessage, Message, encode
from shared.messages.plans import PlanInForce
from shared.messages.requests import (
    RequestCompleted,
    RequestsCompleted,
    RouteReply,
    SubmitRequest,
    TokenChunks,
)
from shared.service import ServiceContext

log = logging.getLogger("oserve.ingress")

COMPLETED_MAX = 16_384
COMPLETED_BATCH_MAX = 512
PLAN_FRESH_S = 10.0
CHECK_S = 1.0
LATE_TICKS = 4.0  # a sweep this many periods late says that the loop was held up


class Gateway:
    def __init__(self, config: IngressConfig, context: ServiceContext) -> None:
        self._config, self._context = config, context
        self._bus, self._clock = context.bus, context.clock
        self.ingress_id = context.instance_id
        self._intake = Intake(config, ingress_id=self.ingress_id, shell=self)
        self.core, self.choices = self._intake.core, self._intake.choices
        self._headers: dict[str, dict[str, str]] = {}  # trace context of traced requests
        self.outbox = Outbox(context.bus, context.metrics)
        self._completed: deque[RequestCompleted] = deque(maxlen=COMPLETED_MAX)
        self._plan: PlanInForce | None = None
        self._plan_s = 0.0
        self._reader = Reader(context.clock, context.metrics)
        metrics = context.metrics
        self._moved = metrics.counter("ingress_moves", "Attempts given up", ["reason"])
        self._moved_live = metrics.counter(
            "ingress_moved_live", "Requests that another replica went on with in a live switch"
        )
        self._unexpected = metrics.counter(
            "ingress_chunks_unexpected", "Chunks of attempts that were never made"
        )
        metrics.gauge("ingress_open_requests", "Requests owned now").set_function(
            lambda: self.core.open_requests
        )

    async def run(self) -> None:
        """Subscribe and work until cancelled."""
        me = self.ingress_id
        bus = self._bus
        await bus.subscribe(subjects.TOKEN_CHUNKS.of(ingress_id=me).pattern, self.on_chunks)
        await bus.subscribe(subjects.ROUTE_REPLY.of(ingress_id=me).pattern, self.on_route)
        await bus.subscribe(subjects.PLAN_IN_FORCE.pattern, self.on_plan)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.outbox.run())
            tasks.create_task(self._sweep())
            tasks.create_task(self._publish_completed())

    def not_ready(self) -> str:
        """Why a request would not be served now; "" if it would."""
        if not self._bus.connected:
            return "the broker is not connected"
        if self._plan is None or self._clock.now_s() - self._plan_s > PLAN_FRESH_S:
            return "no plan in force is known yet"
        if not self._plan.plan.replicas:
            return "the plan in force has no replicas"
        return ""

    def open(self, journey: Journey, choice: Choice, headers: dict[str, str] | None) -> None:
        """Take charge of a request; ``choice`` hears of it until ``on_end`` or ``on_fail``."""
        if headers:
            self._headers[journey.request_id] = headers
        self._intake.open(journey, choice, self._clock.now_s())

    def abort(self, request_id: str) -> None:
        """The client is gone, or wants no more."""
        self._headers.pop(request_id, None)
        self._intake.abort(request_id, self._clock.now_s())

    def completed(self, record: RequestCompleted) -> None:
        """Publish the record with the next batch; the oldest is dropped when too many wait."""
        self._completed.append(record)

    def perform(self, effect: Publish | Ask | Log) -> None:
        match effect:
            case Publish(subject=subject, message=message):
                self._send(subject, message, "")
            case Ask(subject=subject, message=message, reply_to=reply_to):
                self._send(subject, message, reply_to)
            case Log(event=name, fields=fields, level=level):
                if name == "request.moved":
                    self._moved.labels(fields["reason"]).inc()
                elif name == "request.taken_over":
                    self._moved_live.inc()
                log.log(logging.getLevelNamesMapping()[level.upper()], name, extra=fields)

    def on_ended(self, request_id: str) -> None:
        self._headers.pop(request_id, None)

    def on_unexpected(self) -> None:
        self._unexpected.inc()

    def _send(self, subject: str, message: Message | DataMessage, reply_to: str) -> None:
        payload = encode(message)
        if len(payload) > self._bus.payload_bytes_max and isinstance(message, SubmitRequest):
            self._on_too_large(message, subject, len(payload))
            return
        headers = self._headers.get(getattr(message, "request_id", "")) if self._headers else None
        self.outbox.put(subject, payload, reply_to=reply_to, headers=headers)

    def _on_too_large(self, submit: SubmitRequest, subject: str, size_bytes: int) -> None:
        """No replica could be reached with it: do not try 64 of them."""
        limit_bytes = self._bus.payload_bytes_max
        cause = PayloadTooLarge(subject=subject, size_bytes=size_bytes, limit_bytes=limit_bytes)
        lost = AttemptLost(submit.request_id, submit.attempt, "refused", "too_long", str(cause))
        self._intake.step(lost, self._clock.now_s())

    def on_plan(self, delivery: Delivery) -> None:
        plan = self._reader.read(delivery, PlanInForce)
        if plan is None:
            return
        # A lower epoch is a late message, unless ours has been silent: then the state was reset.
        now_s = self._clock.now_s()
        silent = now_s - self._plan_s > PLAN_FRESH_S
        if self._plan is None or plan.epoch >= self._plan.epoch or silent:
            self._plan, self._plan_s = plan, now_s

    def on_route(self, delivery: Delivery) -> None:
        reply = self._reader.read(delivery, RouteReply)
        if reply is not None:
            self._intake.step(reply, self._clock.now_s())

    def on_chunks(self, delivery: Delivery) -> None:
        batch = self._reader.read(delivery, TokenChunks)
        if batch is not None:
            self._intake.on_chunks(batch, self._clock.now_s())

    def sweep(self) -> None:
        """Look for phases that last too long."""
        self._intake.sweep(self._clock.now_s())

    async def _sweep(self) -> None:
        late = away = False
        checked_s = self._clock.now_s()
        while True:
            before_s = self._clock.now_s()
            await asyncio.sleep(self._config.sweep_s)
            now_s = self._clock.now_s()
            was_away, away = away, not self._bus.connected
            if was_away and not away:
                self._intake.step(Reconnected(), now_s)
            # Held up: what arrived meanwhile is unread, so silence proves nothing. Read first,
            # but not twice in a row, or a busy loop would never notice a dead replica.
            late = not late and now_s - before_s > LATE_TICKS * self._config.sweep_s
            if late:
                continue
            self.sweep()
            if now_s - checked_s >= CHECK_S:
                checked_s = now_s
                self._check()

    def _check(self) -> None:
        self.core.check()
        self._intake.forget(self._clock.now_s())

    async def _publish_completed(self) -> None:
        while True:
            await asyncio.sleep(self._config.completed_s)
            self.flush_completed()

    def flush_completed(self) -> None:
        while self._completed:
            count = min(len(self._completed), COMPLETED_BATCH_MAX)
            batch = tuple(self._completed.popleft() for _ in range(count))
            message = RequestsCompleted(ingress_id=self.ingress_id, completed=batch)
            self._send(
                subjects.REQUESTS_COMPLETED.of(ingress_id=self.ingress_id).pattern, message, ""
            )
