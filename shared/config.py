"""Settings: defaults < TOML file < OSERVE_* environment < --set, each value with its source.

The only place that reads the environment. Sections are top-level tables of one file, so that the
same file serves a laptop and a fleet; a process checks the sections it uses, and every unknown
section or key is an error.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from shared.errors import ConfigInvalid

SECTIONS = (
    "mesh", "bus", "telemetry", "up",
    "ingress", "router", "profiler", "forecaster", "scheduler", "switcher", "worker",
)  # fmt: skip
ENV_PREFIX = "OSERVE_"
ENV_IGNORED = ("OSERVE_CONFIG",)  # names the file itself
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
            source = next((s for p, s in self.sources.items() if _covers(p, path)), "default")
            lines.append(f"{path} = {msgspec.json.encode(leaf).decode()}  # {source}")
        return lines


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
            _put(values, path, _parsed(environ[name]), field=name)
            sources[".".join(path)] = name
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigInvalid(field="--set", value=item, remedy="write --set section.key=value")
        _put(values, key.split("."), _parsed(text), field=f"--set {key}")
        sources[key] = "--set"
    unknown = sorted(set(values) - set(SECTIONS))
    if unknown:
        raise ConfigInvalid(
            field=unknown[0], value=sources_of(sources, unknown[0]), remedy=f"sections: {SECTIONS}"
        )
    return Settings(values, sources)


def sources_of(sources: Mapping[str, str], section: str) -> str:
    """Where a section came from, for an error."""
    found = {s for p, s in sources.items() if p == section or p.startswith(section + ".")}
    return ", ".join(sorted(found)) or "?"


def _read_toml(file: str) -> Tree:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(
            field="--config", value=file, remedy=f"cannot read it: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(field="--config", value=file, remedy=f"not TOML: {error}") from None


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
        raise ConfigInvalid(
            field=field, value=value, remedy="name a section and a key: OSERVE_ROUTER__POLICY"
        )
    for part in path[:-1]:
        into = into.setdefault(part, {})
        if not isinstance(into, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  # from a file
            raise ConfigInvalid(field=field, value=value, remedy=f"{part} is a value, not a table")
    into[path[-1]] = value


def _parsed(text: str) -> object:
    """JSON lists and objects as such; anything else stays text for the struct to convert."""
    if text[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigInvalid(field="--set", value=text, remedy=f"not JSON: {error}") from None
    return text


def _leaves(tree: Any, path: str) -> list[tuple[str, Any]]:  # noqa: ANN401  # builtins of any shape
    if isinstance(tree, dict) and tree:
        found: list[tuple[str, Any]] = []
        for key, value in cast("Tree", tree).items():
            found += _leaves(value, f"{path}.{key}")
        return found
    return [(path, tree)]


def _covers(source_path: str, path: str) -> bool:
    return path == source_path or path.startswith(source_path + ".")


def _explained(
    error: msgspec.ValidationError, name: str, raw: object, as_type: type[Any]
) -> ConfigInvalid:
    text = str(error)
    where = name
    if " - at `$" in text:
        text, _, tail = text.partition(" - at `$")
        where = name + tail.rstrip("`")
    if "unknown field" in text:
        unknown = text.split("`")[1]
        known = [f.name for f in msgspec.structs.fields(as_type)] if where == name else []
        remedy = f"unknown key; known keys: {', '.join(known)}" if known else "unknown key"
        return ConfigInvalid(field=f"{where}.{unknown}", value=_at(raw, unknown), remedy=remedy)
    if "missing required field" in text:
        missing = text.split("`")[1]
        return ConfigInvalid(field=f"{where}.{missing}", value=None, remedy="set it: required")
    return ConfigInvalid(field=where, value=raw if where == name else "?", remedy=text)


def _at(raw: object, key: str) -> object:
    return cast("Tree", raw).get(key, "?") if isinstance(raw, dict) else "?"
