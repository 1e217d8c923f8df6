"""A real model changes its shape under load, and its ranks die on the way: its text stays."""

import gc
import os
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

from deploy.local import LocalMesh
from loadgen.bench.switching import Switching, plan_of
from loadgen.client import ClientOptions, closed_loop
from loadgen.workload.records import TraceRecord
from services.worker.engine.torch_engine.make_model import make_model
from tests.chaos.ordeal import Resources, assert_each_ended_once, assert_nothing_left
from tests.chaos.reference import TIE, Reference, assert_same_text
from tests.chaos.switch_ordeal import Draw, Fault, assert_worth_it, under_load, until_at_rest
from tests.support.watch import watching

pytestmark = [
    pytest.mark.nats,
    pytest.mark.torch,
    pytest.mark.processes,
    pytest.mark.chaos,
    pytest.mark.timeout(400),
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
kv_memory_bytes = 33554432
running_max = 16
[[mesh.nodes]]
node_id = "n0"
gpus = 3
[[mesh.replicas]]
replica_id = "r0"
[[mesh.replicas]]
replica_id = "r1"
[up]
routers = 2
"""
G0, G1, G2 = GPUS = tuple(f"n0-g{i}" for i in range(3))
SINGLES = (("tp1", (G0,)), ("tp1", (G1,)), ("tp1", (G2,)))
PAIR = (("tp2", (G0, G1)), ("tp1", (G2,)))
OTHER_PAIR = (("tp1", (G0,)), ("tp2", (G1, G2)))
STAGES = (("tp1pp2", (G0, G1)), ("tp1", (G2,)))
TRIPLE = (("tp3", (G0, G1, G2)),)
Shapes = tuple[tuple[str, tuple[str, ...]], ...]
SEQUENCES: tuple[tuple[tuple[Shapes, Shapes, Shapes], Fault], ...] = (
    # A rank of the tp2 that comes, while it is made ready.
    ((SINGLES, PAIR, STAGES), Fault(f"worker-{G1}", "preparing", "killed")),
    # A rank of the tp2 that goes, and whose other rank hands over.
    ((PAIR, TRIPLE, SINGLES), Fault(f"worker-{G1}", "taking", "held")),
    # The leader that has just taken requests over.
    ((STAGES, OTHER_PAIR, PAIR), Fault(f"worker-{G1}", "committing", "killed")),
    # Who goes on with the requests.
    ((SINGLES, STAGES, TRIPLE), Fault(f"worker-{G0}", "activating", "killed")),
    # Nobody who serves.
    ((OTHER_PAIR, SINGLES, PAIR), Fault("switcher", "pausing", "killed")),
)
DISTINCT, CONCURRENCY = 32, 6
SURVIVORS = ("ingress-0", "router-0", "router-1")
MEGABYTE = 1 << 20


def _records() -> list[TraceRecord]:
    """Prompts are decided by their hash id alone, so that the records can be sent in turn."""
    return [
        TraceRecord(
            timestamp_s=0.0,
            input_tokens=16 + 3 * number,
            output_tokens=200 + 2 * number,
            hash_ids=(number,),
        )
        for number in range(DISTINCT)
    ]


def _draws() -> list[Draw]:
    return [
        Draw(seed, tuple(plan_of(shapes, model_id="tiny") for shapes in sequence), fault)
        for seed, (sequence, fault) in enumerate(SEQUENCES)
    ]


async def test_a_real_model_says_the_same_when_switches_are_struck(tmp_path: Path) -> None:
    """If this fails, weights or KV cache that were moved are others than those that stood there, or
    a rank that dies in a switch takes requests with it: made-up tokens would not show it."""
    folder = tmp_path / "model"
    make_model(folder)
    topology = tmp_path / "topology.toml"
    topology.write_text(TOPOLOGY.format(path=folder))
    records = _records()
    async with (
        LocalMesh(topology, data_dir=tmp_path / "mesh", port=0, say=print) as mesh,
        watching(mesh) as watch,
        Switching(mesh.bus_url) as switching,
    ):
        options = ClientOptions(url=mesh.url, model="tiny", keep_tokens=True, timeout_s=180.0)
        reference = Reference(folder, options)
        undisturbed = await closed_loop(records, options, concurrency=2 * CONCURRENCY)
        assert_each_ended_once(undisturbed)
        for record, result in list(zip(records, undisturbed, strict=True))[:4]:
            assert max(reference.shortfalls(record, result.token_ids)) < TIE, result.index
        pids = {name: mesh.pids()[name] for name in SURVIVORS} | {"supervisor": os.getpid()}
        allowed = dict.fromkeys(SURVIVORS, 16 * MEGABYTE) | {"supervisor": 64 * MEGABYTE}
        gc.collect()
        resources = Resources(pids, rss_growth_bytes_max=allowed)
        await resources.take_baseline()

        results, sequences = await under_load(
            watch, switching, _draws(), records, options, concurrency=CONCURRENCY
        )

        assert_each_ended_once(results)
        await until_at_rest(watch)
        await assert_nothing_left(watch)
        assert_worth_it(sequences)
        assert watch.epochs == sorted(watch.epochs), "an epoch went back"
        gc.collect()
        await resources.assert_returned(watch)
    for result in results:
        number = result.index % DISTINCT
        assert_same_text(reference, records[number], undisturbed[number], result)
