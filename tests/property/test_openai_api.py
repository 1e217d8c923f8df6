"""Whatever bytes arrive, reading them ends in a request or in an ApiError."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.ingress.openai_api import ParsedRequest, parse_chat, parse_completion
from services.ingress.openai_errors import ApiError
from services.ingress.openai_fields import ChatCompletionRequest, CompletionRequest

PARSERS = {"chat": parse_chat, "completion": parse_completion}
FIELDS = sorted(
    {f.encode_name for f in msgspec.structs.fields(ChatCompletionRequest)}
    | {f.encode_name for f in msgspec.structs.fields(CompletionRequest)}
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
BASES = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "completion": {"model": "m", "prompt": "hi"},
}


def _parse(kind: str, body: bytes) -> ParsedRequest | ApiError:
    try:
        parsed = PARSERS[kind](body)
    except ApiError as error:
        outcome = error
    else:
        _check(parsed)
        return parsed
    assert outcome.status == 400
    assert json.loads(outcome.body())["error"]["message"]
    return outcome


def _check(parsed: ParsedRequest) -> None:
    """What the rest of the ingress takes for granted."""
    assert parsed.model
    assert bool(parsed.prompts) != bool(parsed.messages)
    assert 1 <= parsed.num_choices <= 128
    assert parsed.output_tokens_max is None or 1 <= parsed.output_tokens_max < 2**31
    assert 0 <= parsed.temperature <= 2
    assert 0 < parsed.top_p <= 1
    assert parsed.top_k >= 0
    assert parsed.seed is None or -(2**63) <= parsed.seed < 2**63
    assert len(parsed.stop) <= 4
    assert all(parsed.stop)
    assert all(isinstance(message["content"], str) for message in parsed.messages)
    assert parsed.logprobs is None or 0 <= parsed.logprobs <= 20


@pytest.mark.parametrize("kind", PARSERS)
@given(body=st.binary(max_size=64) | st.text(max_size=32).map(str.encode))
@example(body=b"{}")
@example(body=b"null")
@example(body=b'{"model":"m","x`y`":1}')
def test_any_bytes(kind: str, body: bytes) -> None:
    """Anything else than an ApiError is a 500, or a crash that one client can cause for all."""
    _parse(kind, body)


@pytest.mark.parametrize("kind", PARSERS)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_values_in_known_fields(kind: str, fields: dict[str, Any]) -> None:
    """Combinations that nobody thought of must still be read or refused cleanly."""
    _parse(kind, json.dumps(BASES[kind] | fields).encode())


@pytest.mark.parametrize("kind", PARSERS)
@given(field=st.text(min_size=1, max_size=12), value=JSON)
def test_unknown_fields_are_named(kind: str, field: str, value: Any) -> None:
    """A misspelt field must be called by its name, whatever characters it has."""
    if field in FIELDS:
        return
    outcome = _parse(kind, json.dumps(BASES[kind] | {field: value}).encode())
    assert isinstance(outcome, ApiError)
    assert outcome.param == field or outcome.code == "invalid_json"


@pytest.mark.parametrize("kind", PARSERS)
@given(data=st.data())
def test_truncated_bodies(kind: str, data: st.DataObject) -> None:
    """A connection that breaks in the middle of a body must not start a request."""
    body = json.dumps(BASES[kind]).encode()
    cut = data.draw(st.integers(0, len(body) - 1))
    assert isinstance(_parse(kind, body[:cut]), ApiError)
