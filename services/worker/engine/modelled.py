"""An engine whose steps take the time that a small cost model says, and whose tokens are made up.

It batches like a real one, so that queues, preemptions and step times are those of the shape it
stands for: each running request decodes one token a step; what is left of the step's token budget
goes to prefills in order of arrival (chunked prefill, Agrawal et al., Sarathi, 2023); paged KV
blocks are counted, and when they run out the youngest request is preempted and recomputed later
(Kwon et al., PagedAttention, 2023).

Tokens depend only on the seed, the prompt and the position, so that a request resumed elsewhere
goes on as if undisturbed. The terms of a step's time that grow with tokens are divided by the
replica's GPUs, and its KV blocks multiplied by them; ``base_s`` is paid by every shape.
"""

from collections import deque

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
from services.worker.engine.stopping import StopCheck
from services.worker.engine.validation import check_request
from shared.errors import Rejected
from shared.mesh import ModelledEngineSettings
from shared.messages.requests import FinishReason
from shared.text import Tokenizer, byte_tokenizer


class _Sequence:
    """One live request. ``computed`` of its ``known`` tokens are in the KV cache."""

    __slots__ = (
        "blocks", "capacity", "computed", "ignore_eos", "key", "known", "logprobs", "number",
        "prompt", "root", "stop", "tokens_max",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, stop: StopCheck | None) -> None:
        sampling = request.sampling
        self.key = request.key
        self.prompt = len(request.prompt_tokens)
        self.known = self.prompt + len(request.output_tokens)
        self.tokens_max = self.prompt + sampling.output_tokens_max
        self.computed = 0
        self.blocks = 0
        self.capacity = 0  # tokens that its blocks hold
        self.number = 0  # order of arrival
        self.logprobs = sampling.logprobs
        self.stop = stop  # only with stop strings: it costs per token
        self.ignore_eos = sampling.ignore_eos
        self.root = root_of(request.prompt_tokens, seed=sampling.seed)


class ModelledEngine:
    """See Engine. Everything here is O(running requests) per step, and cheap."""

    blocking = False

    def __init__(
        self,
        settings: ModelledEngineSettings,
        *,
        context_tokens_max: int,
        gpus: int = 1,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_settings(settings)
        self._settings = settings
        self._gpus = gpus
        self._context_tokens_max = context_tokens_max
        self._tokenizer = tokenizer or byte_tokenizer()
        self._letters = letter_tokens(self._tokenizer)
        self._vocabulary = self._tokenizer.vocab_size
        self._eos_id = min(self._tokenizer.eos_ids, default=None)
        eos = settings.eos_probability if self._eos_id is not None else 0.0
        self._eos_below = round(eos * (1 << EOS_BITS))
        self._kv_blocks = settings.kv_blocks * gpus
        self._free = self._kv_blocks
        self._live: dict[str, _Sequence] = {}
        self._running: list[_Sequence] = []  # oldest first, all older than those waiting
        self._waiting: deque[_Sequence] = deque()
        self._ended: dict[str, EngineChunk] = {}  # ended by earlier output; told in the next step
        self._arrivals = 0
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._ended)

    def add(self, request: EngineRequest) -> None:
        settings, key = self._settings, request.key
        check_request(
            request,
            vocabulary=self._vocabulary,
            context_tokens=self._context_tokens_max,
        )
        if key in self._live or key in self._ended:
            raise Rejected("invalid", f"request {key} is live already")
        tokens_max = len(request.prompt_tokens) + request.sampling.output_tokens_max
        capacity = self._kv_blocks * settings.block_tokens
        if tokens_max - 1 > capacity:  # the last token is never computed
            detail = f"{tokens_max} tokens exceed the KV cache of {capacity} tokens"
            raise Rejected("too_long", detail)
        if len(self._live) >= settings.running_max + settings.waiting_max:
            raise Rejected("overloaded", f"{len(self._waiting)} requests are waiting already")
        stop: StopCheck | None = None
        if request.sampling.stop or request.output_tokens:
            stop = StopCheck(request, self._tokenizer)
            finish = stop.feed_earlier(request.output_tokens)
            if finish is not None:
                self._ended[key] = EngineChunk(key, len(request.output_tokens), [], finish)
                return
        sequence = _Sequence(request, stop if request.sampling.stop else None)
        self._arrivals += 1
        sequence.number = self._arrivals
        self._live[key] = sequence
        self._waiting.append(sequence)

    def abort(self, key: str) -> bool:
        if self._ended.pop(key, None) is not None:
            return True
        sequence = self._live.pop(key, None)
        if sequence is None:
            return False
        if sequence.blocks:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        return True

    def step(self) -> StepResult:
        chunks = list(self._ended.values())
        self._ended.clear()
        if not self._live:
            return StepResult(chunks)
        sampled, prefilling, context_tokens = self._decode()
        decoded = len(sampled)
        budget = self._settings.batch_tokens_max - decoded
        prefilled = 0
        while prefilled < budget and (sequence := self._next_prefill(prefilling)) is not None:
            count = min(budget - prefilled, sequence.known - sequence.computed)
            sequence.computed += count
            prefilled += count
            context_tokens += sequence.computed
            if sequence.computed == sequence.known:
                sampled.append(sequence)
        self._sample(sampled, chunks)
        return StepResult(chunks, self._duration_s(prefilled, decoded, context_tokens))

    def drop_all(self) -> list[str]:
        keys = [*self._ended, *self._live]
        for key in keys:
            self.abort(key)
        return keys

    def load(self) -> EngineLoad:
        pending = 0
        for sequence in self._live.values():
            prefill = sequence.known - sequence.computed
            if prefill != 1 or not sequence.computed:  # else that one is output, to be decoded
                pending += prefill
            pending += sequence.tokens_max - sequence.known
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            tokens_pending=pending,
            kv_blocks_used=self._kv_blocks - self._free,
            kv_blocks_total=self._kv_blocks,
        )

    def check(self) -> None:
        settings = self._settings
        ages = [sequence.number for sequence in (*self._running, *self._waiting)]
        assert ages == sorted(set(ages)), "requests out of order"
        assert len(ages) == len(self._live) <= settings.running_max + settings.waiting_max
        assert len(self._running) <= settings.running_max
        held = 0
        for sequence in self._running:
            held += sequence.blocks
            assert sequence.capacity == sequence.blocks * settings.block_tokens, sequence.key
            assert sequence.computed <= sequence.capacity, sequence.key
            assert sequence.computed < sequence.known < sequence.tokens_max, sequence.key
        assert held + self._free == self._kv_blocks, "KV blocks leaked"
        for sequence in self._waiting:
            assert sequence.blocks == sequence.computed == 0, sequence.key
        assert not self._ended.keys() & self._live.keys(), "an ended request is still scheduled"

    def close(self) -> None:
        self.drop_all()

    def _decode(self) -> tuple[list[_Sequence], deque[_Sequence], int]:
        """One token for each request whose prefill is done: these, the others, context tokens."""
        running = self._running
        sampled: list[_Sequence] = []
        prefilling: deque[_Sequence] = deque()
        context_tokens = at = 0
        while at < len(running):  # preemption takes from the end
            sequence = running[at]
            at += 1
            if sequence.known - sequence.computed != 1:
                prefilling.append(sequence)
            elif sequence.computed < sequence.capacity or self._grow(sequence):
                sequence.computed += 1
                context_tokens += sequence.computed
                sampled.append(sequence)
        while prefilling and not prefilling[-1].blocks:
            prefilling.pop()  # preempted after it was passed over
        return sampled, prefilling, context_tokens

    def _grow(self, sequence: _Sequence) -> bool:
        """One more block, preempting the youngest; False if that was itself."""
        while not self._free:
            victim = self._running.pop()
            self._release(victim)
            victim.computed = 0
            self._waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        self._take(sequence, 1)
        return True

    def _next_prefill(self, prefilling: deque[_Sequence]) -> _Sequence | None:
        """The next request to prefill: one already running, else the first that waits, if there
        are blocks for all it holds and one to spare for each that runs: else it would soon be
        preempted."""
        if prefilling:
            return prefilling.popleft()
        if not self._waiting or len(self._running) >= self._settings.running_max:
            return None
        sequence = self._waiting[0]
        blocks = -(-sequence.known // self._settings.block_tokens)
        if self._running and blocks > self._free - len(self._running):
            return None
        self._take(sequence, blocks)
        self._running.append(self._waiting.popleft())
        return sequence

    def _sample(self, sampled: list[_Sequence], chunks: list[EngineChunk]) -> None:
        """The next token of each request that is at its end, and whether that ends it."""
        ended, letters = False, self._letters
        for sequence in sampled:
            position = sequence.known - sequence.prompt
            mixed = mix(sequence.root, position)
            token = letters[mixed & LETTER_MASK]
            sequence.known += 1
            finish: FinishReason | None = None
            if sequence.known == sequence.tokens_max:
                finish = "length"
            if mixed >> LETTER_BITS < self._eos_below:
                assert self._eos_id is not None
                token = self._eos_id
                if not sequence.ignore_eos:
                    finish = "stop"
            elif sequence.stop is not None:
                finish = sequence.stop.feed(token)
            logprobs = None
            if sequence.logprobs is not None:
                logprobs = [
                    made_up_logprobs(
                        token, mixed, count=sequence.logprobs, vocabulary=self._vocabulary
                    )
                ]
            chunks.append(EngineChunk(sequence.key, position, [token], finish, logprobs))
            if finish is not None:
                ended = True
                del self._live[sequence.key]
                self._release(sequence)
        if ended:
            self._running = [sequence for sequence in self._running if sequence.blocks]

    def _duration_s(self, prefilled: int, decoded: int, context_tokens: int) -> float:
        settings = self._settings
        tokens_s = (
            settings.prefill_token_s * prefilled
            + settings.decode_token_s * decoded
            + settings.context_token_s * context_tokens
        )
        return (settings.base_s + tokens_s / self._gpus) / settings.speedup

    def _take(self, sequence: _Sequence, blocks: int) -> None:
        self._free -= blocks
        sequence.blocks += blocks
        sequence.capacity = sequence.blocks * self._settings.block_tokens

    def _release(self, sequence: _Sequence) -> None:
        self._free += sequence.blocks
        sequence.blocks = sequence.capacity = 0
