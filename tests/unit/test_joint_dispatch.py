"""Who goes where over time: found by the past, kept unless clearly worse, given up in need."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.scheduler.policies import joint_dispatch
from services.scheduler.policies.capacity import Column, build
from services.scheduler.policies.capacity_plan import place_counts, weights
from services.scheduler.policies.horizon import Foresight
from services.scheduler.policies.horizon_judge import weighed
from services.scheduler.policies.interface import PastWindow, Problem
from services.scheduler.policies.joint_dispatch import (
    DROWNED_MIN,
    DROWNING,
    PAST_S_MIN,
    REVIEW_S,
    TOGETHER_S,
    WAITED,
    Dispatcher,
    Sent,
    drowning,
)
from services.scheduler.policies.separation import LONG, Dispatch
from services.scheduler.policies.weights import planned
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import ReplicaReport
from tests.unit.joint_cases import MadeUpRates, offers, problem

MODEL = "llama-2-70b"
CHAT, CODE = (6.0, 300.0, 200.0), (3.0, 5000.0, 20.0)
CALM, BURST = {0: 6.0, 1: 1.0}, {0: 6.0, 1: 30.0}
BURSTS = (*[CALM] * 6, BURST, *[CALM] * 5, BURST, *[CALM] * 3)


class Mesh:
    """Four replicas of four GPUs, as they stand under what a dispatcher says."""

    def __init__(self, past: Sequence[dict[int, float]] = BURSTS, *, waited: int = WAITED) -> None:
        windows = tuple(
            PastWindow(seconds=10.0, arrivals_rps=rates) for rates in past for _ in range(3)
        )
        late = ReplicaReport(
            replica_id="earlier", worker_id="g", incarnation="i", epoch=1, phase="serving",
            running=8, waiting=waited,
        )  # fmt: skip
        self.problem = replace(
            problem({MODEL: (CHAT, CODE)}, offers(16)), history={MODEL: windows}, loads=(late,)
        )
        self.dispatcher = Dispatcher()

    def sent(self, *, at_s: float) -> Sent:
        """What it says at that time, which is put in force."""
        asked = replace(self.problem, now_s=at_s)
        foreseen = Foresight().foresee(asked)
        table = build(foreseen.high, MadeUpRates())
        judge = weighed(foreseen, table, MadeUpRates(), horizon_s=300.0)
        (pool,) = table.pools
        counts = Counter({Column(MODEL, pool, Parallelism(4, 1)): 4})
        placed = place_counts(table, counts, asked.in_force)
        found = self.dispatcher.sent(judge, judge.dispatched(counts), placed, horizon_s=60.0)
        assert Counter(found.candidate.counts) == found.placed.counts
        rows = weights(found.judge.table, found.placed, found.candidate.shares)
        if found.stays:
            assert {
                name: pytest.approx(row, abs=1e-3) for name, row in rows.items() if name != "*"
            } == {name: row for name, row in asked.in_force.weights.items() if name != "*"}
            return found
        plan = planned(placed.replicas, rows, reason="").plan
        assert plan is not None
        self.problem = replace(asked, in_force=plan)
        return found

    @property
    def plan(self) -> DeploymentPlan:
        return self.problem.in_force

    def queue(self, *waiting: int) -> None:
        """So many wait at each replica, behind eight that run."""
        loads = tuple(
            ReplicaReport(
                replica_id=spec.replica_id, worker_id=spec.gpus[0], incarnation="i", epoch=1,
                phase="serving", running=8, waiting=count,
            )
            for spec, count in zip(self.plan.replicas, waiting, strict=False)
        )  # fmt: skip
        self.problem = replace(self.problem, loads=loads)


@pytest.fixture(name="looks")
def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When dispatches were tried out."""
    times: list[float] = []
    find = joint_dispatch.best_dispatch

    def counting(judge: object, *args: object, **options: object) -> Dispatch:
        times.append(judge.problem.now_s)  # type: ignore[attr-defined]  # a judge
        return find(judge, *args, **options)  # type: ignore[arg-type]  # as they are

    monkeypatch.setattr(joint_dispatch, "best_dispatch", counting)
    return times


def test_what_was_found_is_kept_and_looked_at_anew_now_and_then(looks: list[float]) -> None:
    """Otherwise weights would follow each burst, or never the demand."""
    mesh = Mesh()
    first = mesh.sent(at_s=1000.0)
    assert "prompts over " in first.words
    assert any(column.group == LONG for column in first.candidate.counts)
    assert not first.stays
    for at_s in (1030.0, 1060.0, 1000.0 + REVIEW_S - 1.0):
        again = mesh.sent(at_s=at_s)
        assert again.stays
        assert again.words == first.words
    assert looks == [1000.0]
    assert mesh.sent(at_s=1000.0 + REVIEW_S + 1.0).stays, "bursts are as they were"
    assert len(looks) == 2


def test_a_new_dispatcher_looks_and_leaves_what_is_good(looks: list[float]) -> None:
    """Otherwise a restart of the scheduler would move weights for nothing."""
    mesh = Mesh()
    mesh.sent(at_s=1000.0)
    mesh.dispatcher = Dispatcher()
    assert mesh.sent(at_s=1010.0).stays
    assert looks == [1000.0, 1010.0]


def test_other_replicas_are_looked_at_at_once(looks: list[float]) -> None:
    """Otherwise weights would name replicas that are gone."""
    mesh = Mesh()
    mesh.sent(at_s=1000.0)
    lost = replace(mesh.problem, offers=mesh.problem.offers[4:])
    mesh.problem = replace(lost, offers=(*lost.offers, *offers(24)[16:20]))
    found = mesh.sent(at_s=1030.0)
    assert not found.stays
    assert looks == [1000.0, 1030.0]


def test_types_are_not_kept_apart_by_a_short_past() -> None:
    """A burst or two say nothing of how often they come."""
    windows = int(PAST_S_MIN / 30.0)
    assert windows < len(BURSTS)
    mesh = Mesh(BURSTS[: windows - 1])
    assert mesh.sent(at_s=1000.0).words == ""


def test_types_are_kept_apart_only_where_requests_have_waited() -> None:
    """What a rehearsal fears need not be so."""
    assert Mesh(waited=WAITED - 1).sent(at_s=1000.0).words == ""


def test_steady_demand_keeps_types_together() -> None:
    """Fewer replicas for each is more waiting for all, with nothing to gain."""
    mesh = Mesh([{0: 3.0, 1: 0.1}] * 20)
    assert mesh.sent(at_s=1000.0).words == ""


def test_types_go_together_when_replicas_drown_beside_idle_ones(looks: list[float]) -> None:
    """Otherwise a part that was given too few replicas would have nobody to turn to."""
    mesh = Mesh()
    assert "prompts over " in mesh.sent(at_s=1000.0).words
    mesh.queue(DROWNED_MIN - 1, 0, 0, 0)
    assert mesh.sent(at_s=1010.0).stays, "a queue is what bursts are"
    mesh.queue(9 * DROWNED_MIN, 9 * DROWNED_MIN, 90, 90)
    assert mesh.sent(at_s=1020.0).stays, "nobody is idle"
    mesh.queue(9 * DROWNED_MIN, 0, 0, 0)
    found = mesh.sent(at_s=1030.0)
    assert not found.stays
    assert found.words == DROWNING
    assert all(len(row) == 4 for row in mesh.plan.weights.values())
    for at_s in (1040.0, 1030.0 + TOGETHER_S - 1.0):
        assert mesh.sent(at_s=at_s).stays, "for a while, whatever the past says"
    assert looks == [1000.0]
    mesh.queue(0, 0, 0, 0)
    assert "prompts over " in mesh.sent(at_s=1030.0 + TOGETHER_S + 1.0).words


def test_drowning_is_of_one_model() -> None:
    """Otherwise one model's burst would mix another one's types."""
    mesh = Mesh()

    def with_models(*models: str) -> Problem:
        specs = tuple(
            ReplicaSpec(replica_id=f"r{i}", model_id=model, parallelism="tp1pp1", gpus=(f"g{i}",))
            for i, model in enumerate(models)
        )
        plan = DeploymentPlan(plan_id="p", replicas=specs)
        mesh.problem = replace(mesh.problem, in_force=plan)
        mesh.queue(500, 500, 0, 0)
        return mesh.problem

    assert drowning(with_models("a", "b", "a", "b"))
    assert not drowning(with_models("a", "a", "b", "b"))
    assert not drowning(replace(mesh.problem, loads=())), "nobody has reported"
