"""Twenty sequences of switches, each with a fault somewhere in the middle: clients notice none."""

import asyncio
import gc
import os
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from deploy.local import LocalMesh
from loadgen.bench.switching import Switching
from loadgen.client import ClientOptions, Progress, closed_loop
from loadgen.workload.records import TraceRecord
from tests.chaos.ordeal import Resources, assert_each_ended_once, assert_nothing_left
from tests.chaos.switch_ordeal import PHASES, Told, draw, endure, show, until_at_rest
from tests.support.watch import watching

pytestmark = [
    pytest.mark.nats,
    pytest.mark.processes,
    pytest.mark.chaos,
    pytest.mark.timeout(600),
]

TOPOLOGY = """
[mesh]
name = "chaos"
[mesh.model]
model_id = "modelled"
context_tokens_max = 2048
[mesh.engine.modelled]
base_s = 0.010
start_s = 0.2
[[mesh.nodes]]
node_id = "n0"
gpus = 4
[[mesh.replicas]]
replica_id = "r0"
[[mesh.replicas]]
replica_id = "r1"
[up]
routers = 2
"""
GPUS = tuple(f"n0-g{i}" for i in range(4))
SHAPES = (
    "tp1 tp1 tp1 tp1", "tp2 tp1 tp1", "tp2 tp2", "tp1pp2 tp2", "tp4", "tp3 tp1", "tp1 tp1", "tp2",
)  # fmt: skip
VICTIMS = (*(f"worker-{gpu}" for gpu in GPUS), "switcher", "switcher", "broker", "scheduler")
SEQUENCES = 20
DISTINCT = 400
CONCURRENCY = 10
SURVIVORS = ("ingress-0", "router-0", "router-1")
MEGABYTE = 1 << 20


def _records() -> list[TraceRecord]:
    """Prompts are decided by their hash id alone, so that the records can be sent in turn."""
    draws = random.Random("chaos")
    return [
        TraceRecord(
            timestamp_s=0.0,
            input_tokens=draws.randint(8, 200),
            output_tokens=draws.randint(80, 240),
            hash_ids=(number,),
        )
        for number in range(DISTINCT)
    ]


async def test_switches_that_are_struck_in_any_phase_lose_nothing(tmp_path: Path) -> None:
    """If this fails, a fault in the middle of a switch loses or repeats tokens, or leaves a mesh
    that serves neither the old plan nor the new one."""
    topology = tmp_path / "topology.toml"
    topology.write_text(TOPOLOGY)
    records = _records()
    async with (
        LocalMesh(topology, data_dir=tmp_path / "mesh", port=0, say=print) as mesh,
        watching(mesh) as watch,
        Switching(mesh.bus_url) as switching,
    ):
        options = ClientOptions(
            url=mesh.url, model="modelled", temperature=1.0, keep_tokens=True, timeout_s=180.0
        )
        undisturbed = await closed_loop(records, options, concurrency=100)
        assert_each_ended_once(undisturbed)
        pids = {name: mesh.pids()[name] for name in SURVIVORS} | {"supervisor": os.getpid()}
        allowed = dict.fromkeys(SURVIVORS, 16 * MEGABYTE) | {"supervisor": 64 * MEGABYTE}
        gc.collect()
        resources = Resources(pids, rss_growth_bytes_max=allowed)
        await resources.take_baseline()
        progress = Progress()
        sequences: list[Told] = []
        over = asyncio.Event()

        def until_over() -> Iterator[TraceRecord]:
            for record in cycle(records):
                if over.is_set():
                    return
                yield record

        async def suffer() -> None:
            try:
                for seed in range(SEQUENCES):
                    drawn = draw(
                        seed, gpus=GPUS, shapes=SHAPES, victims=VICTIMS, model_id="modelled"
                    )
                    sequences.append(await endure(watch, switching, drawn, progress))
            except BaseException:
                progress.stop.set()
                raise
            finally:
                over.set()
                show(sequences)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(suffer())
            results = await closed_loop(
                until_over(), options, concurrency=CONCURRENCY, progress=progress
            )

        assert_each_ended_once(results)
        for result in results:
            expected = undisturbed[result.index % DISTINCT].token_ids
            assert result.token_ids == expected, result.request_id
        assert len(sequences) == SEQUENCES
        await until_at_rest(watch)
        await assert_nothing_left(watch)
        reports = [report for told in sequences for report in told.reports]
        assert sum(report.way == "live" for report in reports) > len(reports) // 2
        assert sum(report.moved for report in reports) > 0
        assert len({told.struck_in for told in sequences} & set(PHASES)) > 1, "hardly ever in time"
        assert watch.epochs == sorted(watch.epochs), "an epoch went back"
        gc.collect()
        await resources.assert_returned(watch)
