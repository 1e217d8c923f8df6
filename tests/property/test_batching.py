"""The batch scheduler that counts, against one that loops; leaps against single steps."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.batching_types import Plan
from shared.cost.limits import EngineLimits
from shared.cost.step import DecodeTimes
from tests.property.batch_twins import Add, Remove, Run, Twins, World, keys_of

adds = st.builds(
    Add,
    prompt=st.integers(1, 40),
    output=st.integers(1, 40),
    earlier=st.integers(0, 50),
    prefix=st.integers(0, 2),
    common=st.integers(0, 6),
    piece=st.integers(0, 5),
)
removes = st.builds(Remove, which=st.integers(0, 9), how=st.sampled_from(("abort", "finish")))
crowds = st.lists(adds, max_size=8)
shares = st.one_of(st.just(1.0), st.floats(0, 1.2))
worlds = st.builds(
    World,
    limits=st.builds(
        EngineLimits,
        block_tokens=st.integers(1, 6),
        batch_tokens_max=st.integers(8, 40),
        running_max=st.integers(2, 8),
        waiting_max=st.integers(0, 6),
    ),
    kv_blocks=st.integers(5, 40),
    caching=st.booleans(),
)


@settings(max_examples=250)
@given(
    worlds,
    crowds,
    st.lists(
        st.one_of(
            adds,
            removes,
            st.builds(Run, share=shares),
            st.builds(Run, share=shares, meanwhile=st.lists(adds, max_size=2).map(tuple)),
        ),
        max_size=60,
    ),
)
def test_leaps_equal_single_steps_and_counting_equals_looping(
    world: World, first: list[Add], events: list[Add | Remove | Run]
) -> None:
    """Otherwise a simulated hour would end differently from the same hour served in real time, or
    neither would be what a batch scheduler does."""
    twins = Twins(world)
    for event in [*first, *events, *[Run(1.0)] * 20]:
        if isinstance(event, Run):
            twins.run(event)
        elif isinstance(event, Add):
            key = twins.add(event)
            if key is not None:
                twins.follow(key, event)
        elif twins.batch.sequences:
            key = twins.pick(event)
            twins.remove(key, event.how)
            twins.follow_removal(key)
        twins.compare()
    assert twins.batch.output_tokens_total == twins.single.output_tokens_total == twins.naive.made


@given(
    worlds,
    crowds,
    st.lists(
        st.one_of(
            adds,
            st.builds(
                Run,
                share=shares,
                meanwhile=st.lists(st.one_of(adds, removes), max_size=3).map(tuple),
            ),
        ),
        max_size=40,
    ),
)
def test_who_leaves_in_mid_plan_disturbs_nobody(
    world: World, first: list[Add], events: list[Add | Run]
) -> None:
    """Otherwise a client that hangs up during a step would change when others' tokens come, or
    leave blocks behind."""
    twins = Twins(msgspec.structs.replace(world, caching=False))
    for event in [*first, *events]:
        if isinstance(event, Run):
            twins.run(event)
        else:
            key = twins.add(event)
            if key is not None:
                twins.follow(key, event)
        twins.compare()


@given(worlds, st.lists(adds, min_size=1, max_size=14))
def test_everything_ends_and_leaves_nothing(world: World, requests: list[Add]) -> None:
    """Otherwise requests that preempt each other would go round for ever, or blocks would leak."""
    twins = Twins(world)
    taken = [key for add in requests if (key := twins.add(add)) is not None]
    ended: list[str] = []
    while (plan := twins.batch.plan()) is not None:
        progress = twins.batch.advance()
        assert progress.steps == plan.steps
        ended += keys_of(progress.ended)
        twins.batch.check()
        assert twins.batch.steps_total < 100_000
    assert sorted(ended) == sorted(taken)
    assert twins.batch.load().kv_blocks_used == twins.batch.load().tokens_pending == 0


@given(
    batch=st.integers(1, 300),
    fixed=st.integers(0, 10**11),
    slope=st.integers(0, 10**7),
    context=st.integers(0, 10**7),
    steps=st.integers(1, 3000),
    share=st.floats(0, 1.1),
    off=st.integers(-1, 1),
)
def test_the_step_that_is_under_way_is_found_exactly(
    *, batch: int, fixed: int, slope: int, context: int, steps: int, share: float, off: int
) -> None:
    """Otherwise an arrival would join a step too late, or in the middle of one."""
    times = DecodeTimes(batch, fixed, slope)
    plan = Plan(steps, times.total_ps(context, steps), preempted=(), times=times, context=context)
    elapsed_ps = times.total_ps(context, min(steps, round(steps * share))) + off
    count, end_ps = plan.steps_until(elapsed_ps)
    assert 1 <= count <= steps
    assert end_ps == times.total_ps(context, count)
    assert end_ps >= elapsed_ps or count == steps
    assert count == 1 or times.total_ps(context, count - 1) < elapsed_ps
