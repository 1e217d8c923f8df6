"""From options and a topology to a comparison, and from that to files."""

import time
from importlib import metadata
from pathlib import Path

import msgspec

from loadgen.bench.environment import environment
from loadgen.compare.asked import workload_of
from loadgen.compare.jobs import Runs, source_digest
from loadgen.compare.markdown import report_page
from loadgen.compare.options import Options
from loadgen.compare.outcome import About, Cell, Comparison, PolicyText, cells_of
from loadgen.compare.pictures import can_draw, draw_all
from loadgen.compare.saturation import Saturation
from loadgen.compare.study import Study
from loadgen.compare.words import findings
from loadgen.compare.workload import (
    typed_windows,
)
from loadgen.simulator.deployments import Site
from loadgen.simulator.run import run
from shared.mesh import MeshConfig

PACKAGES = ("msgspec", "numpy")
NOT_DRAWN = "No pictures: they need the extra `report` (`pip install 'oserve[report]'`)."
_COMPARISON, _PAGE = "comparison.json", "report.md"


def compared(
    options: Options, mesh: MeshConfig, *, runs: Runs, topology: str, command: str
) -> Comparison:
    """Do what is missing of the runs, and say what came of all. Raises OServeError."""
    started_unix_s, started_s = time.time(), time.perf_counter()
    workload = workload_of(
        options.traces,
        mesh,
        start_s=options.start_s,
        duration_s=options.duration_s,
        slo_class=options.slo_class,
    )
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
