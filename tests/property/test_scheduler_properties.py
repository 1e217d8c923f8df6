"""Whatever is forecast, offered and in force, policies answer with plans that can be."""

import random

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.scheduler.config import SchedulerConfig
from services.scheduler.correction import FACTOR_MAX, LENT_MAX, Bias, advanced, corrected
from services.scheduler.demands import Demands
from services.scheduler.policies.interface import GpuOffer, Planned, Problem
from services.scheduler.policies.placing import place, standing_shapes
from services.scheduler.policies.registry import POLICIES, make_policy
from services.scheduler.policies.repair import repair
from services.scheduler.policies.verify import verify
from services.scheduler.policies.weights import equal, joined, planned
from services.scheduler.solving import solve
from shared.cost.limits import EngineLimits
from shared.hardware import Parallelism
from shared.messages.demand import ForecastReport, TypeForecast
from shared.messages.plans import DeploymentPlan
from shared.messages.replicas import ReplicaReport
from tests.unit.scheduler_cluster import EMPTY, KIND, TARGET, made_up_profiles, shipped
from tests.unit.scheduler_scenarios import MESH as SCENARIO_MESH
from tests.unit.scheduler_scenarios import Scenario

__all__ = ["made_up_profiles", "shipped"]
MODELS: tuple[str, ...] = ("big", "small")
SHAPES = [Parallelism(tp, pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (1, 3))]
awkward = st.sampled_from([0.0, -1.0, 1e-12, 1e-6, 1e6, 1e300, float("nan"), float("inf")])
numbers = st.one_of(awkward, st.floats(0.01, 1e5))


@st.composite
def clusters(draw: st.DrawFn) -> tuple[GpuOffer, ...]:
    sizes = draw(st.lists(st.integers(1, 8), min_size=0, max_size=4))
    kinds = draw(st.lists(st.sampled_from([KIND, "unmeasured"]), min_size=4, max_size=4))
    return tuple(
        GpuOffer(gpu_id=f"n{n}-g{g}", node_id=f"n{n}", kind=kinds[n])
        for n, size in enumerate(sizes)
        for g in range(size)
    )


@st.composite
def plans(draw: st.DrawFn, offers: tuple[GpuOffer, ...]) -> DeploymentPlan:
    """What was placed on the cluster, or on a larger one, before."""
    wider = (*offers, *(GpuOffer(gpu_id=f"x-g{g}", node_id="x", kind=KIND) for g in range(4)))
    counts = draw(
        st.dictionaries(
            st.tuples(st.sampled_from(MODELS), st.sampled_from(SHAPES)),
            st.integers(0, 6),
            max_size=4,
        )
    )
    placed = place(counts, wider, EMPTY)
    made = planned(placed.replicas, equal(placed.replicas), reason="before")
    return made.plan or EMPTY


@st.composite
def forecasts(draw: st.DrawFn, model_id: str) -> ForecastReport:
    kinds = draw(st.lists(st.tuples(numbers, numbers, numbers), max_size=4))
    return ForecastReport(
        model_id=model_id,
        made_at_s=0.0,
        horizon_s=draw(numbers),
        types=tuple(
            TypeForecast(
                request_type=number,
                arrivals_rps=rps,
                input_tokens_mean=inputs,
                output_tokens_mean=outputs,
            )
            for number, (rps, inputs, outputs) in enumerate(kinds)
        ),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    offers = draw(clusters())
    demands = Demands(MODELS)
    for model_id in MODELS:
        demands.forecast(draw(forecasts(model_id)), 0.0)
    return Problem(
        now_s=draw(st.floats(0.0, 1e6)),
        epoch=1,
        models=demands.models(0.0),
        offers=offers,
        in_force=draw(plans(offers)),
        kinds={offer.gpu_id: offer.kind for offer in offers},
        profiles={model_id: model_id for model_id in MODELS},
        targets=dict.fromkeys(MODELS, TARGET),
        limits=EngineLimits(),
        time_limit_s=10.0,
    )


def sound(answer: Planned, problem: Problem) -> None:
    assert answer.reason
    if answer.plan is not None:
        assert verify(answer.plan, problem.offers, MODELS) == []


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "static"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_policy_answers_everything_with_a_plan_that_can_be(
    name: str, data: st.DataObject
) -> None:
    """Otherwise one odd forecast would end planning, or ask for GPUs that are not there."""
    policy = make_policy(SchedulerConfig(policy=name))  # type: ignore[arg-type]  # a name
    for _ in range(2):  # what a policy remembers of the first must not spoil the second
        problem = data.draw(problems())
        solved = solve(policy, problem)
        assert solved.failure == ""
        assert solved.planned is not None
        sound(solved.planned, problem)
        sound(policy.start(problem), problem)


@settings(max_examples=200)
@given(problem=problems())
def test_a_repair_is_a_plan_that_can_be_and_moves_nothing_that_stands(problem: Problem) -> None:
    """Otherwise falling back would break what the policy had left whole."""
    answer = repair(problem, why="test")
    sound(answer, problem)
    offered = {offer.gpu_id for offer in problem.offers}
    whole = [s for s in problem.in_force.replicas if offered.issuperset(s.gpus)]
    if answer.plan is not None and len(whole) == len(problem.in_force.replicas):
        assert answer.plan == problem.in_force


@settings(max_examples=300)
@given(data=st.data())
def test_placing_what_stands_moves_nothing(data: st.DataObject) -> None:
    """Otherwise a plan that changes nothing would restart replicas."""
    offers = data.draw(clusters())
    before = data.draw(plans(()))
    before = before if before.replicas else data.draw(plans(offers))
    gpus = {gpu for spec in before.replicas for gpu in spec.gpus}
    wider = (*offers, *(GpuOffer(gpu_id=g, node_id="x", kind=KIND) for g in gpus - {
        offer.gpu_id for offer in offers
    }))  # fmt: skip
    again = place(standing_shapes(before), wider, before)
    assert again.replicas == before.replicas
    assert again.dropped == ()


@settings(max_examples=300)
@given(seed=st.integers(0, 10**9), sizes=st.lists(st.sampled_from([4, 8]), min_size=1, max_size=4))
def test_powers_of_two_pack_whenever_they_fit(seed: int, sizes: list[int]) -> None:
    """Otherwise a solver's counts would find no room for the sake of what stands where."""
    rng = random.Random(seed)
    offers = tuple(
        GpuOffer(gpu_id=f"n{n}-g{g}", node_id=f"n{n}", kind=KIND)
        for n, size in enumerate(sizes)
        for g in range(size)
    )

    def draw() -> dict[tuple[str, Parallelism], int]:
        """Shapes cut from the nodes at random."""
        counts: dict[tuple[str, Parallelism], int] = {}
        for size in sizes:
            left = size
            while left:
                tp = rng.choice([tp for tp in (1, 2, 4, 8) if tp <= left])
                left -= tp
                if rng.random() < 0.8:
                    key = "big", Parallelism(tp=tp)
                    counts[key] = counts.get(key, 0) + 1
        return counts

    plan = EMPTY
    for _ in range(4):
        counts = draw()
        placed = place(counts, offers, plan)
        assert placed.dropped == ()
        made = planned(placed.replicas, equal(placed.replicas), reason="test")
        assert made.plan is None or verify(made.plan, offers, MODELS) == []
        assert standing_shapes(made.plan or EMPTY) == {k: n for k, n in counts.items() if n}
        plan = made.plan or EMPTY


shares = st.floats(0.0, 1.0).map(lambda x: round(x, 3))
counts = st.integers(0, 300)


@st.composite
def reports(draw: st.DrawFn, plan: DeploymentPlan) -> list[ReplicaReport]:
    """Loads of some of its replicas, the absurd included."""
    return [
        ReplicaReport(
            replica_id=spec.replica_id, worker_id=spec.gpus[0], incarnation="i", epoch=1,
            phase=draw(st.sampled_from(["serving", "serving", "failed", "starting"])),
            running=draw(counts), waiting=draw(counts), step_s=draw(shares),
            kv_blocks_total=draw(st.sampled_from([0, 100, 200])),
        )
        for spec in plan.replicas
        if draw(st.integers(0, 9))
    ]  # fmt: skip


@settings(max_examples=60)
@given(data=st.data())
def test_corrected_rows_are_whole_and_bounded_and_return_to_the_plan(data: st.DataObject) -> None:
    """Otherwise the fast loop could starve a replica, take a model's requests, or never let go."""
    plan = data.draw(plans(data.draw(clusters())))
    specs, bias = plan.replicas, Bias()
    for _ in range(data.draw(st.integers(1, 4))):
        loads = data.draw(reports(plan))
        for _ in range(data.draw(st.integers(0, 40))):
            bias = advanced(bias, specs, plan.weights, loads, seconds=data.draw(shares))
    rows = corrected(plan.weights, specs, bias)
    for name, row in rows.items():
        base = plan.weights[name]
        assert abs(sum(row.values()) - 1.0) < 1e-9
        for model_id in MODELS:
            own = [spec.replica_id for spec in specs if spec.model_id == model_id]
            before, after = (sum(r.get(id_, 0.0) for id_ in own) for r in (base, row))
            assert abs(before - after) < 1e-4
        for replica_id, share in row.items():
            if base.get(replica_id, 0.0) == 0.0:
                assert share <= LENT_MAX + 1e-6
            else:
                assert share >= 0.6 * base[replica_id] / FACTOR_MAX**2 - 1e-4
    idle = [
        ReplicaReport(replica_id=s.replica_id, worker_id=s.gpus[0], incarnation="i", epoch=1,
                      phase="serving") for s in specs
    ]  # fmt: skip
    for _ in range(600):
        bias = advanced(bias, specs, plan.weights, idle, seconds=5.0)
    assert corrected(plan.weights, specs, bias) == plan.weights


@st.composite
def apart(draw: st.DrawFn) -> tuple[DeploymentPlan, dict[str, int]]:
    """A plan of one model that keeps types apart, and the part of each of its replicas."""
    offers = tuple(GpuOffer(gpu_id=f"g{g}", node_id="n", kind=KIND) for g in range(8))
    placed = place({("big", Parallelism()): draw(st.integers(2, 8))}, offers, EMPTY)
    names = [spec.replica_id for spec in placed.replicas]
    part_of = {name: draw(st.integers(0, 2)) for name in names}
    rows = {
        str(number): {
            name: draw(st.floats(0.5, 1.0)) for name in names if part_of[name] == part
        }
        for number, part in enumerate(sorted(set(part_of.values())))
    }  # fmt: skip
    made = planned(placed.replicas, joined({"big": rows}), reason="apart")
    assert made.plan is not None
    return made.plan, part_of


@settings(max_examples=60)
@given(data=st.data())
def test_what_one_part_bears_moves_nothing_in_another(data: st.DataObject) -> None:
    """Otherwise a burst of one type would take shares of types that are kept apart from it."""
    plan, part_of = data.draw(apart())
    specs, bias = plan.replicas, Bias()
    loads = data.draw(reports(plan))
    late = data.draw(st.sampled_from(sorted(set(part_of.values()))))
    loads = [
        report if part_of[report.replica_id] == late
        else msgspec.structs.replace(report, phase="serving", running=9, waiting=1, step_s=0.0)
        for report in loads
    ]  # fmt: skip
    for _ in range(data.draw(st.integers(1, 60))):
        bias = advanced(bias, specs, plan.weights, loads, seconds=1.0)
    rows = corrected(plan.weights, specs, bias)
    for name, row in plan.weights.items():
        if name != "*" and all(part_of[id_] != late for id_ in row):
            assert rows[name] == row
        served = set(row) | {id_ for (_, of), loan in bias.loans.items() if of == name
                             for id_ in loan.to}  # fmt: skip
        assert set(rows[name]) <= served


waits = st.lists(
    st.tuples(st.sampled_from(["forecast", "nothing", "silence"]), st.floats(0.0, 90.0)),
    max_size=12,
)


@given(events=waits, for_s=st.sampled_from([0.0, 30.0, 60.0]))
def test_plans_wait_for_as_long_as_demand_is_to_be_watched_and_no_longer(
    events: list[tuple[str, float]], for_s: float
) -> None:
    """Otherwise the first seconds' demand would be planned for, or a pause watched over anew."""
    demands, now_s, first_s = Demands(("m",)), 0.0, float("inf")
    for event, seconds in events:
        now_s += seconds
        if event != "silence":
            kind = TypeForecast(
                request_type=0, arrivals_rps=1.0, input_tokens_mean=9.0, output_tokens_mean=9.0
            )
            types = (kind,) if event == "forecast" else ()
            demands.forecast(
                ForecastReport(model_id="m", made_at_s=now_s, horizon_s=30.0, types=types), now_s
            )
        expected = any(demand.types for demand in demands.models(now_s))
        if expected:
            first_s = min(first_s, now_s)
        assert demands.watched(now_s, for_s=for_s) == (expected and now_s - first_s >= for_s)


ids = st.sampled_from([f"n0-g{i}" for i in range(4)])
words = st.one_of(
    st.tuples(st.just("seconds"), st.sampled_from(["1", "2", "7"])),
    st.tuples(st.just("forecast"), st.just("m"), st.sampled_from(["0.4", "1", "3", "9", "nan"])),
    st.tuples(st.just("forecast"), st.just("m"), st.just("1"), st.just("1")),
    st.tuples(st.just("observed"), st.just("idle"), st.just("rejected"), st.just("2")),
    st.tuples(st.just("load"), st.just("m-tp1-1"), st.just("60"), st.sampled_from(["0", "200"])),
    st.tuples(st.sampled_from(["die", "leave", "back"]), ids),
    st.tuples(st.just("failed"), st.just("m-tp1-0"), ids),
    st.tuples(st.just("pin"), ids.map("a@{}".format)),
    st.tuples(st.sampled_from(["raises", "answers", "prompt", "restart", "release", "pin"])),
    st.tuples(st.just("watch"), st.sampled_from(["0", "5"])),
)


@settings(max_examples=150)
@given(events=st.lists(words, max_size=30), grants=st.randoms(use_true_random=False))
def test_whatever_happens_the_core_asks_for_plans_that_can_be_and_keeps_to_what_is_pinned(
    events: list[tuple[str, ...]], grants: random.Random
) -> None:
    """Otherwise some order of events would ask for an empty plan, for GPUs that are gone, or undo
    what a person decided."""
    run = Scenario()
    run.run("seconds 2\nin-force\nprompt\n")
    released = False
    for event in events:
        run.adopt = None
        run.run(" ".join(event))
        if event[0] == "release":
            released = released or any("yes" in line for line in run.lines)
        elif event[0] in ("restart", "watch") or (event[0] == "pin" and "yes" in run.lines[-1]):
            released = False
        asked = run.adopt
        if asked is not None:
            offered = [
                GpuOffer(gpu_id=gpu.gpu_id, node_id="n0", kind="") for gpu in SCENARIO_MESH.gpus()
            ]
            assert verify(asked.plan, offered, SCENARIO_MESH.model_ids) == []
            assert asked.based_on_epoch == run.stored.epoch
            assert asked.plan.pinned or released or not run.stored.in_force.pinned
            if grants.random() < 0.6:
                run.run(grants.choice(["in-force", "in-force", "rolled-back"]))
        assert run.core.wish is None or run.core.wish.replicas
