"""The joint program against every plan there is, and what must hold of it on any cluster."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.policies import joint_rows
from services.scheduler.policies.capacity import Column, Table, TypeDemand, pools
from services.scheduler.policies.flow import best_flow
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.joint import GAP_MAX, Goal, Solution, Terms, best_joint, verify
from services.scheduler.policies.joint_dominance import dominated
from services.scheduler.policies.joint_fallback import filled
from services.scheduler.policies.joint_verify import verify_solution
from shared.hardware import Parallelism

MODELS = ("large", "small")
KINDS = ("a100", "h100")
SHAPES = ("tp1", "tp2", "tp1pp2", "tp4", "tp2pp2", "tp8")
PRICES = {"a100": 1.7, "h100": 3.0}
PLANS_MAX = 150
CLOSE = 2 * GAP_MAX
ZERO = 1e-6
TIME_S = 20.0


def table_of(
    draw: np.random.Generator, nodes: Mapping[str, Sequence[int]], shapes: Sequence[str]
) -> Table:
    """One or two models of one to three types on ``nodes`` (GPUs of each) by kind; some types that
    some shapes cannot do, some that next to nothing is expected of."""
    known = pools(
        GpuOffer(gpu_id=f"{kind}-{n}-{i}", node_id=f"{kind}-{n}", kind=kind)
        for kind, sizes in nodes.items()
        for n, size in enumerate(sizes)
        for i in range(size)
    )
    models = MODELS[: draw.integers(1, 3)]
    spread = 0.5 if draw.random() < 0.5 else 3.0
    types = tuple(
        TypeDemand(
            model_id=model_id,
            name=str(i),
            arrivals_rps=float(np.exp(draw.normal(0.0, spread))),
            input_tokens=100.0,
            output_tokens=100.0,
        )
        for model_id in models
        for i in range(draw.integers(1, 4))
    )
    columns = tuple(
        sorted(
            Column(model_id, pool.name, Parallelism.parse(shape))
            for model_id in models
            for pool in known.values()
            for shape in shapes
            if pool.fits(Parallelism.parse(shape))
        )
    )
    rates = np.zeros((len(columns), len(types)))
    for s, column in enumerate(columns):
        for j, kind in enumerate(types):
            if kind.model_id == column.model_id and draw.random() < 0.85:
                rates[s, j] = draw.uniform(0.3, 2.0) * column.shape.gpus ** draw.uniform(0.8, 1.3)
    return Table(pools=known, columns=columns, types=types, rates=rates)


@st.composite
def tables(draw: st.DrawFn, *, gpus: int = 8) -> Table:
    """On one or two kinds of GPUs, in nodes of one to eight, up to ``gpus`` in all."""
    kinds = KINDS[: draw(st.integers(1, 2))]
    nodes: dict[str, list[int]] = {}
    for kind in kinds:
        left = gpus // len(kinds)
        sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3))
        for size in sizes:
            nodes.setdefault(kind, []).append(max(1, min(size, left)))
            left -= nodes[kind][-1]
            if left <= 0:
                break
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3, unique=True))
    seed = draw(st.integers(0, 2**32 - 1))
    return table_of(np.random.default_rng(seed), nodes, shapes)


def every_plan(case: Table) -> Iterator[Counter[Column]]:
    """All counts that fit the GPUs, by plain enumeration."""

    def extend(columns: tuple[Column, ...]) -> Iterator[Counter[Column]]:
        if not columns:
            yield Counter()
            return
        gpus = sum(case.pools[columns[0].pool].node_gpus)
        for count in range(gpus // columns[0].shape.gpus + 1):
            for rest in extend(columns[1:]):
                counts = +(rest + Counter({columns[0]: count}))
                if not verify(case, counts, wanted=()):
                    yield counts

    yield from extend(case.columns)


def headroom_of(case: Table, counts: Mapping[Column, int], *, survive: int = 0) -> float:
    """By the flow alone; of what is left after the worst loss, of the whole of the plan."""
    flow = best_flow(case.instance(counts), "headroom")
    assert flow is not None
    if not survive or not counts:
        return flow.headroom
    left = (Counter(counts) - Counter({column: 1}) for column in counts)
    return min([flow.headroom, *(headroom_of(case, rest) for rest in left)])


def hourly(case: Table, counts: Mapping[Column, int]) -> float:
    return sum(
        count * column.shape.gpus * PRICES[case.pools[column.pool].kind]
        for column, count in counts.items()
    )


def scaled(case: Table, factor: float) -> Table:
    types = (replace(kind, arrivals_rps=kind.arrivals_rps * factor) for kind in case.types)
    return replace(case, types=tuple(types))


def solved(case: Table, goal: Goal, terms: Terms) -> Solution | None:
    """The best plan, which is checked as every one is, and proven."""
    found = best_joint(case, goal, terms, time_limit_s=TIME_S)
    if found is not None:
        assert verify_solution(case, terms, found) == []
        assert found.optimal
    return found


@given(tables(), st.data())
@settings(max_examples=40, deadline=None)
def test_no_plan_at_all_is_better(case: Table, data: st.DataObject) -> None:
    """An optimum that is none would be believed: it is proven, by a program that is then wrong."""
    plans: list[Counter[Column]] = []
    for counts in every_plan(case):
        plans.append(counts)
        if len(plans) > PLANS_MAX:
            return
    least = {model_id: data.draw(st.integers(0, 2)) for model_id in MODELS}
    least = {c.model_id: least[c.model_id] for c in case.columns}
    survive = data.draw(st.integers(0, 1))
    plans = [
        counts
        for counts in plans
        if all(sum(n for c, n in counts.items() if c.model_id == m) >= k for m, k in least.items())
    ]
    terms = Terms(least=least, survive=survive)
    found = solved(case, "headroom", terms)
    values = [headroom_of(case, counts, survive=survive) for counts in plans]
    if not case.columns or not plans:
        assert found is None
        return
    assert found is not None
    assert found.objective == pytest.approx(max(values), rel=CLOSE, abs=ZERO)

    load = data.draw(st.sampled_from([0.6, 1.0]))
    lighter = scaled(case, max(values) * data.draw(st.floats(0.2, 1.1)) or 1.0)
    enough = [
        counts
        for counts in plans
        if headroom_of(lighter, counts) * load >= 1.0 - ZERO
        and headroom_of(lighter, counts, survive=survive) >= 1.0 - ZERO
    ]
    terms = replace(terms, load=load, prices=PRICES)
    cheapest = solved(lighter, "thrift", terms)
    if not enough:
        assert cheapest is None
    else:
        assert cheapest is not None
        assert cheapest.objective == pytest.approx(min(hourly(case, c) for c in enough), rel=CLOSE)
        assert cheapest.objective == pytest.approx(hourly(case, cheapest.counts))


@given(tables(), st.integers(0, 1), st.sampled_from([0.6, 1.0, 1.5]), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_no_even_dispatch_is_gentler(case: Table, survive: int, load: float, seed: int) -> None:
    """Each plan that carries the demand is one that "gentle" could have chosen."""
    cost = np.exp(np.random.default_rng(seed).normal(0.0, 1.0, case.rates.shape))
    terms = Terms(load=load, cost=cost, survive=survive)
    lighter = scaled(case, 2.0)
    found = solved(lighter, "gentle", terms)
    total = float(lighter.demand.sum())
    for number, counts in enumerate(every_plan(lighter)):
        if number > PLANS_MAX // 4:
            return
        flow = best_flow(lighter.instance(counts), "headroom")
        assert flow is not None
        after = headroom_of(lighter, counts, survive=survive)
        if flow.headroom * load >= 1.0 and after * terms.load_after_loss() >= 1.0:
            assert found is not None
            dispatched = float((flow.shares() * cost * lighter.demand).sum()) / total
            assert found.objective <= dispatched * (1 + CLOSE)


@given(tables(gpus=16), st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_another_gpu_never_lowers_the_headroom(case: Table, survive: int) -> None:
    """It could always idle."""
    before = solved(case, "headroom", Terms(survive=survive))
    for pool in case.pools.values() if case.columns else ():
        whole = replace(pool, node_gpus=(*pool.node_gpus, 1))
        after = solved(
            replace(case, pools={**case.pools, pool.name: whole}),
            "headroom",
            Terms(survive=survive),
        )
        assert before is not None
        assert after is not None
        assert after.objective >= before.objective * (1 - CLOSE) - ZERO


@given(tables(gpus=16), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_names_of_gpus_and_nodes_change_nothing(case: Table, random: Random) -> None:
    """A plan would hang on the order in which workers happen to report."""
    offers = [offer for pool in case.pools.values() for offer in pool.offers]
    nodes = sorted({offer.node_id for offer in offers})
    renamed = dict(zip(nodes, random.sample(nodes, len(nodes)), strict=True))
    ids = random.sample([offer.gpu_id for offer in offers], len(offers))
    moved = [
        replace(offer, gpu_id=gpu_id, node_id=renamed[offer.node_id])
        for offer, gpu_id in zip(random.sample(offers, len(offers)), ids, strict=True)
    ]
    first = solved(case, "headroom", Terms())
    second = solved(replace(case, pools=pools(moved)), "headroom", Terms())
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert second.objective == pytest.approx(first.objective, rel=CLOSE, abs=ZERO)


@given(tables(gpus=16), st.floats(0.01, 100.0), st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_headroom_is_relative_to_the_demand(case: Table, factor: float, survive: int) -> None:
    """Twice the demand would fit half as often, whatever the unit it is counted in."""
    first = solved(case, "headroom", Terms(survive=survive))
    second = solved(scaled(case, factor), "headroom", Terms(survive=survive))
    if first is not None and second is not None:
        assert second.objective * factor == pytest.approx(first.objective, rel=CLOSE, abs=ZERO)


@given(tables(gpus=16))
@settings(max_examples=25, deadline=None)
def test_to_survive_costs_headroom(case: Table) -> None:
    """What is left after a loss is never more than what there was."""
    with_all, after_loss = (solved(case, "headroom", Terms(survive=s)) for s in (0, 1))
    if with_all is not None and after_loss is not None:
        assert after_loss.objective <= with_all.objective * (1 + CLOSE) + ZERO


@given(tables(gpus=16), st.floats(0.05, 0.9), st.floats(1.0, 2.0), st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_more_demand_is_never_cheaper(case: Table, share: float, more: float, survive: int) -> None:
    """A night would cost more than the day."""
    most = solved(case, "headroom", Terms(survive=survive))
    if most is None or most.objective < ZERO:
        return
    terms = Terms(survive=survive, prices=PRICES)
    light = scaled(case, share * most.objective)
    prices: list[float] = []
    for demand in (light, scaled(light, more)):
        found = solved(demand, "thrift", terms)
        if found is None:
            assert share * more > 1.0 - CLOSE, "less than the headroom always fits"
            return
        prices.append(found.objective)
    assert prices[0] <= prices[1] * (1 + CLOSE)


@given(tables())
@settings(max_examples=30, deadline=None)
def test_nothing_expected_and_nothing_asked_for_is_no_replica(case: Table) -> None:
    """A model scaled to nothing would cost as much as one that is used."""
    first = case.only([j for j, kind in enumerate(case.types) if kind.model_id == MODELS[0]])
    for demand in (first, case.only([])):
        found = solved(demand, "thrift", Terms(least=dict.fromkeys(MODELS, 0)))
        if found is not None:
            busy = {kind.model_id for kind in demand.types}
            assert {column.model_id for column in found.counts} == busy


def none_dominated(case: Table, goal: Goal, terms: Terms) -> npt.NDArray[np.bool_]:
    return np.zeros(len(case.columns), np.bool_)


@given(tables(gpus=16), st.integers(0, 1), st.sampled_from(["headroom", "served", "thrift"]))
@settings(max_examples=40, deadline=None)
def test_dominated_columns_are_worth_nothing(case: Table, survive: int, goal: Goal) -> None:
    """Leaving one out that some plan needs would lose that plan."""
    if not case.columns:
        return
    terms = Terms(survive=0 if goal == "served" else survive, prices=PRICES)
    demand = scaled(case, 0.3)
    found = solved(demand, goal, terms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_rows, "dominated", none_dominated)
        whole = solved(demand, goal, terms)
    assert (found is None) == (whole is None)
    if found is not None and whole is not None:
        assert found.objective == pytest.approx(whole.objective, rel=CLOSE, abs=ZERO)
        left_out = dominated(demand, goal, terms)
        used = {case.columns.index(column) for column in found.counts}
        assert not used & set(np.flatnonzero(left_out).tolist())


@given(tables(gpus=16), st.integers(0, 1), st.sampled_from(["headroom", "served", "thrift"]))
@settings(max_examples=40, deadline=None)
def test_a_plan_filled_from_nothing_is_a_plan(case: Table, survive: int, goal: Goal) -> None:
    """It is what is left when the solver finds none in its time."""
    if not case.columns:
        return
    demand = scaled(case, 0.3)
    models = {column.model_id for column in case.columns}
    least = dict.fromkeys(sorted(models), 1)
    terms = Terms(least=least, survive=0 if goal == "served" else survive, prices=PRICES)
    counts = filled(demand, goal, terms, np.zeros(len(case.columns)))
    if counts is None:
        return
    assert verify(demand, counts, wanted=models) == []
    if goal == "thrift":
        assert headroom_of(demand, counts, survive=terms.survive) >= 1.0 - ZERO
