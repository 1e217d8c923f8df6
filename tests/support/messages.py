"""Every message type that crosses a process, found in shared/messages, and how to build one."""

import importlib
import math
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as shapes

import shared.messages
from shared.messages.base import DataMessage, Message

SCALARS: dict[type[shapes.Type], Callable[[str], object]] = {
    shapes.StrType: lambda name: f"{name}-é",
    shapes.IntType: lambda name: 1 + len(name),
    shapes.FloatType: lambda name: math.sqrt(len(name)),
    shapes.BoolType: lambda _name: True,
}
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1


@cache
def message_types() -> tuple[type[Message] | type[DataMessage], ...]:
    """All of them, by name."""
    found: dict[str, type[Any]] = {}
    for module in pkgutil.iter_modules(shared.messages.__path__, "shared.messages."):
        for value in vars(importlib.import_module(module.name)).values():
            if not isinstance(value, type) or value in (Message, DataMessage):
                continue
            if issubclass(value, Message | DataMessage):
                found[value.__name__] = value
    return tuple(found[name] for name in sorted(found))


@cache
def messages(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any value of ``kind``, built from its annotations."""
    return _strategy(shapes.type_info(kind))


def _strategy(kind: shapes.Type) -> st.SearchStrategy[Any]:
    match kind:
        case shapes.StructType():
            found = st.builds(kind.cls, **{f.name: _strategy(f.type) for f in kind.fields})
        case shapes.UnionType():
            found = st.one_of([_strategy(part) for part in kind.types])
        case shapes.ListType():
            found = st.lists(_strategy(kind.item_type), max_size=4)
        case shapes.VarTupleType():
            found = st.lists(_strategy(kind.item_type), max_size=4).map(tuple)
        case shapes.TupleType():
            found = st.tuples(*(_strategy(item) for item in kind.item_types))
        case shapes.DictType():
            keys, values = _strategy(kind.key_type), _strategy(kind.value_type)
            found = st.dictionaries(keys, values, max_size=4)
        case _:
            found = _scalar(kind)
    return found


def _scalar(kind: shapes.Type) -> st.SearchStrategy[Any]:
    match kind:
        case shapes.LiteralType():
            return st.sampled_from(kind.values)
        case shapes.StrType():
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
        case shapes.IntType():
            return st.integers(INT_MIN, INT_MAX)
        case shapes.FloatType():
            return st.floats(allow_nan=False)
        case shapes.BoolType():
            return st.booleans()
        case shapes.NoneType():
            return st.none()
        case _:
            raise AssertionError(f"tests/support/messages.py cannot build a {kind}")


def example(kind: type[Any], *, full: bool) -> Any:  # of the given kind
    """The same value each time: required fields only, or every field set."""
    return _example(shapes.type_info(kind), kind.__name__, full=full)


def _example(kind: shapes.Type, name: str, *, full: bool) -> Any:
    match kind:
        case shapes.StructType():
            fields = [f for f in kind.fields if full or f.required]
            value = kind.cls(**{f.name: _example(f.type, f.name, full=full) for f in fields})
        case shapes.UnionType():
            value = _example(kind.types[0], name, full=full)
        case shapes.ListType():
            value = [_example(kind.item_type, name, full=full)] if full else []
        case shapes.VarTupleType():
            value = (_example(kind.item_type, name, full=full),) if full else ()
        case shapes.TupleType():
            value = tuple(_example(item, name, full=full) for item in kind.item_types)
        case shapes.DictType():
            item = _example(kind.value_type, name, full=full)
            value = {_example(kind.key_type, name, full=full): item} if full else {}
        case shapes.LiteralType():
            value = kind.values[-1]
        case _:
            value = SCALARS[type(kind)](name)
    return value


def with_unknown_field(payload: bytes) -> bytes:
    """The same message as a newer sender would write it: one more field, wherever it may grow."""
    value = cast("dict[str, Any] | list[Any]", msgspec.msgpack.decode(payload))
    if isinstance(value, dict):
        value["field_of_the_future"] = {"nested": [1, 2]}
    else:
        value.append({"nested": [1, 2]})
    return msgspec.msgpack.encode(value)
