"""The diagrams of a switch show the switcher's table of moves."""

import re
from pathlib import Path

import pytest

from services.switcher.config import SwitcherConfig
from services.switcher.machine import GO_ON_LATE, MOVES, WALKING, phase_timeout_s

ROOT = Path(__file__).resolve().parents[2]
MERMAID = re.compile(r"```mermaid\nstateDiagram-v2\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "services/switcher/README.md"])
def test_diagrams_show_the_table_of_moves(page: str) -> None:
    """Someone who debugs a switch at night would follow arrows that do not exist."""
    (diagram,) = MERMAID.findall((ROOT / page).read_text(encoding="utf-8"))
    lines = diagram.strip().splitlines()
    drawn = re.findall(r"^\s+(\w+) --> (\w+)(?: : .+)?$", diagram, re.MULTILINE)
    assert len(drawn) == len(set(drawn)) == len(lines) - 1, "all but the beginning are moves"
    moves = {(a, b) for a, after in MOVES.items() for b in after if b != "loading"}
    assert set(drawn) == moves


def test_every_walking_state_has_a_deadline_and_a_way_out() -> None:
    """Otherwise a worker that never answers would hold a switch for ever."""
    for state in WALKING:
        assert phase_timeout_s(state, SwitcherConfig()) > 0
        late = GO_ON_LATE.get(state, "committing" if state == "rolling_back" else "storing_target")
        assert late in MOVES[state], state
