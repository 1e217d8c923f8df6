"""The ingress under any network: whatever is lost, late, repeated or reordered, a client gets each
token once and in order, and is told exactly once how its request ended."""

import asyncio
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.ingress.journey import Journey
from shared.bus import Delivery
from shared.messages.base import decode, encode
from shared.messages.requests import (
    AbortRequest,
    FailureCode,
    FinishReason,
    RouteReply,
    RouteRequest,
    SubmitRequest,
    TokenChunk,
)
from tests.support.ingress_driver import DrivenGateway, SeenChoice

REQUESTS_MAX = 8
REPLICAS = st.sampled_from(["r0", "r1"])
INCARNATIONS = st.sampled_from(["i0", "i0", "i0", "i1", "i2"])


@dataclass
class Client:
    """One request, and all it should ever be shown."""

    journey: Journey
    choice: SeenChoice
    answer: list[int]
    gone: bool = False

    @property
    def last(self) -> FinishReason:
        full = len(self.answer) == self.journey.sampling.output_tokens_max
        return "length" if full else "stop"


class AnyNetwork(RuleBasedStateMachine):
    """Workers here are honest (token ``i`` of a request is always the same), the network is not:
    any chunk of any attempt may come at any time, from any run of a worker."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self.driven = DrivenGateway(attempts_max=12)
        self.clients: dict[str, Client] = {}
        self.asked: list[RouteRequest] = []
        self.submitted: list[SubmitRequest] = []

    @rule(data=st.data(), tokens_max=st.integers(3, 8))
    def arrive(self, data: st.DataObject, tokens_max: int) -> None:
        if len(self.clients) >= REQUESTS_MAX:
            return
        name = f"q{len(self.clients)}"
        length = data.draw(st.integers(3, tokens_max))
        answer = [100 * len(self.clients) + i for i in range(length)]
        journey, choice = self.driven.open(name, output_tokens_max=tokens_max)
        self.clients[name] = Client(journey, choice, answer)
        self._settle()
        self._answer(self.asked[-1], "r0")

    @precondition(lambda self: self.submitted)
    @rule(behind=st.integers(-1, 3), count=st.integers(0, 3))
    def more_tokens(self, behind: int, count: int) -> None:
        """Of the newest submission: roughly what comes next."""
        submit = self.submitted[-1]
        client = self.clients[submit.request_id]
        length = len(client.answer)
        start = min(length, max(0, len(client.choice.tokens) - behind))
        end = min(length, start + count)
        finish = client.last if end == length else None
        self._chunk(submit, "i0", start=start, end=end, finish=finish)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), replica_id=REPLICAS)
    def answer_question(self, data: st.DataObject, replica_id: str) -> None:
        """Any question, also one answered before."""
        question = data.draw(st.sampled_from(self.asked))
        self._answer(question, replica_id)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), code=st.sampled_from(["no_replica", "overloaded", "draining"]))
    def no_route(self, data: st.DataObject, code: FailureCode) -> None:
        question = data.draw(st.sampled_from(self.asked))
        reply = RouteReply(request_id=question.request_id, attempt=question.attempt, failure=code)
        self.driven.gateway.on_route(Delivery("route", encode(reply)))
        self._settle()

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), incarnation=INCARNATIONS)
    def tokens(self, data: st.DataObject, incarnation: str) -> None:
        """Any stretch of the answer, in any attempt, with the end if it reaches it."""
        submit = data.draw(st.sampled_from(self.submitted))
        client = self.clients[submit.request_id]
        start = data.draw(st.integers(0, len(client.answer)))
        end = data.draw(st.integers(start, len(client.answer)))
        finish = client.last if end == len(client.answer) and data.draw(st.booleans()) else None
        self._chunk(submit, incarnation, start=start, end=end, finish=finish)

    @precondition(lambda self: self.submitted)
    @rule(
        data=st.data(),
        finish=st.sampled_from(["refused", "failed", "abort"]),
        code=st.sampled_from(["engine", "draining", "stale_epoch", "overloaded"]),
    )
    def lose(self, data: st.DataObject, finish: FinishReason, code: FailureCode) -> None:
        submit = data.draw(st.sampled_from(self.submitted))
        chunk = TokenChunk(
            request_id=submit.request_id, attempt=submit.attempt, finish=finish, failure=code
        )
        self.driven.chunks(chunk, replica_id=submit.replica_id)
        self._settle()

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), ahead=st.integers(1, 3))
    def attempt_never_made(self, data: st.DataObject, ahead: int) -> None:
        submit = data.draw(st.sampled_from(self.submitted))
        journey = self.clients[submit.request_id].journey
        chunk = TokenChunk(
            request_id=submit.request_id, attempt=journey.attempt + ahead, tokens=[666]
        )
        self.driven.chunks(chunk, replica_id=submit.replica_id)
        self._settle()

    @rule(replica_id=REPLICAS, incarnation=INCARNATIONS)
    def heartbeat(self, replica_id: str, incarnation: str) -> None:
        self.driven.chunks(replica_id=replica_id, incarnation=incarnation)
        self._settle()

    @rule(payload=st.binary(max_size=20))
    def rubbish(self, payload: bytes) -> None:
        for handler in (self.driven.gateway.on_chunks, self.driven.gateway.on_route):
            handler(Delivery("any", payload))

    @rule(after_s=st.sampled_from([0.05, 0.6, 1.1, 2.5, 6.0]))
    def time_passes(self, after_s: float) -> None:
        self.driven.sweep(after_s=after_s)
        self._settle()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.clients)))
        client = self.clients[name]
        if not client.choice.ends:
            client.gone = True
        self.driven.gateway.abort(name)
        self._settle()

    @invariant()
    def each_token_once_and_in_order(self) -> None:
        for client in self.clients.values():
            shown = client.choice.tokens
            assert shown == client.answer[: len(shown)]
            assert client.journey.tokens == shown

    @invariant()
    def one_end_and_only_when_complete(self) -> None:
        for client in self.clients.values():
            assert len(client.choice.ends) + client.gone == (not client.journey.live)
            if client.choice.ends and not client.choice.ends[0].startswith("failed"):
                assert client.choice.tokens == client.answer
                assert client.choice.ends == [client.last]

    @invariant()
    def nothing_leaks(self) -> None:
        gateway = self.driven.gateway
        gateway.core.check()
        live = sum(client.journey.live for client in self.clients.values())
        assert gateway.core.open_requests == len(gateway.choices) == live

    def teardown(self) -> None:
        """With an honest network from now on, everything that is open comes to its end."""
        try:
            self._end_well()
        finally:
            self._runner.close()

    def _end_well(self) -> None:
        for _ in range(20):
            for question in self.asked[-2 * REQUESTS_MAX :]:
                self._answer(question, "r2")
            for submit in self.submitted[-2 * REQUESTS_MAX :]:
                client = self.clients[submit.request_id]
                start, end = len(submit.output_tokens), len(client.answer)
                self._chunk(submit, "i0", start=start, end=end, finish=client.last)
            self.driven.sweep(after_s=1.1)
            self._settle()
        self.one_end_and_only_when_complete()
        self.nothing_leaks()
        assert self.driven.gateway.core.open_requests == 0

    def _answer(self, question: RouteRequest, replica_id: str) -> None:
        reply = RouteReply(
            request_id=question.request_id,
            attempt=question.attempt,
            replica_id=replica_id,
            leader_id=replica_id,
        )
        self.driven.gateway.on_route(Delivery("route", encode(reply)))
        self._settle()

    def _chunk(
        self,
        submit: SubmitRequest,
        incarnation: str,
        *,
        start: int,
        end: int,
        finish: FinishReason | None,
    ) -> None:
        chunk = TokenChunk(
            request_id=submit.request_id,
            attempt=submit.attempt,
            position=start,
            tokens=self.clients[submit.request_id].answer[start:end],
            finish=finish,
        )
        self.driven.chunks(chunk, replica_id=submit.replica_id, incarnation=incarnation)
        self._settle()

    def _settle(self) -> None:
        """Read what the ingress said, and check what it tells workers."""
        for subject, payload in self._runner.run(self.driven.settle()):
            if subject.endswith(".submit"):
                submit = decode(payload, SubmitRequest)
                answer = self.clients[submit.request_id].answer
                assert submit.output_tokens == answer[: len(submit.output_tokens)]
                self.submitted.append(submit)
            elif subject.endswith(".abort"):
                abort = decode(payload, AbortRequest)
                journey = self.clients[abort.request_id].journey
                assert not journey.live or abort.attempt < journey.attempt
            elif subject.endswith(".route"):
                self.asked.append(decode(payload, RouteRequest))


TestAnyNetwork = AnyNetwork.TestCase
TestAnyNetwork.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
