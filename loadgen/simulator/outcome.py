"""What a simulated run of a trace is given, and what comes of it; run.py runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from loadgen.simulator.faults import Incident
from loadgen.simulator.policies import Policy
from loadgen.workload.records import TraceRecord
from shared.mesh import MeshConfig

Forecast = Literal["ours", "last", "oracle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one model is asked; ``records`` by ascending time, the run begins at 0 s."""

    model_id: str
    records: Sequence[TraceRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSpec:
    mesh: MeshConfig
    traffic: Sequence[Traffic]
    policy: Policy
    forecast: Forecast = "ours"
    seed: int = 0
    network_s: float = 0.0003  # a message's way
    drain_s: float = 600.0  # how long after the last arrival open requests may still end
    slow_work_s: float | None = None  # virtual seconds of each solve; None: as measured in this run
    output_tokens_limit: int | None = None  # what clients allow; None: just what they will get
    incidents: Sequence[Incident] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Columns, one row per request in order of arrival. NaN where there is none."""

    model: npt.NDArray[np.int16]  # index into ``models``
    arrived_s: npt.NDArray[np.float64]
    ttft_s: npt.NDArray[np.float64]
    e2e_s: npt.NDArray[np.float64]
    input_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]
    completed: npt.NDArray[np.bool_]
    label: npt.NDArray[np.int16]  # index into ``labels``; a record's type
    models: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """One change of the plan in force. ``took_s``: from adoption to the new plan in force;
    ``moved``: it touched replicas, not only routing weights."""

    at_s: float
    took_s: float
    succeeded: bool
    plan: str  # its shapes in words: "2 tp4, 4 tp2"
    reason: str = ""
    moved: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    requests: Requests
    duration_s: float  # from 0 to the last end
    switches: tuple[Switch, ...]
    gpu_seconds: float  # GPUs held by replicas of the plan in force, summed over time
    events: int
    engine_steps: int
    preemptions: int
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    digest: str  # equal for equal runs
    notes: tuple[str, ...] = ()  # what the figures alone do not say
