"""Predicted tails: what they must rise and fall with for a ranking of plans to make sense."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from services.scheduler.policies.capacity import ReplicaKind, build
from services.scheduler.policies.joint_choice import Judge
from services.scheduler.policies.joint_latency import Load, Tail, tails
from services.scheduler.policies.rehearsal import rehearse, requests
from services.scheduler.policies.rehearsal_choice import scene_of
from shared.cost.limits import EngineLimits
from shared.hardware import Parallelism
from tests.unit.joint_cases import MadeUpRates, offers, problem

LIMITS = EngineLimits()
SOURCE = MadeUpRates()


def tail(
    *loads: tuple[float, float, float], tp: int = 4, pp: int = 1, horizon_s: float = 300.0
) -> list[Tail]:
    model = SOURCE.model(ReplicaKind("h100", "llama-2-70b", Parallelism(tp, pp), 8))
    each = [Load(arrivals_rps=a, input_tokens=i, output_tokens=o) for a, i, o in loads]
    return tails(model, each, LIMITS, horizon_s=horizon_s)


def test_more_load_is_never_faster() -> None:
    """Up to and through saturation, without a jump down or a number that is none."""
    found = [tail((0.05 * 1.25**step, 800.0, 200.0))[0] for step in range(40)]
    for less, more in pairwise(found):
        assert more.ttft_s >= less.ttft_s * 0.999
        assert more.tpot_s >= less.tpot_s * 0.98
    assert found[0].utilisation < 0.1
    assert found[-1].utilisation > 1
    assert 0 < found[-1].ttft_s < 1e6


def test_overload_waits_longer_the_longer_it_lasts() -> None:
    """By half of what piles up within the horizon."""
    rate = 40.0
    short, long = (tail((rate, 800.0, 200.0), horizon_s=s)[0] for s in (60.0, 600.0))
    assert short.utilisation == long.utilisation > 1
    piled_s = (600.0 - 60.0) / 2 * (long.utilisation - 1)
    assert long.ttft_s - short.ttft_s > piled_s


def test_a_larger_replica_answers_sooner() -> None:
    """At the same load: why two tp8 may beat four tp4 that carry more."""
    small, large = (tail((1.0, 800.0, 200.0), tp=tp)[0] for tp in (4, 8))
    assert large.tpot_s < small.tpot_s
    assert large.ttft_s < small.ttft_s


def test_a_longer_prompt_waits_longer_for_its_first_token() -> None:
    """Types on one replica share its queue, and not their prompts."""
    short, long = tail((1.0, 100.0, 100.0), (1.0, 6000.0, 100.0))
    assert long.ttft_s > short.ttft_s
    assert long.tpot_s == short.tpot_s


def test_unlike_types_wait_for_each_other() -> None:
    """The same mean length, once for all and once half short and half long."""
    (alike,) = tail((3.0, 2000.0, 200.0))
    short, _ = tail((1.5, 100.0, 200.0), (1.5, 3900.0, 200.0))
    assert short.utilisation == pytest.approx(alike.utilisation, rel=0.05)
    (only_short,) = tail((3.0, 100.0, 200.0))
    assert short.ttft_s > only_short.ttft_s


def test_one_output_token_has_no_tpot() -> None:
    """Nothing decodes."""
    assert tail((2.0, 500.0, 1.0))[0].tpot_s == 0.0


def errors_of(shape: str, load: float) -> list[tuple[float, ...]]:
    """Of TPOT and TTFT, mean and 99th percentile, relative to a long rehearsal; one row a type."""
    mix = [(2.0, 500.0, 150.0), (1.0, 2000.0, 40.0), (0.2, 7000.0, 200.0)]
    parallelism = Parallelism.parse(shape)
    asked = problem({"llama-2-70b": mix}, offers(parallelism.gpus))
    table = build(asked, SOURCE)
    (column,) = [column for column in table.columns if column.shape == parallelism]
    scale = load / tail(*mix, tp=parallelism.tp, pp=parallelism.pp)[0].utilisation
    kinds = tuple(replace(kind, arrivals_rps=scale * kind.arrivals_rps) for kind in table.types)
    table = replace(table, types=kinds)
    judge = Judge(problem=asked, table=table, source=SOURCE, horizon_s=300.0)
    shares = np.zeros_like(table.rates)
    shares[table.columns.index(column)] = 1.0
    drawn = requests(table, seconds=1500.0, seed=4)
    seen = rehearse(scene_of(judge), {column: 1}, shares, drawn)
    told = tail(*((scale * a, i, o) for a, i, o in mix), tp=parallelism.tp, pp=parallelism.pp)
    rows: list[tuple[float, ...]] = []
    for one, fared in zip(told, seen.types, strict=True):
        truth = (fared.tpot_s.mean, fared.tpot_s.p99, fared.ttft_s.mean, fared.ttft_s.p99)
        formula = (one.tpot_s_mean, one.tpot_s, one.ttft_s_mean, one.ttft_s)
        rows.append(tuple(abs(a / (b or 0.0) - 1) for a, b in zip(formula, truth, strict=True)))
    return rows


def test_formulas_come_near_a_rehearsal() -> None:
    """Long and short prompts on one replica, with and without stages. Formulas choose what is
    rehearsed at all: a shape that they wrong is never looked at."""
    shapes = ("tp4", "tp8", "tp2pp2", "tp4pp2", "tp2pp4")
    rows = [row for shape in shapes for load in (0.25, 0.65) for row in errors_of(shape, load)]
    tpot, tpot_p99, ttft, ttft_p99 = np.median(np.array(rows), axis=0)
    assert tpot < 0.10
    assert tpot_p99 < 0.20
    assert ttft < 0.20
    assert ttft_p99 < 0.35
    assert np.array(rows).max() < 1.0


def test_no_tpot_exceeds_the_longest_step() -> None:
    """However late they are: prompts share a step's budget."""
    for rate in (1.0, 30.0, 1000.0):
        for found in tail((rate, 4000.0, 30.0), (rate, 100.0, 300.0)):
            assert found.tpot_s_mean <= found.tpot_s < 0.5
