"""Policies uniform and dynamo, and what serves before anything is expected."""

from collections import Counter
from dataclasses import replace

import pytest

from services.scheduler.config import SchedulerConfig
from services.scheduler.policies.dynamo import Dynamo
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.repair import repair
from services.scheduler.policies.starting import Starting
from services.scheduler.policies.uniform import Uniform
from shared.mesh import ReplicaWish
from shared.messages.demand import DemandReport, TypeDemand
from shared.messages.plans import DeploymentPlan
from shared.messages.replicas import ReplicaReport
from shared.slo import SloTarget
from tests.unit.scheduler_cluster import (
    demand,
    in_force,
    made_up_profiles,
    offers,
    problem,
    shipped,
)

__all__ = ["made_up_profiles", "shipped"]
pytestmark = pytest.mark.usefixtures("shipped")
NOTHING = (demand("big"), demand("small"))


def shapes(planned: Planned) -> Counter[tuple[str, str]]:
    assert planned.plan is not None
    return Counter((spec.model_id, spec.parallelism) for spec in planned.plan.replicas)


def in_plan(planned: Planned) -> DeploymentPlan:
    assert planned.plan is not None
    return planned.plan


def test_the_default_is_the_smallest_shape_with_room_for_kv_on_all_gpus() -> None:
    """Otherwise a fresh mesh would serve with hardly any cache, or not at all."""
    planned = Starting().plan(problem(demand("big"), on=offers(8, 4)))
    assert shapes(planned) == {("big", "tp4pp1"): 3}
    assert planned.reason == "default; 3 x big tp4 on made-up"


def test_models_share_the_default_evenly() -> None:
    """Otherwise the first model would take every GPU, and the second never answer."""
    planned = Starting().plan(problem(*NOTHING, on=offers(8)))
    assert shapes(planned) == {("big", "tp4pp1"): 1, ("small", "tp1pp1"): 4}
    row = in_plan(planned).weights["*"]
    assert sum(share for id_, share in row.items() if id_.startswith("big")) == 0.5


def test_a_model_without_a_profile_needs_wishes_and_is_told_so() -> None:
    """Otherwise nothing would serve, for no reason that an operator could find."""
    planned = Starting().plan(problem(demand("unheard-of"), on=offers(2)))
    assert planned.plan is None
    assert "name replicas in [[mesh.replicas]]" in planned.reason
    wishes = (ReplicaWish(replica_id="mine", parallelism="tp2"),)
    asked = replace(problem(demand("unheard-of"), on=offers(2)), wishes=wishes)
    assert shapes(Starting().plan(asked)) == {("unheard-of", "tp2pp1"): 1}


def test_a_plan_in_force_outlives_a_restart_until_something_is_expected() -> None:
    """Otherwise each restart of the scheduler would reshape the mesh, and back a minute later."""
    before = in_force(("x", "big", "tp8pp1", " ".join(f"n0-g{g}" for g in range(8))))
    kept = Starting().plan(problem(demand("big"), on=offers(8), plan=before))
    assert kept.plan == before
    assert "kept" in kept.reason


def test_a_default_that_lost_a_node_comes_back_to_its_size() -> None:
    """Otherwise one crash before the first forecast would halve the mesh for good."""
    before = in_force(("big-tp4-0", "big", "tp4pp1", "n0-g0 n0-g1 n0-g2 n0-g3"))
    planned = Starting().plan(problem(demand("big"), on=offers(4, 4), plan=before))
    assert {spec.replica_id for spec in in_plan(planned).replicas} == {"big-tp4-0", "big-tp4-1"}


def test_repair_hands_a_lost_replica_s_share_to_its_successor() -> None:
    """Otherwise a crashed GPU would undo the routing that the policy had worked out."""
    before = in_force(("a", "big", "tp4pp1", "n0-g0 n0-g1 n0-g2 n0-g3"),
                      ("b", "big", "tp4pp1", "n1-g0 n1-g1 n1-g2 n1-g3"))  # fmt: skip
    uneven = replace_weights(before, {"0": {"a": 0.25, "b": 0.75}})
    left = tuple(offer for offer in offers(4, 4, 4) if offer.gpu_id != "n1-g0")
    planned = repair(problem(demand("big"), on=left, plan=uneven), why="test")
    assert in_plan(planned).weights["0"] == {"a": 0.25, "big-tp4-0": 0.75}
    alone = tuple(offer for offer in offers(4) if offer.node_id == "n0")
    planned = repair(problem(demand("big"), on=alone, plan=uneven), why="test")
    assert in_plan(planned).weights["0"] == {"a": 1.0}
    assert "1 of 2 replicas of the last plan placed" in planned.reason


def replace_weights(plan: DeploymentPlan, rows: dict[str, dict[str, float]]) -> DeploymentPlan:
    return DeploymentPlan(plan_id="uneven", replicas=plan.replicas, weights=rows)


@pytest.mark.parametrize(("rps", "shape"), [(5.0, "tp8pp1"), (30.0, "tp8pp1"), (60.0, "tp4pp1")])
def test_uniform_takes_the_fastest_shape_that_bears_the_load(rps: float, shape: str) -> None:
    """Otherwise the comparator would be weaker than what an operator would choose by hand."""
    planned = Uniform().plan(problem(demand("big", (rps, 1000, 200)), on=offers(8, 8)))
    assert shapes(planned) == {("big", shape): 16 // int(shape[2])}
    assert set(in_plan(planned).weights) == {"*"}


def test_uniform_gives_gpus_to_the_model_that_needs_them() -> None:
    """Otherwise several models could not be compared at all."""
    asked = problem(
        demand("big", (2, 1000, 200)), demand("small", (150, 500, 200)), on=offers(8, 8)
    )
    counts = shapes(Uniform().plan(asked))
    assert sum(n for (model, _), n in counts.items() if model == "big") >= 1
    gpus: Counter[str] = Counter()
    for spec in in_plan(Uniform().plan(asked)).replicas:
        gpus[spec.model_id] += len(spec.gpus)
    assert gpus["small"] > gpus["big"] > 0


def test_uniform_says_when_no_shape_meets_the_targets() -> None:
    """Otherwise an impossible target would stop all serving, or be missed without a word."""
    strict = replace(
        problem(demand("big", (1, 1000, 200)), on=offers(8)),
        targets={"big": SloTarget(ttft_s=1e-4, tpot_s=1e-4)},
    )
    planned = Uniform().plan(strict)
    assert planned.plan is not None
    assert "targets met by no shape" in planned.reason


def test_uniform_without_profiles_keeps_what_serves() -> None:
    """Otherwise a typing error in a model's profile name would empty the mesh."""
    planned = Uniform().plan(problem(demand("unheard-of", (1, 10, 10)), on=offers(2)))
    assert planned.plan is None
    assert "cost profile" in planned.reason


class Seen:
    """A Dynamo planner whose plans come into force at once."""

    def __init__(self, config: SchedulerConfig | None = None) -> None:
        self.policy = Dynamo.of(config or SchedulerConfig(policy="dynamo"))
        self.plan = DeploymentPlan(plan_id="none")
        self.now_s = 0.0

    def ask(self, rps: float, **changed: object) -> int:
        """Replicas that it wants now; five seconds pass."""
        asked = self.problem(rps)
        planned = self.policy.plan(replace(asked, **changed))  # type: ignore[arg-type]  # fields
        self.plan = in_plan(planned)
        self.now_s += 5.0
        return len(self.plan.replicas)

    def problem(self, rps: float) -> Problem:
        types = demand("big", (rps, 1000, 200))
        return problem(types, on=offers(8, 8, 8), plan=self.plan, now_s=self.now_s)

    def loads(self, *, step_s: float, waiting: int = 0) -> tuple[ReplicaReport, ...]:
        return tuple(
            ReplicaReport(
                replica_id=spec.replica_id, worker_id=spec.gpus[0], incarnation="i", epoch=1,
                phase="serving", step_s=step_s, waiting=waiting,
            )
            for spec in self.plan.replicas
        )  # fmt: skip


def test_dynamo_runs_as_many_replicas_as_the_load_divided_by_the_profile() -> None:
    """Otherwise the planner's first loop would not be what its documentation says."""
    seen = Seen()
    assert seen.ask(10.0) == 1
    assert seen.ask(40.0) == 1, "the next look at the forecast is 180 s later"
    seen.now_s = 180.0
    assert seen.ask(40.0) == 4
    assert {spec.parallelism for spec in seen.plan.replicas} == {"tp4pp1"}


def test_dynamo_corrects_its_profile_by_what_was_observed() -> None:
    """Otherwise engines slower than their profile would be planned too few."""
    seen = Seen()
    assert seen.ask(10.0) == 1
    kind = TypeDemand(
        request_type=0, requests=600, arrivals_rps=10.0, input_tokens_mean=1000.0,
        output_tokens_mean=200.0, input_tokens_centroid=1000.0, output_tokens_centroid=200.0,
        ttft_s_mean=0.2, tpot_s_mean=0.16,
    )  # fmt: skip
    slow = DemandReport(model_id="big", window_start_s=0.0, window_s=60.0, types=(kind,))
    seen.now_s = 180.0
    assert seen.ask(10.0, observed=(slow,)) > 1


def test_dynamo_adds_a_replica_only_when_all_engines_break_the_target() -> None:
    """Otherwise one straggler would grow the deployment, or an overrun one not grow at all."""
    seen = Seen()
    seen.ask(20.0)
    one_slow = (*seen.loads(step_s=0.01)[:1], *seen.loads(step_s=0.2)[1:])
    assert seen.ask(20.0, loads=one_slow) == 2
    assert seen.ask(20.0, loads=seen.loads(step_s=0.2)) == 3
    assert seen.ask(20.0, loads=seen.loads(step_s=0.01, waiting=1000)) == 4
    assert seen.ask(20.0, loads=()) == 4, "silent engines say nothing"


def test_dynamo_sheds_one_replica_at_a_time_down_to_the_floor() -> None:
    """Otherwise the second loop would undo the first, and the mesh swing."""
    seen = Seen()
    seen.ask(20.0)
    for expected in (3, 4):
        assert seen.ask(20.0, loads=seen.loads(step_s=0.2)) == expected
    for expected in (3, 2, 2):
        assert seen.ask(20.0, loads=seen.loads(step_s=0.01)) == expected


def test_dynamo_waits_for_its_last_decision() -> None:
    """Otherwise decisions would pile up while engines start."""
    seen = Seen()
    seen.ask(20.0)
    loads, before = seen.loads(step_s=0.2), seen.plan
    assert seen.ask(20.0, loads=loads) == 3
    assert seen.ask(20.0, loads=loads, in_force=before) == 3


def test_dynamo_s_shape_can_be_set_or_wished_for() -> None:
    """Otherwise it could not be configured as its own profiler would have."""
    seen = Seen(SchedulerConfig(policy="dynamo", dynamo_shape="tp8"))
    seen.ask(10.0)
    assert {spec.parallelism for spec in seen.plan.replicas} == {"tp8pp1"}
    wished = Seen()
    wished.ask(10.0, wishes=(ReplicaWish(replica_id="w", parallelism="tp2"),))
    assert {spec.parallelism for spec in wished.plan.replicas} == {"tp2pp1"}


def test_dynamo_asks_for_no_more_than_there_is() -> None:
    """Otherwise a burst would leave a count behind that takes minutes to shed."""
    seen = Seen()
    assert seen.ask(10_000.0) == 6
