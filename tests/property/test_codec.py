"""The codec over every message type there is: whatever can be said arrives as it was said."""

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages.base import DataMessage, decode, encode
from shared.messages.plans import PlanKept
from tests.support.messages import example, message_types, messages, with_unknown_field

EXAMPLES = 25  # of each of some thirty types
CONTROL = [kind for kind in message_types() if not issubclass(kind, DataMessage)]
each_type = pytest.mark.parametrize("kind", message_types(), ids=lambda kind: kind.__name__)


def test_message_types_are_found() -> None:
    """The tests of this file would pass because they test nothing."""
    names = {kind.__name__ for kind in message_types()}
    assert {"SubmitRequest", "TokenChunks", "StoredPlan", "ForecastReport"} <= names
    assert len(names) > 25


@each_type
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_round_trip(kind: type[Any], data: st.DataObject) -> None:
    """A service would act on something else than what was sent."""
    message = data.draw(messages(kind))
    payload = encode(message)
    assert decode(payload, kind) == message
    assert encode(decode(payload, kind)) == payload


@each_type
@given(payload=st.binary(max_size=200))
@settings(max_examples=EXAMPLES, deadline=None)
def test_random_bytes_raise_only_msgspec_errors(kind: type[Any], payload: bytes) -> None:
    """Garbage on a subject would crash its receivers instead of being counted."""
    with suppress(msgspec.ValidationError, msgspec.DecodeError):
        decode(payload, kind)


@each_type
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_damaged_messages_raise_only_msgspec_errors(kind: type[Any], data: st.DataObject) -> None:
    """A truncated or altered message would crash its receivers."""
    payload = bytearray(encode(data.draw(messages(kind))))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for damaged in (bytes(payload), bytes(payload[:cut])):
        with suppress(msgspec.ValidationError, msgspec.DecodeError):
            decode(damaged, kind)


def test_deep_nesting_is_a_decode_error() -> None:
    """A few bytes of nested lists would crash their receiver."""
    payload = b"\x81" + msgspec.msgpack.encode("unknown") + b"\x91" * 100_000 + b"\x90"
    with pytest.raises(msgspec.DecodeError):
        decode(payload, PlanKept)


@each_type
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_unknown_fields_are_ignored(kind: type[Any], data: st.DataObject) -> None:
    """During a rolling restart old processes would refuse the messages of new ones."""
    full = data.draw(messages(kind)) if kind.__struct_config__.tag else example(kind, full=True)
    assert decode(with_unknown_field(_all_fields(full)), kind) == full


@each_type
def test_required_fields_are_enough(kind: type[Any]) -> None:
    """New processes would refuse the messages of old ones, which lack the newer fields."""
    message = example(kind, full=False)
    assert decode(encode(message), kind) == message


@pytest.mark.parametrize("kind", [k for k in message_types() if issubclass(k, DataMessage)])
def test_data_messages_only_append(kind: type[Any]) -> None:
    """The data plane's arrays would shift, and a token count be read as a position."""
    message = example(kind, full=True)
    array = msgspec.msgpack.decode(_all_fields(message))
    fields = msgspec.structs.fields(kind)
    required = sum(field.required for field in fields)
    assert all(field.required for field in fields[:required]), "required fields come first"
    for length in range(required, len(fields) + 1):
        older = msgspec.msgpack.encode(array[:length])
        decoded = decode(older, kind)
        for field in fields[:length]:
            assert getattr(decoded, field.name) == getattr(message, field.name)


@pytest.mark.parametrize("kind", CONTROL, ids=lambda kind: kind.__name__)
def test_a_message_is_not_taken_for_another(kind: type[Any]) -> None:
    """A message on the wrong subject would be understood as something else."""
    payload = encode(example(kind, full=True))
    for other in CONTROL:  # the data plane's arrays carry no tag: their subject tells them apart
        if other is not kind:
            with pytest.raises(msgspec.ValidationError):
                decode(payload, other)


def _all_fields(message: Any) -> bytes:  # of any message type
    """Encoded with the defaults spelled out, so that an array has its full length."""
    value = msgspec.to_builtins(message)
    if isinstance(message, DataMessage):
        names = message.__struct_fields__
        value = [msgspec.to_builtins(getattr(message, name)) for name in names]
    return msgspec.msgpack.encode(value)
