"""Reads one streamed completion, event by event, into its RequestResult."""

from collections.abc import Callable

import msgspec

from loadgen import results
from loadgen.results import RequestResult
from loadgen.wire import Connection

ERROR_BODY_BYTES_MAX = 64 * 1024
EVENT_BYTES_MAX = 16 * 1024 * 1024
_MESSAGE_CHARS_MAX = 500
_HTTP_OK = 200


class _Choice(msgspec.Struct, gc=False):
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    position: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct, gc=False):
    message: str = ""
    type: str | None = None
    code: str | int | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []  # msgspec copies an empty default
    usage: _Usage | None = None
    error: _Error | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


class StreamReader:
    """The Exchange (loadgen.wire) of one completion; ``on_over`` is called once, at its end."""

    __slots__ = (
        "_chunks_max",
        "_ids_seen",
        "_keep_tokens",
        "_on_over",
        "_origin_s",
        "_partial",
        "connection",
        "result",
    )

    def __init__(
        self,
        result: RequestResult,
        *,
        origin_s: float,
        on_over: Callable[["StreamReader", str, str], None],
        keep_tokens: bool,
        chunk_times_max: int,
    ) -> None:
        self.result = result
        self.connection: Connection | None = None
        self._origin_s = origin_s  # the replay's start, on the monotonic clock
        self._on_over = on_over
        self._keep_tokens, self._chunks_max = keep_tokens, chunk_times_max
        self._partial = b""
        self._ids_seen = False

    def began(self, status: int, headers: dict[bytes, bytes]) -> None:
        result = self.result
        result.status = status
        result.request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        result.replica_id = headers.get(b"x-oserve-replica", b"").decode("latin-1")
        try:
            result.overhead_ms = float(headers[b"x-oserve-overhead-ms"])
        except (KeyError, ValueError):
            result.overhead_ms = None  # a server that does not say

    def received(self, data: bytes, now_s: float) -> None:
        if self._partial:
            data = self._partial + data
        if self.result.status != _HTTP_OK:
            self._partial = data[:ERROR_BODY_BYTES_MAX]
            return
        if b"\r" in data:  # event streams may end lines so; JSON never holds a raw one
            data = data.replace(b"\r\n", b"\n")
        events = data.split(b"\n\n")
        self._partial = events.pop()
        for event in events:
            if event.startswith(b"data: "):
                self._event(event[6:], now_s)
            elif event:
                self._unusual_event(event, now_s)
        if len(self._partial) > EVENT_BYTES_MAX:
            self._partial = b""
            self._problem(results.BAD_ANSWER, f"an event exceeds {EVENT_BYTES_MAX} bytes")

    def ended(self, now_s: float) -> None:
        if self.result.dones == 0:
            self._stamp(now_s)
        code, message = self._verdict()
        self._on_over(self, code, message)

    def lost(self, code: str, detail: str) -> None:
        """The connection ended early; a problem seen before is nearer to the cause."""
        if self.result.error_code != results.UNFINISHED:
            code, detail = self.result.error_code, self.result.error_message
        self._on_over(self, code, detail)

    def _unusual_event(self, event: bytes, now_s: float) -> None:
        """Comments (keep-alives) and named events: what counts is their data lines."""
        lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            self._event(b"\n".join(lines), now_s)

    def _event(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self.result.dones += 1
            self._stamp(now_s)
            return
        try:
            event = _decode_event(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._problem(results.BAD_ANSWER, f"an event is not the promised JSON: {error}")
            return
        for choice in event.choices:
            self._choice(choice, now_s)
        if event.usage is not None:
            self.result.usage_input_tokens = event.usage.prompt_tokens
            self.result.usage_output_tokens = event.usage.completion_tokens
        if event.error is not None:
            self._problem(_code_of(event.error, self.result.status), event.error.message)

    def _choice(self, choice: _Choice, now_s: float) -> None:
        result = self.result
        tokens = choice.token_ids
        if tokens is None:
            count = int(choice.text != "")
        else:
            count = len(tokens)
            self._ids_seen = True
        if count:
            if choice.position is not None and choice.position != result.output_tokens:
                self._problem(
                    results.TOKENS_NOT_CONTIGUOUS,
                    f"tokens at position {choice.position} came after {result.output_tokens}",
                )
            result.output_tokens += count
            self._chunk(count, now_s)
            if self._keep_tokens and tokens:
                result.token_ids += tokens
        if choice.finish_reason is not None:
            result.finishes += 1
            result.finish_reason = choice.finish_reason

    def _chunk(self, count: int, now_s: float) -> None:
        result = self.result
        at_s = now_s - self._origin_s
        if result.ttft_s is None:
            result.ttft_s = at_s - (result.sent_s or 0.0)
        if len(result.chunk_times_s) < self._chunks_max:
            result.chunk_times_s.append(at_s)
            result.chunk_tokens.append(count)
        else:
            result.chunks_unrecorded += 1

    def _stamp(self, now_s: float) -> None:
        if self.result.e2e_s is None:
            self.result.e2e_s = now_s - self._origin_s - (self.result.sent_s or 0.0)

    def _problem(self, code: str, message: str) -> None:
        """The first problem is the cause; what follows it are its consequences."""
        if self.result.error_code == results.UNFINISHED:
            self.result.error_code = code
            self.result.error_message = message[:_MESSAGE_CHARS_MAX]

    def _verdict(self) -> tuple[str, str]:
        result = self.result
        if result.status != _HTTP_OK:
            return _error_of(self._partial, result.status)
        if result.error_code != results.UNFINISHED:
            return result.error_code, result.error_message
        if result.finishes == 0 or result.dones == 0:
            missing = "finish_reason" if result.finishes == 0 else "[DONE]"
            return results.UNFINISHED, f"the stream ended without {missing}"
        if result.finishes > 1 or result.dones > 1:
            return results.ENDED_TWICE, f"{result.finishes} finish_reasons, {result.dones} [DONE]s"
        return self._verdict_on_length()

    def _verdict_on_length(self) -> tuple[str, str]:
        """A server without token_ids is counted by its usage, since a chunk's text says less."""
        result = self.result
        usage = result.usage_output_tokens
        asked = result.output_tokens_asked
        if usage is not None and not self._ids_seen:
            result.output_tokens = usage
        if result.output_tokens != asked or (usage is not None and usage != asked):
            return results.WRONG_LENGTH, (
                f"{asked} tokens were asked for, {result.output_tokens} came, usage says {usage}"
            )
        return results.OK, ""


def _code_of(error: _Error, status: int) -> str:
    return str(error.code or error.type or f"http_{status}")


def _error_of(body: bytes, status: int) -> tuple[str, str]:
    """The server's own code of an error body, else the status."""
    try:
        error = _decode_event(body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = None
    if error is None:
        return f"http_{status}", body[:_MESSAGE_CHARS_MAX].decode("utf-8", "replace")
    return _code_of(error, status), error.message[:_MESSAGE_CHARS_MAX]
