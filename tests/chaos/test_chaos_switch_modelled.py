"""Twenty sequences of switches, each with a fault somewhere in the middle: clients notice none."""

import gc
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.local import LocalMesh
from loadgen.bench.switching import Switching
from loadgen.client import ClientOptions, closed_loop
from loadgen.results import RequestResult
from loadgen.workload.prompts import PromptSource
from loadgen.workload.records import TraceRecord
from services.worker.engine.made_up import LETTER_MASK, letter_tokens, mix, root_of
from shared.text import byte_tokenizer
from tests.chaos.ordeal import Resources, assert_each_ended_once, assert_nothing_left
from tests.chaos.switch_ordeal import PHASES, assert_worth_it, draw, under_load, until_at_rest
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
WARM = 200  # requests before the first switch
CONCURRENCY = 10
SURVIVORS = ("ingress-0", "router-0", "router-1")
MEGABYTE = 1 << 20


def _records() -> list[TraceRecord]:
    draws = random.Random("chaos")
    return [
        TraceRecord(
            timestamp_s=0.0,
            input_tokens=draws.randint(8, 200),
            output_tokens=draws.randint(80, 240),
        )
        for _ in range(DISTINCT)
    ]


class MadeUp:
    """What the modelled engine says when nothing happens, worked out without it."""

    def __init__(self, records: Sequence[TraceRecord], options: ClientOptions) -> None:
        self._records = records
        self._letters = letter_tokens(byte_tokenizer())
        self._prompts = PromptSource(
            seed=options.seed,
            vocabulary_min=options.vocabulary_min,
            vocabulary_max=options.vocabulary_max,
        )

    def assert_said(self, results: Sequence[RequestResult]) -> None:
        assert_each_ended_once(results)
        for result in results:
            record = self._records[result.index % len(self._records)]
            root = root_of(self._prompts.prompt(record, result.index), seed=result.index)
            expected = [
                self._letters[mix(root, position) & LETTER_MASK]
                for position in range(record.output_tokens)
            ]
            assert result.token_ids == expected, result.request_id


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
        made_up = MadeUp(records, options)
        made_up.assert_said(await closed_loop(records[:WARM], options, concurrency=100))
        pids = {name: mesh.pids()[name] for name in SURVIVORS} | {"supervisor": os.getpid()}
        allowed = dict.fromkeys(SURVIVORS, 16 * MEGABYTE) | {"supervisor": 64 * MEGABYTE}
        gc.collect()
        resources = Resources(pids, rss_growth_bytes_max=allowed)
        await resources.take_baseline()

        results, sequences = await under_load(
            watch,
            switching,
            [
                draw(seed, gpus=GPUS, shapes=SHAPES, victims=VICTIMS, model_id="modelled")
                for seed in range(SEQUENCES)
            ],
            records,
            options,
            concurrency=CONCURRENCY,
        )

        made_up.assert_said(results)
        await until_at_rest(watch)
        await assert_nothing_left(watch)
        assert_worth_it(sequences)
        assert {told.struck_in for told in sequences} >= set(PHASES), "a phase was never struck"
        assert watch.epochs == sorted(watch.epochs), "an epoch went back"
        gc.collect()
        await resources.assert_returned(watch)
