"""An engine whose step times are a known cost model's, on a clock that moves only with its steps.

It schedules with the torch engine's own batch scheduler, so that a sweep meets real chunking,
admission and paging; it computes nothing.
"""

from random import Random

from services.worker.engine.interface import EngineChunk, EngineLoad, EngineRequest, StepResult
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler, Sequence
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.measure.target import Target
from shared.cost.profile import (
    FORMAT,
    ErrorBar,
    GpuFacts,
    Link,
    ModelFacts,
    Overheads,
    Profile,
    TensorTimes,
)
from shared.cost.step import PS_PER_S, Prefill, StepModel, pairs, step_model
from shared.hardware import Parallelism

FACTS = ModelFacts(
    layers=10, hidden=512, heads=8, kv_heads=4, head_dim=64, ffn=1536, vocab=500, weight_bytes=4
)
LINK = Link(bytes_per_s=1e10, latency_s=1e-6)
GPU = GpuFacts(
    gpu="made-up", memory_bytes=1 << 34, usable=1.0, reserved_bytes=0, gpus_per_node=1,
    price_per_hour=0.0, local=LINK, peer=LINK, host=LINK, network=LINK, disk=LINK,
    engine_start_s=1.0,
)  # fmt: skip
TRUTH = Profile(
    format=FORMAT,
    gpu="made-up",
    model="made-up",
    model_facts=FACTS,
    times=(
        TensorTimes(
            tp=1,
            tokens=(1, 16, 128, 512),
            dense_us=(110.0, 140.0, 700.0, 3100.0),
            collective_us=(0.0, 0.0, 0.0, 0.0),
            head_us=(40.0, 80.0, 360.0, 1300.0),
            decode_us=30.0,
            decode_request_us=9.0,
            decode_context_ns=60.0,
            prefill_chunk_us=25.0,
            prefill_pair_ns=4.0,
        ),
    ),
    overheads=Overheads(step_us=300.0, request_us=12.0, chunk_us=20.0),
    error=ErrorBar(step_median=0.0, step_p90=0.0, ttft_p90=0.0, itl_p90=0.0),
)


def true_model() -> StepModel:
    return step_model(TRUTH, GPU, Parallelism())


class MeasuredEngine:
    """``noise``: the share by which a step may take longer, at random. ``clock`` is the time."""

    def __init__(self, *, noise: float = 0.0, kv_blocks: int = 1024, wrong: bool = False) -> None:
        self.now_s = 0.0
        self.closed = False
        self._scheduler = BatchScheduler(
            KvBlocks(blocks=kv_blocks, block_tokens=16, rows=32, row_tokens_max=4096),
            batch_tokens_max=256,
            running_max=32,
            waiting_max=64,
        )
        self._model = true_model()
        self._noise, self._random = noise, Random(7)
        self._wrong = wrong  # tells of fewer tokens than a scheduler like ours would make

    def clock(self) -> float:
        return self.now_s

    def target(self) -> Target:
        return Target(
            engine=self,
            name="made-up engine",
            facts=FACTS,
            block_tokens=16,
            kv_blocks=self._scheduler.kv.total,
            batch_tokens_max=256,
            running_max=32,
            context_tokens_max=4096,
            start_s=2.5,
        )

    def add(self, request: EngineRequest) -> None:
        self._scheduler.add(Sequence(request))

    def abort(self, key: str) -> bool:
        return self._scheduler.remove(key)

    def step(self) -> StepResult:
        work = self._scheduler.schedule()
        decodes = [chunk for chunk in work if chunk.start >= chunk.sequence.prefill_end]
        prompts = [chunk for chunk in work if chunk.start < chunk.sequence.prefill_end]
        prefill = Prefill(
            tokens=sum(chunk.count for chunk in prompts),
            chunks=len(prompts),
            pairs=sum(pairs(chunk.start, chunk.count) for chunk in prompts),
            ending=sum(chunk.samples for chunk in prompts),
        )
        context = sum(chunk.start + 1 for chunk in decodes)
        taken_s = self._model.step_ps(len(decodes), context, prefill) / PS_PER_S
        self.now_s += taken_s * (1 + self._noise * self._random.random() ** 8)
        sampled = [chunk.sequence for chunk in work if chunk.samples]
        for chunk in work:
            self._scheduler.commit(chunk)
        made: list[EngineChunk] = []
        for sequence in sampled[1:] if self._wrong else sampled:
            made.append(EngineChunk(sequence.request.key, sequence.output_count, [1]))
            sequence.tokens.append(1)
        return StepResult(made)

    def load(self) -> EngineLoad:
        return EngineLoad(kv_blocks_total=self._scheduler.kv.total)

    def close(self) -> None:
        self.closed = True
