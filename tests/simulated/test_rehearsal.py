"""Rehearsals and formulas against the simulator: the whole mesh, with the same step times.

A smaller version of ``python -m loadgen.bench.bench_predictions``, whose figures are far better
than the bounds here: these are broken by a mistake, not by chance.
"""

import pytest

from loadgen.bench.bench_predictions import best, errors
from loadgen.bench.prediction_cases import Case, measure
from loadgen.bench.prediction_grounds import GROUNDS


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Every uniform plan of Llama-2-70B on 16 H100s that is not hopeless, and three unlike ones."""
    return list(measure(GROUNDS[0], "chat", 0.6, seed=3, requests_aimed=700.0))


def test_a_rehearsal_of_the_same_arrivals_is_what_the_simulator_does(cases: list[Case]) -> None:
    """Plans would be ranked by times that no mesh has."""
    found = errors(cases, lambda case: case.hindsight[1])
    assert found["e2e_mean"]["median"] < 0.02
    assert found["e2e_p99"]["median"] < 0.06
    assert found["tpot_mean"]["median"] < 0.02
    assert found["tpot_p99"]["median"] < 0.06
    assert found["ttft_mean"]["median"] < 0.10
    assert found["ttft_p99"]["median"] < 0.15
    assert found["goodput"]["p90"] < 0.08


def test_formulas_come_near_what_the_simulator_does(cases: list[Case]) -> None:
    """They choose which plans are rehearsed at all. With so few requests chance is in it, too."""
    borne = [case for case in cases if case.utilisation < 0.9]
    found = errors(borne, lambda case: case.formula)
    assert found["tpot_mean"]["median"] < 0.08
    assert found["tpot_p99"]["median"] < 0.20
    assert found["ttft_mean"]["median"] < 0.25
    assert found["ttft_p99"]["median"] < 0.40


def test_the_plan_rehearsed_best_is_about_the_best(cases: list[Case]) -> None:
    """Other arrivals of the same forecast must lead to a plan that is hardly worse than any."""
    taken = best([(case.played, case) for case in cases])
    truth = best([(case.seen, case) for case in cases])
    assert taken.seen["goodput"] >= truth.seen["goodput"] - 0.02
    assert taken.seen["e2e_p99"] <= 1.10 * truth.seen["e2e_p99"]
