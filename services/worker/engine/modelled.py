"""An engine whose steps take the time that a cost model says, and whose tokens are made up.

It batches like a real one (batching.py), so that queues, preemptions and step times are those of
the replica it stands for. Tokens depend only on the seed, the prompt and the position, so that a
request resumed elsewhere goes on as if undisturbed.
"""

from services.worker.engine.batching_types import ENDED, PREFILL, Sequence
from services.worker.engine.interface import EngineChunk, EngineLoad, EngineRequest, StepResult
from services.worker.engine.made_up import (
    EOS_BITS,
    LETTER_BITS,
    LETTER_MASK,
    letter_tokens,
    made_up_logprobs,
    mix,
    root_of,
)
from services.worker.engine.modelled_settings import check_settings
from services.worker.engine.modelled_timing import ModelledReplica, replica_by_settings
from services.worker.engine.stopping import StopCheck
from services.worker.engine.validation import check_request
from shared.cost.step import PS_PER_S
from shared.errors import Rejected
from shared.mesh import ModelledEngineSettings
from shared.messages.requests import FinishReason
from shared.text import Tokenizer, byte_tokenizer


class _Writer:
    """What a live request's tokens depend on."""

    __slots__ = ("ignore_eos", "logprobs", "position", "root", "stop")

    def __init__(self, request: EngineRequest, stop: StopCheck | None) -> None:
        sampling = request.sampling
        self.root = root_of(request.prompt_tokens, seed=sampling.seed)
        self.position = len(request.output_tokens)  # of its next token
        self.stop = stop  # only with stop strings: it costs per token
        self.ignore_eos = sampling.ignore_eos
        self.logprobs = sampling.logprobs


class ModelledEngine:
    """See Engine. A step costs the tokens that it makes up, and hardly more."""

    blocking = False

    def __init__(
        self,
        settings: ModelledEngineSettings,
        *,
        context_tokens_max: int,
        gpus: int = 1,
        tokenizer: Tokenizer | None = None,
        replica: ModelledReplica | None = None,
    ) -> None:
        """``replica``: what it stands for; without one, what the settings say of ``gpus`` GPUs."""
        check_settings(settings)
        self._batch = (replica or replica_by_settings(settings, gpus=gpus)).new_batch()
        self._prefix_caching = settings.prefix_caching
        self._context_tokens_max = context_tokens_max
        self._tokenizer = tokenizer or byte_tokenizer()
        self._letters = letter_tokens(self._tokenizer)
        self._vocabulary = self._tokenizer.vocab_size
        self._eos_id = min(self._tokenizer.eos_ids, default=None)
        eos = settings.eos_probability if self._eos_id is not None else 0.0
        self._eos_below = round(eos * (1 << EOS_BITS))
        self._writers: dict[str, _Writer] = {}
        self._ended: dict[str, EngineChunk] = {}  # ended by earlier output; told in the next step

    @property
    def has_work(self) -> bool:
        return bool(self._batch.sequences or self._ended)

    @property
    def preemptions(self) -> int:
        return self._batch.preemptions

    @property
    def hit_tokens_total(self) -> int:
        """Tokens of prompts that were found in the prefix cache."""
        return self._batch.hit_tokens_total

    def add(self, request: EngineRequest) -> None:
        key, sampling = request.key, request.sampling
        check_request(
            request,
            vocabulary=self._vocabulary,
            context_tokens=self._context_tokens_max,
        )
        if key in self._batch.sequences or key in self._ended:
            raise Rejected("invalid", f"request {key} is live already")
        stop: StopCheck | None = None
        if sampling.stop or request.output_tokens:
            stop = StopCheck(request, self._tokenizer)
            finish = stop.feed_earlier(request.output_tokens)
            if finish is not None:
                self._ended[key] = EngineChunk(key, len(request.output_tokens), [], finish)
                return
        hashes: list[int] = []
        if self._prefix_caching:
            tokens = request.prompt_tokens + request.output_tokens
            hashes = block_hashes(tokens, self._batch.kv.block_tokens)
        self._batch.add(
            key,
            prompt_tokens=len(request.prompt_tokens),
            output_tokens=sampling.output_tokens_max,
            earlier_tokens=len(request.output_tokens),
            hashes=hashes,
        )
        self._writers[key] = _Writer(request, stop if sampling.stop else None)

    def abort(self, key: str) -> bool:
        if self._ended.pop(key, None) is not None:
            return True
        self._writers.pop(key, None)
        return self._batch.abort(key)

    def step(self) -> StepResult:
        chunks = list(self._ended.values())
        self._ended.clear()
        batch = self._batch
        if batch.plan() is None:
            return StepResult(chunks)
        _, duration_ps = batch.steps_until(0)  # of a leap, the first step
        running = list(batch.running.values())
        batch.advance(1)
        # A prompt that goes on in the next step makes no token in this one.
        chunks += [self._write(sequence) for sequence in running if sequence.phase != PREFILL]
        return StepResult(chunks, duration_ps / PS_PER_S)

    def drop_all(self) -> list[str]:
        keys = [*self._ended, *self._batch.sequences]
        for key in keys:
            self.abort(key)
        return keys

    def load(self) -> EngineLoad:
        return self._batch.load()

    def check(self) -> None:
        self._batch.check()
        assert self._writers.keys() == self._batch.sequences.keys(), "requests out of step"
        for key, sequence in self._batch.sequences.items():
            assert self._writers[key].position == self._batch.made(sequence), key
        assert not self._ended.keys() & self._writers.keys(), "an ended request is still scheduled"

    def close(self) -> None:
        self.drop_all()

    def _write(self, sequence: Sequence) -> EngineChunk:
        """The token that a sequence has just made, and whether that ends it."""
        key = sequence.key
        writer = self._writers[key]
        position = writer.position
        writer.position = position + 1
        mixed = mix(writer.root, position)
        token = self._letters[mixed & LETTER_MASK]
        finish: FinishReason | None = "length" if sequence.phase == ENDED else None
        if mixed >> LETTER_BITS < self._eos_below:
            assert self._eos_id is not None
            token = self._eos_id
            if not writer.ignore_eos:
                finish = "stop"
        elif writer.stop is not None:
            finish = writer.stop.feed(token)
        logprobs = None
        if writer.logprobs is not None:
            logprobs = [
                made_up_logprobs(token, mixed, count=writer.logprobs, vocabulary=self._vocabulary)
            ]
        if finish is not None:
            del self._writers[key]
            if sequence.phase != ENDED:
                self._batch.finish(sequence)
        return EngineChunk(key, position, [token], finish, logprobs)


def block_hashes(tokens: list[int], block_tokens: int) -> list[int]:
    """A hash for each whole block, of everything up to its end. Python's hash of a tuple of
    numbers: the same in every process, quick, and only ever compared within one engine."""
    hashes: list[int] = []
    chained = 0
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        chained = hash((chained, *tokens[end - block_tokens : end]))
        hashes.append(chained)
    return hashes
