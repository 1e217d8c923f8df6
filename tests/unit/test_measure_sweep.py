"""A whole sweep of an engine whose step times are known."""

import time
from pathlib import Path
from random import Random

import pytest

from services.worker.engine.interface import EngineRequest
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler, Sequence
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.measure.ledger import Ledger, SweepFailed
from services.worker.measure.machine import disk_link, memory_link, socket_link
from services.worker.measure.result import Destination, Machine, gpu_facts, measured_profile, write
from services.worker.measure.scenarios import scenarios
from services.worker.measure.stopwatch import stopwatch
from services.worker.measure.sweep import Bench, sweep
from shared.cost.memory import kv_blocks
from shared.cost.model import cost_model
from shared.cost.step import Prefill, StepModel
from shared.hardware import Parallelism
from shared.messages.requests import SamplingParams
from tests.unit.measured_engine import LINK, MeasuredEngine, true_model

MACHINE = Machine(memory=LINK, socket=LINK, disk=LINK, gpus_per_node=4, price_per_hour=0.5)


def errors(model: StepModel) -> list[float]:
    """At steps of all kinds, most of which no scenario has."""
    truth = true_model()
    found: list[float] = []
    for batch in (1, 3, 10, 25, 31):
        for length in (20, 300, 1100):
            prefills = (Prefill(), Prefill(200, 1, 200 * 100, 1), Prefill(90, 3, 90 * 200, 2))
            for prefill in prefills:
                expected = truth.step_ps(batch, batch * length, prefill)
                found.append(model.step_ps(batch, batch * length, prefill) / expected - 1)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_swept_engine_is_predicted_within_two_percent(tmp_path: Path, noise: float) -> None:
    """A modelled cluster would behave like no engine that anybody has."""
    engine = MeasuredEngine(noise=noise)
    target = engine.target()
    chosen = scenarios(target)
    said: list[str] = []
    found = sweep(
        target, chosen, seconds=60.0, say=said.append, clock=engine.clock, watch=engine.clock
    )
    destination = Destination(tmp_path, "box", "made-up")
    gpu = gpu_facts(target, MACHINE, "box")
    profile, _ = measured_profile(target, found, chosen, gpu, "made-up")
    write(destination, profile, gpu)
    read = cost_model("box", "made-up", Parallelism(), folders=(tmp_path,))
    assert max(map(abs, errors(read.step))) < 0.02
    assert profile.error.step_p90 < 0.05
    assert profile.error.step_median < 0.01
    assert kv_blocks(read.profile, read.gpu, Parallelism(), block_tokens=16) == 1024
    assert read.gpu.gpus_per_node == 4
    assert found.seconds <= 60.0 * 1.2
    assert said[-1] == f"round {found.rounds}, {found.seconds:.0f} of 60 s"


def test_what_takes_too_long_is_left_out_and_said() -> None:
    """A sweep of a slow engine would never end, or would be thin without a word."""
    engine = MeasuredEngine()
    target = engine.target()
    chosen = scenarios(target)
    said: list[str] = []
    found = sweep(
        target, chosen, seconds=12.0, say=said.append, clock=engine.clock, watch=engine.clock
    )
    assert found.skipped
    assert sorted(f"left out, would not leave time for 5 rounds: {s}" for s in found.skipped) == (
        sorted(line for line in said if line.startswith("left out"))
    )
    assert found.seconds < 12.0 * 1.2
    assert {row.origin for row in found.rows}.isdisjoint(found.skipped)


def test_no_time_at_all_is_refused() -> None:
    """A profile of nothing would be written."""
    engine = MeasuredEngine()
    target = engine.target()
    with pytest.raises(SweepFailed, match="raise --seconds"):
        sweep(target, scenarios(target), seconds=0.05, clock=engine.clock, watch=engine.clock)


def test_an_engine_that_schedules_otherwise_is_found_out() -> None:
    """Its times would be fitted to steps that it never ran."""
    engine = MeasuredEngine(wrong=True)
    with pytest.raises(SweepFailed, match="does not schedule as the cost model assumes"):
        sweep(
            engine.target(),
            scenarios(engine.target()),
            seconds=10.0,
            clock=engine.clock,
            watch=engine.clock,
        )


def test_a_cache_too_small_to_sweep_is_refused() -> None:
    """Requests would push each other out, and recomputed prompts would pass for decodes."""
    with pytest.raises(SweepFailed, match="too short to sweep"):
        scenarios(MeasuredEngine(kv_blocks=8).target())


def test_a_small_cache_is_swept_without_preemption() -> None:
    """As above, at sizes that do fit: the ledger would notice, the user would be stuck."""
    engine = MeasuredEngine(kv_blocks=120)
    target = engine.target()
    bench = Bench(target, engine.clock, engine.clock)
    for scenario in scenarios(target):
        bench.restart()
        scenario.run(bench)
    assert bench.samples


@pytest.mark.parametrize("seed", range(10))
def test_the_ledger_foresees_what_the_batch_scheduler_does(seed: int) -> None:
    """Step times would be noted under shapes that the engine never computed."""
    random = Random(seed)
    kv = KvBlocks(blocks=4096, block_tokens=16, rows=64, row_tokens_max=1024)
    scheduler = BatchScheduler(kv, batch_tokens_max=64, running_max=64, waiting_max=64)
    ledger = Ledger(batch_tokens_max=64)
    sampling = SamplingParams(output_tokens_max=200)
    for step in range(80):
        for number in range(random.choice((0, 0, 1, 3))):
            prompt = [1] * random.randint(2, 150)
            request = EngineRequest(key=f"{step}-{number}", prompt_tokens=prompt, sampling=sampling)
            if len(ledger) < 30:
                scheduler.add(Sequence(request))
                ledger.add(request.key, len(prompt))
        if len(ledger) and random.random() < 0.2:
            key = random.choice(ledger.keys)
            ledger.remove(key)
            scheduler.remove(key)
        work = scheduler.schedule()
        shape, sampled = ledger.advance()
        assert {chunk.sequence.request.key for chunk in work if chunk.samples} == sampled
        assert sum(chunk.count for chunk in work) == shape.tokens
        past = [chunk.start >= chunk.sequence.prefill_end for chunk in work]
        decodes = [chunk for chunk, is_past in zip(work, past, strict=True) if is_past]
        assert len(decodes) == shape.batch
        assert sum(chunk.start + 1 for chunk in decodes) == shape.context
        for chunk in work:
            scheduler.commit(chunk)
            if chunk.samples:
                chunk.sequence.tokens.append(1)


def test_waiting_for_a_cpu_is_no_time(tmp_path: Path) -> None:
    """A profile would be of whatever else the machine did that minute."""
    told = tmp_path / "schedstat"
    told.write_text("5000 1000000000 7\n")
    watch = stopwatch(told)
    before_s = watch()
    told.write_text("9000 4000000000 9\n")
    assert -3.0 <= watch() - before_s < -2.0


@pytest.mark.parametrize("text", ["", "1", "one two three"])
def test_a_system_that_does_not_tell_is_timed_by_the_wall(tmp_path: Path, text: str) -> None:
    """The sweep would run on one system only."""
    told = tmp_path / "schedstat"
    told.write_text(text)
    assert stopwatch(told) is time.perf_counter
    assert stopwatch(tmp_path / "none") is time.perf_counter


def test_links_of_this_machine_are_plausible(tmp_path: Path) -> None:
    """Switches would be planned with copies that take no time, or for ever."""
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(3 << 20))
    for link in (memory_link(), socket_link(), disk_link([file])):
        assert 1e6 < link.bytes_per_s < 1e13
        assert 0 <= link.latency_s < 1
