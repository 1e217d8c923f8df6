"""A client and its ingress in one core: submits requests, and tries again until each has ended.

It follows the ingress's side of the protocol: route, submit, resubmit with the tokens so far when
a replica refuses, fails, falls silent, starts anew or leaves a gap. It asserts that every token
is the right one at its position, which a lost or repeated token cannot be.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import assert_never

from loadgen.simulator.engine import token_at
from shared import subjects
from shared.core import Ask, Effect, SetTimer, Started
from shared.messages.base import Message
from shared.messages.requests import (
    AbortRequest,
    RouteReply,
    RouteRequest,
    SamplingParams,
    SubmitRequest,
    TokenChunk,
    TokenChunks,
)

ROUTE_TIMEOUT_S = 0.5
ACCEPT_TIMEOUT_S = 1.0
STALL_TIMEOUT_S = 2.0
EXCLUDED_MAX = 4


class Arrival(Message, frozen=True, kw_only=True):
    """Timer: the request arrives."""

    request_id: str
    output_tokens: int


class Deadline(Message, frozen=True, kw_only=True):
    """Timer: look whether this attempt has made progress."""

    request_id: str
    attempt: int


ClientEvent = Started | Arrival | Deadline | RouteReply | TokenChunks


@dataclass(slots=True)
class _Open:
    """A request that has not ended. ``due_s`` is when its attempt counts as stuck."""

    request_id: str
    output_tokens: int
    attempt: int = 0
    due_s: float = 0.0
    replica_id: str = ""
    leader_id: str = ""
    incarnation: str = ""
    tokens: list[int] = field(default_factory=list[int])
    excluded: list[str] = field(default_factory=list[str])
    leaders: dict[int, str] = field(default_factory=dict[int, str])  # attempt -> worker asked


class Client:
    def __init__(
        self, ingress_id: str, model_id: str, arrivals: list[tuple[float, Arrival]]
    ) -> None:
        self._ingress_id, self._model_id = ingress_id, model_id
        self._arrivals = arrivals
        self._open: dict[str, _Open] = {}
        self.ended: dict[str, int] = {}  # request -> attempts it took
        self.expected = len(arrivals)

    def step(self, event: ClientEvent, now_s: float) -> list[Effect]:
        match event:
            case Started():
                effects: Iterable[Effect] = [SetTimer(at_s, e) for at_s, e in self._arrivals]
            case Arrival():
                effects = self._on_arrival(event, now_s)
            case Deadline():
                effects = self._on_deadline(event, now_s)
            case RouteReply():
                effects = self._on_route_reply(event, now_s)
            case TokenChunks():
                effects = self._on_token_chunks(event, now_s)
            case _:
                assert_never(event)
        return list(effects)

    def check(self) -> None:
        assert not self._open.keys() & self.ended.keys()
        for request in self._open.values():
            assert len(request.tokens) < request.output_tokens, request

    @property
    def done(self) -> bool:
        return len(self.ended) == self.expected

    @property
    def open(self) -> list[str]:
        return sorted(self._open)

    def _on_arrival(self, event: Arrival, now_s: float) -> Iterable[Effect]:
        request = _Open(event.request_id, event.output_tokens)
        self._open[event.request_id] = request
        return self._route(request, now_s)

    def _on_deadline(self, event: Deadline, now_s: float) -> Iterable[Effect]:
        request = self._open.get(event.request_id)
        if request is None or request.attempt != event.attempt:
            return
        if now_s >= request.due_s:
            yield from self._again(request, now_s)
        else:
            yield SetTimer(request.due_s, event)

    def _on_route_reply(self, event: RouteReply, now_s: float) -> Iterable[Effect]:
        request = self._open.get(event.request_id)
        if request is None or event.attempt != request.attempt or request.replica_id:
            return
        if event.failure is not None:
            return  # the deadline of this attempt asks again
        request.replica_id, request.leader_id = event.replica_id, event.leader_id
        request.leaders[request.attempt] = event.leader_id
        request.due_s = now_s + ACCEPT_TIMEOUT_S
        yield SetTimer(
            request.due_s, Deadline(request_id=request.request_id, attempt=request.attempt)
        )
        submit = SubmitRequest(
            request_id=request.request_id,
            attempt=request.attempt,
            ingress_id=self._ingress_id,
            epoch=event.epoch,
            replica_id=event.replica_id,
            prompt_tokens=[1, 2, 3],
            sampling=SamplingParams(output_tokens_max=request.output_tokens),
            output_tokens=list(request.tokens),
        )
        yield subjects.SUBMIT_REQUEST.send(submit, worker_id=event.leader_id)

    def _on_token_chunks(self, event: TokenChunks, now_s: float) -> Iterable[Effect]:
        if not event.chunks:
            for request in self._open.values():  # a heartbeat keeps alive what was accepted
                if (request.replica_id, request.incarnation) == (
                    event.replica_id,
                    event.incarnation,
                ):
                    request.due_s = now_s + STALL_TIMEOUT_S
        for chunk in event.chunks:
            request = self._open.get(chunk.request_id)
            if request is not None and chunk.attempt == request.attempt:
                yield from self._on_chunk(request, chunk, event, now_s)
            elif request is not None and chunk.finish is None:
                yield from self._abort(request, chunk.attempt, event.replica_id)

    def _on_chunk(
        self, request: _Open, chunk: TokenChunk, event: TokenChunks, now_s: float
    ) -> Iterable[Effect]:
        if request.incarnation not in ("", event.incarnation):
            yield from self._again(request, now_s)
            return
        request.incarnation = event.incarnation
        request.due_s = now_s + STALL_TIMEOUT_S
        if chunk.finish in ("refused", "failed", "abort"):
            yield from self._again(request, now_s)
            return
        if not chunk.tokens:
            return
        known = len(request.tokens)
        if chunk.position > known:
            yield from self._again(request, now_s)
            return
        request.tokens.extend(chunk.tokens[known - chunk.position :])
        for position in range(known, len(request.tokens)):
            assert request.tokens[position] == token_at(request.request_id, position), request
        if len(request.tokens) == request.output_tokens:
            assert request.request_id not in self.ended, request
            self.ended[request.request_id] = request.attempt + 1
            del self._open[request.request_id]

    def _again(self, request: _Open, now_s: float) -> Iterable[Effect]:
        """Give this attempt up and ask for another replica."""
        if request.replica_id:
            request.excluded = [*request.excluded, request.replica_id][-EXCLUDED_MAX:]
            yield from self._abort(request, request.attempt, request.replica_id)
        request.attempt += 1
        request.replica_id = request.leader_id = request.incarnation = ""
        yield from self._route(request, now_s)

    def _route(self, request: _Open, now_s: float) -> Iterable[Effect]:
        request.due_s = now_s + ROUTE_TIMEOUT_S
        yield SetTimer(
            request.due_s, Deadline(request_id=request.request_id, attempt=request.attempt)
        )
        question = RouteRequest(
            request_id=request.request_id,
            model_id=self._model_id,
            input_tokens=3,
            output_tokens_max=request.output_tokens,
            excluded=tuple(request.excluded),
            attempt=request.attempt,
        )
        reply_to = subjects.ROUTE_REPLY.of(ingress_id=self._ingress_id).pattern
        yield Ask(subjects.ROUTE.pattern, question, reply_to)

    @staticmethod
    def _abort(request: _Open, attempt: int, replica_id: str) -> Iterable[Effect]:
        if attempt in request.leaders:
            abort = AbortRequest(
                request_id=request.request_id, attempt=attempt, replica_id=replica_id
            )
            yield subjects.ABORT_REQUEST.send(abort, worker_id=request.leaders[attempt])
