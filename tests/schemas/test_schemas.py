"""Processes of two versions meet during a rolling restart: the wire format keeps its promises."""

import base64
import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shared.messages.base import decode, encode
from tests.schemas.schemas import (
    CORPUS,
    SCHEMAS,
    UPDATE,
    broken_promises,
    current_corpus,
    current_schemas,
    golden,
)
from tests.support.messages import message_types

TYPES: dict[str, Any] = {kind.__name__: kind for kind in message_types()}


def test_nothing_was_removed_renamed_or_retyped() -> None:
    """A worker of the last release would no longer understand today's switcher."""
    problems = broken_promises(golden(SCHEMAS), current_schemas())
    assert not problems, "\n".join(
        [*problems, "A field is never removed, renamed or retyped: add a new one, with a default."]
    )


def test_golden_schemas_are_up_to_date() -> None:
    """A change of the wire format would go in unseen by its reviewers."""
    old, new = golden(SCHEMAS), current_schemas()
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    assert not changed, f"changed: {', '.join(changed)}. If that is meant, run `{UPDATE}`"


def test_the_corpus_covers_every_message() -> None:
    """A message could change its bytes without anybody noticing."""
    missing = sorted(current_corpus().keys() - golden(CORPUS).keys())
    assert not missing, f"not in the corpus: {', '.join(missing)}. Run `{UPDATE}`"


@pytest.mark.parametrize("name", sorted(golden(CORPUS)))
def test_bytes_of_the_corpus_decode(name: str) -> None:
    """What the last release wrote, in the state bucket or on the wire, could not be read."""
    kind = TYPES.get(name.split(".", maxsplit=1)[0])
    assert kind is not None, f"{name}: its type is gone; old processes still send it"
    payload = base64.b64decode(golden(CORPUS)[name])
    message = decode(payload, kind)
    if "@" not in name:
        assert encode(message) == payload, f"{name} is encoded differently now. Run `{UPDATE}`"


def _remove(schemas: Any) -> None:
    del schemas["DrainReplica"]["properties"]["timeout_s"]


def _rename_type(schemas: Any) -> None:
    schemas["StopReplicaNow"] = schemas.pop("StopReplica")


def _retype(schemas: Any) -> None:
    schemas["DrainReplica"]["properties"]["epoch"] = {"type": "string"}


def _require(schemas: Any) -> None:
    schemas["DrainReplica"]["properties"]["why"] = {"type": "string"}
    schemas["DrainReplica"]["required"].append("why")


def _shift(schemas: Any) -> None:
    schemas["TokenChunk"]["prefixItems"].insert(0, {"type": "boolean"})


def _shorten(schemas: Any) -> None:
    schemas["TokenChunk"]["prefixItems"].pop()


def _fewer_choices(schemas: Any) -> None:
    schemas["ReplicaReport"]["properties"]["phase"]["enum"].pop()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_remove, "DrainReplica.timeout_s: removed"),
        (_rename_type, "StopReplica: removed or renamed"),
        (_retype, "DrainReplica.epoch: retyped"),
        (_require, "DrainReplica.why: required now"),
        (_shift, "TokenChunk[0]: removed, moved"),
        (_shorten, "TokenChunk["),
        (_fewer_choices, "ReplicaReport.phase: retyped"),
    ],
)
def test_a_broken_promise_is_noticed(change: Callable[[Any], None], problem: str) -> None:
    """The check above would pass whatever we break."""
    changed = copy.deepcopy(current_schemas())
    change(changed)
    assert any(problem in found for found in broken_promises(current_schemas(), changed))


def test_growth_is_allowed() -> None:
    """A new field with a default, a new message or a new choice would be refused."""
    grown: Any = copy.deepcopy(current_schemas())
    grown["DrainReplica"]["properties"]["why"] = {"type": "string", "default": ""}
    grown["TokenChunk"]["prefixItems"].append({"type": "integer", "default": 0})
    grown["ReplicaReport"]["properties"]["phase"]["enum"].append("resting")
    grown["NewMessage"] = {"type": "object"}
    assert broken_promises(current_schemas(), grown) == []


def test_every_message_says_what_it_is() -> None:
    """Control messages without a tag could be mistaken for one another."""
    untagged = [
        name
        for name, kind in TYPES.items()
        if msgspec.structs.fields(kind) and not kind.__struct_config__.tag
        and not kind.__struct_config__.array_like
    ]  # fmt: skip
    assert untagged == []
