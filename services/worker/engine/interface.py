"""What every engine must do, and the vocabulary in which it says so.

An engine is synchronous and single-threaded: the worker adds and aborts requests between steps,
and calls ``step`` while there is work. An engine never drops a request silently: each ends with
exactly one chunk that has ``finish`` set, or is handed back by ``drop_all``.
"""

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from shared.messages.requests import FinishReason, SamplingParams, TokenLogprobs


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


class Engine(Protocol):
    """One replica's engine (or one rank's part of it)."""

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
