"""The torch engine: a Llama-family model behind the Engine interface.

One step: the batch scheduler picks chunks, the decoder computes them in one pass, the sampler
picks tokens, and each request that ends leaves. Everything here runs on the caller's thread.
"""

from pathlib import Path

import torch
from torch import Tensor

from services.worker.engine.interface import (
    Engine,
    EngineChunk,
    EngineLoad,
    EngineRequest,
    StepResult,
)
from services.worker.engine.stopping import StopCheck
from services.worker.engine.torch_engine import sizing
from services.worker.engine.torch_engine.batch import BatchBuilder
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler, Chunk, Sequence
from services.worker.engine.torch_engine.checkpoint import Checkpoint
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.engine.torch_engine.model import DecoderStage
from services.worker.engine.torch_engine.model_config import ModelConfig, read_model_config
from services.worker.engine.torch_engine.sampling import as_list, choose, logprobs
from services.worker.engine.torch_engine.sharding import Rank, weight_shards
from services.worker.engine.torch_engine.weights import allocate_weights
from services.worker.engine.validation import check_request
from shared.errors import EngineFailed, Rejected
from shared.messages.requests import TokenLogprobs
from shared.text import Tokenizer, load_tokenizer


def load_torch_engine(path: str | Path, config: TorchEngineConfig) -> Engine:
    """Load the checkpoint folder ``path``; raises ConfigInvalid for a bad folder or setting."""
    config.validate()
    folder = Path(path)
    model = read_model_config(folder)
    context_tokens = sizing.context_tokens(model, config)
    tokenizer = load_tokenizer(str(folder))
    checkpoint = Checkpoint(folder)
    rank = Rank()
    device = sizing.device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    weights = allocate_weights(model, rank, dtype=sizing.dtype(model, config), device=device)
    checkpoint.refuse_unknown(weight_shards(model, Rank()), tied_embeddings=model.tied_embeddings)
    checkpoint.load(weights.shards, weights.named)
    stage = DecoderStage(model, rank, weights, context_tokens=context_tokens)
    kv_blocks = sizing.kv_blocks(model, config, context_tokens=context_tokens, dtype=stage.dtype)
    stage.allocate_kv(blocks=kv_blocks, block_tokens=config.block_tokens)
    kv = KvBlocks(
        blocks=kv_blocks,
        block_tokens=config.block_tokens,
        rows=config.running_max,
        row_tokens_max=context_tokens,
    )
    scheduler = BatchScheduler(
        kv,
        batch_tokens_max=config.batch_tokens_max,
        running_max=config.running_max,
        waiting_max=config.waiting_max,
    )
    return TorchEngine(model, stage, scheduler, tokenizer, context_tokens=context_tokens)


class TorchEngine:
    """See Engine. Tokens are made on ``stage``'s device; nothing else is."""

    blocking = True

    def __init__(
        self,
        model: ModelConfig,
        stage: DecoderStage,
        scheduler: BatchScheduler,
        tokenizer: Tokenizer,
        *,
        context_tokens: int,
    ) -> None:
        self._model = model
        self._stage: DecoderStage | None = stage
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._builder = BatchBuilder(
            heads_per_kv_head=model.heads // model.kv_heads, dtype=stage.dtype, device=stage.device
        )
        self._stops: dict[str, StopCheck] = {}
        self._ended: dict[str, EngineChunk] = {}  # ended by earlier output; told in the next step

    @property
    def has_work(self) -> bool:
        return bool(self._stops or self._ended)

    @property
    def preemptions(self) -> int:
        """Requests that lost their KV blocks so far and were computed again."""
        return self._scheduler.preemptions

    def add(self, request: EngineRequest) -> None:
        check_request(
            request, vocabulary=self._model.vocabulary, context_tokens=self._context_tokens
        )
        key = request.key
        if key in self._scheduler or key in self._ended:
            raise Rejected("invalid", f"request {key} is live already")
        stop = StopCheck(request, self._tokenizer)
        finish = stop.feed_earlier(request.output_tokens)
        if finish is not None:
            if len(self._ended) >= self._scheduler.live_max:
                raise Rejected("overloaded", "too many requests ended between two steps")
            self._ended[key] = EngineChunk(key, len(request.output_tokens), [], finish)
            return
        self._scheduler.add(Sequence(request))
        self._stops[key] = stop

    def abort(self, key: str) -> bool:
        self._stops.pop(key, None)
        return self._ended.pop(key, None) is not None or self._scheduler.remove(key)

    @torch.inference_mode()
    def step(self) -> StepResult:
        work = self._scheduler.schedule()
        try:
            made = self._run(work) if work else []
        except RuntimeError as error:  # torch raises it for lost devices and lack of memory
            tokens = sum(chunk.count for chunk in work)
            detail = f"the model failed on a batch of {tokens} tokens: {error}"
            raise EngineFailed(detail) from error
        ended = list(self._ended.values())
        self._ended.clear()
        return StepResult(ended + made)

    def drop_all(self) -> list[str]:
        keys = [*self._ended, *self._scheduler]
        for key in keys:
            self.abort(key)
        return keys

    def load(self) -> EngineLoad:
        scheduler = self._scheduler
        return EngineLoad(
            running=scheduler.running,
            waiting=scheduler.waiting,
            tokens_pending=scheduler.tokens_pending,
            kv_blocks_used=scheduler.kv.used,
            kv_blocks_total=scheduler.kv.total,
        )

    def check(self) -> None:
        self._scheduler.check()
        assert set(self._stops) == set(self._scheduler), "requests and their stops differ"
        assert not self._ended.keys() & self._stops.keys(), "ended requests are still scheduled"

    def close(self) -> None:
        """Weights and cache go with the stage; whoever still held them would keep the memory."""
        self.drop_all()
        self._stage = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _run(self, work: list[Chunk]) -> list[EngineChunk]:
        assert self._stage is not None, "the engine is closed"
        logits = self._stage.forward(self._builder.build(work, self._scheduler.kv))
        sampled = [chunk.sequence for chunk in work if chunk.samples]
        for chunk in work:
            self._scheduler.commit(chunk)
        return self._sample(sampled, logits) if sampled else []

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[EngineChunk]:
        params = [sequence.request.sampling for sequence in sequences]
        positions = [sequence.output_count for sequence in sequences]
        tokens = choose(logits, params, positions)
        finite = as_list(logits.isfinite().all(dim=-1), bool)
        wanted = _logprobs(sequences, tokens, logits)
        chunks: list[EngineChunk] = []
        for sequence, position, token, good in zip(
            sequences, positions, tokens, finite, strict=True
        ):
            key = sequence.request.key
            if good:
                sequence.tokens.append(token)
                finish = self._stops[key].feed(token)
                chunk = EngineChunk(key, position, [token], finish, wanted.get(key))
            else:
                chunk = EngineChunk(key, position, [], "failed", detail=_NOT_FINITE)
            if chunk.finish is not None:
                self._scheduler.remove(key)
                del self._stops[key]
            chunks.append(chunk)
        return chunks


_NOT_FINITE = "the model's logits are not finite: check the weights, or use float32"


def _logprobs(
    sequences: list[Sequence], tokens: list[int], logits: Tensor
) -> dict[str, list[TokenLogprobs]]:
    rows = [
        (row, sequence.request.key, sequence.request.sampling.logprobs)
        for row, sequence in enumerate(sequences)
    ]
    wanted = [(row, key, count) for row, key, count in rows if count is not None]
    if not wanted:
        return {}
    picked = torch.tensor([row for row, _, _ in wanted], device=logits.device)
    found = logprobs(
        logits.index_select(0, picked),
        [tokens[row] for row, _, _ in wanted],
        [count for _, _, count in wanted],
    )
    return {key: [entry] for (_, key, _), entry in zip(wanted, found, strict=True)}
