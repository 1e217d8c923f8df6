"""The READMEs of router, profiler and forecaster say what the code does."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.forecaster import core as forecaster
from services.forecaster.config import ForecasterConfig
from services.profiler import core as profiler
from services.profiler.config import ProfilerConfig
from services.router import core as router
from services.router.config import RouterConfig
from shared.subjects import Subject

SERVICES = Path(__file__).resolve().parents[2] / "services"


@pytest.mark.parametrize(
    ("name", "config"),
    [("router", RouterConfig), ("profiler", ProfilerConfig), ("forecaster", ForecasterConfig)],
)
def test_knobs_are_those_of_the_config(name: str, config: type[msgspec.Struct]) -> None:
    """An operator would set a knob that does not exist, or trust a default that changed."""
    text = (SERVICES / name / "README.md").read_text(encoding="utf-8").partition("## Knobs")[2]
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", text, re.MULTILINE)
    assert dict(rows) == {f.name: str(f.default) for f in msgspec.structs.fields(config)}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("router", [*router.INPUTS, *(subject for subject, _ in router.QUERIES)]),
        ("profiler", profiler.INPUTS),
        ("forecaster", forecaster.INPUTS),
    ],
)
def test_subjects_are_those_of_the_core(name: str, inputs: list[Subject[Any]]) -> None:
    """Someone who writes to a subject of the table would not be heard."""
    text = (SERVICES / name / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:in|asked) \| `([^`]+)`[^|]*\| `(\w+)`", text, re.MULTILINE)
    assert dict(rows) == {s.pattern: s.message.__name__ for s in inputs}
