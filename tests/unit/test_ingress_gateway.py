"""The gateway and the exchange: bus messages in, a client's bytes out, and nothing left behind."""

import asyncio
import gc

import pytest

from services.ingress import outbox
from services.ingress.events import RequestFailed
from services.ingress.exchange import SlowClient, Streamed, StreamedChoice, Whole, WholeChoice
from services.ingress.gateway import COMPLETED_BATCH_MAX, COMPLETED_MAX, PLAN_FRESH_S
from services.ingress.journey import Taken
from services.ingress.openai_api import ParsedRequest
from services.ingress.openai_errors import ApiError
from services.ingress.openai_format import DONE, ResponseHead
from shared.bus import Delivery
from shared.messages.base import decode, encode
from shared.messages.plans import DeploymentPlan, PlanInForce
from shared.messages.requests import (
    AbortRequest,
    RequestCompleted,
    RequestsCompleted,
    SubmitRequest,
    TokenChunk,
)
from shared.text import byte_tokenizer
from tests.support.ingress_driver import DrivenGateway, SeenChoice, journey

HEAD = ResponseHead(kind="completion", response_id="cmpl-1", model="m", created_unix_s=0)


def chunk(position: int, tokens: list[int], **fields: object) -> TokenChunk:
    options = {"request_id": "a", "attempt": 0} | fields
    return TokenChunk(position=position, tokens=tokens, **options)  # type: ignore[arg-type]


def of(sent: list[tuple[str, bytes]], verb: str) -> list[bytes]:
    return [payload for subject, payload in sent if subject.endswith(f".{verb}")]


class TestGateway:
    async def test_tokens_reach_their_choice_and_its_end(self) -> None:
        """A client would wait for tokens that have arrived, or its request never be let go."""
        driven = DrivenGateway()
        one, choice = driven.streaming()
        driven.chunks(chunk(0, [5, 6]), chunk(2, [7], finish="length"))
        assert (choice.tokens, choice.ends) == ([5, 6, 7], ["length"])
        assert not one.live
        assert (driven.gateway.core.open_requests, len(driven.gateway.choices)) == (0, 0)

    async def test_usage_is_exact_over_a_move(self) -> None:
        """A client would be billed for tokens that two replicas made."""
        driven = DrivenGateway()
        one, choice = driven.streaming()
        driven.chunks(chunk(0, [5, 6, 7]))
        driven.chunks(chunk(0, [], finish="failed", failure="engine"))
        driven.route(one, replica_id="r1")
        again = {"attempt": 1}
        driven.chunks(chunk(0, [5, 6], **again), replica_id="r1", incarnation="x")
        driven.chunks(chunk(2, [7, 8], **again), replica_id="r1", incarnation="x")
        driven.chunks(chunk(4, [], finish="stop", **again), replica_id="r1", incarnation="x")
        assert (choice.tokens, choice.ends) == ([5, 6, 7, 8], ["stop"])

    @pytest.mark.parametrize("late", [chunk(2, [7]), chunk(2, [7], finish="length")])
    async def test_tokens_behind_a_gap_start_the_next_attempt_at_once(
        self, late: TokenChunk
    ) -> None:
        """The client would miss a token, or wait for it until the probe."""
        driven = DrivenGateway()
        one, choice = driven.streaming()
        driven.chunks(chunk(0, [5]), late)
        assert (choice.tokens, choice.ends, one.attempt, one.excluded) == ([5], [], 1, ())

    async def test_an_end_behind_a_gap_is_no_end(self) -> None:
        """The client would take an answer without its last tokens for the whole."""
        driven = DrivenGateway()
        one, choice = driven.streaming()
        driven.chunks(chunk(0, [5]), chunk(3, [], finish="length"))
        assert (choice.ends, one.attempt) == ([], 1)

    async def test_an_engine_that_says_too_much_is_cut_off(self) -> None:
        """One faulty worker would break the ingress's invariant, and with it every stream."""
        driven = DrivenGateway()
        one, choice = driven.streaming(output_tokens_max=2)
        driven.chunks(chunk(0, [5, 6, 7, 8]))
        driven.gateway.core.check()
        assert choice.tokens == one.tokens == [5, 6]

    async def test_an_abort_nobody_asked_for_is_no_end(self) -> None:
        """A client would take half an answer for the whole."""
        driven = DrivenGateway()
        one, choice = driven.streaming()
        driven.chunks(chunk(0, [5], finish=None), chunk(1, [], finish="abort"))
        assert (choice.ends, one.phase, one.attempt) == ([], "routing", 1)

    async def test_what_cannot_be_read_is_counted_and_costs_nothing_else(self) -> None:
        """One broken message would silence the subscription, and every stream with it."""
        driven = DrivenGateway()
        _, choice = driven.streaming()
        for payload in (b"", b"\xc1", b"\x81\xa1a\x01", encode(RequestCompleted(
            request_id="a", outcome="completed", model_id="m"))):  # fmt: skip
            driven.gateway.on_chunks(Delivery("c", payload))
            driven.gateway.on_route(Delivery("r", payload))
            driven.gateway.on_plan(Delivery("p", payload))
        for message in ("TokenChunks", "RouteReply", "PlanInForce"):
            assert driven.counted("ingress_undecodable", message=message) == 4
        driven.chunks(chunk(0, [5], finish="length"))
        assert choice.ends == ["length"]

    async def test_a_choice_that_breaks_fails_alone(self) -> None:
        """A fault in one answer would lose the tokens of all others in the same message."""
        driven = DrivenGateway()
        broken = SeenChoice(broken=True)
        one, _ = driven.streaming("bad", choice=broken)
        _, choice = driven.streaming("good")
        driven.chunks(
            chunk(0, [5], request_id="bad"), chunk(0, [6], request_id="good", finish="length")
        )
        assert broken.ends == ["failed: engine"]
        assert one.finish == "failed"
        assert choice.tokens == [6]
        assert len(driven.gateway.choices) == 0
        assert len(of(await driven.settle(), "abort")) == 1

    async def test_a_stop_string_aborts_the_engine(self) -> None:
        """The engine would go on behind an answer that has ended."""
        driven = DrivenGateway()
        one, choice = driven.streaming(choice=SeenChoice(stop_at=2))
        driven.chunks(chunk(0, [5, 6]), chunk(2, [7]))
        assert (choice.tokens, choice.ends, one.finish) == ([5, 6], ["stop"], "stop")
        assert len(of(await driven.settle(), "abort")) >= 1

    async def test_chunks_of_a_request_that_is_gone_are_answered_once_a_second(self) -> None:
        """An engine that missed an abort would run on, or each of its steps be answered."""
        driven = DrivenGateway()
        driven.streaming()
        driven.gateway.abort("a")
        await driven.settle()
        for position in range(5):
            driven.chunks(chunk(position, [5]))
        (payload,) = of(await driven.settle(), "abort")
        assert decode(payload, AbortRequest).attempt == 0

    async def test_a_new_run_of_a_worker_moves_the_requests_of_the_former(self) -> None:
        """They would wait for the probe, seconds later, while others revive their replica."""
        driven = DrivenGateway()
        one, _ = driven.streaming()
        driven.chunks(replica_id="r0", incarnation="i1")
        assert one.attempt == 1
        driven.route(one, replica_id="r0")
        driven.chunks(chunk(0, [], attempt=1), incarnation="i1")
        driven.chunks(replica_id="r0", incarnation="i0")  # a late heartbeat of the former run
        assert (one.attempt, one.phase) == (1, "streaming")

    async def test_what_the_broker_cannot_carry_fails_at_once(self) -> None:
        """A prompt beyond max_payload would be tried sixty-four times before its client hears."""
        driven = DrivenGateway(payload_bytes_max=100)
        one, choice = driven.open()
        one.prompt_tokens.extend(range(1000, 1100))
        driven.route(one)
        assert choice.ends == ["failed: too_long"]
        assert of(await driven.settle(), "submit") == []

    async def test_a_lower_epoch_is_believed_once_ours_is_silent(self) -> None:
        """An ingress would never be ready again after the broker lost its state."""
        driven = DrivenGateway()

        def hear(epoch: int) -> str:
            plan = PlanInForce(epoch=epoch, plan=DeploymentPlan(plan_id=f"p{epoch}"))
            driven.gateway.on_plan(Delivery("p", encode(plan)))
            return driven.gateway.not_ready()

        driven.clock.time_s = 1.0
        assert "no replicas" in hear(7)
        driven.clock.time_s += PLAN_FRESH_S + 1
        assert "no plan" in driven.gateway.not_ready()
        assert "no replicas" in hear(1)


class TestOutbox:
    async def test_it_is_bounded_and_counts_what_it_drops(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A broker that hangs would fill the memory of the ingress."""
        monkeypatch.setattr(outbox, "OUTBOX_MAX", 3)
        driven = DrivenGateway()
        for number in range(5):
            driven.open(f"a{number}")
        assert len(of(await driven.settle(), "route")) == 3
        assert driven.counted("ingress_outbox_dropped") == 2

    async def test_a_bus_that_refuses_is_counted_and_not_the_end(self) -> None:
        """The first message that the broker cannot take would be the ingress's last."""
        driven = DrivenGateway()
        await driven.bus.close()
        driven.open("a")
        driven.open("b")
        assert await driven.settle() == []
        assert driven.counted("ingress_publish_failed") == 2

    async def test_completions_are_batched_and_bounded(self) -> None:
        """The journal would get a message per request, or one that the broker refuses."""
        driven = DrivenGateway()
        for number in range(COMPLETED_MAX + 10):
            record = RequestCompleted(request_id=f"q{number}", outcome="completed", model_id="m")
            driven.gateway.completed(record)
        driven.gateway.flush_completed()
        batches = [
            decode(payload, RequestsCompleted).completed
            for payload in of(await driven.settle(), "completed")
        ]
        sizes = [len(batch) for batch in batches]
        assert sum(sizes) == COMPLETED_MAX
        assert max(sizes) == COMPLETED_BATCH_MAX

    async def test_submissions_carry_what_the_engine_needs(self) -> None:
        """Workers would run something else than what was asked."""
        driven = DrivenGateway()
        one, _ = driven.open()
        driven.route(one, epoch=9)
        (payload,) = of(await driven.settle(), "submit")
        submit = decode(payload, SubmitRequest)
        assert (submit.prompt_tokens, submit.epoch, submit.attempt) == ([1, 2, 3], 9, 0)


class Written:
    """A sink that keeps what was sent, and is never read."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.ends = 0

    @property
    def begun(self) -> bool:
        return bool(self.events)

    def send(self, event: bytes) -> None:
        self.events.append(event)

    def end(self) -> None:
        self.ends += 1

    def buffered(self) -> int:
        return sum(map(len, self.events))


def streamed(
    *, n: int = 1, buffer_bytes_max: int = 1 << 20, stop: tuple[str, ...] = ()
) -> tuple[Streamed, list[StreamedChoice], Written]:
    """A stream, its choices, and what was written."""
    parsed = ParsedRequest(
        kind="completion", model="m", prompts=([1],), stream=True, n=n, stop=stop
    )
    written = Written()
    stream = Streamed(
        HEAD, written, num_choices=n, usage_for=None, buffer_bytes_max=buffer_bytes_max
    )
    tokenizer = byte_tokenizer()
    choices = [
        StreamedChoice(stream, journey(), index=index, parsed=parsed, tokenizer=tokenizer)
        for index in range(n)
    ]
    return stream, choices, written


def taken(text: str, position: int = 0) -> Taken:
    tokens = byte_tokenizer().encode(text, add_special_tokens=False)
    return Taken(tokens, None, position)


FAILED = RequestFailed("a", "engine", "broken", 0.0)


class TestExchange:
    async def test_a_failure_before_the_first_event_leaves_the_status_open(self) -> None:
        """A client would get 200 and an error inside, where a 503 could still be sent."""
        stream, (choice,), written = streamed()
        choice.on_fail(FAILED)
        with pytest.raises(ApiError):
            await stream.done
        assert (written.events, written.ends) == ([], 0)

    async def test_the_stream_is_done_when_all_choices_are(self) -> None:
        """[DONE] would come while a choice still speaks."""
        stream, choices, written = streamed(n=3)
        for number, choice in enumerate(choices):
            assert not stream.done.done()
            choice.on_tokens(taken("hi"))
            choice.on_end("stop")
            assert b'"index":%d' % number in b"".join(written.events[-2:])
        await stream.done
        assert (written.events[-1], written.ends) == (DONE, 1)

    async def test_nothing_follows_an_error(self) -> None:
        """Other choices' events would come behind the end of the body, as garbage in the next
        answer of the connection."""
        stream, choices, written = streamed(n=2)
        choices[0].on_tokens(taken("hi"))
        choices[1].on_fail(FAILED)
        with pytest.raises(ApiError):
            await stream.done
        choices[0].on_tokens(taken("more", 2))
        choices[0].on_end("stop")
        assert b'"error"' in written.events[-1]
        assert DONE not in b"".join(written.events)
        assert written.ends == 1

    async def test_a_client_that_does_not_read_is_given_up(self) -> None:
        """Its answer would grow in our memory as long as its engine speaks."""
        stream, (choice,), _ = streamed(buffer_bytes_max=500)
        for number in range(20):
            choice.on_tokens(taken("word ", 5 * number))
        with pytest.raises(SlowClient):
            await stream.done

    async def test_a_failure_nobody_asks_for_is_not_reported_as_a_leak(self) -> None:
        """Each client that leaves at the wrong moment would put a stack trace into the log."""
        told: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        stream, (choice,), _ = streamed()
        choice.on_fail(FAILED)
        whole = Whole(num_choices=1)
        whole.ended(0, ApiError(status=500, type="t", code=None, message="m"))
        await asyncio.sleep(0)
        del stream, choice, whole
        gc.collect()
        assert told == []

    async def test_a_stop_string_in_the_last_bytes_is_a_stop(self) -> None:
        """finish_reason would say that the answer was cut off when it had ended."""
        stream, (choice,), written = streamed(stop=("END",))
        assert choice.on_tokens(taken("textEN")) is False
        assert choice.on_tokens(taken("D", 6)) is True
        choice.on_end("stop")
        text = b"".join(written.events)
        assert b'"finish_reason":"stop"' in text
        assert b"EN" not in text.replace(b'"END', b"")
        await stream.done

    async def test_a_whole_answer_waits_for_every_choice_and_counts_all(self) -> None:
        """n answers would come back incomplete, or with the usage of one."""
        parsed = ParsedRequest(kind="completion", model="m", prompts=([1],), n=2)
        whole = Whole(num_choices=2)
        tokenizer = byte_tokenizer()
        choices = [
            WholeChoice(whole, journey(), index=index, parsed=parsed, tokenizer=tokenizer)
            for index in range(2)
        ]
        for choice, text in zip(choices, ("ab", "cde"), strict=True):
            assert not whole.done.done()
            choice.on_tokens(taken(text))
            choice.on_end("length")
        await whole.done
        body = whole.body(HEAD, choices, prompt_tokens=1)
        assert b'"completion_tokens":5' in body
        assert body.index(b'"text":"ab"') < body.index(b'"text":"cde"')
