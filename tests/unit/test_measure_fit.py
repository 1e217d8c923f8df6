"""From timed steps to coefficients."""

from itertools import combinations
from random import Random

import numpy as np
import pytest

from services.worker.measure.assess import error_bar, judge, quantiles, split, table
from services.worker.measure.fit import fit
from services.worker.measure.ledger import StepShape, SweepFailed
from services.worker.measure.nnls import Floats, non_negative_least_squares
from services.worker.measure.sweep import Row, Scenario
from shared.cost.profile import Overheads, Profile
from shared.cost.step import PS_PER_S, Prefill, pairs
from tests.unit.measured_engine import FACTS, GPU, TRUTH, true_model


def brute_force(matrix: Floats, values: Floats) -> float:
    """The least squared residual over all sets of columns whose solution is non-negative."""
    best = float(values @ values)
    columns = range(matrix.shape[1])
    for size in range(1, matrix.shape[1] + 1):
        for chosen in combinations(columns, size):
            part = matrix[:, list(chosen)]
            found = np.linalg.lstsq(part, values, rcond=None)[0]
            if (found >= 0).all():
                best = min(best, float(((part @ found - values) ** 2).sum()))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_no_other_non_negative_coefficients_fit_better(seed: int) -> None:
    """Profiles would carry coefficients that are not the best, and nobody would notice."""
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(12, 5)) * 10.0 ** random.integers(-4, 5, 5)
    values = random.normal(size=12)
    found = non_negative_least_squares(matrix, values)
    assert (found >= 0).all()
    residual = float(((matrix @ found - values) ** 2).sum())
    assert residual == pytest.approx(brute_force(matrix, values), rel=1e-6)


def test_columns_that_say_the_same_or_nothing_do_no_harm() -> None:
    """A sweep that never met a kind of step would end in a crash or in nonsense."""
    matrix = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    found = non_negative_least_squares(matrix, np.array([2.0, 4.0, 6.0]))
    assert matrix @ found == pytest.approx([2.0, 4.0, 6.0])
    assert found[2] == 0


def shapes() -> list[StepShape]:
    found: list[StepShape] = []
    for batch in (0, 1, 2, 4, 8, 16, 31, 64):
        for length in (20, 200, 1500) if batch else (0,):
            for count, done, tokens in (
                (0, 0, 0), (1, 0, 7), (1, 0, 60), (1, 256, 180), (4, 0, 30), (12, 0, 9),
            ):  # fmt: skip
                ending = 0 if done else count
                prefill = Prefill(count * tokens, count, count * pairs(done, tokens), ending)
                if batch or count:
                    found.append(StepShape(batch, batch * length, prefill))
    return found


def rows(*, noise: float = 0.0, outliers: float = 0.0) -> list[Row]:
    """The truth, each row off by up to ``noise`` either way, some by far."""
    random, model = Random(3), true_model()
    found: list[Row] = []
    for shape in shapes():
        taken_s = model.step_ps(shape.batch, shape.context, shape.prefill) / PS_PER_S
        taken_s *= 1 + random.uniform(-noise, noise)
        if random.random() < outliers:
            taken_s *= 2.5
        found.append(Row(shape, taken_s, 5, "made-up"))
    return found


def fitted(measured: list[Row]) -> Profile:
    return Profile(
        format=TRUTH.format,
        gpu=GPU.gpu,
        model="fitted",
        model_facts=FACTS,
        times=(fit(measured, FACTS.layers),),
        overheads=Overheads(step_us=0.0, request_us=0.0),
        error=TRUTH.error,
    )


def worst(profile: Profile) -> float:
    return max(abs(one.error) for one in judge(profile, GPU, rows(), []))


def test_exact_times_give_back_the_model_that_made_them() -> None:
    """Engine overheads that cannot be told from layers would be lost instead of moved."""
    assert worst(fitted(rows())) < 0.01


def test_noise_averages_out() -> None:
    """Every profile of a shared machine would carry its noise on."""
    profile = fitted(rows(noise=0.05))
    assert quantiles(judge(profile, GPU, rows(), []))[0] < 0.015
    assert worst(profile) < 0.06


def test_a_disturbed_row_pulls_little() -> None:
    """One step that another process interrupted would bend all predictions."""
    assert worst(fitted(rows(noise=0.02, outliers=0.08))) < 0.04


def test_what_depends_on_context_and_pairs_is_found_itself() -> None:
    """Right sums of wrong terms fail as soon as contexts are longer than those measured."""
    times, truth = fit(rows(), FACTS.layers), TRUTH.times[0]
    assert times.decode_context_ns == pytest.approx(truth.decode_context_ns, rel=0.02)
    assert times.prefill_pair_ns == pytest.approx(truth.prefill_pair_ns, rel=0.02)
    assert all(after >= one for one, after in zip(times.dense_us, times.dense_us[1:], strict=False))


def test_too_few_rows_are_refused() -> None:
    """Coefficients would be made up and look measured."""
    with pytest.raises(SweepFailed, match="raise --seconds"):
        fit(rows()[:6], FACTS.layers)


def test_held_out_rows_do_not_depend_on_the_times() -> None:
    """A noisy run would choose its own judges, and two runs could not be compared."""
    scenarios = [Scenario(name="judge", tokens=1, run=lambda _: None, held_out=True)]
    quiet, noisy = rows(), rows(noise=0.5)
    extra = Row(StepShape(1, 999, Prefill()), 1.0, 5, "judge")
    first, second = (split([*some, extra], scenarios) for some in (quiet, noisy))
    assert [row.shape for row in first[1]] == [row.shape for row in second[1]]
    assert extra in first[1]
    assert len(first[0]) == pytest.approx(3 * (len(first[1]) - 1), abs=3)


def test_the_error_bar_is_that_of_held_out_rows_only() -> None:
    """A fit would judge itself, and every profile would look accurate."""
    good, bad = rows()[0], rows()[30]
    off = Row(bad.shape, bad.time_s * 2, 5, "judge")
    judge_scenario = Scenario(name="judge", tokens=1, run=lambda _: None, held_out=True)
    judged = judge(TRUTH, GPU, [good], [off])
    found = error_bar(judged, [judge_scenario])
    assert found.step_median == found.step_p90 == 0.5
    assert "judge, the sum of its 1 kinds of steps: -50.0%" in found.basis
    assert "-50.0%  held out" in table(judged)
