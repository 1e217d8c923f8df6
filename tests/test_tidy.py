"""What linters cannot check: the rules of the house that a reader would otherwise have to know."""

import ast
import importlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

from shared.subjects import Subject

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("shared", "services", "loadgen", "deploy", "tests")
SERVICES = ("ingress", "router", "profiler", "forecaster", "scheduler", "switcher", "worker")
MODULE_LINES_MAX, MODULE_LINES_HARD_MAX = 300, 500
FUNCTION_LINES_MAX = 70
FILE_BYTES_MAX = 1 << 20

LONG_MODULES: dict[str, str] = {}
"""Modules of more than MODULE_LINES_MAX lines, each with its reason. Test modules need none: a
suite is a list."""

SUBJECT_SPELLERS = ("shared/subjects.py", "tests/", "README.md", "ARCHITECTURE.md")
ENVIRONMENT_READERS = (
    "shared/config.py", "shared/service.py", "deploy/", "tests/", "loadgen/bench/",
)  # fmt: skip
UNFINISHED = re.compile(
    r"\b(TODO|FIXME|XXX|HACK)\b|\bfor now\b|\bsimplified\b|\bNotImplementedError\b"
    r"|\bnot (?:yet )?implemented\b",
    re.IGNORECASE,
)
DEVELOPER_PATH = re.compile(
    r"(?<![\w.])/(?:home|Users|root|work|mnt|workspace)/[\w.-]+|[A-Z]:\\\\Users"
)
BANNED_WORDS = {
    "pod": "replica",
    "backend": "replica or engine",
    "msg": "message",
    "cfg": "config",
    "mgr": "a noun that says what it does",
    "utils": "the noun of what is in it",
    "helpers": "the noun of what is in it",
}


@cache
def tracked() -> tuple[Path, ...]:
    """Files that are, or would be, committed; relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    paths = (Path(line) for line in listed.splitlines())
    return tuple(sorted(path for path in paths if (ROOT / path).is_file()))


def modules(*, tests: bool = True) -> list[Path]:
    folders = FOLDERS if tests else FOLDERS[:-1]
    return [path for path in tracked() if path.suffix == ".py" and path.parts[0] in folders]


@cache
def text(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path), filename=str(path))


def report(problems: list[str], remedy: str) -> None:
    assert not problems, "\n".join([*problems, "", remedy])


def lines_matching(pattern: re.Pattern[str], path: Path) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for number, line in enumerate(text(path).splitlines(), 1)
        if pattern.search(line)
    ]


def test_subjects_are_spelled_in_one_file() -> None:
    """A subject spelled twice changes once, and two services no longer hear each other."""
    pattern = re.compile(r"oserve\.v\d")
    problems = [
        line
        for path in modules()
        if not str(path).startswith(SUBJECT_SPELLERS)
        for line in lines_matching(pattern, path)
    ]
    report(problems, "Name the subject in shared/subjects.py and use it from there.")


def test_the_environment_is_read_in_one_place() -> None:
    """A setting read elsewhere is not shown by --print-config, and cannot be set in a file."""
    pattern = re.compile(r"\bos\.environ\b|\bgetenv\b|from os import .*environ")
    problems = [
        line
        for path in modules()
        if not str(path).startswith(ENVIRONMENT_READERS)
        for line in lines_matching(pattern, path)
    ]
    report(problems, "Make it a field of the service's config; shared/config.py fills it in.")


def test_modules_are_short() -> None:
    """A module that grows without a word becomes the system."""
    problems: list[str] = []
    for path in modules(tests=False):
        length = len(text(path).splitlines())
        if length > MODULE_LINES_HARD_MAX:
            problems.append(f"{path}: {length} lines, never more than {MODULE_LINES_HARD_MAX}")
        elif length > MODULE_LINES_MAX and str(path) not in LONG_MODULES:
            problems.append(f"{path}: {length} lines, {MODULE_LINES_MAX} without a reason")
    report(problems, "Split it, or give its reason in LONG_MODULES of tests/test_tidy.py.")


def test_reasons_for_long_modules_are_still_needed() -> None:
    """The list of exceptions would outlive them."""
    problems = [
        f"{name}: {reason}"
        for name, reason in LONG_MODULES.items()
        if not (ROOT / name).exists() or len(text(Path(name)).splitlines()) <= MODULE_LINES_MAX
    ]
    report(problems, "Take it off LONG_MODULES.")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short() -> None:
    """A function that does not fit a screen is not read to its end."""
    problems: list[str] = []
    for path in modules():
        for function in functions(path):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > FUNCTION_LINES_MAX:
                problems.append(f"{path}:{function.lineno}: {function.name} has {length} lines")
    report(problems, f"Split what has more than {FUNCTION_LINES_MAX} lines.")


def test_nothing_is_left_for_later() -> None:
    """A user meets a part that pretends to work."""
    problems = [
        line
        for path in modules()
        if path != Path("tests/test_tidy.py")
        for line in lines_matching(UNFINISHED, path)
    ]
    report(problems, "Finish it, or leave it out.")


def names_made_in(path: Path) -> Iterator[tuple[int, str]]:
    """Public names that the module defines: what others, and operators, have to call it by."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.lineno, node.name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case _:
                pass


def words(name: str) -> set[str]:
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    return set(parts)


def test_names_use_the_words_of_the_glossary() -> None:
    """One thing with two names is two things in its reader's head."""
    problems: list[str] = []
    for path in modules(tests=False):
        found = [(0, path.stem), *names_made_in(path)]
        problems += [
            f"{path}:{line}: {name}: say {BANNED_WORDS[word]}, not {word}"
            for line, name in found
            if not name.startswith("_")
            for word in sorted(words(name) & BANNED_WORDS.keys())
        ]
    report(problems, "GLOSSARY.md has one word for each thing.")


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_its_parts(service: str) -> None:
    """A reader, or a deployment, would not find in one service what is there in all others."""
    folder = ROOT / "services" / service
    parts = ("README.md", "__init__.py", "__main__.py", "config.py", "core.py", "service.py")
    missing = [part for part in parts if not (folder / part).is_file()]
    assert not missing, f"services/{service} lacks {', '.join(missing)}"


def test_there_are_no_other_services() -> None:
    """A new service would escape every check that goes by SERVICES."""
    found = {path.parts[1] for path in modules() if path.parts[0] == "services" and path.parts[2:]}
    assert found == set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_readme_lists_the_subjects_that_the_code_hears(service: str) -> None:
    """The README would send an operator to look for messages that never come."""
    core: Any = importlib.import_module(f"services.{service}.core")
    if not hasattr(core, "INPUTS"):
        core = importlib.import_module(f"services.{service}.service")
    inputs = cast("tuple[Subject[Any], ...]", getattr(core, "INPUTS", ()))
    queries = cast("tuple[tuple[Subject[Any], str], ...]", getattr(core, "QUERIES", ()))
    heard = {subject.pattern for subject in inputs} | {subject.pattern for subject, _ in queries}
    readme = ROOT / "services" / service / "README.md"
    assert readme.is_file(), f"services/{service} has no README.md"
    told = _subjects_in(readme.read_text(encoding="utf-8"))
    if not heard:
        assert told, f"services/{service}/README.md has no table of subjects that it hears"
        return
    assert told == heard, (
        f"services/{service}/README.md: missing rows {sorted(heard - told)}, "
        f"rows that the code does not hear {sorted(told - heard)}"
    )


def _subjects_in(readme: str) -> set[str]:
    """Subjects of table rows that start with ``| in |`` or ``| asked |``."""
    rows = re.findall(r"^\|\s*(?:in|asked)\s*\|([^|]*)\|", readme, flags=re.MULTILINE)
    return {subject for row in rows for subject in re.findall(r"`(oserve\.v\d[^`]*)`", row)}


def test_no_large_file_is_tracked() -> None:
    """Everybody who clones would carry a checkpoint or a trace along for ever."""
    sizes = {path: (ROOT / path).stat().st_size for path in tracked()}
    problems = [f"{path}: {size} bytes" for path, size in sizes.items() if size > FILE_BYTES_MAX]
    report(problems, "Generate it, or fetch it when it is needed.")


def test_no_path_of_one_machine_is_written_down() -> None:
    """It would work on one developer's machine only."""
    suffixes = (".py", ".md", ".toml", ".sh", ".conf", ".yaml", ".yml", "")
    problems = [
        line
        for path in tracked()
        if path.suffix in suffixes and path != Path("tests/test_tidy.py")
        for line in lines_matching(DEVELOPER_PATH, path)
    ]
    report(problems, "Write it relative to the repository, or make it a setting.")


def test_every_test_says_what_would_be_wrong() -> None:
    """A red test would not tell its reader whether to worry."""
    problems = [
        f"{path}:{function.lineno}: {function.name}"
        for path in modules()
        if path.parts[0] == "tests"
        for function in functions(path)
        if function.name.startswith("test_") and ast.get_docstring(function) is None
    ]
    report(problems, "Its docstring says what would be wrong in the world if it failed.")


@pytest.mark.parametrize(
    ("folder", "marker"), [("processes", "processes"), ("chaos", "chaos"), ("gpu", "gpu")]
)
def test_slow_tests_carry_their_marker(folder: str, marker: str) -> None:
    """`pytest -m "not chaos"` would start killing processes all the same."""
    problems = [
        str(path)
        for path in modules()
        if path.parts[:2] == ("tests", folder)
        and path.name.startswith("test_")
        and f"pytest.mark.{marker}" not in text(path)
    ]
    report(problems, f"Set pytestmark = pytest.mark.{marker}.")


def test_markers_are_declared_and_used() -> None:
    """A marker in nobody's tests selects nothing, and says so to nobody."""
    config = tomllib.loads(text(Path("pyproject.toml")))
    declared = {line.split(":")[0] for line in config["tool"]["pytest"]["ini_options"]["markers"]}
    used = {
        name
        for path in modules()
        if path.parts[0] == "tests"
        for name in re.findall(r"pytest\.mark\.(\w+)", text(path))
    }
    assert declared <= used, f"declared, but used by no test: {sorted(declared - used)}"


def test_no_module_is_dead() -> None:
    """Code that nobody imports is read, and mended, for nothing."""
    imported = {name for path in modules() for name in _imports(path)}
    entry_points = ("__main__.py", "__init__.py", "conftest.py", "update.py")
    problems: list[str] = []
    for path in modules(tests=False):
        name = ".".join(path.with_suffix("").parts)
        runs = '__name__ == "__main__"' in text(path)
        if path.name not in entry_points and not runs and name not in imported:
            problems.append(str(path))
    report(problems, "Delete it, or use it.")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
