"""Small simulated clusters whose engines take their times from settings, and traces for them."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from loadgen.simulator.faults import Incident
from loadgen.simulator.outcome import SimulationSpec, Traffic
from loadgen.simulator.policies import policy_named
from loadgen.workload.records import TraceRecord
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.models import ModelSpec

ENGINE = ModelledEngineSettings(
    base_s=0.01, prefill_token_s=1e-5, decode_token_s=2e-4, context_token_s=1e-8, start_s=3.0
)
NEVER = (Incident(kind="slow", node="profiler", at_s=1e9, for_s=1.0),)
"""Comes after the end of every run, and brings the heartbeats of production with it."""


def mesh_of(*, gpus: int = 1, replicas: int | None = None, **settings: Any) -> MeshConfig:
    """One node; as many replicas of one GPU as there are GPUs, if not told otherwise."""
    wishes = tuple(ReplicaWish(replica_id=f"r{i}") for i in range(replicas or gpus))
    return MeshConfig(
        model=ModelSpec(model_id="m", context_tokens_max=100_000),
        engine=EngineSpec(modelled=msgspec.structs.replace(ENGINE, **settings)),
        nodes=(NodeSpec(node_id="n0", gpus=gpus, gpu_kind="modelled"),),
        replicas=wishes,
    )


def poisson(  # requests like those of a chat
    requests: int, *, rps: float, seed: int = 1, output_tokens_max: int = 200
) -> list[TraceRecord]:
    rng = random.Random(seed)
    at_s, records = 0.0, list[TraceRecord]()
    for _ in range(requests):
        at_s += rng.expovariate(rps)
        records.append(
            TraceRecord(
                timestamp_s=at_s,
                input_tokens=rng.randint(1, 2000),
                output_tokens=rng.randint(1, output_tokens_max),
                label=rng.choice(("chat", "code")),
            )
        )
    return records


def spec_of(mesh: MeshConfig, records: Sequence[TraceRecord], **changes: Any) -> SimulationSpec:
    """Policy static, and solves that take no time, if not told otherwise."""
    spec = SimulationSpec(
        mesh=mesh,
        traffic=(Traffic(model_id="m", records=records),),
        policy=policy_named("static"),
        slow_work_s=0.0,
    )
    return dataclasses.replace(spec, **changes)
