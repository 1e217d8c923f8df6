"""What routers make of types that they cannot tell apart, and plans that are made for that."""

from statistics import NormalDist

import numpy as np
import pytest

from services.router import request_types as router
from services.router import routes
from services.router.config import RouterConfig
from services.router.loads import ReplicaLoad
from services.router.policies import Candidate, Memory
from services.router.request_types import TypeModel, posterior
from services.router.routes import Routes
from services.scheduler.policies import beliefs
from services.scheduler.policies.beliefs import Beliefs, confusion, guessed
from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.capacity_types import TypeDemand
from services.scheduler.policies.flow import Array, best_flow
from shared.hardware import Parallelism
from shared.slo import SloTarget
from tests.unit.joint_cases import offers, table

A, B = "llama-2-70b", "llama-3.1-8b"
UNBOUNDED = 10**9


def kind(name: str, rps: float, inputs: float, outputs: float, model_id: str = A) -> TypeDemand:
    return TypeDemand(
        model_id=model_id,
        name=name,
        arrivals_rps=rps,
        input_tokens=inputs,
        output_tokens=outputs,
    )


MIXED = (
    kind("0", 3.0, 50.0, 100.0),
    kind("1", 1.0, 60.0, 800.0),
    kind("2", 2.0, 1000.0, 100.0),
    kind("3", 0.5, 6000.0, 300.0),
)


def of_types(types: tuple[TypeDemand, ...], rates: Array, *, late: tuple[int, ...] = ()) -> Table:
    """Columns tp1, tp2, ... of model A with ``rates`` [S, J]."""
    pools = table({(A, "tp1"): (1.0,)}, {A: (1.0,)}, offers(8)).pools
    columns = tuple(Column(A, "h100", Parallelism(2**s)) for s in range(len(rates)))
    return Table(pools=pools, columns=columns, types=types, rates=rates, late=late)


def test_constants_are_the_routers() -> None:
    """Services do not import each other; what one assumes of another may drift apart."""
    assert RouterConfig().length_spread_ln == beliefs.SPREAD_LN
    assert routes.CERTAIN == beliefs.CERTAIN
    assert routes.NEGLIGIBLE == beliefs.NEGLIGIBLE
    assert router.SHARE_MIN == beliefs.SHARE_MIN


def test_confusion_is_what_routers_do_on_average() -> None:
    """Requests of each type are drawn, and routed by the router's own code: which row of weights
    they met is read off replicas of which each has one type's row to itself."""
    total = sum(each.arrivals_rps for each in MIXED)
    known = TypeModel(
        numbers=tuple(range(len(MIXED))),
        inputs_ln=tuple(np.log1p([each.input_tokens for each in MIXED])),
        outputs_ln=tuple(np.log1p([each.output_tokens for each in MIXED])),
        shares=tuple(each.arrivals_rps / total for each in MIXED),
    )
    rows = {each.name: list(row) for each, row in zip(MIXED, np.eye(len(MIXED)), strict=True)}
    memory = Memory(instance_id="r", load_gain=4.0, prefix_load_slack=0.25, prefixes_max=8)
    replicas = [
        Candidate(index=i, replica_id=f"r{i}", leader_id=f"g{i}", load=ReplicaLoad(decisions_max=8))
        for i in range(len(MIXED))
    ]
    plan = Routes(replicas, {**rows, "*": [0.25] * 4}, memory)
    seen = np.zeros((len(MIXED), len(MIXED)))
    draws = 997
    for j, each in enumerate(MIXED):
        centre = float(np.log1p(each.input_tokens))
        for draw in range(draws):
            step = NormalDist().inv_cdf((draw + 0.5) / draws)
            tokens = round(np.expm1(centre + beliefs.SPREAD_LN * step))
            chances = posterior(
                known,
                input_tokens=tokens,
                output_tokens_max=UNBOUNDED,
                prior=known.shares,
                spread_ln=beliefs.SPREAD_LN,
            )
            met = np.array(plan.shares(known.numbers, chances))
            seen[j] += met / met.sum() / draws
    assert confusion(MIXED) == pytest.approx(seen, abs=0.01)


def test_types_are_told_apart_by_inputs_only() -> None:
    """Same inputs, other outputs: nobody can tell; the more frequent type is believed more often.
    Inputs far apart: always told. Other models: never taken for each other."""
    alike = confusion((kind("0", 3.0, 500.0, 10.0), kind("1", 1.0, 500.0, 900.0)))
    assert alike == pytest.approx(np.array([[0.75, 0.25], [0.75, 0.25]]))
    apart = confusion((kind("0", 3.0, 20.0, 10.0), kind("1", 1.0, 20_000.0, 10.0)))
    assert apart == pytest.approx(np.eye(2), abs=1e-3)
    models = confusion((kind("0", 3.0, 500.0, 10.0), kind("0", 1.0, 500.0, 10.0, B)))
    assert models == pytest.approx(np.eye(2))
    assert confusion(MIXED).sum(axis=1) == pytest.approx(np.ones(4))


def test_a_plan_for_believed_types_takes_the_time_that_true_ones_take() -> None:
    """Otherwise a plan that is proven to carry the demand would not."""
    draw = np.random.default_rng(7)
    for _ in range(20):
        true = of_types(MIXED, draw.uniform(0.5, 20.0, (3, 4)))
        known = Beliefs.of(true)
        shares = draw.uniform(0.0, 1.0, (3, len(known.believed.types)))
        shares /= shares.sum(axis=0)
        believed_time = (known.believed.demand * shares / known.believed.rates).sum(axis=1)
        true_time = (true.demand * known.true_shares(shares) / true.rates).sum(axis=1)
        assert believed_time == pytest.approx(true_time)
        assert known.true_shares(shares).sum(axis=0) == pytest.approx(np.ones(4))
        assert known.believed.demand.sum() == pytest.approx(true.demand.sum())


def test_separation_that_cannot_be_carried_out_is_worth_nothing() -> None:
    """Two shapes, each fast for one of two types that differ in outputs only: a plan that knows
    outputs carries far more than any router can make true."""
    types = (kind("0", 1.0, 500.0, 10.0), kind("1", 1.0, 500.0, 900.0))
    true = of_types(types, np.array([[10.0, 1.0], [1.0, 10.0]]))
    known = Beliefs.of(true)
    counts = dict.fromkeys(true.columns, 1)
    separated = best_flow(true.instance(counts), "headroom")
    mixed = best_flow(known.believed.instance(counts), "headroom")
    assert separated is not None
    assert mixed is not None
    assert separated.headroom == pytest.approx(10.0)
    assert mixed.headroom == pytest.approx(2 / 1.1)


def test_a_column_serves_what_it_can_serve_but_for_a_small_part() -> None:
    """A fiftieth that a column would serve late does not bar it; a half does, while others can."""
    types = (kind("0", 98.0, 500.0, 10.0), kind("1", 2.0, 500.0, 900.0))
    rare = Beliefs.of(of_types(types, np.array([[10.0, 0.0], [8.0, 2.0]]))).believed
    assert rare.rates[:, 0] == pytest.approx([10.0, 1 / (0.98 / 8 + 0.02 / 2)])
    types = (kind("0", 1.0, 500.0, 10.0), kind("1", 1.0, 500.0, 900.0))
    half = Beliefs.of(of_types(types, np.array([[10.0, 0.0], [8.0, 2.0]]))).believed
    assert half.rates[0] == pytest.approx([0.0, 0.0])
    assert half.rates[1] == pytest.approx([3.2, 3.2])


def test_what_no_column_can_serve_whole_goes_where_most_of_it_is_served() -> None:
    """Else such requests, which nobody can tell apart, would be planned for nowhere."""
    types = (kind("0", 3.0, 500.0, 10.0), kind("1", 1.0, 500.0, 900.0))
    torn = Beliefs.of(of_types(types, np.array([[10.0, 0.0], [0.0, 2.0]]))).believed
    assert torn.servable() == (0, 1)
    assert torn.rates[0] == pytest.approx([10.0, 10.0])
    assert torn.rates[1] == pytest.approx([0.0, 0.0])
    none = Beliefs.of(of_types(types, np.zeros((2, 2)))).believed
    assert none.servable() == ()


def test_a_type_that_is_never_believed_has_no_part_in_the_plan() -> None:
    """Same inputs and a two-hundredth of the requests: routers leave it out of every mixture."""
    types = (kind("0", 199.0, 500.0, 10.0), kind("1", 1.0, 500.0, 900.0))
    known = Beliefs.of(of_types(types, np.array([[10.0, 1.0]])))
    assert [each.name for each in known.believed.types] == ["0"]
    assert known.believed.demand == pytest.approx([200.0])
    assert known.true_shares(np.array([[1.0]])) == pytest.approx(np.array([[1.0, 1.0]]))


def test_a_believed_type_is_the_mixture_of_its_parts() -> None:
    """Judges go by its lengths, its target and its classes."""
    quick, slow = SloTarget(ttft_s=0.5, tpot_s=0.2), SloTarget(ttft_s=2.0, tpot_s=0.1)
    types = (
        TypeDemand(
            model_id=A, name="7", arrivals_rps=3.0, input_tokens=500.0, output_tokens=100.0,
            target=quick, class_shares={"interactive": 1.0},
        ),
        TypeDemand(
            model_id=A, name="9", arrivals_rps=1.0, input_tokens=500.0, output_tokens=900.0,
            target=slow, class_shares={"interactive": 0.2, "standard": 0.8},
        ),
    )  # fmt: skip
    known = Beliefs.of(of_types(types, np.array([[10.0, 1.0]]), late=(1,)))
    first, second = known.believed.types
    assert (first.name, second.name) == ("7", "9")
    assert (first.input_tokens, first.output_tokens) == pytest.approx((500.0, 300.0))
    assert first.target == SloTarget(ttft_s=0.5, tpot_s=0.1)
    assert first.class_shares == pytest.approx({"interactive": 0.8, "standard": 0.2})
    assert known.believed.late == (0, 1), "a quarter of each cannot be in time"
    rare = TypeDemand(
        model_id=A, name="9", arrivals_rps=0.1, input_tokens=500.0, output_tokens=900.0, target=slow
    )
    known = Beliefs.of(of_types((types[0], rare), np.array([[10.0, 1.0]])))
    assert known.believed.types[0].target == quick, "a rare part does not set the target"


def test_single_guesses_come_to_the_confusion() -> None:
    """A rehearsal sends each request by one row, where routers mix rows: the same on average."""
    types = (*MIXED, kind("0", 5.0, 300.0, 30.0, B))
    draw, each = np.random.default_rng(11), 20_000
    kinds = np.repeat(np.arange(len(types)), each)
    centres = np.log1p([each_.input_tokens for each_ in types])
    inputs = np.expm1(centres[kinds] + beliefs.SPREAD_LN * draw.standard_normal(len(kinds)))
    found = guessed(types, kinds, inputs, draw.random(len(kinds)))
    seen = np.zeros((len(types), len(types)))
    np.add.at(seen, (kinds, found), 1.0 / each)
    assert seen == pytest.approx(confusion(types), abs=0.015)
