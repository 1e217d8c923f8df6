"""The torch engine's leading rank: a Llama-family model behind the Engine interface.

One step: the batch scheduler picks chunks, the ranks compute them in one pass, the sampler picks
tokens, and each request that ends leaves. With pipeline stages a step hands in as many batches as
there are stages, and yields the tokens of the oldest. Everything here runs on the caller's thread.
"""

import contextlib
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from services.worker.engine.interface import (
    EngineChunk,
    EngineLoad,
    EngineRequest,
    LiveState,
    StepResult,
    Taken,
)
from services.worker.engine.stopping import StopCheck
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler, Sequence
from services.worker.engine.torch_engine.model import DecoderStage
from services.worker.engine.torch_engine.pipeline import Pipeline
from services.worker.engine.torch_engine.sampling import as_list, choose, logprobs
from services.worker.engine.validation import check_request
from shared.errors import EngineFailed, Rejected
from shared.messages.requests import TokenLogprobs
from shared.placement.copies import Copy
from shared.text import Tokenizer


class TakesOver(Protocol):
    """Moves KV cache and weights between replicas; see Engine for what each does. ``settle``
    comes before held requests are released."""

    def expect(
        self, copies: SequenceOf[Copy], peers: Mapping[str, str], *, verify: bool
    ) -> None: ...
    def take(self, replica_id: str, states: SequenceOf[LiveState], *, final: bool) -> Taken: ...
    def settle(self) -> None: ...
    def advance_stage(self, stage: int, layers: tuple[int, int]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What a leading rank is put together from. ``grow``: the KV cache of all ranks, unless that is
    put off. ``close`` ends the followers' part."""

    stage: DecoderStage
    scheduler: BatchScheduler
    pipeline: Pipeline
    tokenizer: Tokenizer
    context_tokens: int
    fetched: dict[str, int]
    fetch_s: float = 0.0
    takeover: TakesOver | None = None
    grow: Callable[[], None] = lambda: None
    cache_bytes_full: int = 0
    close: Callable[[], None] = lambda: None


class TorchEngine:
    """See Engine. Tokens are made on the ranks' devices; nothing else is."""

    blocking = True

    def __init__(self, parts: EngineParts) -> None:
        self._parts: EngineParts | None = parts
        self._scheduler = parts.scheduler
        self._pipeline = parts.pipeline
        self._tokenizer = parts.tokenizer
        self._context_tokens = parts.context_tokens
        self._vocabulary = parts.stage.vocabulary
        self._fetched, self.fetch_s = parts.fetched, parts.fetch_s
        self._cache_bytes = parts.stage.cache_bytes
        self._cache_bytes_full = max(parts.cache_bytes_full, self._cache_bytes)
        self._stops: dict[str, StopCheck] = {}
        # Ended by earlier output; told in the next step.
        self._ended: dict[str, tuple[EngineRequest, EngineChunk]] = {}

    @property
    def block_tokens(self) -> int:
        return self._scheduler.kv.block_tokens

    @property
    def fetched(self) -> dict[str, int]:
        return self._fetched

    @property
    def cache_bytes(self) -> int:
        return self._cache_bytes

    @property
    def cache_bytes_full(self) -> int:
        return self._cache_bytes_full

    @property
    def has_work(self) -> bool:
        live = self._stops and not self._scheduler.stuck
        return bool(live or self._ended or self._pipeline.under_way)

    @property
    def preemptions(self) -> int:
        """Requests that lost their KV blocks so far and were computed again."""
        return self._scheduler.preemptions

    def states(self) -> list[LiveState]:
        """As they were before the steps that are under way: whoever takes a request over computes
        its last token again rather than to miss one that nobody has been told."""
        self._pipeline.quiesce()
        ended = [
            LiveState(request=request, output_tokens=request.output_tokens)
            for request, _ in self._ended.values()
        ]
        return ended + self._scheduler.states()

    def expect(self, copies: SequenceOf[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        self._takeover.expect(copies, peers, verify=verify)

    def take(self, replica_id: str, states: SequenceOf[LiveState], *, final: bool) -> Taken:
        self._pipeline.quiesce()
        return self._takeover.take(replica_id, states, final=final)

    def release(self, *, keep: bool) -> None:
        self._pipeline.quiesce()  # a rank in the middle of a step would not answer
        if self._parts is not None and self._parts.takeover is not None:
            self._parts.takeover.settle()
        released = self._scheduler.release_held(keep=keep)
        for sequence in released if keep else ():
            key = sequence.request.key
            stop = StopCheck(sequence.request, self._tokenizer)
            finish = stop.feed_earlier(sequence.output_tokens)
            detail = ""
            if finish is None and not self._scheduler.kv.fits_ever(sequence.tokens_max):
                finish, detail = "failed", _NEVER_FITS
            if finish is None:
                self._stops[key] = stop
            else:
                self._scheduler.remove(key)
                chunk = EngineChunk(key, sequence.output_count, [], finish, detail=detail)
                self._ended[key] = sequence.request, chunk

    def grow_cache(self) -> None:
        if self._parts is not None and not self._scheduler.held:
            self._pipeline.quiesce()
            self._parts.grow()
            self._cache_bytes = self._parts.stage.cache_bytes

    def advance_stage(self, stage: int, layers: tuple[int, int]) -> None:
        self._pipeline.quiesce()
        self._takeover.advance_stage(stage, layers)

    def add(self, request: EngineRequest) -> None:
        check_request(request, vocabulary=self._vocabulary, context_tokens=self._context_tokens)
        key = request.key
        if key in self._scheduler or key in self._ended:
            raise Rejected("invalid", f"request {key} is live already")
        stop = StopCheck(request, self._tokenizer)
        finish = stop.feed_earlier(request.output_tokens)
        if finish is not None:
            if len(self._ended) >= self._scheduler.live_max:
                raise Rejected("overloaded", "too many requests ended between two steps")
            chunk = EngineChunk(key, len(request.output_tokens), [], finish)
            self._ended[key] = request, chunk
            return
        self._scheduler.add(Sequence(request))
        self._stops[key] = stop

    def abort(self, key: str) -> bool:
        self._stops.pop(key, None)
        return self._ended.pop(key, None) is not None or self._scheduler.remove(key)

    @torch.inference_mode()
    def step(self) -> StepResult:
        try:
            while not self._pipeline.full and (work := self._scheduler.schedule()):
                self._pipeline.submit(work)
            made = self._collect() if self._pipeline.under_way else []
        except RuntimeError as error:  # torch raises it for lost devices and lack of memory
            detail = f"the model failed on a batch of {self._pipeline.tokens} tokens: {error}"
            raise EngineFailed(detail) from error
        ended = [chunk for _, chunk in self._ended.values()]
        self._ended.clear()
        return StepResult(ended + made)

    def drop_all(self) -> list[str]:
        keys = [*self._ended, *self._scheduler]
        # Where a rank is lost there is nothing to wait for: what it did is not used any more.
        with contextlib.suppress(EngineFailed):
            self._pipeline.quiesce()
        for chunk in self._pipeline.abandon():
            self._scheduler.commit(chunk)
        self._scheduler.release_held(keep=False)
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
        if self._parts is None:
            return
        self._parts.close()
        if self._parts.takeover is not None:
            self._parts.takeover.close()
        self._parts = None
        self._pipeline.close()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @property
    def _takeover(self) -> TakesOver:
        assert self._parts is not None, "the engine is closed"
        assert self._parts.takeover is not None, "an engine without peers takes nothing over"
        return self._parts.takeover

    def _collect(self) -> list[EngineChunk]:
        chunks, logits = self._pipeline.collect()
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        rows = [row for row, sequence in enumerate(sampling) if self._scheduler.is_live(sequence)]
        for chunk in chunks:
            self._scheduler.commit(chunk)
        if not rows:
            return []
        if len(rows) < len(logits):  # some were aborted, or nothing was to be sampled
            sampling = [sampling[row] for row in rows]
            logits = logits[torch.tensor(rows, device=logits.device)]
        return self._sample(sampling, logits)

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


_NEVER_FITS = "the KV cache of the replica that took the request over is too small for it"
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
