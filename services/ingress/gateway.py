"""Between HTTP and the bus: feeds the core, performs its effects, hands tokens to their choices.

Runs on one event loop and steps the core directly, without an inbox: every caller is already a
callback of that loop, and a step takes microseconds. What one client's request breaks costs only
that request: a batch of chunks is shared by many.
"""

import asyncio
import logging
from collections import deque

from services.ingress.choices import Choice, Choices
from services.ingress.config import IngressConfig
from services.ingress.core import IngressCore
from services.ingress.events import (
    Acknowledged,
    Arrived,
    AttemptLost,
    ClientGone,
    Finished,
    IngressEvent,
    Reconnected,
    ReplicaRestarted,
    StaleChunk,
    Sweep,
)
from services.ingress.journey import Journey, Taken, take
from services.ingress.outbox import Outbox
from services.ingress.reader import Reader
from shared import subjects
from shared.bus import Delivery
from shared.core import Ask, Log, Publish, Start
from shared.errors import PayloadTooLarge
from shared.messages.base import DataMessage, Message, encode
from shared.messages.plans import PlanInForce
from shared.messages.requests import (
    FinishReason,
    RequestCompleted,
    RequestsCompleted,
    RouteReply,
    SubmitRequest,
    TokenChunk,
    TokenChunks,
)
from shared.service import ServiceContext

log = logging.getLogger("oserve.ingress")

COMPLETED_MAX = 16_384
COMPLETED_BATCH_MAX = 512
STALE_REPLIES_MAX = 1_000  # aborts of stale attempts remembered between two checks
PLAN_FRESH_S = 10.0
CHECK_S = 1.0
LATE_TICKS = 4.0  # a sweep this many periods late says that the loop was held up


class Gateway:
    def __init__(self, config: IngressConfig, context: ServiceContext) -> None:
        self._config, self._context = config, context
        self._bus, self._clock = context.bus, context.clock
        self.ingress_id = context.instance_id
        self.core = IngressCore(config, ingress_id=self.ingress_id)
        self.choices = Choices()
        self._headers: dict[str, dict[str, str]] = {}  # trace context of traced requests
        self.outbox = Outbox(context.bus, context.metrics)
        self._completed: deque[RequestCompleted] = deque(maxlen=COMPLETED_MAX)
        self._heard: dict[str, float] = {}
        self._runs: dict[str, tuple[str, str]] = {}  # replica -> incarnation now, and before
        self._stale: set[tuple[str, int]] = set()
        self._plan: PlanInForce | None = None
        self._plan_s = 0.0
        self._reader = Reader(context.clock, context.metrics)
        metrics = context.metrics
        self._moved = metrics.counter("ingress_moves", "Attempts given up", ["reason"])
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
        self.choices.open(journey.request_id, choice)
        if headers:
            self._headers[journey.request_id] = headers
        self._step(Arrived(journey))

    def abort(self, request_id: str) -> None:
        """The client is gone, or wants no more."""
        self._headers.pop(request_id, None)
        self.choices.forget(request_id)
        self._step(ClientGone(request_id))

    def completed(self, record: RequestCompleted) -> None:
        """Publish the record with the next batch; the oldest is dropped when too many wait."""
        self._completed.append(record)

    def _step(self, event: IngressEvent) -> None:
        for effect in self.core.step(event, self._clock.now_s()):
            match effect:
                case Publish(subject=subject, message=message):
                    self._send(subject, message, "")
                case Ask(subject=subject, message=message, reply_to=reply_to):
                    self._send(subject, message, reply_to)
                case Start(job="fail", argument=failure):
                    self._headers.pop(failure.request_id, None)
                    self.choices.fail(failure)
                case Start(job="finish", argument=finished):
                    self._end(finished.request_id, finished.finish)
                case Log(event=name, fields=fields):
                    if name == "request.moved":
                        self._moved.labels(fields["reason"]).inc()
                    log.info(name, extra=fields)
                case _:
                    raise AssertionError(effect)

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
        self._step(lost)

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
            self._step(reply)

    def on_chunks(self, delivery: Delivery) -> None:
        batch = self._reader.read(delivery, TokenChunks)
        if batch is None:
            return
        now_s = self._clock.now_s()
        run = self._runs.get(batch.replica_id)
        if (run is not None and run[0] == batch.incarnation) or self._is_new_run(batch, run):
            self._heard[batch.replica_id] = now_s
        for chunk in batch.chunks:
            self._on_chunk(batch, chunk, now_s)

    def _is_new_run(self, batch: TokenChunks, known: tuple[str, str] | None) -> bool:
        """Another run of the worker leads the replica; False for the last words of the former."""
        if known is not None and known[1] == batch.incarnation:
            return False
        self._runs[batch.replica_id] = (batch.incarnation, known[0] if known else "")
        if known is not None:
            self._step(ReplicaRestarted(batch.replica_id, batch.incarnation))
        return True

    def _on_chunk(self, batch: TokenChunks, chunk: TokenChunk, now_s: float) -> None:
        request_id, attempt = chunk.request_id, chunk.attempt
        journey = self.core.journey(request_id)
        if journey is None or attempt != journey.attempt:
            if journey is None or attempt < journey.attempt:
                self._on_stale(batch.replica_id, chunk)
            else:
                self._unexpected.inc()
            return
        finish = chunk.finish
        if finish in ("refused", "failed", "abort"):  # an abort that we did not ask for
            reason = "refused" if finish == "refused" else "failed"
            self._step(AttemptLost(request_id, attempt, reason, chunk.failure, chunk.detail))
            return
        streaming = journey.phase == "streaming" and journey.incarnation == batch.incarnation
        if not streaming or journey.probing:
            self._step(Acknowledged(request_id, attempt, batch.incarnation))
            if journey.attempt != attempt or journey.phase != "streaming":
                return
        if chunk.tokens:
            verdict, taken = take(journey, chunk)
            if verdict == "gap":
                detail = f"position {chunk.position} came after {len(journey.tokens)} tokens"
                self._step(AttemptLost(request_id, attempt, "gap", detail=detail))
                return
            journey.heard_s = now_s
            if taken is not None and self._show(journey, taken, now_s):
                return
        if finish is not None:
            self._on_finish(journey, chunk, finish)

    def _show(self, journey: Journey, taken: Taken, now_s: float) -> bool:
        """Hand on new tokens; True if a stop string ended the request here."""
        if journey.first_token_s is None:
            journey.first_token_s = now_s
        ended = self.choices.show(journey.request_id, taken)
        if ended is None:
            return False
        # No harm if the engine has seen the stop string too.
        self._step(ClientGone(journey.request_id))
        journey.finish = ended
        self._headers.pop(journey.request_id, None)
        self.choices.end(journey.request_id, ended)
        return True

    def _on_finish(self, journey: Journey, chunk: TokenChunk, finish: FinishReason) -> None:
        if chunk.position + len(chunk.tokens) > len(journey.tokens):
            detail = f"ended at {chunk.position}, known are {len(journey.tokens)} tokens"
            self._step(AttemptLost(journey.request_id, chunk.attempt, "gap", detail=detail))
            return
        self._end(journey.request_id, finish)

    def _end(self, request_id: str, finish: FinishReason) -> None:
        self._headers.pop(request_id, None)
        self._step(Finished(request_id, finish))
        self.choices.end(request_id, finish)

    def _on_stale(self, replica_id: str, chunk: TokenChunk) -> None:
        """Somebody still works on what nobody waits for: say so, once between two checks."""
        key = (chunk.request_id, chunk.attempt)
        if chunk.finish is None and key not in self._stale and len(self._stale) < STALE_REPLIES_MAX:
            self._stale.add(key)
            self._step(StaleChunk(chunk.request_id, chunk.attempt, replica_id))

    def sweep(self) -> None:
        """Look for phases that last too long."""
        self._step(Sweep(self._heard))

    async def _sweep(self) -> None:
        late = away = False
        checked_s = self._clock.now_s()
        while True:
            before_s = self._clock.now_s()
            await asyncio.sleep(self._config.sweep_s)
            now_s = self._clock.now_s()
            was_away, away = away, not self._bus.connected
            if was_away and not away:
                self._step(Reconnected())
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
        self._stale.clear()
        self.core.check()
        horizon_s = self._clock.now_s() - self._config.request_s
        self._heard = {r: t for r, t in self._heard.items() if t > horizon_s}
        self._runs = {r: run for r, run in self._runs.items() if r in self._heard}

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
