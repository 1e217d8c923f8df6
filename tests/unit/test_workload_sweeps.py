"""Made-up mixes: how uneven they are, how they move, and whose lengths they have."""

import math
import statistics
from collections import Counter

import pytest

from loadgen.workload.kinds import Split, split_of
from loadgen.workload.records import TraceRecord
from loadgen.workload.sweeps import (
    CV_MAX,
    KINDS,
    SPATIAL,
    TEMPORAL,
    Swing,
    mix_of,
    sweep,
    swung,
    uneven,
)
from shared.errors import ConfigInvalid

REAL = [
    TraceRecord(timestamp_s=float(i), input_tokens=into, output_tokens=out)
    for i, (into, out) in enumerate(
        [(3000, 20), (4000, 30), (200, 300), (300, 400), (2000, 350), (150, 10)]
    )
]


def test_kinds_split_at_geometric_means() -> None:
    """One giant prompt would make all others short."""
    lengths = [(10, 100), (10, 100), (1000, 1)]
    records = [
        TraceRecord(timestamp_s=0.0, input_tokens=into, output_tokens=out) for into, out in lengths
    ]
    split = split_of(records)
    assert split.input_tokens == pytest.approx(10 ** (5 / 3))
    assert [split.kind(record) for record in records] == [
        "short-in/long-out", "short-in/long-out", "long-in/short-out",
    ]  # fmt: skip
    assert Split(10, 100).kind(records[0]) == "short-in/short-out"  # at the split: short


@pytest.mark.parametrize("cv", [0.0, *SPATIAL.values(), CV_MAX])
def test_uneven_shares_vary_as_asked(cv: float) -> None:
    """A sweep would be over another range than its name says."""
    shares = uneven(cv)
    assert math.fsum(shares) == pytest.approx(1.0)
    assert min(shares) >= -1e-12
    assert statistics.pstdev(shares) / statistics.fmean(shares) == pytest.approx(cv)
    assert sorted(shares, reverse=True) == list(shares)


def test_what_cannot_be_is_refused() -> None:
    """Shares below zero, or a level by mistake."""
    with pytest.raises(ConfigInvalid, match=r"0\.745"):
        uneven(0.8)
    with pytest.raises(ConfigInvalid, match="S1, S2"):
        mix_of("S6")


def test_a_swing_goes_from_one_mix_to_the_other_and_back() -> None:
    """A workload that is called temporal would stand still."""
    swing = Swing(1.0, 400.0)
    assert swung(swing, 100.0) == pytest.approx((0.7, 0.1, 0.1, 0.1))
    assert swung(swing, 300.0) == pytest.approx((0.1, 0.7, 0.1, 0.1))
    assert swung(swing, 0.0) == pytest.approx((0.4, 0.4, 0.1, 0.1))
    for level, at in TEMPORAL.items():
        shares = mix_of(level)(at.period_s / 4)
        assert math.fsum(shares) == pytest.approx(1.0)
        assert shares[0] - 0.4 == pytest.approx(0.3 * at.amplitude)


def test_arrivals_have_the_mix_the_rate_and_real_lengths() -> None:
    """A stationary level would drift, or hold requests that nobody sent."""
    arrivals = list(sweep(REAL, "S4", rps=50.0, duration_s=400.0, seed=3))
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    counts = Counter(record.label for record in arrivals)
    for kind, share in zip(KINDS, uneven(SPATIAL["S4"]), strict=True):
        assert counts[kind] / len(arrivals) == pytest.approx(share, abs=0.01)
    lengths = {(record.input_tokens, record.output_tokens) for record in arrivals}
    assert lengths == {(record.input_tokens, record.output_tokens) for record in REAL}
    times = [record.timestamp_s for record in arrivals]
    assert times == sorted(times)
    assert times[-1] < 400.0


def test_the_mix_moves_with_time() -> None:
    """A temporal level would be a stationary one."""
    arrivals = list(sweep(REAL, "T4", rps=50.0, duration_s=300.0, seed=3))
    first = Counter(record.label for record in arrivals if 50 <= record.timestamp_s < 100)
    later = Counter(record.label for record in arrivals if 200 <= record.timestamp_s < 250)
    assert first[KINDS[0]] > 2 * first[KINDS[1]]
    assert later[KINDS[1]] > 2 * later[KINDS[0]]


def test_same_arguments_same_arrivals() -> None:
    """Policies could not be compared on it, nor a table be made again."""
    one, same, other = (
        list(sweep(REAL, "T2", rps=5.0, duration_s=60.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("records", [[], REAL[:2]])
def test_a_trace_without_some_kind_is_refused(records: list[TraceRecord]) -> None:
    """Its share would silently go to the others."""
    with pytest.raises(ConfigInvalid, match="lacks"):
        next(sweep(records, "S1", rps=1.0, duration_s=10.0, seed=1))
