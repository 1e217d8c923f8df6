"""Between HTTP and the bus: feeds the core, performs its effects, hands tokens to their choices.

Runs on one event loop and steps the core directly, without an inbox: every caller is already a
callback of that loop, and a step takes microseconds. What is published goes through one bounded
outbox, so that callbacks never wait for the broker.
"""

import asyncio
import logging
from collections import deque
from typing import Protocol

import msgspec

from services.ingress.config import IngressConfig
from services.ingress.core import (
    Acknowledged,
    Arrived,
    AttemptLost,
    ClientGone,
    Finished,
    IngressCore,
    IngressEvent,
    RequestFailed,
    StaleChunk,
    Sweep,
)
from services.ingress.journey import Journey, Taken, take
from shared import subjects
from shared.bus import Delivery
from shared.core import Ask, Log, Publish, Start
from shared.errors import BusUnavailable, PayloadTooLarge
from shared.messages.base import Message, decode, encode
from shared.messages.plans import PlanInForce
from shared.messages.requests import (
    FinishReason,
    RequestCompleted,
    RequestsCompleted,
    RouteReply,
    TokenChunk,
    TokenChunks,
)
from shared.service import ServiceContext

log = logging.getLogger("oserve.ingress")

OUTBOX_MAX = 65_536
COMPLETED_MAX = 16_384
COMPLETED_BATCH_MAX = 512
STALE_REPLIES_MAX = 1_000  # aborts of stale attempts remembered between two sweeps
PLAN_FRESH_S = 10.0


class Choice(Protocol):
    """Whoever shows one journey's tokens to a client."""

    def on_tokens(self, taken: Taken) -> bool:
        """Show them; True if a stop string ended the text: nothing more is wanted."""
        ...

    def on_end(self, finish: FinishReason) -> None: ...
    def on_fail(self, failure: RequestFailed) -> None: ...


class Gateway:
    def __init__(self, config: IngressConfig, context: ServiceContext) -> None:
        self._config, self._context = config, context
        self._bus, self._clock = context.bus, context.clock
        self.ingress_id = context.instance_id
        self.core = IngressCore(config, ingress_id=self.ingress_id)
        self._choices: dict[str, Choice] = {}
        self._headers: dict[str, dict[str, str]] = {}  # trace context of traced requests
        self._outbox: deque[tuple[str, bytes, str, dict[str, str] | None]] = deque()
        self._outbox_wake = asyncio.Event()
        self._completed: deque[RequestCompleted] = deque(maxlen=COMPLETED_MAX)
        self._heard: dict[str, float] = {}
        self._stale: set[tuple[str, int]] = set()
        self._plan: PlanInForce | None = None
        self._plan_s = 0.0
        self._decode_chunks = msgspec.msgpack.Decoder(TokenChunks).decode
        metrics = context.metrics
        self._moved = metrics.counter("ingress_moves", "Attempts given up", ["reason"])
        self._dropped = metrics.counter("ingress_outbox_dropped", "Messages the outbox refused")
        metrics.gauge("ingress_open_requests", "Requests owned now").set_function(
            lambda: self.core.open_requests
        )

    async def run(self) -> None:
        """Subscribe and work until cancelled."""
        me = self.ingress_id
        bus = self._bus
        await bus.subscribe(subjects.TOKEN_CHUNKS.of(ingress_id=me).pattern, self._on_chunks)
        await bus.subscribe(subjects.ROUTE_REPLY.of(ingress_id=me).pattern, self._on_route)
        await bus.subscribe(subjects.PLAN_IN_FORCE.pattern, self._on_plan)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_outbox())
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
        self._choices[journey.request_id] = choice
        if headers:
            self._headers[journey.request_id] = headers
        self._step(Arrived(journey))

    def abort(self, request_id: str) -> None:
        """The client is gone, or wants no more."""
        self._forget(request_id)
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
                    self._on_failed(failure)
                case Start(job="finish", argument=finished):
                    self._end(finished.request_id, finished.finish)
                case Log(event=name, fields=fields):
                    if name == "request.moved":
                        self._moved.labels(fields["reason"]).inc()
                    log.info(name, extra=fields)
                case _:
                    raise AssertionError(effect)

    def _send(self, subject: str, message: object, reply_to: str) -> None:
        assert isinstance(message, Message)
        if len(self._outbox) >= OUTBOX_MAX:
            # Lost like any message can be: its phase's deadline will repeat it.
            self._dropped.inc()
            return
        headers = self._headers.get(getattr(message, "request_id", "")) if self._headers else None
        self._outbox.append((subject, encode(message), reply_to, headers))
        self._outbox_wake.set()

    async def _send_outbox(self) -> None:
        while True:
            while self._outbox:
                subject, payload, reply_to, headers = self._outbox.popleft()
                try:
                    await self._bus.publish(subject, payload, reply_to=reply_to, headers=headers)
                except (BusUnavailable, PayloadTooLarge) as error:
                    log.warning("publish.failed", extra={"subject": subject, "error": str(error)})
            self._outbox_wake.clear()
            await self._outbox_wake.wait()

    def _on_plan(self, delivery: Delivery) -> None:
        plan = decode(delivery.payload, PlanInForce)
        if self._plan is None or plan.epoch >= self._plan.epoch:
            self._plan, self._plan_s = plan, self._clock.now_s()

    def _on_route(self, delivery: Delivery) -> None:
        self._step(decode(delivery.payload, RouteReply))

    def _on_chunks(self, delivery: Delivery) -> None:
        batch = self._decode_chunks(delivery.payload)
        now_s = self._clock.now_s()
        self._heard[batch.replica_id] = now_s
        for chunk in batch.chunks:
            self._on_chunk(batch, chunk, now_s)

    def _on_chunk(self, batch: TokenChunks, chunk: TokenChunk, now_s: float) -> None:
        request_id, attempt = chunk.request_id, chunk.attempt
        journey = self.core.journey(request_id)
        if journey is None or attempt < journey.attempt:
            self._on_stale(batch.replica_id, chunk)
            return
        finish = chunk.finish
        if finish in ("refused", "failed"):
            self._step(
                AttemptLost(request_id, attempt, finish, chunk.failure, chunk.detail)  # type: ignore[arg-type]
            )
            return
        streaming = journey.phase == "streaming" and journey.incarnation == batch.incarnation
        if not streaming or journey.probing:
            self._step(Acknowledged(request_id, attempt, batch.incarnation))
            if journey.attempt != attempt:
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
        choice = self._choices[journey.request_id]
        if not choice.on_tokens(taken):
            return False
        self.abort(journey.request_id)  # no harm if the engine has seen the stop string too
        journey.finish = "stop"
        choice.on_end("stop")
        return True

    def _on_finish(self, journey: Journey, chunk: TokenChunk, finish: FinishReason) -> None:
        if chunk.position + len(chunk.tokens) > len(journey.tokens):
            detail = f"ended at {chunk.position}, known are {len(journey.tokens)} tokens"
            self._step(AttemptLost(journey.request_id, chunk.attempt, "gap", detail=detail))
            return
        self._end(journey.request_id, finish)

    def _end(self, request_id: str, finish: FinishReason) -> None:
        choice = self._choices.get(request_id)
        self._forget(request_id)
        self._step(Finished(request_id, finish))
        if choice is not None:
            choice.on_end(finish)

    def _on_failed(self, failure: RequestFailed) -> None:
        choice = self._choices.get(failure.request_id)
        self._forget(failure.request_id)
        if choice is not None:
            choice.on_fail(failure)

    def _forget(self, request_id: str) -> None:
        self._choices.pop(request_id, None)
        self._headers.pop(request_id, None)

    def _on_stale(self, replica_id: str, chunk: TokenChunk) -> None:
        """Somebody still works on what nobody waits for: say so, once per sweep."""
        key = (chunk.request_id, chunk.attempt)
        if chunk.finish is None and key not in self._stale and len(self._stale) < STALE_REPLIES_MAX:
            self._stale.add(key)
            self._step(StaleChunk(chunk.request_id, chunk.attempt, replica_id))

    async def _sweep(self) -> None:
        ticks_per_check = max(1, round(1.0 / self._config.sweep_s))
        ticks = 0
        while True:
            await asyncio.sleep(self._config.sweep_s)
            self._step(Sweep(self._heard))
            ticks += 1
            if ticks % ticks_per_check == 0:
                self._stale.clear()
                self.core.check()
                horizon_s = self._clock.now_s() - self._config.request_s
                self._heard = {r: t for r, t in self._heard.items() if t > horizon_s}

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
