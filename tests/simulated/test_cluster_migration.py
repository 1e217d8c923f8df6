"""A simulated cluster whose running requests move between replicas with their KV."""

import dataclasses

import pytest

from loadgen.simulator.faults import Incident
from loadgen.simulator.policies import policy_named
from loadgen.workload.records import TraceRecord
from tests.simulated.test_cluster_faults import Watched
from tests.support.clusters import NEVER, mesh_of, spec_of

LLUMNIX = policy_named("llumnix")


def uneven(requests: int = 240) -> list[TraceRecord]:
    """Long outputs that fill one replica's KV cache sooner than another's."""
    return [
        TraceRecord(
            timestamp_s=0.15 * number,
            input_tokens=40 + 900 * (number % 5 == 0),
            output_tokens=60 + 700 * (number % 3 == 0),
        )
        for number in range(requests)
    ]


@pytest.mark.parametrize(
    "incidents",
    [(), NEVER, (Incident(kind="crash", node="n0-g1", at_s=15.0, for_s=8.0),)],
    ids=["hushed", "loud", "crash"],
)
def test_requests_that_move_lose_nothing(incidents: tuple[Incident, ...]) -> None:
    """A migration would lose or double tokens, or leave KV behind, or a dead replica speak."""
    mesh = mesh_of(gpus=3, kv_blocks=700, running_max=64)
    spec = spec_of(mesh, uneven(), policy=LLUMNIX, incidents=incidents)
    cluster = Watched(spec)
    cluster.boot()
    cluster.serve()
    assert cluster.migrator is not None
    assert cluster.migrator.migrations > 3
    assert (cluster.ended, cluster.source.columns.failed) == (240, {})
    for core in cluster.world.cores():
        core.check()
    for engines in cluster.fleet:
        for engine in engines.engines.values():
            assert engine.batch.kv.used == 0 or engines not in living(cluster)
    still = Watched(dataclasses.replace(spec, policy=dataclasses.replace(LLUMNIX, migration="none")))
    still.boot()
    still.serve()
    assert cluster.preemptions < still.preemptions, "that is what they are for"


def living(cluster: Watched) -> list[object]:
    return [
        engines
        for engines in cluster.fleet
        if engines.incarnation == max(e.incarnation for e in cluster.fleet if
           e.incarnation.rpartition("-")[0] == engines.incarnation.rpartition("-")[0])
    ]
