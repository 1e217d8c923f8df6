"""Runs a trace through a simulated mesh.

result = run(SimulationSpec(mesh=..., traffic=..., policy=policy_named("oserve")))
"""

import dataclasses
import hashlib
import resource
import time
from collections.abc import Iterator

import numpy as np

from loadgen.simulator.cluster import BOOT_S, Cluster
from loadgen.simulator.outcome import (
    Forecast,
    Requests,
    SimulationResult,
    SimulationSpec,
    Switch,
    Traffic,
)

__all__ = [
    "Forecast",
    "Requests",
    "SimulationResult",
    "SimulationSpec",
    "Switch",
    "Traffic",
    "run",
]


def run(spec: SimulationSpec) -> SimulationResult:
    """Simulate it. Raises ConfigInvalid for what cannot be, and AssertionError if a core breaks
    its invariants. Two runs of one spec are equal to the bit, unless ``slow_work_s`` is None and
    its policy solves."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    cluster = Cluster(spec)
    cluster.boot()
    ended_s = cluster.serve()
    requests = _requests(cluster)
    observer = cluster.observer
    switches = tuple(
        dataclasses.replace(switch, at_s=switch.at_s - BOOT_S) for switch in observer.switches
    )
    return SimulationResult(
        requests=requests,
        duration_s=ended_s - BOOT_S,
        switches=switches,
        gpu_seconds=observer.gpu_seconds,
        events=cluster.world.steps,
        engine_steps=cluster.engine_steps,
        preemptions=cluster.preemptions,
        wall_s=time.perf_counter() - wall_s,
        cpu_s=time.process_time() - cpu_s,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        digest=_digest(requests, switches),
        notes=tuple(_notes(cluster, ended_s)),
    )


def _requests(cluster: Cluster) -> Requests:
    columns, arrivals = cluster.source.columns, cluster.arrivals
    models = tuple(dict.fromkeys(traffic.model_id for traffic in cluster.spec.traffic))
    labels = tuple(sorted({arrival.record.label for arrival in arrivals}))
    model_index = {model_id: i for i, model_id in enumerate(models)}
    label_index = {label: i for i, label in enumerate(labels)}
    e2e_s = np.array(columns.e2e_s)
    return Requests(
        model=np.array([model_index[a.model_id] for a in arrivals], dtype=np.int16),
        arrived_s=np.array([a.at_s - BOOT_S for a in arrivals]),
        ttft_s=np.array(columns.ttft_s),
        e2e_s=e2e_s,
        input_tokens=np.array([a.record.input_tokens for a in arrivals], dtype=np.int32),
        output_tokens=np.array(columns.output_tokens, dtype=np.int32),
        completed=~np.isnan(e2e_s),
        label=np.array([label_index[a.record.label] for a in arrivals], dtype=np.int16),
        models=models,
        labels=labels,
    )


def _notes(cluster: Cluster, ended_s: float) -> Iterator[str]:
    """What the figures alone do not say."""
    for code, count in sorted(cluster.source.columns.failed.items()):
        yield f"{count:,} requests failed: {code}"
    if cluster.source.open_requests:
        yield (
            f"{cluster.source.open_requests:,} requests were still open "
            f"{cluster.spec.drain_s:g} s after the last arrival"
        )
    for incident in cluster.spec.incidents:
        if BOOT_S + incident.at_s > ended_s:
            yield (
                f"{incident.kind} of {incident.node} at {incident.at_s:g} s never came: "
                "all had ended before"
            )


def _digest(requests: Requests, switches: tuple[Switch, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for column in (requests.ttft_s, requests.e2e_s, requests.output_tokens):
        digest.update(column.tobytes())
    digest.update(repr(switches).encode())
    return digest.hexdigest()
