"""Requests that go from one batch to another, whatever happens meanwhile."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.batching import Batch
from services.worker.engine.batching_types import Sequence
from shared.cost.limits import EngineLimits
from tests.property.naive_batch import PrimeTimes


class Add(msgspec.Struct, frozen=True):
    prompt: int
    output: int


class Run(msgspec.Struct, frozen=True):
    """Perform the plan up to this share of it."""

    share: float


class Take(msgspec.Struct, frozen=True):
    """Hold what the source runs; ``aborted`` of those held are given up by their clients."""

    aborted: int


class Release(msgspec.Struct, frozen=True):
    keep: bool


Event = Add | Run | Take | Release
adds = st.builds(Add, prompt=st.integers(1, 30), output=st.integers(1, 30))
runs = st.builds(Run, share=st.one_of(st.just(1.0), st.floats(0, 1.2)))
events = st.lists(
    st.one_of(
        adds,
        runs,
        st.builds(Take, aborted=st.integers(0, 2)),
        st.builds(Release, keep=st.booleans()),
    ),
    max_size=30,
)
limits = st.builds(
    EngineLimits,
    block_tokens=st.integers(1, 6),
    batch_tokens_max=st.integers(8, 40),
    running_max=st.integers(2, 8),
    waiting_max=st.just(99),
)


@settings(max_examples=200)
@given(limits, st.integers(70, 99), st.integers(60, 90), events, events)
def test_taken_over_requests_are_like_others(
    limits: EngineLimits, source_tokens: int, target_tokens: int, before: list[Event],
    after: list[Event],
) -> None:  # fmt: skip
    """Otherwise blocks would leak in a switch, a leap would end elsewhere than its steps, or those
    that are held would keep the others from running."""
    source = _batch(limits, source_tokens)
    for number, event in enumerate(before):
        if isinstance(event, Add | Run):
            _do(source, event, key=f"s{number}", source=source)
    leaping, stepping = _batch(limits, target_tokens), _batch(limits, target_tokens)
    for number, event in enumerate([*after, Release(True), *[Run(1.0)] * 3]):
        steps = _do(leaping, event, key=f"t{number}", source=source)
        if isinstance(event, Run):
            for _ in range(steps):
                stepping.advance(1)
        else:
            _do(stepping, event, key=f"t{number}", source=source)
        _compare(leaping, stepping)
    while leaping.plan() is not None:
        leaping.advance()
        leaping.check()
    assert not leaping.sequences
    assert leaping.load().kv_blocks_used == leaping.load().tokens_pending == 0


@given(limits, st.lists(adds, min_size=1, max_size=8), st.integers(0, 40))
def test_nothing_is_computed_twice_where_there_is_room(
    limits: EngineLimits, requests: list[Add], steps: int
) -> None:
    """Otherwise a switch would cost what a replay costs."""
    source, target = _batch(limits, 9999), _batch(limits, 9999)
    for number, request in enumerate(requests):
        _add(source, f"s{number}", request)
    for _ in range(steps):
        if source.plan() is not None:
            source.advance(1)
    moved = _take(source, target, Take(0))
    target.release(keep=True)
    left = sum(request.known - request.computed for request in moved if request.computed)
    decoding = sum(s.started and s.computed == s.known - 1 for s in moved)
    waiting = sum(request.known for request in moved if not request.computed)
    while target.plan() is not None:
        target.advance()
    assert target.preemptions == 0
    assert target.prefill_tokens_total == left - decoding + waiting


def _batch(limits: EngineLimits, tokens: int) -> Batch:
    return Batch(limits, PrimeTimes(), kv_blocks=-(-tokens // limits.block_tokens))


def _do(batch: Batch, event: Event, *, key: str, source: Batch) -> int:
    """How many steps that were."""
    steps = 0
    match event:
        case Add():
            _add(batch, key, event)
        case Run():
            steps = _run(batch, event)
        case Take():
            _take(source, batch, event)
        case Release():
            batch.release(keep=event.keep)
    batch.check()
    return steps


def _add(batch: Batch, key: str, add: Add) -> None:
    batch.add(key, prompt_tokens=add.prompt, output_tokens=add.output)


def _run(batch: Batch, run: Run) -> int:
    plan = batch.plan()
    if plan is None:
        assert not batch.sequences, "those that are held keep the others from running"
        return 0
    steps, _ = batch.steps_until(int(plan.duration_ps * run.share))
    batch.advance(steps)
    return steps


def _take(source: Batch, target: Batch, take: Take) -> list[Sequence]:
    held: list[Sequence] = []
    for sequence in (*source.running.values(), *source.waiting.values()):
        if sequence.key in target.sequences or sequence.key in target.entering:
            continue
        held.append(
            target.hold(
                sequence.key,
                prompt_tokens=sequence.prompt_tokens,
                output_tokens=sequence.output_tokens,
                earlier_tokens=source.made(sequence),
                computed_tokens=source.computed(sequence),
            )
        )
    for sequence in held[: take.aborted]:
        assert target.abort(sequence.key)
        assert not target.abort(sequence.key)
    return held


def _compare(one: Batch, other: Batch) -> None:
    assert one.load() == other.load()
    for place, twin in (
        (one.running, other.running),
        (one.waiting, other.waiting),
        (one.held, other.held),
        (one.entering, other.entering),
    ):
        assert list(place) == list(twin)
        for key, sequence in place.items():
            assert one.computed(sequence) == other.computed(twin[key])
            assert one.made(sequence) == other.made(twin[key])
