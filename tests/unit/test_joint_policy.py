"""Our policy: which plan it takes, when it moves, and what it says."""

from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from services.scheduler.policies import joint_policy
from services.scheduler.policies.capacity import build
from services.scheduler.policies.interface import Needs, Policy, Problem
from services.scheduler.policies.joint import Terms, losses
from services.scheduler.policies.joint import verify as packs
from services.scheduler.policies.joint_choice import (
    Candidate,
    Judge,
    candidates,
    choose,
    solve_capacity,
)
from services.scheduler.policies.joint_policy import OServe
from services.scheduler.policies.joint_refine import neighbours, refine
from services.scheduler.policies.transition import DRAIN_S, backlog
from services.scheduler.policies.transition_columns import columns_of
from services.scheduler.policies.verify import verify
from shared.messages.decisions import ALTERNATIVES_MAX
from shared.messages.demand import DemandReport, TypeDemand
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from tests.unit.joint_cases import MadeUpRates, offers, problem
from tests.unit.test_joint import every_plan

M, SMALL = "llama-2-70b", "llama-3.1-8b"
FOUR = [(4.0, 600.0, 60.0), (2.0, 1500.0, 250.0), (1.0, 3000.0, 30.0), (0.5, 500.0, 900.0)]


def four(scale: float) -> dict[str, list[tuple[float, float, float]]]:
    return {M: [(scale * rate, tokens_in, tokens_out) for rate, tokens_in, tokens_out in FOUR]}


def planned(case: Problem, policy: Policy | None = None) -> tuple[DeploymentPlan, str]:
    """The plan, which must stand up to the check that all plans go through."""
    answer = (policy or OServe(MadeUpRates())).plan(case)
    assert answer.plan is not None, answer.reason
    models = [model.model_id for model in case.models]
    assert verify(answer.plan, case.offers, models) == []
    return answer.plan, answer.reason


def gpus_of(plan: DeploymentPlan) -> list[int]:
    return sorted(len(spec.gpus) for spec in plan.replicas)


def test_light_load_gets_large_replicas_and_heavy_load_many() -> None:
    """Capacity that nobody needs is worth less than answers that come sooner."""
    light, _ = planned(problem(four(0.5), offers(8)))
    heavy, reason = planned(problem(four(2.6), offers(8)))
    assert gpus_of(light)[-1] == 8
    assert len(heavy.replicas) > len(light.replicas)
    assert "times the demand could be served (proven best)" in reason


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_no_plan_at_all_is_predicted_to_be_much_less_late(load: float) -> None:
    """Candidates come from a few linear programs; every plan of 8 GPUs is judged beside them."""
    table = build(problem(four(1.0), offers(8)), MadeUpRates())
    most, _ = solve_capacity(table, [M], time_limit_s=10.0)
    assert most is not None
    case = problem(four(load * most.objective), offers(8))
    table = build(case, MadeUpRates())
    best, terms = solve_capacity(table, [M], time_limit_s=10.0)
    assert best is not None
    judge = Judge(problem=case, table=table, source=MadeUpRates(), horizon_s=300.0)
    chosen = refine(judge, choose(candidates(judge, best, terms, time_limit_s=10.0)), terms)
    least = min(judge.dispatched(counts).lateness for counts in every_plan(table, (M,)))
    assert chosen.lateness <= 1.06 * least
    assert packs(table, chosen.counts, wanted=(M,)) == []


def test_neighbours_use_no_more_gpus_and_fit() -> None:
    """Steps between plans stay among plans."""
    table = build(problem({M: FOUR, SMALL: FOUR}, offers(16)), MadeUpRates())
    best, _ = solve_capacity(table, [M, SMALL], time_limit_s=10.0)
    assert best is not None
    gpus = sum(column.shape.gpus * count for column, count in best.counts.items())
    around = list(neighbours(table, best.counts))
    assert around
    for counts in around:
        assert packs(table, counts, wanted=(M, SMALL)) == []
        assert sum(column.shape.gpus * count for column, count in counts.items()) <= gpus


def test_of_plans_that_are_about_as_late_the_roomier_is_taken() -> None:
    """GPUs that idle help nobody."""

    def candidate(headroom: float, lateness: float) -> Candidate:
        return Candidate(
            counts={}, shares=np.zeros((0, 0)), headroom=headroom, lateness=lateness
        )  # fmt: skip

    tight, roomy, late = candidate(1.0, 0.50), candidate(2.0, 0.52), candidate(9.0, 0.6)
    assert choose([tight, roomy, late]) is roomy


def test_it_stays_with_what_it_planned() -> None:
    """The same demand again: nothing moves, not even a weight."""
    case = problem(four(2.0), offers(16))
    plan, _ = planned(case)
    again, reason = planned(replace(case, in_force=plan))
    assert again is plan
    assert "the replicas in force are the best" in reason
    assert "new weights" not in reason


def test_new_weights_cost_nothing_and_are_taken() -> None:
    """The replicas in force stay under another mix, and are told the new shares."""
    case = problem(four(2.0), offers(16))
    plan, _ = planned(case)
    skewed = {name: dict.fromkeys(row, 0.0) for name, row in plan.weights.items()}
    for row in skewed.values():
        row[plan.replicas[0].replica_id] = 1.0
    bent = replace_weights(plan, skewed)
    answer, reason = planned(replace(case, in_force=bent))
    if len(plan.replicas) > 1:
        assert "new weights" in reason
    assert answer.replicas == plan.replicas
    assert answer.weights == plan.weights


def replace_weights(plan: DeploymentPlan, weights: dict[str, dict[str, float]]) -> DeploymentPlan:
    return DeploymentPlan(plan_id="bent", replicas=plan.replicas, weights=weights)


def test_it_moves_when_the_demand_outgrows_the_plan() -> None:
    """Two large replicas that answered soonest cannot carry the rush."""
    light, _ = planned(problem(four(0.3), offers(16)))
    rush = problem(four(5.0), offers(16), in_force=light)
    plan, reason = planned(rush, OServe(MadeUpRates(), switch_s=5.0))
    assert plan.replicas != light.replicas
    assert "pays back" in reason
    assert "does not pay back" not in reason


def test_it_does_not_move_when_the_switch_costs_more_than_it_brings() -> None:
    """The gain is there and the time to earn it back is not; the reason has both sums."""
    light, _ = planned(problem(four(0.3), offers(16)))
    rush = problem(four(5.0), offers(16), in_force=light)
    answer = OServe(MadeUpRates(), switch_s=299.0).plan(rush)
    assert answer.plan is not None
    assert answer.plan.replicas == light.replicas
    assert "299 s of switching" in answer.reason
    assert answer.decision is not None
    switch = answer.decision.switch
    assert switch is not None
    assert not switch.moves
    assert switch.gain < switch.cost
    assert switch.seconds == pytest.approx(299.0)
    refused = [each for each in answer.decision.alternatives if "not worth the switch" in each.why]
    assert len(refused) == 1
    assert answer.decision.in_force is not None
    assert refused[0].lateness < answer.decision.in_force.lateness


def test_a_gain_within_the_error_of_prediction_is_no_reason() -> None:
    """Or the plan would flap with the noise of the forecast."""
    case = problem(four(2.0), offers(16))
    plan, _ = planned(case)
    for wobble in (0.97, 1.03):
        again, _ = planned(replace(problem(four(2.0 * wobble), offers(16)), in_force=plan))
        assert again.replicas == plan.replicas


def test_switch_time_is_that_of_the_slowest_new_replica() -> None:
    """Unless the operator's switcher is faster and says so."""
    light, _ = planned(problem(four(0.3), offers(16)))
    _, reason = planned(problem(four(5.0), offers(16), in_force=light))
    shown = float(reason.split(" s of switching")[0].rsplit(" ", 1)[1])
    assert shown > DRAIN_S + 20.0  # the made-up engine starts in 20 s and then reads its weights


def test_lost_gpus_are_planned_around_at_once() -> None:
    """No payback test holds back the repair of what is gone."""
    case = problem(four(1.0), offers(16))
    plan, _ = planned(case)
    left = case.offers[1:]
    answer, _ = planned(replace(case, offers=left, in_force=plan))
    assert {gpu for spec in answer.replicas for gpu in spec.gpus} <= {o.gpu_id for o in left}


def test_two_models_share_by_need() -> None:
    """The one that needs more gets more, and the idle one keeps a replica."""
    case = problem({M: FOUR, SMALL: []}, offers(16))
    plan, _ = planned(case)
    own: dict[str, int] = {}
    for spec in plan.replicas:
        own[spec.model_id] = own.get(spec.model_id, 0) + len(spec.gpus)
    assert own[M] > own[SMALL] > 0


def test_two_kinds_of_gpu_are_planned_side_by_side() -> None:
    """A replica never mixes them."""
    gpus = (*offers(8), *offers(4, kind="other"))
    plan, _ = planned(problem({M: FOUR}, gpus))
    for spec in plan.replicas:
        assert len({gpu.split("-")[0] for gpu in spec.gpus}) == 1


def test_more_models_than_gpus_serves_what_it_can_and_says_so() -> None:
    """On two GPUs the large model or the small one, not both."""
    plan, reason = planned(problem({M: [(1.0, 100, 100)], SMALL: [(1.0, 100, 100)]}, offers(2)))
    assert {spec.model_id for spec in plan.replicas} < {M, SMALL}
    assert "no GPUs for " in reason


def test_overload_zero_demand_and_no_room_are_no_exceptions() -> None:
    """Each has a plan or a reason, also with one type only."""
    policy = OServe(MadeUpRates())
    plan, reason = planned(problem({M: [(500.0, 600.0, 60.0)]}, offers(8)), policy)
    assert plan.replicas
    assert "at most 0." in reason
    plan, _ = planned(problem({M: [], SMALL: []}, offers(8)), policy)
    assert {spec.model_id for spec in plan.replicas} == {M, SMALL}
    lone = policy.plan(problem(four(1.0), offers(1)))
    assert lone.plan is None
    assert lone.reason == f"{M} fits no shape on the GPUs on offer"
    assert policy.plan(problem(four(1.0), ())).plan is None
    partly = policy.plan(problem({M: [(1.0, 100, 100), (0.1, 3e6, 3e6)]}, offers(8)))
    assert partly.plan is not None
    assert "no shape on offer holds llama-2-70b type 1" in partly.reason


def test_same_problem_same_plan() -> None:
    """A replayed run must not differ because the solver was in another mood."""
    case = problem({M: FOUR, SMALL: [(3.0, 200.0, 200.0)]}, offers(16))
    first, second = OServe(MadeUpRates()).plan(case), OServe(MadeUpRates()).plan(case)
    assert first == second
    assert first.plan is not None
    for row in first.plan.weights.values():
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-9)


def test_a_change_is_walked_step_by_step_to_its_end() -> None:
    """Each step is a plan by itself, the next one follows when it stands, and then nothing moves,
    however the forecast wobbles."""
    policy = OServe(MadeUpRates())
    case = problem(four(1.2), offers(32), in_force=standing_tp4(32))
    reasons: list[str] = []
    for step in range(8):
        now = replace(case, now_s=200.0 * step, epoch=1 + step)
        answer = policy.plan(now)
        assert answer.plan is not None
        assert verify(answer.plan, now.offers, [M]) == []
        if answer.plan.replicas == case.in_force.replicas:
            break
        assert policy.plan(replace(now, now_s=now.now_s + 30.0)) is answer, "it is under way"
        reasons.append(answer.reason)
        case = replace(case, in_force=answer.plan)
    assert len(reasons) > 1
    assert f"step 1 of {len(reasons)}" in reasons[0]
    assert f"step {len(reasons)} of {len(reasons)}" in reasons[-1]
    for wobble in (0.9, 1.1):
        noisy = problem(four(1.2 * wobble), offers(32), in_force=case.in_force)
        again = policy.plan(replace(noisy, now_s=2000.0, epoch=20))
        assert again.plan is not None
        assert again.plan.replicas == case.in_force.replicas


def standing_tp4(gpus: int) -> DeploymentPlan:
    replicas = tuple(
        ReplicaSpec(
            replica_id=f"r{i}",
            model_id=M,
            parallelism="tp4pp1",
            gpus=tuple(f"h100-{4 * i + rank:03d}" for rank in range(4)),
        )
        for i in range(gpus // 4)
    )
    row = {spec.replica_id: 4.0 / gpus for spec in replicas}
    return DeploymentPlan(plan_id="tp4", replicas=replicas, weights={"*": row})


def test_gpus_are_left_unused_and_taken_back_where_that_may_be() -> None:
    """Elastic: as few as the targets need, more when they are needed, and no move for a tie."""
    needs = Needs(elastic=True)
    light = replace(problem(four(0.4), offers(32)), needs=needs)
    plan, _ = planned(light)
    assert sum(gpus_of(plan)) < 16
    policy = OServe(MadeUpRates())
    wide = replace(light, in_force=standing_tp4(32))
    fewer = policy.plan(wide)
    assert fewer.plan is not None
    assert sum(gpus_of(fewer.plan)) < 32
    assert "saves" in fewer.reason
    rush = replace(problem(four(4.0), offers(32)), needs=needs, in_force=fewer.plan)
    more, _ = planned(rush, OServe(MadeUpRates()))
    assert sum(gpus_of(more)) > sum(gpus_of(fewer.plan))


def test_a_plan_that_is_to_survive_a_loss_does() -> None:
    """Any replica may go, and the rest carries the demand; those in force that cannot are left
    though nothing is gained in lateness."""
    needs = Needs(survive=1)
    case = replace(problem(four(1.0), offers(16)), needs=needs)
    plan, _ = planned(case)
    table = build(case, MadeUpRates())
    counts = Counter(columns_of(table, plan.replicas).values())
    assert min(losses(table, counts).values()) >= 1.0
    lone, _ = planned(problem(four(0.3), offers(8)))
    assert len(lone.replicas) == 1
    wider = replace(problem(four(0.3), offers(16)), needs=needs, in_force=lone)
    answer, reason = planned(wider)
    assert len(answer.replicas) > 1
    assert "too few to lose one" in reason


def test_a_step_of_the_mix_is_followed_in_the_period_that_shows_it() -> None:
    """The forecast has come half way, the window all of it; and replicas that were chosen are no
    longer held."""
    policy = OServe(MadeUpRates(), switch_s=5.0)
    chat, code = (
        [(9.0, 400.0, 200.0), (0.2, 6000.0, 40.0)],
        [(0.5, 400.0, 200.0), (6.0, 6000.0, 40.0)],
    )
    half = [(4.75, 400.0, 200.0), (3.1, 6000.0, 40.0)]
    first = problem({M: chat}, offers(32))
    plan = policy.plan(first).plan
    assert plan is not None
    policy.plan(replace(first, now_s=30.0, epoch=2, in_force=plan))
    seen = problem({M: half}, offers(32), in_force=plan)
    window = DemandReport(
        model_id=M, window_start_s=0.0, window_s=60.0,
        types=tuple(
            TypeDemand(
                request_type=i, requests=round(60 * rps), arrivals_rps=rps,
                input_tokens_mean=tokens_in, output_tokens_mean=tokens_out,
                input_tokens_centroid=tokens_in, output_tokens_centroid=tokens_out,
            )
            for i, (rps, tokens_in, tokens_out) in enumerate(code)
        ),
    )  # fmt: skip
    answer = policy.plan(replace(seen, now_s=60.0, epoch=3, observed=(window,)))
    assert "has shifted" in answer.reason
    assert answer.decision is not None
    planned_for = {kind.request_type: kind.arrivals_rps for kind in answer.decision.types}
    assert planned_for == pytest.approx({"0": 0.5, "1": 6.0})


@pytest.mark.parametrize("scale", [0.3, 2.0, 50.0])
def test_every_answer_says_what_it_was_made_of(scale: float) -> None:
    """Types, replicas, alternatives and what is missing, whether it moves or stays."""
    policy = OServe(MadeUpRates())
    case = problem(four(scale), offers(16))
    for number in range(2):
        answer = policy.plan(replace(case, now_s=40.0 * number, epoch=number))
        told = answer.decision
        assert answer.plan is not None
        assert told is not None
        assert told.chosen is not None
        assert len(told.types) == len(FOUR)
        assert {each.replica_id for each in told.replicas} == {
            spec.replica_id for spec in answer.plan.replicas
        }
        assert all(kind.arrivals_rps_p10 <= kind.arrivals_rps <= kind.arrivals_rps_p90
                   for kind in told.types)  # fmt: skip
        assert all(kind.ttft_s_p99 is not None for kind in told.types)
        sent = sum(sum(each.arrivals_rps.values()) for each in told.replicas)
        assert sent == pytest.approx(scale * sum(rate for rate, _, _ in FOUR))
        assert 0 < len(told.alternatives) <= ALTERNATIVES_MAX
        assert all(each.why for each in told.alternatives)
        assert told.objective is not None
        assert told.bound is not None
        assert told.optimal
        assert bool(told.missing) == (told.objective < 1.0)
        assert len(msgspec.json.encode(told)) < 100_000
        case = replace(case, in_force=answer.plan)


def test_no_plan_in_time_keeps_what_stands_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that finds nothing must not stop a mesh that serves, nor one that starts."""

    def nothing(*_: object, **__: object) -> tuple[None, Terms]:
        return None, Terms()

    monkeypatch.setattr(joint_policy, "solve_capacity", nothing)
    case = problem(four(1.0), offers(16), in_force=standing_tp4(16))
    plan, reason = planned(case)
    assert plan.replicas == case.in_force.replicas
    assert "no plan was found within" in reason
    begun = OServe(MadeUpRates()).plan(problem(four(1.0), offers(16)))
    assert "no plan was found within" in begun.reason
    assert begun.decision is not None
    assert begun.decision.missing


@pytest.mark.parametrize(
    ("phases", "area"),
    [
        ([(100.0, 2.0)], 0.0),  # there is always room
        ([(10.0, 0.0), (100.0, 2.0)], 100.0),  # 10 s of demand pile up, and are gone 10 s later
        ([(10.0, 0.0), (5.0, 2.0)], 87.5),  # ... of which only 5 s are seen
        ([(10.0, 0.5), (20.0, 1.0)], 125.0),  # nothing to spare: the queue stays
        ([(10.0, 0.5), (10.0, 0.5)], 100.0),
    ],
)
def test_backlog_is_the_area_under_the_queue(
    phases: list[tuple[float, float]], area: float
) -> None:
    """A switch that takes longer to recover from than it saves would look like a gain."""
    assert backlog(phases) == pytest.approx(area)
