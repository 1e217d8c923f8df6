"""Workload properties over generated traces."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from loadgen.workload.arrivals import NothingSelected, Selection, select
from loadgen.workload.formats import native
from loadgen.workload.prompts import PromptSource
from loadgen.workload.readers import read_trace
from loadgen.workload.records import TraceRecord
from shared.slo import SLO_CLASSES

texts = st.text(
    st.characters(categories=["L", "N", "P", "S"], include_characters=" "), max_size=12
).map(str.strip)
records = st.builds(
    TraceRecord,
    timestamp_s=st.floats(0, 1e6, allow_nan=False),
    input_tokens=st.integers(0, 100_000),
    output_tokens=st.integers(0, 10_000),
    label=texts,
    slo_class=st.sampled_from([None, *SLO_CLASSES]),
    tenant=texts,
    session=texts,
    hash_ids=st.lists(st.integers(0, 2**63 - 1), max_size=5).map(tuple),
    hash_block_tokens=st.integers(1, 1024),
)


@given(st.lists(records, max_size=8), st.booleans())
def test_our_format_round_trips(trace: list[TraceRecord], pack: bool) -> None:
    """A trace that was saved and shared would not be the trace that was replayed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("t.csv.gz" if pack else "t.csv")
        native.write(trace, path)
        assert list(read_trace(path)) == trace


@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.lists(st.integers(0, 5), max_size=6),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 64),
)
def test_prompts_share_exactly_the_prefix_that_hash_ids_say(
    left_ids: list[int], right_ids: list[int], left_tokens: int, right_tokens: int, block: int
) -> None:
    """Prefix caches would be measured on a sharing that the trace does not have."""
    # An id names a block and all before it, so ids that follow different ids are different.
    left_chain, right_chain = chained(left_ids), chained(right_ids)
    source = PromptSource(seed=3, vocabulary_min=32, vocabulary_max=255)
    left = source.prompt(made(left_chain, left_tokens, block), 0)
    right = source.prompt(made(right_chain, right_tokens, block), 1)
    assert (len(left), len(right)) == (left_tokens, right_tokens)
    blocks = common(left_chain, right_chain)
    expected = min(blocks * block, left_tokens, right_tokens)
    assert left[:expected] == right[:expected]
    # Spans of fewer than eight tokens may agree by chance; whole ones never do.
    ends = min(left_tokens, right_tokens)
    if ends - expected >= 8 and block >= 8:
        assert left[expected : expected + 8] != right[expected : expected + 8]


@given(st.integers(0, 2**31), st.integers(0, 10_000), st.integers(1, 200))
def test_prompts_are_decided_by_seed_and_index(seed: int, index: int, tokens: int) -> None:
    """A disturbed and an undisturbed run could not be compared token by token."""
    record = made((), tokens, 512)
    first = PromptSource(seed=seed, vocabulary_min=0, vocabulary_max=999).prompt(record, index)
    again = PromptSource(seed=seed, vocabulary_min=0, vocabulary_max=999).prompt(record, index)
    assert first == again


@given(
    st.lists(records, min_size=1, max_size=30),
    st.floats(0.1, 4),
    st.floats(0.1, 10),
    st.integers(0, 99),
)
def test_schedule_is_monotone_and_within_the_window(
    trace: list[TraceRecord], rate_scale: float, time_scale: float, seed: int
) -> None:
    """The open loop would wait for an arrival that is already overdue."""
    selection = Selection(
        start_s=100.0, duration_s=5e5, rate_scale=rate_scale, time_scale=time_scale, seed=seed
    )
    try:
        arrivals = select(sorted(trace, key=lambda one: one.timestamp_s), selection)
    except NothingSelected:
        assert not any(100 <= one.timestamp_s < 500_100 for one in trace)
        return
    times = [one.timestamp_s for one in arrivals]
    assert times == sorted(times)
    assert all(0 <= at <= 5e5 * time_scale for at in times)
    assert all(one.input_tokens >= 1 and one.output_tokens >= 1 for one in arrivals)


def made(ids: tuple[int, ...], tokens: int, block: int) -> TraceRecord:
    return TraceRecord(
        timestamp_s=0,
        input_tokens=tokens,
        output_tokens=1,
        hash_ids=ids,
        hash_block_tokens=block,
    )


def chained(ids: list[int]) -> tuple[int, ...]:
    chain: list[int] = []
    before = 0
    for one in ids:
        before = before * 7 + one + 1
        chain.append(before)
    return tuple(chain)


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
