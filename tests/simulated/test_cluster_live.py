"""A simulated cluster that switches live: at the links' speed, and nearly unnoticed."""

from dataclasses import replace

import pytest

from loadgen.simulator import cluster as clusters
from loadgen.simulator.cluster import BOOT_S, Cluster
from loadgen.simulator.outcome import SimulationSpec, Traffic
from loadgen.simulator.policies import Policy, policy_named
from services.profiler.config import ProfilerConfig
from services.scheduler.config import SchedulerConfig
from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.weights import equal
from services.scheduler.static_policy import Static
from shared.core import Publish
from shared.cost.library import gpu_facts, load_profile
from shared.errors import ConfigInvalid
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.messages.plans import ReplicaSpec, SwitchEnded
from shared.messages.requests import SubmitRequest
from shared.models import ModelSpec
from tests.support.clusters import poisson

MODEL, CHANGE_S = "llama-3.1-8b", 20.0
POLICY = Policy(
    name="scripted",
    scheduler=SchedulerConfig(policy="uniform", plan_period_s=1.0),
    profiler=ProfilerConfig(window_s=5.0, seed_samples=8),
)


class PairAfterAWhile:
    """From two replicas of one GPU to one of two."""

    period_s, slow = 1.0, False

    def start(self, problem: Problem) -> Planned:
        return Static().plan(problem)

    def plan(self, problem: Problem) -> Planned:
        if problem.now_s < BOOT_S + CHANGE_S:
            return Planned(plan=None, reason="not yet")
        replicas = (
            ReplicaSpec(
                replica_id="pair", model_id=MODEL, parallelism="tp2pp1", gpus=("n0-g0", "n0-g1")
            ),
        )
        return Planned(plan=make_plan(replicas, equal(replicas), reason="pair"), reason="pair")


class Seen:
    """One run, and what was said in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, live: bool) -> None:
        def make_policy(_: SchedulerConfig) -> PairAfterAWhile:
            return PairAfterAWhile()

        monkeypatch.setattr(clusters, "make_policy", make_policy)
        records = poisson(700, rps=10.0, output_tokens_max=400)
        mesh = MeshConfig(
            model=ModelSpec(model_id=MODEL, context_tokens_max=32768, profile=MODEL),
            engine=EngineSpec(modelled=ModelledEngineSettings(timing="profile")),
            nodes=(NodeSpec(node_id="n0", gpus=2, gpu_kind="h100"),),
            replicas=tuple(ReplicaWish(replica_id=f"r{i}") for i in range(2)),
        )
        self.cluster = Cluster(
            SimulationSpec(
                mesh=mesh,
                traffic=(Traffic(model_id=MODEL, records=records),),
                policy=replace(POLICY, live=live),
                slow_work_s=0.1,
            )
        )
        self.ended: list[SwitchEnded] = []
        self.again = 0
        self.cluster.world.taps.append(self._see)
        self.cluster.boot()
        self.cluster.serve()

    def _see(self, _: str, effect: Publish) -> None:
        if isinstance(effect.message, SwitchEnded):
            self.ended.append(effect.message)
        elif isinstance(effect.message, SubmitRequest):
            self.again += effect.message.attempt > 0


@pytest.fixture(autouse=True)
def profiled() -> None:
    try:
        load_profile("h100", MODEL)
    except ConfigInvalid as error:
        pytest.skip(f"no cost profile to plan by: {error}")


def test_requests_change_hands_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches would take as long as reloads, requests be begun anew, or the report of a run not
    know of them."""
    seen = Seen(monkeypatch, live=True)
    assert seen.cluster.source.done
    _, ended = seen.ended
    report = ended.report
    assert ended.succeeded
    assert report is not None
    assert report.way == "live"
    assert report.moved > 10
    assert seen.again == 0, "they go on in the same attempt"
    assert report.pause_p99_s < 0.25
    start_s = gpu_facts("h100").engine_start_s
    assert start_s < ended.took_s < start_s + 1.0
    [switch] = seen.cluster.observer.switches
    assert (switch.succeeded, switch.moved, switch.plan) == (True, True, "1 tp2")


def test_others_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a competitor cannot do would be counted for it."""
    seen = Seen(monkeypatch, live=False)
    _, ended = seen.ended
    assert ended.succeeded
    assert ended.report is not None
    assert ended.report.way == "reload"
    assert ended.report.moved == 0
    assert ended.took_s > gpu_facts("h100").engine_start_s + 1.0, "weights come from disk"


@pytest.mark.parametrize(
    ("name", "live"),
    [("oserve", True), ("oserve-elastic", True), ("oserve-fast", False), ("oserve-paper", False),
     ("uniform-reload", False), ("melange", False), ("dynamo", False)],
)  # fmt: skip
def test_which_policies_switch_live(name: str, live: bool) -> None:  # a table
    """Ours do, unless they are given the switches of another, so that only plans differ."""
    assert policy_named(name).live is live
