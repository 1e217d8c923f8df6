"""What every engine must do, and the vocabulary in which it says so.

An engine is synchronous and single-threaded: the worker adds and aborts requests between steps,
and calls ``step`` while there is work. An engine never drops a request silently: each ends with
exactly one chunk that has ``finish`` set, or is handed back by ``drop_all``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from shared.messages.requests import FinishReason, SamplingParams, TokenLogprobs
from shared.placement.copies import Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One attempt at a request. ``key`` is unique among the engine's live requests.

    ``output_tokens`` were made by earlier attempts: the engine prefills them after the prompt
    and goes on at position ``len(output_tokens)``; they count against ``output_tokens_max`` and
    take part in stop strings. Random sampling at a position depends only on (seed, position), so
    that a resumed request draws the same numbers as an undisturbed one.
    """

    key: str
    prompt_tokens: list[int]
    sampling: SamplingParams
    output_tokens: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class EngineChunk:
    """Tokens made for one request in one step; ``position`` counts from the request's first
    output token, earlier attempts included."""

    key: str
    position: int
    tokens: list[int]
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step made. ``duration_s`` is how long the driver must still wait before the
    chunks exist: the modelled engine computes it, a real engine has already spent it (0)."""

    chunks: list[EngineChunk]
    duration_s: float = 0.0


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    running: int = 0
    waiting: int = 0
    tokens_pending: int = 0  # prompt tokens to prefill + output tokens still allowed
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """A live request between two steps. ``output_tokens`` are all of them, those of earlier
    attempts included; the KV cache of the first ``computed`` of prompt and output tokens lies in
    ``blocks``, in order. ``admission`` is another number each time it is given blocks anew."""

    request: EngineRequest
    output_tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list[int])
    admission: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What ``Engine.take`` did. ``bytes_by_source``: target worker -> source worker -> bytes;
    ``bytes_needed``: between workers, of the KV cache of those moved, whenever it was copied, each
    byte once."""

    moved: list[str] = field(default_factory=list[str])
    replayed: list[str] = field(default_factory=list[str])
    bytes_by_source: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    bytes_needed: int = 0
    detail: str = ""


class Engine(Protocol):
    """One replica's engine: all of it, or its leading rank, which has the others do their part."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV block."""
        ...

    @property
    def fetched(self) -> dict[str, int]:
        """Bytes of weights by the worker that they came from, "" for the disk."""
        ...

    @property
    def fetch_s(self) -> float:
        """Seconds in which they were copied or read: not those of allocating, or of waiting for
        other ranks. 0 where there are no weights."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Of this rank's KV cache, used or not."""
        ...

    @property
    def cache_bytes_full(self) -> int:
        """What ``grow_cache`` makes of it."""
        ...

    def grow_cache(self) -> None:
        """Give the KV cache of all ranks its full size, if it was made smaller to fit beside other
        replicas; live requests keep what they have. Put off, and to be asked for again, while a
        peer reads the cache or requests are taken over. Until then
        what only the full size has room for waits."""
        ...

    def states(self) -> list[LiveState]:
        """Everything live that is not held, oldest first."""
        ...

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """KV cache will be taken over along these copies of the sheet ``cache``."""
        ...

    def take(self, replica_id: str, states: Sequence[LiveState], *, final: bool) -> Taken:
        """Take over requests of ``replica_id``, with their KV cache where it fits, and hold them:
        they do not run until ``release``. Called with ``final`` False while they still run there:
        copies ahead what will not change any more, a bounded part of it each time, and holds
        nothing that a later call does not confirm; their tokens are stand-ins then, as many as
        there are. What is not among the states of the final call
        is forgotten. A request that does not fit, or whose KV cache cannot be had, is held
        without it (``replayed``); one that never fits here, not even alone in the full cache, ends
        with ``failed`` once it is let go on. Raises PeerLost when the source is gone and Rejected
        never."""
        ...

    def release(self, *, keep: bool) -> None:
        """Let the held requests run, or forget them. Once a final call has taken them they give way
        to nobody, and who runs here may have to wait for their KV cache: release them soon."""
        ...

    def advance_stage(self, stage: int, layers: tuple[int, int]) -> None:
        """Fetch the weights of ``stage``; of an engine that was ready from the beginning: free
        those of ``layers``, after which it can only be closed."""
        ...

    @property
    def blocking(self) -> bool:
        """True if ``step`` keeps the CPU or GPU busy: the worker then calls it in a thread."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises shared.errors.Rejected with code ``overloaded`` (waiting queue
        full), ``too_long`` (prompt + output cannot fit the context or the KV cache) or
        ``invalid`` (token outside the vocabulary, ...)."""
        ...

    def abort(self, key: str) -> bool:
        """Forget a request at once and free its KV blocks; False if it is not known.
        No chunk follows."""
        ...

    def step(self) -> StepResult:
        """Run one batch: bounded prefill chunks and one token for each running request."""
        ...

    def drop_all(self) -> list[str]:
        """Abort everything; the keys that were live."""
        ...

    def load(self) -> EngineLoad: ...

    def check(self) -> None:
        """Assert the invariants: KV blocks neither leaked nor shared by mistake, bounds kept."""
        ...

    def close(self) -> None:
        """Free memory and threads; the engine is not used afterwards."""
        ...


class Follower(Protocol):
    """A rank of a replica other than the leading one: it does what the leader says."""

    @property
    def fetched(self) -> dict[str, int]: ...

    @property
    def fetch_s(self) -> float: ...

    @property
    def cache_bytes(self) -> int: ...

    @property
    def cache_bytes_full(self) -> int: ...

    def expect(self, copies: Sequence[Copy], peers: Mapping[str, str], *, verify: bool) -> None:
        """As Engine.expect; may be called while ``serve`` runs in another thread."""
        ...

    def serve(self) -> None:
        """Take part until the leader closes the replica, or ``stop``. Raises EngineFailed when the
        leader or another rank is lost. Blocks."""
        ...

    def stop(self) -> None:
        """Make ``serve`` return soon; from any thread."""
        ...

    def close(self) -> None: ...
