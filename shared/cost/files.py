"""Profile files: TOML in, structs out, and back. The writer's text is canonical: equal structs give
equal bytes, and what was written reads as what it was.

Every error is a ``ProfileInvalid`` that names file, line (where it can be known) and field.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from shared.cost.checks import Problem, gpu_problems, profile_problems
from shared.cost.profile import FORMAT, GpuFacts, Profile
from shared.errors import ConfigInvalid

Struct = TypeVar("Struct", bound=msgspec.Struct)
Tree = dict[str, Any]

FILE_BYTES_MAX = 1 << 20
LINE_LENGTH = 100
_HEADER = re.compile(r"\s*(\[\[|\[)\s*([\w.-]+)\s*\]")
_KEY = re.compile(r"\s*([\w-]+)\s*=")
_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")


class ProfileInvalid(ConfigInvalid):
    """A profile file cannot be used. ``line`` is 0 where none can be named."""

    def __init__(self, *, file: str, line: int, field: str, value: object, remedy: str) -> None:
        super().__init__(field=field, value=value, remedy=remedy)
        self.file, self.line = file, line
        place = f"{file}, line {line}" if line else file
        shown = repr(value)
        shown = shown if len(shown) <= LINE_LENGTH else shown[:LINE_LENGTH] + "..."
        self.args = (f"{place}: {field} = {shown}: {remedy}",)


def read_profile(path: Path) -> Profile:
    """The profile in ``path``; raises ProfileInvalid."""
    return _read(path, Profile, profile_problems)


def read_gpu(path: Path) -> GpuFacts:
    """The GPU's facts in ``path``; raises ProfileInvalid."""
    return _read(path, GpuFacts, gpu_problems)


def write_profile(path: Path, profile: Profile) -> None:
    """Write it whole or not at all; raises ProfileInvalid for what could not be read back."""
    _write(path, dump_profile(profile), profile_problems(profile))


def write_gpu(path: Path, facts: GpuFacts) -> None:
    """As ``write_profile``."""
    _write(path, dump_gpu(facts), gpu_problems(facts))


def dump_profile(profile: Profile) -> str:
    """Canonical TOML text of ``profile``."""
    return _dumped(profile)


def dump_gpu(facts: GpuFacts) -> str:
    """Canonical TOML text of ``facts``."""
    return _dumped(facts)


def _read(
    path: Path, as_type: type[Struct], problems: Callable[[Struct], Iterator[Problem]]
) -> Struct:
    text = _text(path)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = _AT_LINE.search(str(error))
        line = int(at[1]) if at else 0
        raise ProfileInvalid(
            file=str(path), line=line, field="TOML", value=_line_of(text, line), remedy=str(error)
        ) from None
    lines = _lines(text)

    def invalid(field: str, value: object, remedy: str) -> ProfileInvalid:
        line = _nearest(lines, field)
        return ProfileInvalid(file=str(path), line=line, field=field, value=value, remedy=remedy)

    written_as = tree.get("format")
    if as_type is Profile and isinstance(written_as, int) and written_as > FORMAT:
        remedy = f"written by a newer oserve: this one reads format {FORMAT}; upgrade"
        raise invalid("format", written_as, remedy)
    try:
        found = msgspec.convert(tree, as_type)
    except msgspec.ValidationError as error:
        field, remedy = _explained(error, as_type)
        raise invalid(field, _value_at(tree, field), remedy) from None
    for problem in problems(found):
        raise invalid(problem.field, problem.value, problem.remedy)
    return found


def _text(path: Path) -> str:
    def invalid(remedy: str) -> ProfileInvalid:
        return ProfileInvalid(file=str(path), line=0, field="file", value=path.name, remedy=remedy)

    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise invalid(f"more than {FILE_BYTES_MAX} bytes: not a profile")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise invalid(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise invalid(f"not UTF-8 text: {error.reason} at byte {error.start}") from None


def _explained(error: msgspec.ValidationError, as_type: type[msgspec.Struct]) -> tuple[str, str]:
    """Field and remedy of msgspec's complaint, whose text ends in `` - at `$.path` ``."""
    text, _, tail = str(error).partition(" - at `$")
    where = tail.rstrip("`").removeprefix(".")
    named = text.split("`")[1] if "`" in text else ""
    if "unknown field" in text:
        return _joined(where, named), f"no such field in {as_type.__name__}: remove it"
    if "missing required field" in text:
        return _joined(where, named), "required: set it"
    return where or "file", text


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _lines(text: str) -> dict[str, int]:
    """Where each key and table stands, from 1; the keys are paths such as ``times[1].tp``."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = header[2]
            if header[1] == "[[":
                place = counts.get(table, 0)
                counts[table] = place + 1
                found.setdefault(table, number)
                table = f"{table}[{place}]"
            found[table] = number
        elif key := _KEY.match(line):
            found.setdefault(_joined(table, key[1]), number)
    return found


def _nearest(lines: Mapping[str, int], field: str) -> int:
    """The line of ``field``, or of the closest thing around it; 0 if none of it is there."""
    while field:
        if field in lines:
            return lines[field]
        field = re.sub(r"(\[\d+\]|\.?[^.\[\]]+)$", "", field)
    return 0


def _line_of(text: str, line: int) -> str:
    lines = text.splitlines()
    return lines[line - 1].strip() if 1 <= line <= len(lines) else ""


def _value_at(tree: object, field: str) -> object:
    for name, place in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        if isinstance(tree, dict):
            tree = cast("Tree", tree).get(name)
        elif isinstance(tree, list) and place:
            tree = cast("list[object]", tree)[int(place)]
        else:
            return None
    return tree


def _write(path: Path, text: str, problems: Iterator[Problem]) -> None:
    for problem in problems:
        raise ProfileInvalid(
            file=str(path), line=0, field=problem.field, value=problem.value, remedy=problem.remedy
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _dumped(struct: msgspec.Struct) -> str:
    """Values first, tables after them: TOML knows no way back out of a table."""
    # Whole numbers in float fields become floats, so that equal structs give equal text.
    plain: Tree = msgspec.to_builtins(msgspec.convert(msgspec.to_builtins(struct), type(struct)))
    out = [_assignment(key, value) for key, value in plain.items() if not _is_table(value)]
    for key, value in plain.items():
        if isinstance(value, dict):
            out += ["", f"[{key}]"]
            out += [_assignment(*item) for item in cast("Tree", value).items()]
        elif _is_table(value):
            for one in cast("list[Tree]", value):
                out += ["", f"[[{key}]]", *(_assignment(*item) for item in one.items())]
    return "\n".join(out) + "\n"


def _is_table(value: object) -> bool:
    if isinstance(value, list | tuple):
        items = cast("list[object]", value)
        return bool(items) and isinstance(items[0], dict)
    return isinstance(value, dict)


def _assignment(key: str, value: object) -> str:
    if not isinstance(value, list | tuple):
        return f"{key} = {_scalar(value)}"
    items = [_scalar(item) for item in cast("list[object]", value)]
    line = f"{key} = [{', '.join(items)}]"
    if len(line) <= LINE_LENGTH:
        return line
    rows = [""]
    for item in items:
        if len(rows[-1]) + len(item) + 4 > LINE_LENGTH:
            rows.append("")
        rows[-1] += f" {item}," if rows[-1] else f"  {item},"
    return "\n".join([f"{key} = [", *rows, "]"])


def _scalar(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case _:
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
