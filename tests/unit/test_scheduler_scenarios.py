"""The scheduler's core does what the scenarios in ``scenarios/`` say."""

from pathlib import Path

import pytest

from tests.unit.scheduler_scenarios import Scenario, scenarios


@pytest.mark.parametrize("path", scenarios(), ids=lambda path: path.stem)
def test_the_core_does_what_the_scenario_says(path: Path) -> None:
    """Otherwise what an operator sees it do has changed, and nobody has read how."""
    text = path.read_text(encoding="utf-8")
    assert Scenario().run(text) == text, "read the difference, then update the scenarios"
