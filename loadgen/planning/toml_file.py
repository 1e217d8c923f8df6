"""TOML that people write: read into structs, with errors that name file, line and field."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from shared.errors import ConfigInvalid
from shared.toml_place import line_of

FILE_BYTES_MAX = 8 << 20
SHOWN_MAX = 80  # characters of a value in an error
T = TypeVar("T", bound=msgspec.Struct)


def read_toml(path: Path, as_type: type[T]) -> T:
    """The file as ``as_type``; raises ConfigInvalid for what cannot be read, is no TOML, or does
    not fit, unknown keys included where the struct forbids them."""
    text = _text(path)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid(field="file", value=str(path), remedy=f"not TOML: {error}") from None
    try:
        return msgspec.convert(tree, as_type)
    except msgspec.ValidationError as error:
        field, remedy = _explained(error)
        raise invalid(path, field, _value_at(tree, field), remedy) from None


def invalid(path: Path, field: str, value: object, remedy: str) -> ConfigInvalid:
    """The error about ``field``, such as ``replicas[1].gpus``, with the line it stands in."""
    error = ConfigInvalid(field=field, value=value, remedy=remedy)
    line = line_of(path, field)
    place = f"{path}, line {line}" if line else str(path)
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN_MAX else shown[:SHOWN_MAX] + "..."
    error.args = (f"{place}: {field} = {shown}: {remedy}",)
    return error


def write_text(path: Path, text: str) -> None:
    """Write it whole or not at all, its folders included; raises ConfigInvalid."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        remedy = f"cannot be written: {error.strerror}"
        raise ConfigInvalid(field="file", value=str(path), remedy=remedy) from None
    finally:
        beside.unlink(missing_ok=True)


def _text(path: Path) -> str:
    def unreadable(remedy: str) -> ConfigInvalid:
        return ConfigInvalid(field="file", value=str(path), remedy=remedy)

    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise unreadable(f"larger than {FILE_BYTES_MAX >> 20} MiB: not a file of this kind")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise unreadable(f"not UTF-8 text: {error.reason} at byte {error.start}") from None


def _explained(error: msgspec.ValidationError) -> tuple[str, str]:
    """Field and remedy of msgspec's complaint, whose text ends in `` - at `$.path` ``."""
    text, _, tail = str(error).partition(" - at `$")
    where = tail.rstrip("`").removeprefix(".").replace("[...]", "")
    named = text.split("`")[1] if "`" in text else ""
    inner = f"{where}.{named}" if where else named
    if "unknown field" in text:
        return inner, "unknown key: remove it, or mend its name"
    if "missing required field" in text:
        return inner, "required: set it"
    return where or "file", text


def _value_at(tree: object, field: str) -> object:
    for name, place in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        if isinstance(tree, dict):
            tree = cast("dict[str, Any]", tree).get(name)
        elif isinstance(tree, list) and place:
            tree = cast("list[object]", tree)[int(place)]
        else:
            return None
    return tree
