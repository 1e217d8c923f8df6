"""Every kind of process is killed, one after the other, under a replay that must not notice."""

import gc
import os
import random
from pathlib import Path

import pytest

from deploy.local import LocalMesh
from loadgen.client import ClientOptions, closed_loop
from loadgen.workload.records import TraceRecord
from tests.chaos.ordeal import (
    Fault,
    Resources,
    assert_each_ended_once,
    assert_nothing_left,
    assert_only_victims_died,
    endure,
)
from tests.support.watch import watching

pytestmark = [
    pytest.mark.nats,
    pytest.mark.processes,
    pytest.mark.chaos,
    pytest.mark.timeout(300),
]

TOPOLOGY = """
[mesh]
name = "chaos"
[mesh.model]
model_id = "modelled"
context_tokens_max = 2048
[mesh.engine.modelled]
base_s = 0.008
start_s = 0.2
[[mesh.nodes]]
node_id = "n0"
gpus = 3
[[mesh.replicas]]
replica_id = "r0"
[[mesh.replicas]]
replica_id = "r1"
[[mesh.replicas]]
replica_id = "r2"
[up]
routers = 2
"""
REQUESTS_MIN, REQUESTS_MAX = 300, 800
CONCURRENCY = 10
FAULTS = (
    Fault("worker-n0-g0"),
    Fault("router-0"),
    Fault("scheduler"),
    Fault("profiler"),
    Fault("broker"),
    Fault("switcher"),  # it finds its plan in the store that the broker came back on
    Fault("worker-n0-g1", held=True),
)
SURVIVORS = ("ingress-0", "router-1", "forecaster", "worker-n0-g1", "worker-n0-g2")
MEGABYTE = 1 << 20


def _records() -> list[TraceRecord]:
    draws = random.Random("chaos")
    return [
        TraceRecord(
            timestamp_s=0.0,
            input_tokens=draws.randint(8, 200),
            output_tokens=draws.randint(60, 140),
        )
        for _ in range(REQUESTS_MAX)
    ]


async def test_a_replay_does_not_notice_that_processes_die(tmp_path: Path) -> None:
    """If this fails, some process is one that clients see die: their streams break, stall for
    ever, or repeat or change their tokens; or the mesh survives and leaks with each fault."""
    topology = tmp_path / "topology.toml"
    topology.write_text(TOPOLOGY)
    records = _records()
    async with (
        LocalMesh(topology, data_dir=tmp_path / "mesh", port=0, say=print) as mesh,
        watching(mesh) as watch,
    ):
        options = ClientOptions(
            url=mesh.url, model="modelled", temperature=1.0, keep_tokens=True, timeout_s=120.0
        )
        undisturbed = await closed_loop(records, options, concurrency=100)
        assert_each_ended_once(undisturbed)
        epoch = watch.plan.epoch
        pids = {name: mesh.pids()[name] for name in SURVIVORS} | {"supervisor": os.getpid()}
        allowed = dict.fromkeys(SURVIVORS, 8 * MEGABYTE) | {"supervisor": 32 * MEGABYTE}
        gc.collect()
        resources = Resources(pids, rss_growth_bytes_max=allowed)
        await resources.take_baseline()

        ordeal = await endure(
            watch,
            records,
            options,
            FAULTS,
            concurrency=CONCURRENCY,
            requests_min=REQUESTS_MIN,
        )

        ordeal.show()
        assert_each_ended_once(ordeal.results)
        assert len(ordeal.results) >= REQUESTS_MIN
        assert [outcome.fault for outcome in ordeal.outcomes] == list(FAULTS)
        assert all(outcome.in_flight > 0 for outcome in ordeal.outcomes)
        for before, after in zip(undisturbed, ordeal.results, strict=False):
            assert after.token_ids == before.token_ids, (before.request_id, after.request_id)
        await assert_nothing_left(watch)
        assert_only_victims_died(ordeal.outcomes)
        assert watch.epochs == sorted(watch.epochs), "an epoch went back"
        assert watch.plan.epoch > epoch, "no plan moved when a worker was gone for ten seconds"
        gc.collect()
        await resources.assert_returned(watch)
