"""Writes OpenAI's responses, whole and streamed.

A stream sends an event per chunk, so what an event has in common with the others of its choice is
encoded once, and only the text is encoded each time: under a microsecond an event.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

Kind = Literal["completion", "chat"]
Finish = Literal["stop", "length"]

DONE = b"data: [DONE]\n\n"

_json = msgspec.json.Encoder().encode
_OBJECT: dict[Kind, str] = {"completion": "text_completion", "chat": "chat.completion"}
_STREAM_OBJECT: dict[Kind, str] = {"completion": "text_completion", "chat": "chat.completion.chunk"}
_FINISH = {None: b"null", "stop": b'"stop"', "length": b'"length"'}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What every event and the whole response of one request begin with."""

    kind: Kind
    response_id: str
    model: str
    created_unix_s: int

    def encode(self, object_name: str) -> bytes:
        """An object still open: ``{"id":..., "model":...,``."""
        fields = {
            "id": self.response_id,
            "object": object_name,
            "created": self.created_unix_s,
            "model": self.model,
        }
        return _json(fields)[:-1] + b","


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Extension ``return_token_ids``: the tokens behind a text, and the index of the first among
    the choice's output tokens."""

    position: int
    tokens: Sequence[int]

    def encode(self) -> bytes:
        """The end of a choice object."""
        return b',"token_ids":%b,"position":%d' % (_json(self.tokens), self.position)


class ChoiceStream:
    """Server-sent events of one choice.

    ``usage`` is in every event when the client asked for it: null, but for the last one.
    """

    __slots__ = ("_after_text", "_before_text", "_close", "_empty", "_first", "_plain")

    def __init__(self, head: ResponseHead, *, index: int, include_usage: bool) -> None:
        start = b"data: " + head.encode(_STREAM_OBJECT[head.kind])
        start += b'"choices":[{"index":%d,' % index
        if head.kind == "chat":
            delta = b'"delta":{"role":"assistant","content":""},"logprobs":null'
            self._before_text = start + b'"delta":{"content":'
            self._after_text = b'},"logprobs":'
            self._empty = start + b'"delta":{},"logprobs":'
        else:
            delta = b""
            self._before_text = start + b'"text":'
            self._after_text = b',"logprobs":'
            self._empty = start + b'"text":"","logprobs":'
        usage = b',"usage":null' if include_usage else b""
        self._close = b"}]" + usage + b"}\n\n"
        self._plain = self._after_text + b'null,"finish_reason":null' + self._close
        self._first = start + delta + b',"finish_reason":null' + self._close if delta else b""

    def first(self) -> bytes:
        """Before any text: the role, in a chat; nothing in a completion."""
        return self._first

    def text(self, text: str) -> bytes:
        """The plain event, which most are."""
        return self._before_text + _json(text) + self._plain

    def event(
        self,
        text: str,
        *,
        finish: Finish | None = None,
        logprobs: bytes | None = None,
        token_ids: TokenIds | None = None,
    ) -> bytes:
        """An event with more than text; ``logprobs`` is encoded (openai_logprobs.py)."""
        before = self._before_text + _json(text) + self._after_text if text else self._empty
        end = b"" if token_ids is None else token_ids.encode()
        return b'%b%b,"finish_reason":%b%b%b' % (
            before,
            logprobs or b"null",
            _FINISH[finish],
            end,
            self._close,
        )


def usage_event(head: ResponseHead, *, prompt_tokens: int, completion_tokens: int) -> bytes:
    """The last event before DONE when ``stream_options.include_usage`` is set: no choices."""
    usage = _json(_usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens))
    start = b"data: " + head.encode(_STREAM_OBJECT[head.kind])
    return start + b'"choices":[],"usage":' + usage + b"}\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One finished choice of a response that is not streamed."""

    index: int
    text: str
    finish: Finish
    logprobs: bytes | None = None
    token_ids: TokenIds | None = None

    def encode(self, kind: Kind) -> bytes:
        text = _json(self.text)
        if kind == "chat":
            content = b'"message":{"role":"assistant","content":%b,"refusal":null}' % text
        else:
            content = b'"text":' + text
        return b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b}' % (
            self.index,
            content,
            self.logprobs or b"null",
            _FINISH[self.finish],
            b"" if self.token_ids is None else self.token_ids.encode(),
        )


def response(
    head: ResponseHead, choices: Sequence[Choice], *, prompt_tokens: int, completion_tokens: int
) -> bytes:
    """The whole response. ``prompt_tokens`` counts each prompt once, whatever n is."""
    encoded = b",".join([choice.encode(head.kind) for choice in choices])
    usage = _json(_usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens))
    return b'%b"choices":[%b],"usage":%b}' % (head.encode(_OBJECT[head.kind]), encoded, usage)


def model_list(models: Sequence[str], *, created_unix_s: int) -> bytes:
    """Body of GET /v1/models."""
    data = [_model(model, created_unix_s) for model in models]
    return _json({"object": "list", "data": data})


def model_entry(model: str, *, created_unix_s: int) -> bytes:
    """Body of GET /v1/models/{model}."""
    return _json(_model(model, created_unix_s))


def _model(model: str, created_unix_s: int) -> dict[str, str | int]:
    return {"id": model, "object": "model", "created": created_unix_s, "owned_by": "oserve"}


def _usage(*, prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
