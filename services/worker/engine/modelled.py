"""An engine whose steps take the time that a cost model says, and whose tokens are made up.

It batches like a real one (batching.py), so that queues, preemptions and step times are those of
the replica it stands for. Tokens depend only on the seed, the prompt and the position, so that a
request resumed elsewhere goes on as if undisturbed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.worker.engine.batching_types import ENDED, PREFILL
from services.worker.engine.batching_types import Sequence as Running
from services.worker.engine.interface import (
    EngineChunk,
    EngineLoad,
    EngineRequest,
    LiveState,
    StepResult,
    Taken,
)
from services.worker.engine.made_up import (
    EOS_BITS,
    LETTER_BITS,
    LETTER_MASK,
    letter_tokens,
    made_up_logprobs,
    mix,
)
from services.worker.engine.modelled_settings import check_settings
from services.worker.engine.modelled_timing import ModelledReplica, replica_by_settings
from services.worker.engine.modelled_writer import Ended, Writer, begin
from services.worker.engine.validation import check_request
from shared.cost.step import PS_PER_S
from shared.errors import Rejected
from shared.mesh import ModelledEngineSettings
from shared.messages.requests import FinishReason
from shared.placement.copies import Copy
from shared.text import Tokenizer, byte_tokenizer


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
        self._writers: dict[str, Writer] = {}
        self._ended: dict[str, Ended] = {}
        self._held: dict[str, Writer | Ended] = {}  # taken over, and not yet let go on

    @property
    def block_tokens(self) -> int:
        return self._batch.kv.block_tokens

    @property
    def fetched(self) -> dict[str, int]:
        """Nothing: there are no weights."""
        return {}

    fetch_s = 0.0

    @property
    def cache_bytes(self) -> int:
        """None: its KV cache is a number of blocks."""
        return 0

    @property
    def cache_bytes_full(self) -> int:
        return 0

    def grow_cache(self) -> None:
        self._batch.grow()

    @property
    def has_work(self) -> bool:
        batch = self._batch
        runs = (batch.sequences or batch.entering) and not batch.stuck
        return bool(runs or self._ended)

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
        if key in self._writers or key in self._ended or key in self._held:
            raise Rejected("invalid", f"request {key} is live already")
        begun = begin(request, self._tokenizer)
        if isinstance(begun, Ended):
            self._ended[key] = begun
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
        self._writers[key] = begun

    def abort(self, key: str) -> bool:
        known = key in self._ended or self._batch.abort(key) or key in self._held
        for place in (self._writers, self._ended, self._held):
            place.pop(key, None)
        return known

    def states(self) -> list[LiveState]:
        """Blocks have no numbers here."""
        batch = self._batch
        live = (*batch.running.values(), *batch.entering.values(), *batch.waiting.values())
        return [
            LiveState(request=ended.request, output_tokens=ended.request.output_tokens)
            for ended in self._ended.values()
        ] + [
            LiveState(
                request=self._writers[sequence.key].request,
                output_tokens=self._output(self._writers[sequence.key]),
                computed=batch.computed(sequence),
                admission=sequence.admission,
            )
            for sequence in live
        ]

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """There is nothing to copy: a request has its KV with it wherever there is room for it."""

    def take(self, replica_id: str, states: Sequence[LiveState], *, final: bool) -> Taken:
        """Ahead there is nothing to do."""
        del replica_id
        taken = Taken()
        for state in states if final else ():
            key = state.request.key
            if key in self._writers or key in self._ended:
                continue  # it runs here already
            held = self._held[key] = self._hold(state)
            again = (
                isinstance(held, Writer) and state.computed and not self._batch.held[key].computed
            )
            (taken.replayed if again else taken.moved).append(key)
        if taken.replayed:
            detail = f"the KV cache of {self._batch.kv.total} blocks has no room for them"
            return Taken(moved=taken.moved, replayed=taken.replayed, detail=detail)
        return taken

    def release(self, *, keep: bool) -> None:
        self._batch.release(keep=keep)
        for key, held in self._held.items() if keep else ():
            if isinstance(held, Ended):
                self._ended[key] = held
            else:
                self._writers[key] = held
        self._held.clear()

    def advance_stage(self, stage: int, layers: tuple[int, int]) -> None:
        """There are no weights to fetch or to free."""

    def step(self) -> StepResult:
        chunks = [ended.chunk for ended in self._ended.values()]
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
        self.release(keep=False)
        keys = [*self._ended, *self._writers]
        for key in keys:
            self.abort(key)
        return keys

    def load(self) -> EngineLoad:
        return self._batch.load()

    def check(self) -> None:
        self._batch.check()
        live = {**self._batch.sequences, **self._batch.entering}
        assert self._writers.keys() == live.keys(), "requests out of step"
        held = {key for key, held in self._held.items() if isinstance(held, Writer)}
        assert held == self._batch.held.keys(), "held requests out of step"
        for key, sequence in live.items():
            assert self._writers[key].position == self._batch.made(sequence), key
        assert not self._ended.keys() & self._writers.keys(), "an ended request is still scheduled"

    def close(self) -> None:
        self.drop_all()

    def _hold(self, state: LiveState) -> Writer | Ended:
        """One that never fits here ends as failed, so that its ingress tries elsewhere."""
        request = replace(state.request, output_tokens=state.output_tokens)
        begun = begin(request, self._tokenizer)
        if isinstance(begun, Ended):
            return begun
        try:
            check_request(
                request, vocabulary=self._vocabulary, context_tokens=self._context_tokens_max
            )
            self._batch.hold(
                request.key,
                prompt_tokens=len(request.prompt_tokens),
                output_tokens=request.sampling.output_tokens_max,
                earlier_tokens=len(request.output_tokens),
                computed_tokens=state.computed,
            )
        except Rejected as error:
            position = len(request.output_tokens)
            chunk = EngineChunk(request.key, position, [], "failed", detail=error.detail)
            return Ended(request, chunk)
        return begun

    def _output(self, writer: Writer) -> list[int]:
        """All that it has made: what was made here is made up once more."""
        earlier = writer.request.output_tokens
        return earlier + [
            self._token(mix(writer.root, position))
            for position in range(len(earlier), writer.position)
        ]

    def _token(self, mixed: int) -> int:
        if mixed >> LETTER_BITS < self._eos_below:
            assert self._eos_id is not None
            return self._eos_id
        return self._letters[mixed & LETTER_MASK]

    def _write(self, sequence: Running) -> EngineChunk:
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
