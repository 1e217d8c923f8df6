"""The ingress in virtual time: the real intake and core, driven as the gateway drives them.

What is not here is the gateway's IO: HTTP, encoding and the outbox. Requests arrive as timers.
"""

from collections.abc import Iterable
from typing import assert_never

import msgspec

from loadgen.simulator.clients import Clients, Order
from services.ingress.config import IngressConfig
from services.ingress.core import IngressCore
from services.ingress.intake import Intake
from services.ingress.journey import Journey
from shared import subjects
from shared.core import Ask, Effect, Log, Publish, SetTimer, Started
from shared.messages.base import Message
from shared.messages.requests import (
    RouteReply,
    SamplingParams,
    SubmitRequest,
    TokenChunks,
)
from shared.subjects import Subject

SWEEP_S = 0.2  # coarser than in production, where it costs nothing
FORGET_S = 1.0
PROMPT = (1, 2, 3)


class Arrival(Message, frozen=True, kw_only=True):
    """Timer: the request arrives."""

    request_id: str


class Departure(Message, frozen=True, kw_only=True):
    """Timer: the client has lost patience."""

    request_id: str


class SweepTick(Message, frozen=True, kw_only=True):
    """Timer: look what is overdue."""


class ForgetTick(Message, frozen=True, kw_only=True):
    """Timer: let go of what is of no use any more."""


Tick = SweepTick | ForgetTick
IngressEvent = Started | Arrival | Departure | Tick | RouteReply | TokenChunks


def inputs(ingress_id: str) -> tuple[Subject[RouteReply], Subject[TokenChunks]]:
    return (
        subjects.ROUTE_REPLY.of(ingress_id=ingress_id),
        subjects.TOKEN_CHUNKS.of(ingress_id=ingress_id),
    )


class Ingress:
    """One process; the next of the same name knows nothing of its requests."""

    def __init__(
        self, config: IngressConfig, clients: Clients, *, ingress_id: str, model_id: str
    ) -> None:
        self._config, self._clients, self._model_id = config, clients, model_id
        self._intake = Intake(config, ingress_id=ingress_id, shell=self)
        self._effects: list[Effect] = []  # of the step in progress

    @property
    def core(self) -> IngressCore:
        return self._intake.core

    def step(self, event: IngressEvent, now_s: float) -> list[Effect]:
        self._effects = []
        match event:
            case TokenChunks():
                self._intake.on_chunks(event, now_s)
            case RouteReply():
                self._intake.step(event, now_s)
            case SweepTick():
                self._intake.sweep(now_s)
                self._effects.append(SetTimer(now_s + SWEEP_S, event))
            case ForgetTick():
                self._intake.forget(now_s)
                self._effects.append(SetTimer(now_s + FORGET_S, event))
            case Arrival(request_id=request_id):
                self._on_arrival(self._clients.order(request_id), now_s)
            case Departure(request_id=request_id):
                if self._clients.leave(request_id):
                    self._intake.abort(request_id, now_s)
            case Started():
                self._effects.extend(self._on_started(now_s))
            case _:
                assert_never(event)
        return self._effects

    def check(self) -> None:
        self.core.check()
        self._clients.check()
        assert self.core.open_requests == len(self._intake.choices) == len(self._clients.open)

    def perform(self, effect: Publish | Ask | Log) -> None:
        """Hand it to the world, as it would leave the process: later tokens of the journey are no
        part of a submission that was sent before they came."""
        match effect:
            case Publish(subject=subject, message=SubmitRequest() as submit):
                tokens = list(submit.output_tokens)
                sent = msgspec.structs.replace(submit, output_tokens=tokens)
                self._effects.append(Publish(subject, sent))
            case _:
                self._effects.append(effect)

    def on_ended(self, request_id: str) -> None:
        """The gateway lets go of trace headers here."""

    def on_unexpected(self) -> None:
        raise AssertionError("a worker speaks of an attempt that was never made")

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        self._clients.lose()
        for order in self._clients.ahead():
            arrival = Arrival(request_id=order.request_id)
            yield SetTimer(max(order.at_s, now_s), arrival)  # who finds nobody there calls again
        yield SetTimer(now_s + SWEEP_S, SweepTick())
        yield SetTimer(now_s + FORGET_S, ForgetTick())

    def _on_arrival(self, order: Order, now_s: float) -> None:
        journey = Journey(
            request_id=order.request_id,
            model_id=self._model_id,
            prompt_tokens=list(PROMPT),
            sampling=SamplingParams(output_tokens_max=order.output_tokens),
            slo_class="standard",
            tenant="",
            arrived_s=now_s,
            deadline_s=now_s + self._config.request_s,
        )
        self._intake.open(journey, self._clients.arrive(order, journey), now_s)
        if order.patience_s is not None:
            departure = Departure(request_id=order.request_id)
            self._effects.append(SetTimer(now_s + order.patience_s, departure))
