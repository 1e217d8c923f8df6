"""What one run came to, from columns made by hand."""

import math

import pytest

from loadgen.compare.metrics import measure
from loadgen.simulator.outcome import Switch
from shared.slo import SloTarget
from tests.support.comparisons import result_of

NAN = math.nan
TARGETS = {"m/chat": SloTarget(ttft_s=1.0, tpot_s=0.1), "m/doc": SloTarget(ttft_s=9.0, tpot_s=9.0)}


def test_goodput_counts_only_what_met_both_targets_of_its_type() -> None:
    """A policy could look good by serving late, or slowly, or by the targets of another type."""
    result = result_of(
        [0.0, 1.0, 2.0, 3.0],
        [0.5, 2.0, 0.5, 2.0],
        [1.4, 2.5, 5.5, 3.0],
        [10, 10, 10, 10],
        [10, 10, 10, 10],
        labels=["chat", "chat", "chat", "doc"],  # good, late, slow, good
    )
    found = measure(result, window_s=10.0, warmup_s=0.0, targets=TARGETS)
    assert found.goodput_rps == pytest.approx(0.2)
    assert found.slo_attainment == pytest.approx(0.5)
    assert {key: entry.met for key, entry in found.types.items()} == {"m/chat": 1, "m/doc": 1}


def test_requests_that_never_ended_are_misses_and_endless() -> None:
    """A policy that drops the slow half would have the best percentiles."""
    result = result_of(
        [0.0, 1.0, 2.0, 3.0], [0.1, 0.1, 0.1, NAN], [0.2, 0.2, NAN, NAN], [1] * 4, [2, 2, 1, 0]
    )
    found = measure(result, window_s=10.0, warmup_s=0.0, targets=TARGETS)
    assert (found.offered, found.completed) == (4, 2)
    assert found.slo_attainment == pytest.approx(0.5)
    assert found.e2e_ms.p50 == pytest.approx(200.0)
    assert found.e2e_ms.p90 is None
    assert found.tpot_ms.p99 is None
    assert found.settled_s is None


def test_warmup_is_not_counted() -> None:
    """The cold start would be charged to whichever policy begins most differently."""
    result = result_of([0.0, 5.0], [5.0, 0.1], [9.0, 0.2], [1, 1], [2, 2])
    found = measure(result, window_s=10.0, warmup_s=4.0, targets=TARGETS)
    assert found.offered == 1
    assert found.goodput_rps == pytest.approx(1 / 6)
    assert found.ttft_ms.p99 == pytest.approx(100.0)


def test_one_token_has_no_tpot() -> None:
    """Requests for one token would have a TPOT of 0 and improve its percentiles."""
    result = result_of([0.0, 1.0], [0.1, 0.1], [0.1, 1.1], [1, 1], [1, 11])
    found = measure(result, window_s=10.0, warmup_s=0.0, targets=TARGETS)
    assert found.tpot_ms.count == 1
    assert found.tpot_ms.p50 == pytest.approx(100.0)
    assert found.slo_attainment == 1.0


def test_settled_is_when_99_percent_of_the_tokens_are_done() -> None:
    """Saturation would be told by one short request that lags, or miss a long one."""
    lagging = result_of([0.0, 1.0], [1.0, 1.0], [11.0, 50.0], [9900, 5], [90, 5])
    assert measure(
        lagging, window_s=10.0, warmup_s=0.0, targets=TARGETS
    ).settled_s == pytest.approx(1.0)
    heavy = result_of([0.0, 1.0], [1.0, 1.0], [11.0, 50.0], [900, 90], [5, 5])
    assert measure(heavy, window_s=10.0, warmup_s=0.0, targets=TARGETS).settled_s == pytest.approx(
        41.0
    )


def test_switches_and_gpu_hours() -> None:
    """What a policy pays for moving would not be told."""
    switches = (
        Switch(at_s=1.0, took_s=2.0, succeeded=True, plan="2 tp2"),
        Switch(at_s=5.0, took_s=3.0, succeeded=False, plan="4 tp1"),
    )
    result = result_of([0.0], [0.1], [0.2], [1], [2], switches=switches)
    found = measure(result, window_s=10.0, warmup_s=0.0, targets=TARGETS)
    assert (found.switches, found.switches_failed, found.switch_s) == (1, 1, 5.0)
    assert found.gpu_hours == pytest.approx(2.0)
    assert [moment.plan for moment in found.moments] == ["2 tp2", "4 tp1"]
    shares = tuple(
        Switch(at_s=at_s, took_s=0.01, succeeded=True, plan="3 tp1", moved=moved)
        for at_s, moved in ((1.0, False), (2.0, True), (3.0, False))
    )
    kept = result_of([0.0], [0.1], [0.2], [1], [2], switches=shares)
    found = measure(kept, window_s=10.0, warmup_s=0.0, targets=TARGETS)
    assert (found.switches, found.reweightings) == (1, 2)


def test_an_empty_run_is_zeros() -> None:
    """A load so small that no request is left after the warm-up would crash the comparison."""
    found = measure(
        result_of([], [], [], [], [], labels=()), window_s=10.0, warmup_s=1.0, targets=TARGETS
    )
    assert (found.offered, found.goodput_rps, found.slo_attainment) == (0, 0.0, 0.0)
    assert found.e2e_ms.p99 is None
