"""The benchmark of the planner of copies: its cases are what their names say."""

import pytest

from loadgen.bench.bench_transfer import CASES, Case, measure, problem_of
from loadgen.bench.environment import Environment
from services.switcher.transfer import plan_transfer

NOWHERE = Environment(commit="", cpu="", cores=1, memory_bytes=1, python="", system="")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_within_five_percent_of_its_bound(case: Case) -> None:
    """Otherwise the table would hold a plan that leaves links idle, or moves too much."""
    plan = plan_transfer(problem_of(case, seed=1))
    assert not plan.infeasible
    assert plan.seconds <= 1.05 * plan.seconds_bound
    assert sum(plan.bytes_by_link.values()) == plan.bytes_bound
    assert (len(plan.stages) > 1) == case.tight
    assert any(link.startswith("disk") for link in plan.bytes_by_link) is False


def test_a_line_tells_both_planners() -> None:
    """The figures of one would be told as those of the other."""
    case = next(case for case in CASES if case.lost)
    result = measure(case, repeats=1, seed=1, where=NOWHERE)
    assert result.ratio_planner < result.ratio_greedy
    assert result.gpus == 32
    assert result.replayed > 0
