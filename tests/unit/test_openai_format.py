"""What clients read: each response and event is checked with OpenAI's own types."""

import json
import math
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.ingress import openai_errors
from services.ingress.openai_errors import ApiError, from_failure
from services.ingress.openai_format import (
    Choice,
    ChoiceStream,
    Kind,
    ResponseHead,
    TokenIds,
    model_entry,
    model_list,
    response,
    usage_event,
)
from services.ingress.openai_logprobs import LogprobsFormat
from shared.messages.requests import FailureCode, TokenLogprobs
from shared.text import byte_tokenizer

KINDS: tuple[Kind, ...] = ("completion", "chat")
NASTY = 'line\nbreak "quoted" \\ \u2028 \x00 🙂 data: [DONE]'


def _head(kind: Kind) -> ResponseHead:
    return ResponseHead(kind=kind, response_id="r-1", model='m"x', created_unix_s=7)


def _read(event: bytes) -> dict[str, Any]:
    """One event, read as a client does: it must be one line, so that it is one event."""
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    return json.loads(event[6:])


def _read_whole(kind: Kind, body: bytes) -> Any:
    whole = Completion if kind == "completion" else ChatCompletion
    return whole.model_validate_json(body, strict=True)


def _read_chunk(kind: Kind, event: bytes) -> Any:
    chunk = _read(event)
    if kind == "chat":
        return ChatCompletionChunk.model_validate(chunk, strict=True)
    for choice in chunk["choices"]:
        # OpenAI streams null here, though its type says otherwise.
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    return Completion.model_validate(chunk, strict=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_reads_as_openais(kind: Kind, include_usage: bool) -> None:
    """The official client must be able to read every event, and get the text unchanged."""
    stream = ChoiceStream(_head(kind), index=2, include_usage=include_usage)
    events = [stream.text(NASTY), stream.event("end", finish="stop")]
    events += [stream.event("", finish="length")]
    if kind == "chat":
        events.insert(0, stream.first())
    chunks = [_read_chunk(kind, event) for event in events]
    texts = [
        chunk.choices[0].delta.content if kind == "chat" else chunk.choices[0].text
        for chunk in chunks
    ]
    assert "".join([text or "" for text in texts]) == NASTY + "end"
    for event, chunk in zip(events, chunks, strict=True):
        assert (chunk.id, chunk.model, chunk.created) == ("r-1", 'm"x', 7)
        assert chunk.choices[0].index == 2
        assert ("usage" in _read(event)) == include_usage
    finishes = [_read(event)["choices"][0]["finish_reason"] for event in events[-3:]]
    assert finishes == [None, "stop", "length"]


def test_a_chat_begins_with_the_role() -> None:
    """Clients build their message from the first event."""
    event = ChoiceStream(_head("chat"), index=0, include_usage=False).first()
    assert _read(event)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert ChoiceStream(_head("completion"), index=0, include_usage=False).first() == b""


@pytest.mark.parametrize("kind", KINDS)
def test_the_usage_event_has_no_choices(kind: Kind) -> None:
    """Billing reads this event; clients recognise it by its empty choices."""
    chunk = _read_chunk(kind, usage_event(_head(kind), prompt_tokens=3, completion_tokens=4))
    assert chunk.choices == []
    assert (chunk.usage.prompt_tokens, chunk.usage.total_tokens) == (3, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_response_reads_as_openais(kind: Kind) -> None:
    """The official client must be able to read it, and get the text unchanged."""
    choices = [
        Choice(index=0, text=NASTY, finish="stop"),
        Choice(index=1, text="", finish="length", token_ids=TokenIds(position=0, tokens=[5, 6])),
    ]
    body = response(_head(kind), choices, prompt_tokens=3, completion_tokens=4)
    whole = _read_whole(kind, body)
    first, second = whole.choices
    assert (first.message.content if kind == "chat" else first.text) == NASTY
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert (second.token_ids, second.position) == ([5, 6], 0)
    assert whole.usage.total_tokens == 7


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_in_the_choice(kind: Kind) -> None:
    """Tests of resumed streams count tokens by these fields."""
    stream = ChoiceStream(_head(kind), index=0, include_usage=True)
    event = stream.event("x", token_ids=TokenIds(position=9, tokens=[1, 2]))
    choice = _read_chunk(kind, event).choices[0]
    assert (choice.token_ids, choice.position) == ([1, 2], 9)


def _logprobs(text: str) -> tuple[list[int], list[TokenLogprobs]]:
    tokens = byte_tokenizer().encode(text, add_special_tokens=False)
    return tokens, [
        TokenLogprobs(logprob=-0.5, top_tokens=[token, 98], top_logprobs=[-0.5, -math.inf])
        for token in tokens
    ]


def test_chat_logprobs_read_as_openais() -> None:
    """Evaluation tools compute with these numbers."""
    encoded = LogprobsFormat("chat", byte_tokenizer()).encode(*_logprobs("aé"))
    stream = ChoiceStream(_head("chat"), index=0, include_usage=False)
    choice = _read_chunk("chat", stream.event("aé", logprobs=encoded)).choices[0]
    entries = choice.logprobs.content
    assert [entry.token for entry in entries] == ["a", "�", "�"]
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == "aé"
    assert [top.logprob for top in entries[0].top_logprobs] == [-0.5, -9999.0]
    body = response(
        _head("chat"),
        [Choice(index=0, text="aé", finish="stop", logprobs=encoded)],
        prompt_tokens=1,
        completion_tokens=3,
    )
    assert _read_whole("chat", body).choices[0].logprobs.content == entries


def test_completion_logprobs_read_as_openais() -> None:
    """Offsets must point into the text even where a character has several tokens, and go on
    from chunk to chunk."""
    tokens, logprobs = _logprobs("aéb")
    encode = LogprobsFormat("completion", byte_tokenizer()).encode
    stream = ChoiceStream(_head("completion"), index=0, include_usage=False)
    offsets: list[int] = []
    for piece in (slice(0, 2), slice(2, 4)):
        event = stream.event("", logprobs=encode(tokens[piece], logprobs[piece]))
        read = _read_chunk("completion", event).choices[0].logprobs
        offsets += read.text_offset
        assert read.token_logprobs == [-0.5, -0.5]
        assert all(-9999.0 in top.values() for top in read.top_logprobs)
    assert offsets == [0, 1, 1, 2]


def test_nan_is_written_as_the_least() -> None:
    """JSON has no NaN: one such number would make a whole response unreadable."""
    encoded = LogprobsFormat("chat", byte_tokenizer()).encode(
        [97], [TokenLogprobs(logprob=math.nan)]
    )
    assert json.loads(encoded)["content"][0]["logprob"] == -9999.0


def test_models_read_as_openais() -> None:
    """`client.models.list()` is how most users try a new server."""
    listed = json.loads(model_list(["a", "b"], created_unix_s=7))
    assert listed["object"] == "list"
    assert [Model.model_validate(entry, strict=True).id for entry in listed["data"]] == ["a", "b"]
    assert json.loads(model_entry("a", created_unix_s=7)) == listed["data"][0]


def test_errors_read_as_openais() -> None:
    """Clients choose their exception by status, and show message, param and code."""
    error = openai_errors.invalid_request("top_p: too high.", param="top_p", code="c")
    assert json.loads(error.body()) == {
        "error": {
            "message": "top_p: too high.",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "c",
        }
    }
    assert _read(error.event()) == json.loads(error.body())
    assert error.headers() == {}


STATUS: dict[FailureCode, int] = {
    "overloaded": 503,
    "no_replica": 503,
    "stale_epoch": 503,
    "draining": 503,
    "bus": 503,
    "unknown_model": 404,
    "too_long": 413,
    "deadline": 504,
    "engine": 500,
    "invalid": 400,
}


@pytest.mark.parametrize("code", FailureCode.__args__)
def test_every_failure_of_the_mesh_has_a_status(code: FailureCode) -> None:
    """A client retries on 503 and gives up on 400: the wrong one loses requests."""
    error = from_failure(code, "why", model="m", retry_after_s=2.2)
    assert error.status == STATUS[code]
    assert (error.headers() == {"Retry-After": "3"}) == (error.status == 503)
    assert "m" in error.message if code == "unknown_model" else error.message == "why"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (openai_errors.invalid_api_key("x"), 401, "invalid_api_key"),
        (openai_errors.model_not_found("x", ("m",)), 404, "model_not_found"),
        (openai_errors.unknown_url("GET", "/x"), 404, "unknown_url"),
        (openai_errors.method_not_allowed("GET", "/x", "POST"), 405, "method_not_supported"),
        (openai_errors.body_too_large(9), 413, "request_too_large"),
        (openai_errors.rate_limit_exceeded("x", retry_after_s=0.1), 429, "rate_limit_exceeded"),
    ],
)
def test_errors_of_the_edge_have_openais_codes(error: ApiError, status: int, code: str) -> None:
    """Clients branch on these codes."""
    assert (error.status, error.code) == (status, code)
    assert error.headers() == ({"Retry-After": "1"} if status == 429 else {})
