"""What planners are measured on: windows of traces as demand, and what is told without traces."""

from pathlib import Path
from random import Random

import pytest

from loadgen.bench.bench_planners import Bench, sizes
from loadgen.bench.planner_demands import (
    MODEL,
    TRACE_FILES,
    WINDOW_REQUESTS,
    TraceDemands,
    problem,
    random_demand,
    typed,
)
from loadgen.workload.records import TraceRecord


def records(count: int, *, every_s: float = 0.5) -> list[TraceRecord]:
    """In turn: a long document, two short questions."""
    return [
        TraceRecord(
            timestamp_s=i * every_s,
            input_tokens=50 + i % 7 if i % 3 else 8000 + i % 7,
            output_tokens=400 if i % 3 else 20,
        )
        for i in range(count)
    ]


def test_a_window_becomes_types_with_its_rates_and_lengths() -> None:
    """Otherwise real demands would be no more real than drawn ones."""
    short, long = typed(records(1001), 2)
    assert (short.request_type, long.request_type) == (0, 1)
    assert short.arrivals_rps + long.arrivals_rps == pytest.approx(1001 / 500.0)
    assert short.input_tokens_mean == pytest.approx(53, abs=1)
    assert (short.output_tokens_mean, long.output_tokens_mean) == (400.0, 20.0)
    assert len(typed(records(1001), 16)) > 2


def test_windows_are_taken_from_all_traces_and_all_of_their_length(tmp_path: Path) -> None:
    """A benchmark on the first minutes of one trace would say little."""
    for i, name in enumerate(TRACE_FILES):
        rows = [
            f"{second},{100 * (i + 1)},{10 + second // WINDOW_REQUESTS}"
            for second in range(4 * WINDOW_REQUESTS)
        ]
        text = "\n".join(["timestamp_s,input_tokens,output_tokens", *rows])
        (tmp_path / name).write_text(text, encoding="utf-8")
    demands = TraceDemands(tmp_path)
    assert demands.missing == ()
    taken = [kind for (kind,) in demands.take(6, 1)]
    assert [kind.input_tokens_mean for kind in taken] == [100.0, 200.0, 300.0] * 2
    assert [kind.output_tokens_mean for kind in taken] == [10.0] * 3 + [12.0] * 3


def test_without_traces_nothing_is_taken_and_their_names_are_known(tmp_path: Path) -> None:
    """The benchmark runs on random demands then, and says so."""
    demands = TraceDemands(tmp_path)
    assert demands.missing == TRACE_FILES
    assert demands.take(3, 4) == []


def test_sizes_are_gpus_by_types() -> None:
    """As the option spells them."""
    assert sizes("16x4,1024x16") == ((16, 4), (1024, 16))


def test_a_problem_has_the_gpus_and_the_scaled_demand() -> None:
    """On nodes of eight, nothing in force."""
    demand = random_demand(4, Random(1))
    case = problem(20, demand, scale=2.5, limit_s=1.0)
    assert len({offer.node_id for offer in case.offers}) == 3
    (model,) = case.models
    assert model.model_id == MODEL
    assert model.arrivals_rps == pytest.approx(2.5 * sum(kind.arrivals_rps for kind in demand))


def test_what_is_measured_is_told_side_by_side() -> None:
    """One small size, with the others beside us: no comparator has more headroom than the proven
    best."""
    told = Bench(8).measure([random_demand(3, Random(seed)) for seed in range(2)])
    assert (told.demands, told.types_mean, told.proven) == (2, 3.0, 2)
    assert set(told.others) == {"oserve-paper", "exhaustive"}
    assert told.others["oserve-paper"].headroom_ratio_mean <= 1.0001
    assert told.others["exhaustive"].headroom_ratio_min == pytest.approx(1.0, abs=1e-4)
