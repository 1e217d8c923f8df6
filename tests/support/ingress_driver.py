"""Drives the ingress by hand, the core alone or the gateway on a bus in memory: a clock that moves
when told, route replies, token chunks."""

import asyncio
from typing import Any, TypeVar

import msgspec

from services.ingress.config import IngressConfig
from services.ingress.core import IngressCore
from services.ingress.events import (
    Acknowledged,
    Arrived,
    AttemptLost,
    IngressEvent,
    LossReason,
    RequestFailed,
    Sweep,
)
from services.ingress.gateway import Gateway
from services.ingress.journey import Journey, Taken
from shared.bus import Delivery
from shared.bus_memory import MemoryBus
from shared.clock import ManualClock
from shared.core import Ask, Effect, Log, Publish, Start
from shared.ids import CountedIds
from shared.mesh import MeshConfig
from shared.messages.base import encode
from shared.messages.requests import (
    AbortRequest,
    FailureCode,
    FinishReason,
    RouteReply,
    RouteRequest,
    SamplingParams,
    SubmitRequest,
    TokenChunk,
    TokenChunks,
)
from shared.service import ServiceContext
from shared.telemetry import Metrics, TelemetryConfig, Tracing

INGRESS = "in0"
T = TypeVar("T")


def journey(request_id: str = "a", *, output_tokens_max: int = 8, now_s: float = 0.0) -> Journey:
    return Journey(
        request_id=request_id,
        model_id="m",
        prompt_tokens=[1, 2, 3],
        sampling=SamplingParams(output_tokens_max=output_tokens_max),
        slo_class="standard",
        tenant="",
        arrived_s=now_s,
        deadline_s=now_s + 600.0,
    )


class DrivenIngress:
    """One core; ``feed`` checks the invariants after each step."""

    def __init__(self, **settings: Any) -> None:
        self.config = msgspec.convert(settings, IngressConfig)
        self.core = IngressCore(self.config, ingress_id=INGRESS)
        self.now_s = 0.0
        self.effects: list[Effect] = []  # of the last feed
        self.heard: dict[str, float] = {}

    def feed(self, event: IngressEvent) -> list[Effect]:
        self.effects = self.core.step(event, self.now_s)
        self.core.check()
        return self.effects

    def arrive(self, request_id: str = "a", **options: Any) -> Journey:
        new = journey(request_id, now_s=self.now_s, **options)
        self.feed(Arrived(new))
        return new

    def route(
        self, one: Journey, *, replica_id: str = "r0", attempt: int | None = None
    ) -> list[Effect]:
        reply = RouteReply(
            request_id=one.request_id,
            attempt=one.attempt if attempt is None else attempt,
            replica_id=replica_id,
            leader_id=f"leader-{replica_id}",
            epoch=3,
            request_type=2,
        )
        return self.feed(reply)

    def no_route(self, one: Journey, code: FailureCode, **fields: Any) -> list[Effect]:
        reply = RouteReply(
            request_id=one.request_id,
            attempt=one.attempt,
            failure=code,
            reason=f"because {code}",
            **fields,
        )
        return self.feed(reply)

    def acknowledge(
        self, one: Journey, *, incarnation: str = "i0", attempt: int | None = None
    ) -> list[Effect]:
        number = one.attempt if attempt is None else attempt
        return self.feed(Acknowledged(one.request_id, number, incarnation))

    def lose(
        self,
        one: Journey,
        reason: LossReason,
        failure: FailureCode | None = None,
        *,
        attempt: int | None = None,
    ) -> list[Effect]:
        number = one.attempt if attempt is None else attempt
        return self.feed(AttemptLost(one.request_id, number, reason, failure, "detail"))

    def streaming(
        self, request_id: str = "a", *, replica_id: str = "r0", **options: Any
    ) -> Journey:
        """A request that was routed, submitted and acknowledged."""
        one = self.arrive(request_id, **options)
        self.route(one, replica_id=replica_id)
        self.acknowledge(one)
        return one

    def sweep(self, *, after_s: float) -> list[Effect]:
        """Let time pass, then look what is overdue."""
        self.now_s += after_s
        return self.feed(Sweep(self.heard))

    def of(self, kind: type[T]) -> list[T]:
        """Messages and job arguments of one type among the last effects."""
        found: list[object] = []
        for effect in self.effects:
            match effect:
                case Publish(message=message) | Ask(message=message):
                    found.append(message)
                case Start(argument=argument):
                    found.append(argument)
                case _:
                    continue
        return [item for item in found if isinstance(item, kind)]

    @property
    def asked(self) -> list[RouteRequest]:
        return self.of(RouteRequest)

    @property
    def submitted(self) -> list[SubmitRequest]:
        return self.of(SubmitRequest)

    @property
    def aborted(self) -> list[AbortRequest]:
        return self.of(AbortRequest)

    @property
    def failed(self) -> list[RequestFailed]:
        return self.of(RequestFailed)

    @property
    def moved(self) -> list[str]:
        """Reasons of the moves in the last effects."""
        logs = [effect for effect in self.effects if isinstance(effect, Log)]
        return [str(entry.fields["reason"]) for entry in logs if entry.event == "request.moved"]


class SeenChoice:
    """A client's side that remembers what it was shown. ``stop_at`` is the number of tokens after
    which a stop string is complete."""

    def __init__(self, *, stop_at: int | None = None, broken: bool = False) -> None:
        self.tokens: list[int] = []
        self.ends: list[str] = []
        self._stop_at, self._broken = stop_at, broken

    def on_tokens(self, taken: Taken) -> bool:
        assert not self.ends, "tokens after the end"
        if self._broken:
            raise ZeroDivisionError
        assert taken.position == len(self.tokens)
        self.tokens += taken.tokens
        return self._stop_at is not None and len(self.tokens) >= self._stop_at

    def on_end(self, finish: FinishReason) -> None:
        self.ends.append(finish)

    def on_fail(self, failure: RequestFailed) -> None:
        self.ends.append(f"failed: {failure.code}")


def memory_context(bus: MemoryBus, clock: ManualClock) -> ServiceContext:
    """What a gateway needs, with nothing outside the process."""
    return ServiceContext(
        name="ingress",
        instance_id=INGRESS,
        bus=bus,
        clock=clock,
        ids=CountedIds(),
        mesh=MeshConfig(),
        metrics=Metrics("ingress"),
        tracing=Tracing(TelemetryConfig(), service="ingress", instance_id=INGRESS),
    )


class DrivenGateway:
    """A gateway on a bus in memory. ``settle`` lets its outbox publish; ``sent`` is what came."""

    def __init__(self, *, payload_bytes_max: int = 8 << 20, **settings: Any) -> None:
        self.bus = MemoryBus(payload_bytes_max=payload_bytes_max)
        self.clock = ManualClock()
        self.context = memory_context(self.bus, self.clock)
        self.gateway = Gateway(msgspec.convert(settings, IngressConfig), self.context)

    def open(self, request_id: str = "a", **options: Any) -> tuple[Journey, SeenChoice]:
        choice = options.pop("choice", None) or SeenChoice()
        one = journey(request_id, now_s=self.clock.time_s, **options)
        self.gateway.open(one, choice, None)
        return one, choice

    def route(self, one: Journey, *, replica_id: str = "r0", **fields: Any) -> None:
        reply = RouteReply(
            request_id=one.request_id,
            attempt=one.attempt,
            replica_id=replica_id,
            leader_id=f"leader-{replica_id}",
            **fields,
        )
        self.gateway.on_route(Delivery("route", encode(reply)))

    def chunks(
        self,
        *chunks: TokenChunk,
        replica_id: str = "r0",
        incarnation: str = "i0",
        worker_id: str = "",
    ) -> None:
        batch = TokenChunks(
            replica_id=replica_id,
            incarnation=incarnation,
            chunks=list(chunks),
            worker_id=worker_id,
        )
        self.gateway.on_chunks(Delivery("chunks", encode(batch)))

    def streaming(self, request_id: str = "a", **options: Any) -> tuple[Journey, SeenChoice]:
        one, choice = self.open(request_id, **options)
        self.route(one)
        self.chunks(TokenChunk(request_id=request_id, attempt=one.attempt))
        return one, choice

    def sweep(self, *, after_s: float) -> None:
        self.clock.time_s += after_s
        self.gateway.sweep()

    async def settle(self) -> list[tuple[str, bytes]]:
        """Everything published since the last call."""
        sending = asyncio.create_task(self.gateway.outbox.run())
        await asyncio.sleep(0)
        await self.gateway.outbox.flush(5.0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        sent = list(self.bus.sent)
        self.bus.sent.clear()
        return sent

    def counted(self, name: str, **labels: str) -> float:
        return self.context.metrics.registry.get_sample_value(f"oserve_{name}_total", labels) or 0
