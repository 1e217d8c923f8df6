"""An ingress that replays traces in virtual time: the real intake and core, and what each request
felt like.

The gateway's IO is not here (HTTP, encoding, the outbox). Prompts have lengths and no content; what
matters of their content, which blocks they share with others, is in the records' hashes.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from msgspec.structs import replace

from loadgen.simulator.workshop import Facts
from loadgen.workload.records import TraceRecord
from services.ingress.completed import completed
from services.ingress.config import IngressConfig
from services.ingress.events import RequestFailed
from services.ingress.intake import Intake
from services.ingress.journey import Journey, Taken
from shared import subjects
from shared.core import Ask, Effect, Log, Publish, SetTimer, Started
from shared.messages.base import Message
from shared.messages.requests import (
    FinishReason,
    RequestCompleted,
    RequestsCompleted,
    RouteReply,
    SamplingParams,
    SubmitRequest,
    TokenChunks,
)

ANXIOUS_S = IngressConfig().sweep_s  # between looks while a request waits to be routed again
FORGET_S = 5.0
NONE = float("nan")
ID = "q"  # of a request, before its row


class NextArrival(Message, frozen=True, kw_only=True):
    """Timer: the next request of the trace arrives."""


class SweepTick(Message, frozen=True, kw_only=True):
    """Timer: look what is overdue."""


class AnxiousTick(Message, frozen=True, kw_only=True):
    """Timer: the same, between the others, since a request has found no replica."""


class ForgetTick(Message, frozen=True, kw_only=True):
    """Timer: let go of what is of no use any more."""


class CompletedTick(Message, frozen=True, kw_only=True):
    """Timer: publish what has ended since."""


Tick = SweepTick | AnxiousTick | ForgetTick | CompletedTick
SourceEvent = Started | NextArrival | Tick | RouteReply | TokenChunks


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the merged traffic."""

    at_s: float
    model_id: str
    record: TraceRecord


def _times() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class Columns:
    """What became of each request, in order of arrival; NaN: it did not come to that."""

    ttft_s: "array[float]" = field(default_factory=_times)
    e2e_s: "array[float]" = field(default_factory=_times)
    output_tokens: "array[int]" = field(default_factory=lambda: array("l"))
    ended: int = 0
    failed: dict[str, int] = field(default_factory=dict[str, int])

    def grow(self, count: int) -> None:
        self.ttft_s.extend([NONE] * count)
        self.e2e_s.extend([NONE] * count)
        self.output_tokens.extend([0] * count)


class _Client:
    """The choice of one request: notes when its tokens come."""

    __slots__ = ("journey", "row", "source")

    def __init__(self, source: "Source", journey: Journey, row: int) -> None:
        self.source, self.journey, self.row = source, journey, row

    def on_tokens(self, taken: Taken) -> bool:
        if taken.position == 0:
            source = self.source
            source.columns.ttft_s[self.row] = source.now_s - self.journey.arrived_s
        return False

    def on_end(self, finish: FinishReason) -> None:
        del finish  # the journey knows
        source, journey = self.source, self.journey
        columns = source.columns
        columns.e2e_s[self.row] = source.now_s - journey.arrived_s
        columns.output_tokens[self.row] = len(journey.tokens)
        source.on_completed(journey)

    def on_fail(self, failure: RequestFailed) -> None:
        failed = self.source.columns.failed
        failed[failure.code] = failed.get(failure.code, 0) + 1
        self.source.on_completed(self.journey)


class Source:
    """A core for the world; ``arrivals`` by ascending time, on the world's clock."""

    def __init__(
        self,
        config: IngressConfig,
        arrivals: Sequence[Arrival],
        *,
        ingress_id: str,
        output_tokens_limit: int | None = None,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """``output_tokens_limit``: what each client allows, at least what it will get; without
        it a client allows just that, as ``oserve replay`` does. ``on_done``: the last request has
        ended."""
        self._on_done = on_done
        self._config, self._ingress_id = config, ingress_id
        self._arrivals, self._next = arrivals, 0
        self._limit = output_tokens_limit
        self._intake = Intake(config, ingress_id=ingress_id, shell=self)
        self._samplings: dict[int, SamplingParams] = {}
        self._rows: dict[str, int] = {}
        self._effects: list[Effect] = []  # of the step in progress
        self._completed: list[RequestCompleted] = []
        self._anxious = False
        self.now_s = self.last_end_s = 0.0
        self.columns = Columns()
        self.columns.grow(len(arrivals))

    @property
    def done(self) -> bool:
        return self._next == len(self._arrivals) and not self._rows

    @property
    def open_requests(self) -> int:
        return len(self._rows)

    def step(self, event: SourceEvent, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        self._effects = effects
        self.now_s = now_s
        match event:
            case TokenChunks():
                self._intake.on_chunks(event, now_s)
            case RouteReply():
                self._intake.step(event, now_s)
                if event.failure is not None:
                    self._worry(now_s)
            case NextArrival():
                self._on_arrival(now_s)
            case CompletedTick():
                effects.append(self._publish_completed())
            case SweepTick():
                self._intake.sweep(now_s)
                effects.append(SetTimer(now_s + self._config.sweep_s, event))
            case AnxiousTick():
                self._anxious = False
                self._intake.sweep(now_s)
                self._worry(now_s)
            case ForgetTick():
                self._intake.forget(now_s)
                effects.append(SetTimer(now_s + FORGET_S, event))
            case Started():
                effects.extend(self._on_started(now_s))
            case _:
                assert_never(event)
        return effects

    def check(self) -> None:
        core = self._intake.core
        core.check()
        assert core.open_requests == len(self._intake.choices) == len(self._rows)

    def facts(self, request_id: str) -> Facts:
        """Of a request that may have ended elsewhere meanwhile."""
        record = self._arrivals[int(request_id.removeprefix(ID))].record
        if not record.hash_ids:
            return Facts(record.output_tokens)
        return Facts(record.output_tokens, record.hash_ids, record.hash_block_tokens)

    def on_completed(self, journey: Journey) -> None:
        """A request has ended, however it did."""
        del self._rows[journey.request_id]
        self.columns.ended += 1
        self.last_end_s = self.now_s
        if not self._completed:
            self._effects.append(SetTimer(self.now_s + self._config.completed_s, CompletedTick()))
        self._completed.append(completed(journey, self.now_s))
        if self.done:
            self._on_done()

    def perform(self, effect: Publish | Ask | Log) -> None:
        """Hand it to the world, as it would leave the process: later tokens of the journey are no
        part of a submission that was sent before they came."""
        match effect:
            case Publish(subject=subject, message=SubmitRequest() as submit):
                sent = replace(submit, output_tokens=list(submit.output_tokens))
                self._effects.append(Publish(subject, sent))
            case Log():  # an attempt was given up
                self._worry(self.now_s)
            case _:
                self._effects.append(effect)

    def _worry(self, now_s: float) -> None:
        """Whoever waits to be routed again waits as long as in production, however rarely the
        ingress looks at the others."""
        if self._anxious or self._config.sweep_s <= ANXIOUS_S:
            return
        due_s = [j.due_s for j in self._intake.core.journeys() if j.phase == "backing_off"]
        if due_s:
            self._anxious = True
            at_s = max(now_s + ANXIOUS_S, min(due_s))
            self._effects.append(SetTimer(at_s, AnxiousTick()))

    def on_ended(self, request_id: str) -> None:
        """The gateway lets go of trace headers here."""

    def on_unexpected(self) -> None:
        raise AssertionError("a worker speaks of an attempt that was never made")

    def _on_started(self, now_s: float) -> Iterable[Effect]:
        assert self._next == 0, "the source outlives every fault"
        if self._arrivals:
            yield SetTimer(max(now_s, self._arrivals[0].at_s), NextArrival())
        yield SetTimer(now_s + self._config.sweep_s, SweepTick())
        yield SetTimer(now_s + FORGET_S, ForgetTick())

    def _on_arrival(self, now_s: float) -> None:
        row = self._next
        arrival = self._arrivals[row]
        self._next = row + 1
        if self._next < len(self._arrivals):
            self._effects.append(SetTimer(self._arrivals[self._next].at_s, NextArrival()))
        record = arrival.record
        request_id = f"{ID}{row}"
        self._rows[request_id] = row
        journey = Journey(
            request_id=request_id,
            model_id=arrival.model_id,
            prompt_tokens=[0] * record.input_tokens,
            sampling=self._sampling(record.output_tokens),
            slo_class=record.slo_class or "standard",
            tenant=record.tenant,
            arrived_s=now_s,
            deadline_s=now_s + self._config.request_s,
            prefix_hashes=record.hash_ids,
        )
        self._intake.open(journey, _Client(self, journey, row), now_s)

    def _sampling(self, output_tokens: int) -> SamplingParams:
        limit = max(output_tokens, self._limit or 0)
        known = self._samplings.get(limit)
        if known is None:
            known = self._samplings[limit] = SamplingParams(output_tokens_max=limit)
        return known

    def _publish_completed(self) -> Publish:
        message = RequestsCompleted(ingress_id=self._ingress_id, completed=tuple(self._completed))
        self._completed.clear()
        return subjects.REQUESTS_COMPLETED.send(message, ingress_id=self._ingress_id)


def inputs(ingress_id: str) -> tuple[subjects.Subject[RouteReply], subjects.Subject[TokenChunks]]:
    return (
        subjects.ROUTE_REPLY.of(ingress_id=ingress_id),
        subjects.TOKEN_CHUNKS.of(ingress_id=ingress_id),
    )
