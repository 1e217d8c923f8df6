"""Windows and scales of a trace, the built-in generator, and prompts."""

from collections import Counter

import pytest

from loadgen.workload.arrivals import NothingSelected, Selection, select
from loadgen.workload.generator import DEFAULT_TYPES, Knot, TypeSchedule, generate
from loadgen.workload.prompts import PromptSource
from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid

TRACE = [
    TraceRecord(timestamp_s=float(second), input_tokens=100 + second, output_tokens=10)
    for second in range(1000)
]


def test_window_begins_at_zero_and_ends_before_its_end() -> None:
    """A replay of a minute would hold a request too many, or begin with a wait."""
    arrivals = select(TRACE, Selection(start_s=10, duration_s=5))
    assert [one.timestamp_s for one in arrivals] == [0, 1, 2, 3, 4]
    assert [one.input_tokens for one in arrivals] == [110, 111, 112, 113, 114]


def test_reading_stops_soon_after_the_window() -> None:
    """Replaying a minute of a day would read the day."""
    reached = 0

    def endless() -> "object":
        nonlocal reached
        for record in TRACE:
            reached += 1
            yield record

    select(endless(), Selection(duration_s=5))  # pyright: ignore[reportArgumentType]  # a generator
    assert reached < 100


def test_rows_slightly_out_of_order_are_sorted() -> None:
    """A trace merged from two logs would send some requests late, or never."""
    shuffled = [TRACE[3], TRACE[1], TRACE[8], TRACE[2], TRACE[40]]
    arrivals = select(shuffled, Selection(duration_s=5))
    assert [one.timestamp_s for one in arrivals] == [1, 2, 3]


def test_time_scale_stretches_and_limit_cuts() -> None:
    """`--time-scale 2` would speed the replay up, or `--limit` would count before thinning."""
    arrivals = select(TRACE, Selection(duration_s=100, time_scale=2, limit=3, rate_scale=0.5))
    whole = select(TRACE, Selection(duration_s=100, rate_scale=0.5))
    assert len(arrivals) == 3
    assert [one.timestamp_s for one in arrivals] == [2 * one.timestamp_s for one in whole[:3]]


def test_thinning_is_seeded_nested_and_near_its_share() -> None:
    """Two runs at one scale would differ, or a scale sweep would compare unrelated samples."""
    half = select(TRACE, Selection(rate_scale=0.5, seed=7))
    again = select(TRACE, Selection(rate_scale=0.5, seed=7))
    other = select(TRACE, Selection(rate_scale=0.5, seed=8))
    fifth = select(TRACE, Selection(rate_scale=0.2, seed=7))
    assert half == again != other
    assert {one.input_tokens for one in fifth} < {one.input_tokens for one in half}
    assert 430 < len(half) < 570


def test_copies_move_a_little_and_share_no_prefix_with_the_original() -> None:
    """Doubling the rate would double the cache hits instead of the work."""
    base = [
        TraceRecord(timestamp_s=t * 10.0, input_tokens=600, output_tokens=1, hash_ids=(0, t + 1))
        for t in range(50)
    ]
    arrivals = select(base, Selection(rate_scale=3))
    assert len(arrivals) == 150
    firsts = Counter(one.hash_ids[0] for one in arrivals)
    assert sorted(firsts.values()) == [50, 50, 50]
    assert [one.timestamp_s for one in arrivals] == sorted(one.timestamp_s for one in arrivals)
    assert all(abs(one.timestamp_s - 10 * round(one.timestamp_s / 10)) <= 1 for one in arrivals)


def test_lengths_scale_clamp_and_never_vanish() -> None:
    """A small machine would be sent what it cannot hold, or a request for no tokens."""
    records = [TraceRecord(timestamp_s=0, input_tokens=5000, output_tokens=0, hash_ids=(1,))]
    (one,) = select(records, Selection(length_scale=0.1, input_tokens_max=300))
    assert (one.input_tokens, one.output_tokens, one.hash_block_tokens) == (300, 1, 51)


def test_empty_window_says_where_the_requests_are() -> None:
    """Someone whose trace begins at day three would see a replay of nothing."""
    with pytest.raises(NothingSelected, match="end at 999 s"):
        select(TRACE, Selection(start_s=5000))
    with pytest.raises(NothingSelected, match="begin at 500 s"):
        select(TRACE[500:], Selection(duration_s=10))


@pytest.mark.parametrize("field", ["rate_scale", "time_scale", "length_scale", "duration_s"])
def test_impossible_settings_are_refused_by_name(field: str) -> None:
    """`--rate-scale 0` would replay nothing and report success."""
    with pytest.raises(ConfigInvalid, match=field):
        Selection(**{field: 0.0})  # pyright: ignore[reportArgumentType]  # one of the floats


def test_generator_is_seeded_ordered_and_shifts() -> None:
    """The built-in workload would be a constant mix, which shows nothing of what OServe does."""
    records = list(generate(duration_s=600, seed=3))
    assert records == list(generate(duration_s=600, seed=3))
    assert records != list(generate(duration_s=600, seed=4))
    times = [one.timestamp_s for one in records]
    assert times == sorted(times)
    assert times[-1] < 600
    assert {one.label for one in records} == {kind.label for kind in DEFAULT_TYPES}
    early = Counter(one.label for one in records if 120 <= one.timestamp_s < 180)
    late = Counter(one.label for one in records if one.timestamp_s >= 500)
    assert early["code"] > 2 * early["document"]
    assert late["document"] > late["code"]


def test_generator_follows_its_rates_and_medians() -> None:
    """A schedule of 10 requests/s would offer something else."""
    kind = TypeSchedule(
        label="x",
        knots=(
            Knot(at=0.0, rate_rps=0.0, input_tokens_median=100, output_tokens_median=10),
            Knot(at=1.0, rate_rps=20.0, input_tokens_median=100, output_tokens_median=10),
        ),
        input_sigma=0.5,
        output_sigma=0.0,
    )
    records = list(generate(duration_s=400, seed=1, types=[kind]))
    assert abs(len(records) - 4000) < 4 * 4000**0.5
    first_half = sum(one.timestamp_s < 200 for one in records)
    assert abs(first_half - 1000) < 4 * 1000**0.5
    assert all(one.output_tokens == 10 for one in records)
    lengths = sorted(one.input_tokens for one in records)
    assert 95 < lengths[len(lengths) // 2] < 105


def test_knots_must_be_in_order() -> None:
    """A schedule written backwards would be read as some other schedule."""
    knot = Knot(at=0.5, rate_rps=1, input_tokens_median=1, output_tokens_median=1)
    early = Knot(at=0.1, rate_rps=1, input_tokens_median=1, output_tokens_median=1)
    with pytest.raises(ConfigInvalid, match=r"x\.knots"):
        TypeSchedule(label="x", knots=(knot, early), input_sigma=1, output_sigma=1)


def test_prompts_longer_than_the_pool() -> None:
    """A prompt of 200,000 tokens would come out short."""
    source = PromptSource(seed=1, vocabulary_min=3, vocabulary_max=250)
    record = TraceRecord(timestamp_s=0, input_tokens=200_000, output_tokens=1)
    prompt = source.prompt(record, 5)
    assert len(prompt) == 200_000
    assert min(prompt) >= 3
    assert max(prompt) <= 250


def test_vocabulary_too_small_to_tell_prompts_apart_is_refused() -> None:
    """Prompts would share beginnings by accident, and prefix caches would look too good."""
    with pytest.raises(ConfigInvalid, match="vocabulary"):
        PromptSource(seed=0, vocabulary_min=5, vocabulary_max=9)
