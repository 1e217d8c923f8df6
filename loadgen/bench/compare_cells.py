"""The cells of the study: one workload, one set of models and GPUs, one load, every policy.

Load 1.0 of each (workload, models, GPUs) is found once, on the workload as it is; the workload may
then be drawn anew for each load. Every run is kept in one folder and done once, whoever asks for it
(``loadgen/compare/jobs.py``).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from loadgen.bench.compare_workloads import StudyWorkload
from loadgen.compare.asked import workload_of
from loadgen.compare.assemble import compared
from loadgen.compare.jobs import Runs
from loadgen.compare.options import Options
from loadgen.compare.outcome import Cell
from loadgen.compare.saturation import Saturation
from loadgen.compare.study import Study
from loadgen.simulator.run import run
from loadgen.simulator.site import Site
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec
from shared.models import ModelSpec

NODE_GPUS = 8
CONTEXT_TOKENS_MAX = 16_384
VALUES = (
    "goodput_rps", "slo_attainment", "ttft_ms_p99", "tpot_ms_p99", "e2e_ms_p50", "e2e_ms_p99",
    "completed_share", "gpu_hours", "switches", "reweightings", "switch_s",
)  # fmt: skip


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of all cells alike."""

    policies: tuple[str, ...]
    loads: tuple[float, ...]
    seeds: int
    duration_s: float
    warmup_s: float
    saturation_s: float
    candidates: int
    slo_times: float | None
    cache: Path


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One policy in one cell. ``values``: by metric, the mean over the seeds; None where a run has
    none (a percentile that falls on a request that never ended)."""

    workload: str
    models: str
    gpus: int
    load: float
    policy: str
    began_with: str
    rate_scale: float
    seeds: int
    values: dict[str, float | None]

    @property
    def cell(self) -> tuple[str, str, int, float]:
        return self.workload, self.models, self.gpus, self.load


def mesh_of(models: Sequence[str], gpus: int) -> MeshConfig:
    """Nodes of eight H100s. Queues without a bound to speak of: a policy that is too slow shows it
    as latency."""
    settings = ModelledEngineSettings(timing="profile", waiting_max=100_000)
    specs = [
        ModelSpec(model_id=model_id, context_tokens_max=CONTEXT_TOKENS_MAX) for model_id in models
    ]
    return MeshConfig(
        name=f"h100x{gpus}",
        model=specs[0],
        more_models=tuple(specs[1:]),
        engine=EngineSpec(kind="modelled", modelled=settings),
        nodes=tuple(
            NodeSpec(node_id=f"n{i}", gpus=min(NODE_GPUS, gpus - i * NODE_GPUS), gpu_kind="h100")
            for i in range(-(-gpus // NODE_GPUS))
        ),
    )


def rows(
    workload: StudyWorkload, models: tuple[str, ...], gpus: int, setting: Setting, runs: Runs
) -> Iterator[Row]:
    """The cells of one workload on one mesh, load by load. Raises OServeError, and Unavailable
    before anything is simulated."""
    mesh = mesh_of(models, gpus)
    saturation = _saturation(workload, mesh, setting, runs)
    for load in setting.loads:
        offered = workload.files(setting.cache, models, load * saturation.rate_scale)
        options = _options(
            setting, offered.traces, loads=(load,), saturation_scale=offered.rate_scale / load
        )
        outcome = compared(
            options, mesh, runs=runs, topology=mesh.name, command="loadgen.bench.bench_compare"
        )
        for cell in outcome.cells:
            yield _row(cell, workload.name, models, gpus)


def _saturation(
    workload: StudyWorkload, mesh: MeshConfig, setting: Setting, runs: Runs
) -> Saturation:
    offered = workload.files(setting.cache, mesh.model_ids, None)
    options = _options(setting, offered.traces, loads=(1.0,), saturation_scale=None)
    asked = workload_of(
        options.traces,
        mesh,
        start_s=0.0,
        duration_s=options.duration_s,
        slo_class=options.slo_class,
    )
    static = msgspec.structs.replace(options, policies=("static-best",))
    return Study(static, site=Site(mesh), workload=asked, runs=runs, simulate=run).saturation()


def _options(
    setting: Setting,
    traces: Mapping[str, str],
    *,
    loads: tuple[float, ...],
    saturation_scale: float | None,
) -> Options:
    return Options(
        traces=dict(traces),
        policies=setting.policies,
        loads=loads,
        seeds=setting.seeds,
        reference="static-best",
        duration_s=setting.duration_s,
        warmup_s=setting.warmup_s,
        slo_times=setting.slo_times,
        saturation_scale=saturation_scale,
        saturation_s=setting.saturation_s,
        candidates=setting.candidates,
    ).checked()


def _row(cell: Cell, workload: str, models: tuple[str, ...], gpus: int) -> Row:
    found = {name: cell.values.get(name) for name in VALUES}
    return Row(
        workload=workload,
        models="+".join(models),
        gpus=gpus,
        load=cell.load,
        policy=cell.policy,
        began_with=cell.deployment,
        rate_scale=cell.rate_scale,
        seeds=len(cell.seeds),
        values={k: None if v is None else v.mean for k, v in found.items()},
    )
