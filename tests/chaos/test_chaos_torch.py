"""A real model, killed, stopped and cut off from its broker: its text stays the same."""

import gc
import os
from itertools import cycle
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

from deploy.local import LocalMesh
from loadgen.client import ClientOptions, closed_loop
from loadgen.workload.records import TraceRecord
from services.worker.engine.torch_engine.make_model import make_model
from tests.chaos.ordeal import (
    Fault,
    Resources,
    assert_each_ended_once,
    assert_nothing_left,
    assert_only_victims_died,
    endure,
)
from tests.chaos.reference import TIE, Reference, assert_same_text
from tests.support.watch import watching

pytestmark = [
    pytest.mark.nats,
    pytest.mark.torch,
    pytest.mark.processes,
    pytest.mark.chaos,
    pytest.mark.timeout(300),
]

TOPOLOGY = """
[mesh]
name = "chaos"
[mesh.model]
model_id = "tiny"
path = "{path}"
context_tokens_max = 1024
[mesh.engine]
kind = "torch"
[mesh.engine.torch]
dtype = "float32"
threads = 1
kv_memory_bytes = 67108864
running_max = 16
[[mesh.nodes]]
node_id = "n0"
gpus = 2
[[mesh.replicas]]
replica_id = "r0"
[[mesh.replicas]]
replica_id = "r1"
[up]
routers = 2
"""
DISTINCT, REQUESTS_MIN = 48, 100
CONCURRENCY = 6
FAULTS = (
    Fault("worker-n0-g0"),
    Fault("broker"),
    Fault("worker-n0-g1", held=True),
)
SURVIVORS = ("ingress-0", "router-0", "router-1", "worker-n0-g1")
MEGABYTE = 1 << 20


def _records() -> list[TraceRecord]:
    """Prompts are decided by their hash id alone, so that the records can be sent in turn."""
    return [
        TraceRecord(
            timestamp_s=0.0,
            input_tokens=16 + 3 * number,
            output_tokens=120 + 2 * number,
            hash_ids=(number,),
        )
        for number in range(DISTINCT)
    ]


async def test_a_real_model_says_the_same_when_its_processes_die(tmp_path: Path) -> None:
    """If this fails, a request that is resumed elsewhere goes on with another text than it would
    have had: lost, repeated or misplaced tokens, which made-up tokens might not show."""
    folder = tmp_path / "model"
    make_model(folder)
    topology = tmp_path / "topology.toml"
    topology.write_text(TOPOLOGY.format(path=folder))
    records = _records()
    async with (
        LocalMesh(topology, data_dir=tmp_path / "mesh", port=0, say=print) as mesh,
        watching(mesh) as watch,
    ):
        options = ClientOptions(url=mesh.url, model="tiny", keep_tokens=True, timeout_s=120.0)
        reference = Reference(folder, options)
        undisturbed = await closed_loop(records, options, concurrency=2 * CONCURRENCY)
        assert_each_ended_once(undisturbed)
        for record, result in list(zip(records, undisturbed, strict=True))[:4]:
            assert max(reference.shortfalls(record, result.token_ids)) < TIE, result.index
        pids = {name: mesh.pids()[name] for name in SURVIVORS} | {"supervisor": os.getpid()}
        allowed = dict.fromkeys(SURVIVORS, 16 * MEGABYTE) | {"supervisor": 32 * MEGABYTE}
        gc.collect()
        resources = Resources(pids, rss_growth_bytes_max=allowed)
        await resources.take_baseline()

        ordeal = await endure(
            watch,
            cycle(records),
            options,
            FAULTS,
            concurrency=CONCURRENCY,
            requests_min=REQUESTS_MIN,
        )

        ordeal.show()
        assert_each_ended_once(ordeal.results)
        assert [outcome.fault for outcome in ordeal.outcomes] == list(FAULTS)
        assert all(outcome.in_flight > 0 for outcome in ordeal.outcomes)
        await assert_nothing_left(watch)
        assert_only_victims_died(ordeal.outcomes)
        assert watch.epochs == sorted(watch.epochs), "an epoch went back"
        gc.collect()
        await resources.assert_returned(watch)
    for result in ordeal.results:
        number = result.index % DISTINCT
        assert_same_text(reference, records[number], undisturbed[number], result)
