"""From options and a topology to a comparison, and from that to files."""

import time
from importlib import metadata
from pathlib import Path

import msgspec

from loadgen.bench.environment import environment
from loadgen.compare.jobs import Runs, source_digest
from loadgen.compare.markdown import report_page
from loadgen.compare.options import Options
from loadgen.compare.outcome import About, Cell, Comparison, PolicyText, cells_of
from loadgen.compare.pictures import can_draw, draw_all
from loadgen.compare.saturation import Saturation
from loadgen.compare.study import Study
from loadgen.compare.words import findings
from loadgen.compare.workload import (
    TraceOfModel,
    Workload,
    file_digest,
    last_arrival_s,
    typed_windows,
)
from loadgen.simulator.deployments import Site
from loadgen.simulator.run import run
from shared.config import load_settings
from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig
from shared.models import ModelSpec

PACKAGES = ("msgspec", "numpy")
NOT_DRAWN = "No pictures: they need the extra `report` (`pip install 'oserve[report]'`)."
_AFTER_LAST_S = 0.001  # the window ends just after the last arrival
_COMPARISON, _PAGE = "comparison.json", "report.md"


def mesh_of(topology: Path, model: str, options: Options) -> MeshConfig:
    """The topology with the models that are asked for; its replicas only if they are of these, and
    then for policy ``static`` alone. A model that it does not name is served as its cost profile
    of that name says. The file alone counts, no environment: a comparison can be repeated."""
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
    wanted = [model or mesh.model.model_id] if "" in options.traces else list(options.traces)
    if model and "" not in options.traces:
        raise ConfigInvalid(
            field="model", value=model, remedy="give it with one TRACE; pairs name their models"
        )
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


def compared(
    options: Options, mesh: MeshConfig, *, runs: Runs, topology: str, command: str
) -> Comparison:
    """Do what is missing of the runs, and say what came of all. Raises OServeError."""
    started_unix_s, started_s = time.time(), time.perf_counter()
    workload = workload_of(options, mesh)
    study = Study(options, site=Site(mesh), workload=workload, runs=runs, simulate=run)
    saturation = study.saturation()
    cells = cells_of(study.groups(saturation), options.reference)
    kinds: dict[str, int] = {}
    for gpu in mesh.gpus():
        kinds[gpu.kind] = kinds.get(gpu.kind, 0) + 1
    windows = typed_windows(workload)
    about = About(
        command=command,
        started_unix_s=started_unix_s,
        took_s=time.perf_counter() - started_s,
        oserve_version=metadata.version("oserve"),
        packages={name: metadata.version(name) for name in PACKAGES},
        environment=environment(),
        topology=topology,
        gpus=kinds,
        traces={trace.model_id: trace.path for trace in workload.traces},
        trace_digests={trace.model_id: trace.digest for trace in workload.traces},
        offered_requests={typed.trace.model_id: len(typed.records) for typed in windows},
        prompts_cut={typed.trace.model_id: typed.cut for typed in windows},
        window_s=workload.window_s,
        warmup_s=study.warmup_s,
        settings=_flat(options),
        runs_done=runs.done,
        runs_reused=runs.reused,
        source_digest=source_digest(),
    )
    return _comparison(study, saturation, cells, about)


def workload_of(options: Options, mesh: MeshConfig) -> Workload:
    """The traces' window, from one to the last arrival of the longest; raises OServeError."""
    paths = {name or mesh.model.model_id: path for name, path in options.traces.items()}
    window_s = options.duration_s
    if window_s is None:
        ends_s = (last_arrival_s(path, options.start_s) for path in paths.values())
        window_s = max(ends_s) + _AFTER_LAST_S
    traces = tuple(
        TraceOfModel(
            model_id=model_id,
            path=path,
            digest=file_digest(Path(path)),
            context_tokens_max=mesh.model_of(model_id).context_tokens_max,
        )
        for model_id, path in paths.items()
    )
    return Workload(
        traces=traces, start_s=options.start_s, window_s=window_s, slo_class=options.slo_class
    )


def write_outputs(comparison: Comparison, folder: Path) -> list[Path]:
    """JSON, page and pictures into ``folder``; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(comparison, folder) if can_draw() else {}
    encoded = msgspec.json.format(msgspec.json.encode(comparison), indent=2)
    (folder / _COMPARISON).write_bytes(encoded + b"\n")
    page = report_page(comparison, pictures, "" if pictures else NOT_DRAWN)
    (folder / _PAGE).write_text(page, encoding="utf-8")
    return [folder / name for name in (_PAGE, _COMPARISON, *pictures)]


def _comparison(
    study: Study, saturation: Saturation, cells: tuple[Cell, ...], about: About
) -> Comparison:
    return Comparison(
        about=about,
        saturation=saturation,
        reference=study.reference,
        policies=tuple(
            PolicyText(
                name=policy.name,
                forecast=study.forecast_of(policy),
                known=policy.known,
                inferred=policy.inferred,
                switches=policy.switches,
            )
            for policy in study.policies
        ),
        deployments=tuple(option.name for option in study.candidates),
        targets=study.targets,
        cells=cells,
        findings=findings(cells),
    )


def _flat(options: Options) -> dict[str, str | int | float | bool | None]:
    flat: dict[str, str | int | float | bool | None] = {}
    for name, value in msgspec.structs.asdict(options).items():
        if isinstance(value, tuple | dict):
            flat[name] = msgspec.json.encode(value).decode()
        else:
            flat[name] = value
    return flat
