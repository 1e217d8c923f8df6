"""The processes of a mesh on one machine: which, with which arguments, in which order stopped."""

import itertools
import os
import sys
from collections.abc import Mapping

from deploy.config import Topology
from deploy.process import ProcessSpec, Role

CONTROL: dict[str, Role] = {
    "scheduler": "deciding",
    "switcher": "deciding",
    "profiler": "control",
    "forecaster": "control",
}
STOP_ORDER: tuple[tuple[Role, ...], ...] = (
    ("ingress",),  # admits nothing more, and waits for what is open: all others still serve it
    ("deciding",),  # or they would re-plan because workers leave
    ("worker", "control"),
    ("broker",),  # last, so that everybody can say goodbye
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_DEVICES = "CUDA_VISIBLE_DEVICES"


def service_specs(
    topology: Topology, *, bus_url: str, http_ports: tuple[int, ...], environ: Mapping[str, str]
) -> list[ProcessSpec]:
    """Every service of the topology; what serves requests first comes first."""
    common = (f"bus.url={bus_url}",)
    quiet = dict.fromkeys((name for name in _THREADS if name not in environ), "1")
    metrics_ports = itertools.count(topology.metrics_port)

    def spec(
        name: str, service: str, role: Role, *sets: str, extra: Mapping[str, str] = quiet
    ) -> ProcessSpec:
        settings = [*topology.overrides, *common, *sets]
        if topology.metrics_port:
            settings.append(f"telemetry.metrics_port={next(metrics_ports)}")
        return ProcessSpec(
            name=name,
            role=role,
            command=(
                *(sys.executable, "-m", f"services.{service}"),
                *("--config", str(topology.file), "--instance", name),
                *(part for setting in settings for part in ("--set", setting)),
            ),
            environ=extra,
        )

    specs: list[ProcessSpec] = []
    for index, gpu in enumerate(topology.mesh.gpus()):
        extra = worker_environ(topology, index=index, environ=environ)
        worker_id = f"worker.worker_id={gpu.gpu_id}"
        specs.append(spec(f"worker-{gpu.gpu_id}", "worker", "worker", worker_id, extra=extra))
    specs += [spec(name, name, role) for name, role in CONTROL.items()]
    specs += [spec(f"router-{i}", "router", "control") for i in range(topology.up.routers)]
    for i, port in enumerate(http_ports):
        sets = (f"ingress.host={topology.http_host}", f"ingress.port={port}")
        specs.append(spec(f"ingress-{i}", "ingress", "ingress", *sets))
    return specs


def worker_environ(topology: Topology, *, index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Cores and GPU of one worker; what the operator set stays.

    Torch and BLAS take every core they see: workers that share a machine would thrash. And each
    worker sees only its own GPU, so that ``device = "cuda"`` means that one.
    """
    gpus = topology.mesh.gpus()
    threads = max(1, len(os.sched_getaffinity(0)) // len(gpus))
    extra = {name: str(threads) for name in _THREADS if name not in environ}
    if topology.mesh.engine.kind == "torch" and gpus[index].kind != "cpu":
        visible = [d for d in environ.get(_DEVICES, "").split(",") if d]
        extra[_DEVICES] = visible[index] if index < len(visible) else str(index)
    return extra
