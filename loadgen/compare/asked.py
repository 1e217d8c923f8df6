"""What a simulation is asked for on a command line, as mesh, workload and demand."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from loadgen.compare.workload import (
    TraceOfModel,
    TypeMean,
    Workload,
    file_digest,
    last_arrival_s,
)
from loadgen.simulator.demand import Demand
from shared.config import load_settings
from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig
from shared.models import ModelSpec
from shared.slo import SloClass

_AFTER_LAST_S = 0.001  # the window ends just after the last arrival


def mesh_of(topology: Path, model: str, traces: Mapping[str, str]) -> MeshConfig:
    """The topology with the models that are asked for; its replicas only if they are of just
    these. A model that it does not name is served as its cost profile of that name says. The file
    alone counts, no environment: a run can be repeated."""
    settings = load_settings(file=str(topology), environ={}, sets=())
    mesh = settings.section("mesh", MeshConfig).checked()
    if mesh.engine.kind != "modelled":
        raise ConfigInvalid(
            field="mesh.engine.kind",
            value=mesh.engine.kind,
            remedy="only modelled engines can be simulated",
        )
    if not mesh.nodes:
        raise ConfigInvalid(field="mesh.nodes", value=(), remedy="name at least one node")
    wanted = [model or mesh.model.model_id] if "" in traces else list(traces)
    if model and "" not in traces:
        raise ConfigInvalid(
            field="model", value=model, remedy="give it with one TRACE; pairs name their models"
        )
    return with_models(mesh, wanted)


def with_models(mesh: MeshConfig, wanted: Sequence[str]) -> MeshConfig:
    """The mesh with just these models. One that it does not name is served as its cost profile of
    that name says. Its replicas stay only if they are of just these."""
    known = {spec.model_id: spec for spec in mesh.models}
    like = mesh.model.context_tokens_max
    specs = [
        known.get(name) or ModelSpec(model_id=name, context_tokens_max=like) for name in wanted
    ]
    served = {mesh.model_of(wish.model_id).model_id for wish in mesh.replicas}
    return msgspec.structs.replace(
        mesh,
        model=specs[0],
        more_models=tuple(specs[1:]),
        replicas=mesh.replicas if served == set(wanted) else (),
    ).checked()


def workload_of(
    traces: Mapping[str, str],
    mesh: MeshConfig,
    *,
    start_s: float,
    duration_s: float | None,
    slo_class: SloClass,
) -> Workload:
    """The traces' window, from one to the last arrival of the longest; raises OServeError."""
    paths = {name or mesh.model.model_id: path for name, path in traces.items()}
    window_s = duration_s
    if window_s is None:
        window_s = max(last_arrival_s(path, start_s) for path in paths.values()) + _AFTER_LAST_S
    return Workload(
        traces=tuple(
            TraceOfModel(
                model_id=model_id,
                path=path,
                digest=file_digest(Path(path)),
                context_tokens_max=mesh.model_of(model_id).context_tokens_max,
            )
            for model_id, path in paths.items()
        ),
        start_s=start_s,
        window_s=window_s,
        slo_class=slo_class,
    )


def demand_of(
    types: Sequence[TypeMean], window_s: float, *, rate_scale: float = 1.0
) -> tuple[Demand, ...]:
    """Mean rates and lengths of the window's types."""
    return tuple(
        Demand(
            model_id=kind.model_id,
            rps=rate_scale * kind.requests / window_s,
            input_tokens=kind.input_tokens,
            output_tokens=kind.output_tokens,
        )
        for kind in types
    )
