"""vLLM's engine core in this process, a step at a time, to be measured.

vLLM serves from a process of its own, in which the same core runs the same steps; here
``LLMEngine.step`` runs one and returns. That needs VLLM_ENABLE_V1_MULTIPROCESSING=0 in the
environment before vLLM is imported. Chunked prefill is on, as in service; prefix caching is off, so
that a prompt that comes again is computed again, and so is asynchronous scheduling, with which a
step would return the tokens of the one before.

vLLM is imported by name, since it lives in environments of its own and comes without types; the
protocols below are the part of it that is used (as of 0.32).
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from services.worker.engine.interface import EngineChunk, EngineLoad, EngineRequest, StepResult
from services.worker.engine.vllm_settings import VllmSettings
from shared.errors import ConfigInvalid, EngineFailed


class _Completion(Protocol):
    token_ids: Sequence[int]
    finish_reason: str | None


class _Output(Protocol):
    request_id: str
    outputs: Sequence[_Completion]


class _LlmEngine(Protocol):
    engine_core: Any

    def add_request(self, request_id: str, prompt: object, params: object) -> str: ...
    def abort_request(self, request_ids: list[str]) -> None: ...
    def step(self) -> list[_Output]: ...


def load_vllm_stepper(
    folder: Path, settings: VllmSettings, *, context_tokens_max: int
) -> "VllmStepper":
    """Start vLLM on the checkpoint in ``folder``; raises ConfigInvalid for what vLLM does not take,
    and if it would run in other processes, where its steps cannot be timed one by one."""
    context = settings.context_tokens_max or context_tokens_max
    arguments: Any = import_module("vllm.engine.arg_utils").EngineArgs
    try:
        engine: _LlmEngine = import_module("vllm.v1.engine.llm_engine").LLMEngine.from_engine_args(
            arguments(
                model=str(folder),
                dtype=settings.dtype,
                enforce_eager=True,
                max_model_len=context,
                max_num_seqs=settings.running_max,
                max_num_batched_tokens=settings.batch_tokens_max,
                kv_cache_memory_bytes=settings.kv_memory_bytes,
                block_size=settings.block_tokens,
                enable_prefix_caching=False,
                enable_chunked_prefill=True,
                async_scheduling=False,
                disable_log_stats=True,
            )
        )
    except ValueError as error:  # vLLM's word for settings and checkpoints that it does not take
        raise ConfigInvalid(
            field="--set, or --model", value=str(folder), remedy=f"vLLM says: {error}"
        ) from error
    if not isinstance(engine.engine_core, import_module("vllm.v1.engine.core_client").InprocClient):
        engine.engine_core.shutdown()
        raise ConfigInvalid(
            field="VLLM_ENABLE_V1_MULTIPROCESSING",
            value=None,
            remedy="set it to 0, or run `oserve profile measure`, which does",
        )
    return VllmStepper(engine, context_tokens_max=context)


class VllmStepper:
    """The part of ``Engine`` that a sweep drives. Token ids only: texts are the ingress's."""

    def __init__(self, engine: _LlmEngine, *, context_tokens_max: int) -> None:
        self._engine = engine
        self._params: Callable[..., object] = import_module("vllm").SamplingParams
        self._only_new: object = import_module("vllm.sampling_params").RequestOutputKind.DELTA
        self._positions: dict[str, int] = {}
        self.context_tokens_max = context_tokens_max
        self.version: str = import_module("vllm").__version__

    def add(self, request: EngineRequest) -> None:
        sampling = request.sampling
        # No seed: on a CPU vLLM cannot take back a seeded draw, as it does after a partial prefill.
        params = self._params(
            max_tokens=sampling.output_tokens_max,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            ignore_eos=sampling.ignore_eos,
            detokenize=False,
            output_kind=self._only_new,
        )
        prompt = {"prompt_token_ids": request.prompt_tokens}
        self._engine.add_request(request.key, prompt, params)
        self._positions[request.key] = 0

    def abort(self, key: str) -> bool:
        self._engine.abort_request([key])
        return self._positions.pop(key, None) is not None

    def step(self) -> StepResult:
        try:
            outputs = self._engine.step()
        except RuntimeError as error:  # torch raises it for models that its kernels do not take
            raise EngineFailed(f"vLLM cannot compute a step: {error}") from error
        chunks: list[EngineChunk] = []
        for output in outputs:
            made = output.outputs[0]
            key, tokens = output.request_id, list(made.token_ids)
            if not tokens:
                continue
            finish = None if made.finish_reason is None else "length"
            chunks.append(EngineChunk(key, self._positions[key], tokens, finish))
            self._positions[key] += len(tokens)
        return StepResult(chunks)

    def load(self) -> EngineLoad:
        """Live requests and the size of the cache. One block of it is vLLM's null block, which no
        request gets."""
        blocks: int = self._engine.engine_core.engine_core.vllm_config.cache_config.num_gpu_blocks
        return EngineLoad(running=len(self._positions), kv_blocks_total=blocks - 1)

    def close(self) -> None:
        self._engine.engine_core.shutdown()
