"""The READMEs of scheduler and switcher say what the code does."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.scheduler import core as scheduler
from services.scheduler.config import SchedulerConfig
from services.switcher import core as switcher
from services.switcher.config import SwitcherConfig
from services.switcher.machine import MOVES
from shared.subjects import Subject

SERVICES = Path(__file__).resolve().parents[2] / "services"


@pytest.mark.parametrize(
    ("name", "config"), [("scheduler", SchedulerConfig), ("switcher", SwitcherConfig)]
)
def test_knobs_are_those_of_the_config(name: str, config: type[msgspec.Struct]) -> None:
    """An operator would set a knob that does not exist, or trust a default that changed."""
    text = (SERVICES / name / "README.md").read_text(encoding="utf-8")
    knobs = text.partition("## Knobs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", knobs, re.MULTILINE)
    assert dict(rows) == {f.name: str(f.default) for f in msgspec.structs.fields(config)}


@pytest.mark.parametrize(
    ("name", "inputs"), [("scheduler", scheduler.INPUTS), ("switcher", switcher.INPUTS)]
)
def test_subjects_are_those_of_the_core(name: str, inputs: tuple[Subject[Any], ...]) -> None:
    """Someone who writes to a subject of the table would not be heard."""
    text = (SERVICES / name / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| in \| `([^`]+)`[^|]*\| `(\w+)`", text, re.MULTILINE)
    assert dict(rows) == {s.pattern: s.message.__name__ for s in inputs}


def test_the_state_diagram_shows_the_table_of_moves() -> None:
    """Someone who debugs a switch at night would follow arrows that do not exist."""
    text = (SERVICES / "switcher" / "README.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", text, re.MULTILINE))
    assert drawn == {(a, b) for a, moves in MOVES.items() for b in moves if b != "loading"}
