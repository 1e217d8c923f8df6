"""A request inside the engine, and the part of it that a step computes."""

from dataclasses import dataclass, field

from services.worker.engine.interface import EngineRequest, LiveState
from services.worker.engine.torch_engine.kv_cache import KvBlocks


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. ``computed`` tokens have their keys and values cached.

    ``in_flight``: a step that has not ended works on it. ``admission``: another number each time it
    is given KV blocks anew.
    """

    request: EngineRequest
    number: int = 0  # order of arrival
    tokens: list[int] = field(init=False)  # prompt, then output
    computed: int = 0
    prefill_end: int = field(init=False)  # tokens before this one are prefilled, not decoded
    row: int | None = None  # in the KV block table while running
    admission: int = 0
    in_flight: bool = False
    ahead: bool = False  # held, and still running where it comes from

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_tokens, *self.request.output_tokens]
        self.prefill_end = len(self.tokens)

    @property
    def output_count(self) -> int:
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[len(self.request.prompt_tokens) :]

    @property
    def one_left(self) -> bool:
        """To compute, that is; then the next token is known."""
        return len(self.tokens) - self.computed == 1

    @property
    def tokens_max(self) -> int:
        return len(self.request.prompt_tokens) + self.request.sampling.output_tokens_max

    @property
    def tokens_pending(self) -> int:
        prefill = max(0, self.prefill_end - self.computed)
        return prefill + self.tokens_max - len(self.tokens)

    def state(self, kv: KvBlocks) -> LiveState:
        """For another replica; its blocks are in ``kv``."""
        count = kv.blocks_for(self.computed)
        return LiveState(
            request=self.request,
            output_tokens=self.output_tokens,
            computed=self.computed,
            blocks=[] if self.row is None else kv.blocks(self.row)[:count],
            admission=self.admission,
        )

    def next_chunk(self, budget: int) -> "Chunk":
        """Its next step, of ``budget`` tokens at most. It is in flight from now on."""
        self.in_flight = True
        return Chunk(self, self.computed, min(budget, len(self.tokens) - self.computed))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + count)`` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step yields the sequence's next token."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def row(self) -> int:
        row = self.sequence.row
        assert row is not None, self
        return row
