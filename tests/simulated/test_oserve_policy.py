"""Policy "oserve" in a simulated mesh: what it does over time, with production's other services.

Replicas of llama-3.1-8b on one H100 each serve some 3.5 requests/s of long prompts, so that few
requests are enough to load them; a switch takes about a minute.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from loadgen.simulator.faults import Incident
from loadgen.simulator.oracle import Oracle
from loadgen.simulator.outcome import SimulationResult, SimulationSpec, Traffic
from loadgen.simulator.policies import policy_named
from loadgen.simulator.run import run
from loadgen.workload.records import TraceRecord
from services.scheduler.config import SchedulerConfig
from services.scheduler.policies.joint_policy import PERIOD_S
from shared import subjects
from shared.core import Effect, Publish, Started
from shared.cost.library import load_profile
from shared.errors import ConfigInvalid
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.messages.demand import DemandReport, ForecastReport
from shared.models import ModelSpec

ONE, TWO = "llama-3.1-8b", "other"
LONG = (6000, 60)
CONFIG = SchedulerConfig(policy="oserve", watch_s=0.0)  # runs are too short to watch first
SECONDS_OF_A_PERIOD = PERIOD_S + 10.0  # and a window, which is what the next one starts from


@pytest.fixture(autouse=True)
def profiled() -> None:
    """Plans are made by measured profiles."""
    try:
        load_profile("h100", ONE)
    except ConfigInvalid as error:
        pytest.skip(f"no cost profile to plan by: {error}")


def poisson(
    parts: Sequence[tuple[float, float, tuple[int, int]]], *, seed: int = 1
) -> list[TraceRecord]:
    """(seconds, requests/s, mean tokens in and out), one part after the other."""
    rng = random.Random(seed)
    records: list[TraceRecord] = []
    begins_s = 0.0
    for seconds, rps, (tokens_in, tokens_out) in parts:
        at_s = begins_s + rng.expovariate(rps)
        while at_s < begins_s + seconds:
            records.append(
                TraceRecord(
                    timestamp_s=at_s,
                    input_tokens=max(1, round(tokens_in * rng.lognormvariate(0.0, 0.3))),
                    output_tokens=max(1, round(tokens_out * rng.lognormvariate(0.0, 0.5))),
                )
            )
            at_s += rng.expovariate(rps)
        begins_s += seconds
    return records


def mesh(*models: str, gpus: int = 4) -> MeshConfig:
    """GPUs of one node, dealt out to the models as replicas of one GPU each."""
    specs = [
        ModelSpec(model_id=model_id, context_tokens_max=32768, profile=ONE) for model_id in models
    ]
    return MeshConfig(
        model=specs[0],
        more_models=tuple(specs[1:]),
        engine=EngineSpec(modelled=ModelledEngineSettings(timing="profile")),
        nodes=(NodeSpec(node_id="n0", gpus=gpus, gpu_kind="h100"),),
        replicas=tuple(
            ReplicaWish(replica_id=f"r{i}", model_id=models[i * len(models) // gpus])
            for i in range(gpus)
        ),
    )


def spec(records: dict[str, list[TraceRecord]], **changes: object) -> SimulationSpec:
    made = SimulationSpec(
        mesh=mesh(*records),
        traffic=tuple(Traffic(model_id=id_, records=own) for id_, own in records.items()),
        policy=replace(policy_named("oserve"), begin="topology", scheduler=CONFIG),
        slow_work_s=0.5,
    )
    return replace(made, **changes)


def moves(result: SimulationResult) -> list[str]:
    """Changes of replicas, each with its reason; the steps of one way are one change."""
    return [
        switch.reason
        for switch in result.switches
        if switch.moved and not any(f"step {n} of" in switch.reason for n in range(2, 9))
    ]


@pytest.mark.parametrize("rps", [1.5, 6.0])
def test_a_stationary_trace_brings_one_change_at_most(rps: float) -> None:
    """Noise of forecasts is no reason to move, and each move costs somebody."""
    result = run(spec({ONE: poisson([(300.0, rps, LONG)])}))
    assert result.requests.completed.all()
    assert len(moves(result)) <= 1, moves(result)
    assert all(switch.succeeded for switch in result.switches)


def test_gpus_follow_the_demand_of_two_models_in_the_first_period_that_shows_it() -> None:
    """One model's demand ceases as the other's outgrows its GPUs: they are moved at the next
    decision, not once a smoothed forecast has come round."""
    shift_s = 80.0
    result = run(
        spec(
            {
                ONE: poisson([(shift_s, 3.0, LONG), (100.0, 0.3, LONG)]),
                TWO: poisson([(shift_s, 0.3, LONG), (100.0, 8.5, LONG)], seed=2),
            }
        )
    )
    assert result.requests.completed.all()
    after = [switch for switch in result.switches if switch.moved and switch.at_s > shift_s]
    assert after, result.switches
    assert after[0].at_s - shift_s < SECONDS_OF_A_PERIOD
    assert TWO in after[0].reason


def test_what_is_left_serves_on_when_a_gpu_is_lost() -> None:
    """The plan without it is there within a second of its worker being missed, whatever the solver
    does meanwhile, and no request is lost."""
    crash_s = 40.0
    incident = Incident(kind="crash", node="n0-g2", at_s=crash_s, for_s=1e6)
    records = poisson([(100.0, 8.0, LONG)])
    result = run(spec({ONE: records}, incidents=(incident,)))
    assert result.requests.completed.all()
    first = next(switch for switch in result.switches if switch.at_s > crash_s)
    assert "GPUs lost" in first.reason, result.switches
    missed_s = crash_s + CONFIG.worker_timeout_s
    assert first.at_s <= missed_s + CONFIG.plan_period_s + 1.0


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_forecasts_that_are_wrong_by_half_bring_no_collapse(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where GPUs may be left unused: what was seen is planned for, whatever is expected."""
    foresee = Oracle.step

    def wrong(knows: Oracle, event: DemandReport | Started, now_s: float) -> list[Effect]:
        return [
            subjects.FORECAST_REPORT.send(_times(effect.message, factor))
            for effect in foresee(knows, event, now_s)
            if isinstance(effect, Publish) and isinstance(effect.message, ForecastReport)
        ]

    monkeypatch.setattr(Oracle, "step", wrong)
    config = msgspec.structs.replace(CONFIG, elastic=True)
    policy = replace(policy_named("oserve"), begin="topology", scheduler=config)
    result = run(spec({ONE: poisson([(360.0, 6.0, LONG)])}, policy=policy, forecast="oracle"))
    assert result.requests.completed.all()
    late_s = result.requests.arrived_s > 120.0
    assert np.nanpercentile(result.requests.ttft_s[late_s], 99) < 4.0, "twice its target"


def _times(report: ForecastReport, factor: float) -> ForecastReport:
    types = tuple(
        msgspec.structs.replace(kind, arrivals_rps=factor * kind.arrivals_rps)
        for kind in report.types
    )
    return msgspec.structs.replace(report, types=types)
