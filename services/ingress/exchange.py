"""One HTTP request and its choices: tokens in, OpenAI's bytes out.

Tokens arrive in a callback of the bus. A stream's events are written to the socket from there,
without waking its handler, which only waits for the end: at sixteen events a request that is what
the ingress spends its time on.
"""

import asyncio
from typing import Protocol

from services.ingress.events import RequestFailed
from services.ingress.journey import Journey, Taken
from services.ingress.openai_api import ParsedRequest
from services.ingress.openai_errors import ApiError, from_failure
from services.ingress.openai_format import (
    DONE,
    Choice,
    ChoiceStream,
    ResponseHead,
    TokenIds,
    response,
    usage_event,
)
from services.ingress.openai_logprobs import LogprobsFormat
from shared.messages.requests import FinishReason, TokenLogprobs
from shared.text import StopMatcher, Tokenizer


class Text:
    """What one choice's tokens spell, up to its stop string."""

    __slots__ = ("_detokenizer", "_stop", "logprobs", "tokens")

    def __init__(self, parsed: ParsedRequest, journey: Journey, tokenizer: Tokenizer) -> None:
        # A completion goes on with its prompt's text; a chat's answer is a text of its own.
        after = journey.prompt_tokens if parsed.kind == "completion" else ()
        self._detokenizer = tokenizer.detokenizer(after)
        self._stop = StopMatcher(parsed.stop) if parsed.stop else None
        wanted = parsed.logprobs is not None
        self.logprobs = LogprobsFormat(parsed.kind, tokenizer) if wanted else None
        self.tokens = 0

    def feed(self, tokens: list[int]) -> tuple[str, bool]:
        """Text that is final, and whether a stop string ended it."""
        self.tokens += len(tokens)
        text = self._detokenizer.feed(tokens)
        return (text, False) if self._stop is None else self._stop.feed(text)

    def flush(self) -> tuple[str, bool]:
        """What was held back, at the end of the tokens, and whether it ends in a stop string."""
        text = self._detokenizer.flush()
        if self._stop is None:
            return text, False
        shown, stopped = self._stop.feed(text)
        return (shown, True) if stopped else (shown + self._stop.flush(), False)


class StreamedChoice:
    """Writes an event for each batch of tokens."""

    def __init__(
        self,
        stream: "Streamed",
        journey: Journey,
        *,
        index: int,
        parsed: ParsedRequest,
        tokenizer: Tokenizer,
    ) -> None:
        self._out, self.journey = stream, journey
        self._parsed = parsed
        self._text = Text(parsed, journey, tokenizer)
        self._events = ChoiceStream(stream.head, index=index, include_usage=parsed.include_usage)
        self._plain = self._text.logprobs is None and not parsed.return_token_ids
        self._begun = False
        self._stopped = False

    @property
    def output_tokens(self) -> int:
        return self._text.tokens

    def on_tokens(self, taken: Taken) -> bool:
        text, self._stopped = self._text.feed(taken.tokens)
        if not self._begun:
            self._begun = True
            first = self._events.first()
            if first:
                self._out.write(first)
        if self._plain:
            if text:
                self._out.write(self._events.text(text))
        else:
            self._out.write(self._detailed(text, taken))
        return self._stopped

    def _detailed(self, text: str, taken: Taken) -> bytes:
        logprobs = None
        if self._text.logprobs is not None and taken.logprobs is not None:
            logprobs = self._text.logprobs.encode(taken.tokens, taken.logprobs)
        ids = None
        if self._parsed.return_token_ids:
            ids = TokenIds(position=taken.position, tokens=taken.tokens)
        return self._events.event(text, logprobs=logprobs, token_ids=ids)

    def on_end(self, finish: FinishReason) -> None:
        rest, stopped = ("", True) if self._stopped else self._text.flush()
        reason = "length" if finish == "length" and not stopped else "stop"
        self._out.write(self._events.event(rest, finish=reason))
        self._out.ended(None, output_tokens=self._text.tokens)

    def on_fail(self, failure: RequestFailed) -> None:
        self._out.ended(_error(failure, self.journey), output_tokens=self._text.tokens)


class Sink(Protocol):
    """Where a stream's bytes go (sse.SseResponse)."""

    @property
    def begun(self) -> bool: ...
    def send(self, event: bytes) -> None: ...
    def end(self) -> None: ...
    def buffered(self) -> int: ...


class Streamed:
    """A stream of server-sent events of ``num_choices`` choices. As long as the sink has not
    begun there are no headers yet, and an error may still become a proper status.

    ``usage_for`` is the number of prompt tokens if the client asked for a usage event."""

    def __init__(
        self,
        head: ResponseHead,
        sink: Sink,
        *,
        num_choices: int,
        usage_for: int | None,
        buffer_bytes_max: int,
    ) -> None:
        self.head = head
        self._sink = sink
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_seen)
        self._open_choices = num_choices
        self._usage_for = usage_for
        self._output_tokens = 0
        self._closed = False
        self._buffer_bytes_max = buffer_bytes_max

    def write(self, event: bytes) -> None:
        if self._closed:
            return
        self._sink.send(event)
        if self._sink.buffered() > self._buffer_bytes_max and not self.done.done():
            self._closed = True
            self.done.set_exception(SlowClient)

    def ended(self, error: ApiError | None, *, output_tokens: int) -> None:
        """One choice is over. The last one ends the stream; an error does so at once, and what
        the other choices still have to say comes too late: nothing may follow it."""
        self._open_choices -= 1
        self._output_tokens += output_tokens
        if self._closed:
            return
        if error is not None:
            self._closed = True
            if self._sink.begun:
                self._sink.send(error.event())
                self._sink.end()
            self.done.set_exception(error)
        elif self._open_choices == 0:
            self._closed = True
            self._sink.send(self._tail())
            self._sink.end()
            self.done.set_result(None)

    def _tail(self) -> bytes:
        if self._usage_for is None:
            return DONE
        usage = usage_event(
            self.head, prompt_tokens=self._usage_for, completion_tokens=self._output_tokens
        )
        return usage + DONE


class SlowClient(Exception):  # a condition
    """The client reads so slowly that what it was sent fills its buffer."""


class WholeChoice:
    """Keeps everything for one answer at the end."""

    def __init__(
        self,
        whole: "Whole",
        journey: Journey,
        *,
        index: int,
        parsed: ParsedRequest,
        tokenizer: Tokenizer,
    ) -> None:
        self._out, self.journey, self._index = whole, journey, index
        self._parsed = parsed
        self._text = Text(parsed, journey, tokenizer)
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._tokens: list[int] = []
        self._finish: FinishReason = "stop"
        self._stopped = False

    @property
    def output_tokens(self) -> int:
        return self._text.tokens

    def on_tokens(self, taken: Taken) -> bool:
        text, self._stopped = self._text.feed(taken.tokens)
        self._parts.append(text)
        self._tokens += taken.tokens
        self._logprobs += taken.logprobs or ()
        return self._stopped

    def on_end(self, finish: FinishReason) -> None:
        if not self._stopped:
            rest, self._stopped = self._text.flush()
            self._parts.append(rest)
        self._finish = "stop" if self._stopped else finish
        self._out.ended(self._index, None)

    def on_fail(self, failure: RequestFailed) -> None:
        self._out.ended(self._index, _error(failure, self.journey))

    def choice(self) -> Choice:
        logprobs = None
        if self._text.logprobs is not None:
            logprobs = self._text.logprobs.encode(self._tokens, self._logprobs)
        ids = None
        if self._parsed.return_token_ids:
            ids = TokenIds(position=0, tokens=self._tokens)
        return Choice(
            index=self._index,
            text="".join(self._parts),
            finish="length" if self._finish == "length" else "stop",
            logprobs=logprobs,
            token_ids=ids,
        )


class Whole:
    def __init__(self, *, num_choices: int) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_seen)
        self._open_choices = num_choices

    def ended(self, index: int, error: ApiError | None) -> None:  # noqa: ARG002  # all alike here
        self._open_choices -= 1
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error)
        elif self._open_choices == 0:
            self.done.set_result(None)

    @staticmethod
    def body(head: ResponseHead, choices: list[WholeChoice], *, prompt_tokens: int) -> bytes:
        return response(
            head,
            [choice.choice() for choice in choices],
            prompt_tokens=prompt_tokens,
            completion_tokens=sum(choice.output_tokens for choice in choices),
        )


def _seen(done: asyncio.Future[None]) -> None:
    """Its handler may be gone before it asks: then nobody is to be told of the failure."""
    if not done.cancelled():
        done.exception()


def _error(failure: RequestFailed, journey: Journey) -> ApiError:
    return from_failure(
        failure.code,
        failure.detail,
        model=journey.model_id,
        retry_after_s=failure.retry_after_s,
    )
