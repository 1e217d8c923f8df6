"""A simulated cluster whose plan changes: requests move, time passes, GPUs are accounted for."""

from collections.abc import Callable

import numpy as np
import pytest

from loadgen.simulator import cluster as clusters
from loadgen.simulator.cluster import BOOT_S, Cluster
from loadgen.simulator.outcome import SimulationSpec, Traffic
from loadgen.simulator.policies import Policy, policy_named
from loadgen.simulator.run import run
from services.ingress.journey import Journey
from services.profiler.config import ProfilerConfig
from services.scheduler.config import SchedulerConfig
from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import Planned, Problem
from services.scheduler.policies.weights import equal
from services.scheduler.static_policy import Static
from shared.cost.library import load_profile
from shared.errors import ConfigInvalid
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.messages.demand import DemandReport, ForecastReport
from shared.messages.plans import ReplicaSpec
from shared.models import ModelSpec
from tests.support.clusters import ENGINE, mesh_of, poisson, spec_of

CHANGE_S = 20.0
POLICY = Policy(
    name="scripted",
    scheduler=SchedulerConfig(policy="uniform", plan_period_s=1.0),
    profiler=ProfilerConfig(window_s=5.0, seed_samples=8),
)


def pair(reason: str = "one tp2 instead of four tp1") -> Planned:
    """Half of the four GPUs, as one replica of two."""
    replicas = (
        ReplicaSpec(replica_id="pair", model_id="m", parallelism="tp2pp1", gpus=("n0-g0", "n0-g1")),
    )
    return Planned(plan=make_plan(replicas, equal(replicas), reason=reason), reason=reason)


class Scripted:
    """Keeps the topology's replicas until CHANGE_S of the trace, then wishes for another plan."""

    period_s = 1.0

    def __init__(self, wish: Callable[[], Planned], *, slow: bool) -> None:
        self.slow, self._wish = slow, wish
        self.asked_s: list[float] = []

    def start(self, problem: Problem) -> Planned:
        return Static().plan(problem)

    def plan(self, problem: Problem) -> Planned:
        self.asked_s.append(problem.now_s - BOOT_S)
        if problem.now_s < BOOT_S + CHANGE_S:
            return Planned(plan=None, reason="not yet")
        return self._wish()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    """Puts a policy in the place of what the registry would make."""

    def put(wish: Callable[[], Planned] = pair, *, slow: bool = False) -> Scripted:
        policy = Scripted(wish, slow=slow)

        def make_policy(_: SchedulerConfig) -> Scripted:
            return policy

        monkeypatch.setattr(clusters, "make_policy", make_policy)
        return policy

    return put


def a_spec(**changes: object) -> SimulationSpec:
    records = poisson(600, rps=10.0, output_tokens_max=400)
    return spec_of(mesh_of(gpus=4), records, **{"policy": POLICY, **changes})


def test_a_change_of_plan_loses_nothing_and_is_accounted_for(
    script: Callable[..., Scripted],
) -> None:
    """Switches would be free, lose requests, or be missing from the report."""
    script()
    spec = a_spec()
    result = run(spec)
    assert result.requests.completed.all()
    wanted = [record.output_tokens for record in spec.traffic[0].records]
    assert result.requests.output_tokens.tolist() == wanted
    (switch,) = result.switches
    assert (switch.succeeded, switch.plan) == (True, "1 tp2")
    assert "one tp2 instead of four tp1" in switch.reason
    assert switch.at_s == pytest.approx(CHANGE_S, abs=1.5), "forecasts come every 5 s, looks each s"
    assert ENGINE.start_s < switch.took_s < ENGINE.start_s + POLICY.switcher.drain_timeout_s + 3.0
    changed_s = switch.at_s + switch.took_s
    by_hand = 4 * changed_s + 2 * (result.duration_s - changed_s)
    assert result.gpu_seconds == pytest.approx(by_hand, abs=0.05)


def test_weights_that_change_each_second_disturb_no_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Corrections of weights would drain, move or delay the very requests that they are to help."""

    class Leaning:
        period_s, slow, leans = 0.0, False, 0

        def start(self, problem: Problem) -> Planned:
            return Static().plan(problem)

        def plan(self, problem: Problem) -> Planned:
            self.leans += 1
            replicas = problem.in_force.replicas
            first = 0.24 + 0.002 * (self.leans % 10)
            shares = [first, *[(1.0 - first) / (len(replicas) - 1)] * (len(replicas) - 1)]
            row = {spec.replica_id: share for spec, share in zip(replicas, shares, strict=True)}
            return Planned(plan=make_plan(replicas, {"*": row}, reason="leans"), reason="leans")

    def make_policy(_: SchedulerConfig) -> Leaning:
        return policy

    policy, moves = Leaning(), list[int]()
    still = run(a_spec(policy=policy_named("static")))
    monkeypatch.setattr(clusters, "make_policy", make_policy)
    cluster = Cluster(a_spec())
    completed = cluster.source.on_completed

    def on_completed(journey: Journey) -> None:
        moves.append(journey.moves)
        completed(journey)

    monkeypatch.setattr(cluster.source, "on_completed", on_completed)
    cluster.boot()
    cluster.serve()
    columns = cluster.source.columns
    assert columns.failed == {}
    assert (len(moves), sum(moves)) == (600, 0)
    assert policy.leans > 40
    assert len(cluster.observer.switches) > 40
    assert all(switch.took_s < 0.1 for switch in cluster.observer.switches)
    assert np.mean(columns.e2e_s) == pytest.approx(still.requests.e2e_s.mean(), rel=0.02)


def test_a_switch_costs_what_a_replica_takes_to_start(script: Callable[..., Scripted]) -> None:
    """Policies that differ in how fast they switch would be compared as equals."""
    script()
    took_s = {
        start_s: run(a_spec(policy=with_start(start_s))).switches[0].took_s
        for start_s in (1.0, 11.0)
    }
    assert took_s[11.0] - took_s[1.0] == pytest.approx(10.0, abs=0.1)


def with_start(start_s: float) -> Policy:
    return Policy(
        name="scripted", scheduler=POLICY.scheduler, profiler=POLICY.profiler, start_s=start_s
    )


@pytest.mark.parametrize("took_s", [0.0, 4.0])
def test_slow_work_takes_its_time(script: Callable[..., Scripted], took_s: float) -> None:
    """A policy that needs minutes to decide would decide in no time."""
    policy = script(slow=True)
    (switch,) = run(a_spec(slow_work_s=took_s)).switches
    asked_s = min(at_s for at_s in policy.asked_s if at_s >= CHANGE_S)
    assert switch.at_s - asked_s == pytest.approx(took_s, abs=0.01)
    gaps = np.diff(policy.asked_s)
    assert gaps.min() >= max(took_s, policy.period_s) - 1e-6, "one solve at a time"


def test_slow_work_takes_what_it_takes_here(script: Callable[..., Scripted]) -> None:
    """Without a figure for it, a policy's own slowness would cost it nothing."""

    def worked() -> Planned:
        total = 0
        for number in range(200_000):
            total += number
        return pair(f"after much thought: {total}")

    policy = script(worked, slow=True)
    (switch,) = run(a_spec(slow_work_s=None)).switches
    asked_s = min(at_s for at_s in policy.asked_s if at_s >= CHANGE_S)
    assert 0.001 < switch.at_s - asked_s < 10.0


def test_an_outage_in_a_switch_is_as_long_as_the_switch(script: Callable[..., Scripted]) -> None:
    """Nothing serves while the only GPU's replica is replaced. Without incidents an ingress looks
    for overdue requests every five seconds; these would wait for that as well."""

    def other() -> Planned:
        replicas = (
            ReplicaSpec(replica_id="other", model_id="m", parallelism="tp1pp1", gpus=("n0-g0",)),
        )
        return Planned(plan=make_plan(replicas, equal(replicas), reason="other"), reason="other")

    script(other)
    records = poisson(150, rps=4.0, output_tokens_max=50)
    result = run(spec_of(mesh_of(), records, policy=POLICY))
    requests = result.requests
    assert requests.completed.all()
    (switch,) = result.switches
    up_s = switch.at_s + switch.took_s
    first_s = requests.arrived_s + requests.ttft_s
    waited = (requests.arrived_s > switch.at_s + 1.0) & (requests.arrived_s < up_s - 0.1)
    assert waited.sum() > 5
    assert (first_s[waited] > up_s - 0.5).all()
    assert first_s[waited].max() < up_s + 1.5, "pauses grow to a second at most"


def test_the_oracle_forecasts_what_will_arrive(script: Callable[..., Scripted]) -> None:
    """The bound of what forecasting could bring would be no bound."""
    script(lambda: Planned(plan=None, reason="keep"))
    spec = a_spec(forecast="oracle")
    cluster = Cluster(spec)
    heard: list[tuple[float, ForecastReport]] = []
    reports: list[DemandReport] = []

    def see(_: str, effect: object) -> None:
        message = getattr(effect, "message", None)
        if isinstance(message, ForecastReport):
            heard.append((cluster.world.now_s - BOOT_S, message))
        elif isinstance(message, DemandReport):
            reports.append(message)

    cluster.world.taps.append(see)
    cluster.boot()
    cluster.serve()
    at_s = np.array([record.timestamp_s for record in spec.traffic[0].records])
    busy = [(now_s, forecast) for now_s, forecast in heard if forecast.types]
    assert len(busy) >= 8
    horizon_s = POLICY.profiler.window_s * POLICY.forecaster.horizon_windows
    for now_s, forecast in busy:
        assert forecast.horizon_s == horizon_s
        coming = ((at_s >= now_s) & (at_s < now_s + horizon_s)).sum()
        expected = sum(kind.arrivals_rps for kind in forecast.types) * horizon_s
        assert expected == pytest.approx(coming, abs=1e-6)
        assert {kind.method for kind in forecast.types} == {"oracle"}
    assert len(reports) == len(heard)


def test_a_real_policy_changes_the_plan_and_does_so_again() -> None:
    """Only scripts could change plans, or a policy's solves would make every run another one."""
    model_id = "llama-2-70b"
    try:
        load_profile("h100", model_id)
    except ConfigInvalid as error:
        pytest.skip(f"no cost profile to plan by: {error}")
    mesh = MeshConfig(
        model=ModelSpec(model_id=model_id, context_tokens_max=8192),
        engine=EngineSpec(modelled=ModelledEngineSettings(timing="profile")),
        nodes=(NodeSpec(node_id="n0", gpus=8, gpu_kind="h100"),),
        replicas=tuple(ReplicaWish(replica_id=f"r{i}", parallelism="tp2") for i in range(4)),
    )
    records = poisson(400, rps=5.0, output_tokens_max=300)
    spec = spec_of(
        mesh,
        records,
        policy=policy_named("uniform-fast"),
        traffic=(Traffic(model_id=model_id, records=records),),
    )
    first, again = run(spec), run(spec)
    assert first.requests.completed.all()
    assert first.switches
    assert all(switch.succeeded for switch in first.switches)
    assert "uniform" in first.switches[0].reason
    assert first.digest == again.digest
    assert first.switches == again.switches
