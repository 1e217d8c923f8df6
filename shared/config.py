"""Settings: defaults < TOML file < OSERVE_* environment < --set, each value with its source.

The only place that reads the environment. Sections are top-level tables of one file, so that the
same file serves a laptop and a fleet; a process checks the sections it uses, and every unknown
section or key is an error.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from msgspec.inspect import (
    AnyType,
    DictType,
    ListType,
    LiteralType,
    StructType,
    Type,
    VarTupleType,
    type_info,
)

from shared.errors import ConfigInvalid

SECTIONS = (
    "mesh", "bus", "telemetry", "up",
    "ingress", "router", "profiler", "forecaster", "scheduler", "switcher", "worker",
)  # fmt: skip
ENV_PREFIX = "OSERVE_"
ENV_IGNORED = (  # name the file itself; and what only clients and the demo read
    "OSERVE_CONFIG", "OSERVE_API_KEY", "OSERVE_TRACES",
)  # fmt: skip
SECRETS, SECRET = ("password",), "***"
T = TypeVar("T")
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """Raw values by section, and where each leaf came from."""

    values: Tree
    sources: dict[str, str]

    def section(self, name: str, as_type: type[T]) -> T:
        """The section as its struct, defaults filled in; raises ConfigInvalid."""
        raw = self.values.get(name, {})
        try:
            return msgspec.convert(raw, as_type, strict=False)
        except msgspec.ValidationError as error:
            raise _explained(error, name, raw, as_type) from None

    def show(self, name: str, value: msgspec.Struct) -> list[str]:
        """One line per setting of a section: ``name = value  # source``."""
        lines: list[str] = []
        for path, leaf in _leaves(msgspec.to_builtins(value), name):
            # The longest path that covers the leaf: a key set inside a table set as a whole.
            source = self.sources[max(found, key=len)] if (found := self._covering(path)) else None
            shown = SECRET if leaf and path.rpartition(".")[2] in SECRETS else leaf
            text = msgspec.json.encode(shown).decode()
            lines.append(f"{path} = {text}  # {source or 'default'}")
        return lines

    def _covering(self, path: str) -> list[str]:
        return [p for p in self.sources if path == p or path.startswith(p + ".")]


def load_settings(
    *, file: str | None, environ: Mapping[str, str], sets: Sequence[str] = ()
) -> Settings:
    """Merge all sources. Raises ConfigInvalid for what cannot be read or is not a section."""
    values: Tree = {}
    sources: dict[str, str] = {}
    if file is not None:
        for section, table in _read_toml(file).items():
            _merge(values, {section: table}, sources, source=file, prefix="")
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in ENV_IGNORED:
            path = name.removeprefix(ENV_PREFIX).lower().split("__")
            _put(values, path, _parsed(environ[name], field=name), field=name)
            _note(sources, ".".join(path), name)
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigInvalid(field="--set", value=item, remedy="write --set section.key=value")
        field = f"--set {key}"
        _put(values, key.split("."), _parsed(text, field=field), field=field)
        _note(sources, key, "--set")
    unknown = sorted(set(values) - set(SECTIONS))
    if unknown:
        raise ConfigInvalid(
            field=unknown[0],
            value=values[unknown[0]],
            remedy=f"unknown section, from {sources_of(sources, unknown[0])}; "
            f"known sections: {', '.join(SECTIONS)}",
        )
    return Settings(values, sources)


def _note(sources: dict[str, str], path: str, source: str) -> None:
    """Remember where ``path`` came from; what was known of anything inside it is void."""
    for inner in [p for p in sources if p.startswith(path + ".")]:
        del sources[inner]
    sources[path] = source


def sources_of(sources: Mapping[str, str], section: str) -> str:
    """Where a section came from, for an error."""
    found = {s for p, s in sources.items() if p == section or p.startswith(section + ".")}
    return ", ".join(sorted(found)) or "?"


def _read_toml(file: str) -> Tree:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(
            field="settings file", value=file, remedy=f"cannot read it: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            field="settings file", value=file, remedy=f"not TOML: {error}"
        ) from None


def _merge(into: Tree, table: Tree, sources: dict[str, str], *, source: str, prefix: str) -> None:
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            child = into.setdefault(key, {})
            _merge(child, cast("Tree", value), sources, source=source, prefix=path + ".")
        else:
            into[key] = value
            sources[path] = source


def _put(into: Tree, path: list[str], value: object, *, field: str) -> None:
    if len(path) < 2 or not all(path):  # noqa: PLR2004  # section and key
        remedy = "name a section and a key, as in OSERVE_ROUTER__POLICY or --set router.policy"
        raise ConfigInvalid(field=field, value=value, remedy=remedy)
    for part in path[:-1]:
        into = into.setdefault(part, {})
        if not isinstance(into, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  # from a file
            raise ConfigInvalid(field=field, value=value, remedy=f"{part} is a value, not a table")
    into[path[-1]] = value


def _parsed(text: str, *, field: str) -> object:
    """JSON lists and objects as such; anything else stays text for the struct to convert."""
    if text[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigInvalid(field=field, value=text, remedy=f"not JSON: {error}") from None
    return text


def _leaves(tree: Any, path: str) -> list[tuple[str, Any]]:  # noqa: ANN401  # builtins of any shape
    if isinstance(tree, dict) and tree:
        found: list[tuple[str, Any]] = []
        for key, value in cast("Tree", tree).items():
            found += _leaves(value, f"{path}.{key}")
        return found
    return [(path, tree)]


def _explained(
    error: msgspec.ValidationError, name: str, raw: object, as_type: type[Any]
) -> ConfigInvalid:
    """msgspec's message with the field's full path, its value and what would be right."""
    text, _, tail = str(error).partition(" - at `$")
    tail = tail.rstrip("`")
    where = name + tail
    value, kind = _walk(raw, as_type, tail)
    if "unknown field" in text:
        unknown = text.split("`")[1]
        known = ", ".join(f.name for f in kind.fields) if isinstance(kind, StructType) else "none"
        remedy = f"unknown key; known keys: {known}"
        return ConfigInvalid(field=f"{where}.{unknown}", value=_at(value, unknown), remedy=remedy)
    if "missing required field" in text:
        missing = text.split("`")[1]
        return ConfigInvalid(field=f"{where}.{missing}", value=None, remedy="required: set it")
    if isinstance(kind, LiteralType):
        text = f"one of {', '.join(map(str, kind.values))}"
    return ConfigInvalid(field=where, value=value, remedy=text)


def _walk(raw: object, as_type: type[Any], tail: str) -> tuple[object, Type]:
    """Value and type at msgspec's path ``tail``, such as ``.engine.modelled`` or ``.nodes[0]``."""
    kind = type_info(as_type)
    for step in re.findall(r"\.([^.\[\]]+)|\[([^\]]*)\]", tail):
        name, index = step
        if isinstance(kind, StructType):
            kind = next((f.type for f in kind.fields if f.encode_name == name), AnyType())
        elif isinstance(kind, (ListType, VarTupleType)):
            kind = kind.item_type
        elif isinstance(kind, DictType):
            kind = kind.value_type
        raw = _item(raw, index) if index else _at(raw, name)
    return raw, kind


def _item(raw: object, index: str) -> object:
    if isinstance(raw, list) and index.isdecimal():
        return cast("list[object]", raw)[int(index)]
    return "?"  # msgspec does not say which key of a free table


def _at(raw: object, key: str) -> object:
    return cast("Tree", raw).get(key, "?") if isinstance(raw, dict) else "?"
