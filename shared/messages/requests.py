"""A request's way through the mesh: route, submit, token chunks, completion."""

from typing import Literal

import msgspec

from shared.messages.base import DataMessage, Message
from shared.slo import SloClass

FinishReason = Literal["stop", "length", "abort", "refused", "failed"]
"""How an attempt ended. ``stop`` and ``length`` end the request; after ``refused`` (the replica
did not take it) and ``failed`` (the engine lost it) the ingress tries elsewhere; ``abort`` is the
echo of our own abort."""

Outcome = Literal["completed", "aborted", "rejected", "failed"]
FailureCode = Literal[
    "overloaded",
    "no_replica",
    "stale_epoch",
    "draining",
    "unknown_model",
    "too_long",
    "bus",
    "deadline",
    "engine",
    "invalid",
]


class RouteRequest(Message, frozen=True, kw_only=True):
    """Which replica should serve this? Lengths and hashes, never the prompt itself."""

    request_id: str
    model_id: str
    input_tokens: int
    output_tokens_max: int
    slo_class: SloClass = "standard"
    tenant: str = ""
    prefix_hashes: tuple[int, ...] = ()
    excluded: tuple[str, ...] = ()  # replicas that just refused, stalled or died under it
    attempt: int = 0


class RouteReply(Message, frozen=True, kw_only=True):
    """The replica to submit to, or a failure; always with the reason in words."""

    request_id: str
    attempt: int = 0
    replica_id: str = ""
    leader_id: str = ""  # worker that leads the replica
    epoch: int = 0
    request_type: int = -1  # index into the demand's types; -1 while none are known
    reason: str = ""
    failure: FailureCode | None = None
    retry_after_s: float = 0.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose each token. ``temperature`` 0 is greedy."""

    output_tokens_max: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely ones'


class SubmitRequest(Message, frozen=True, kw_only=True):
    """Run this on your replica; chunks go to ``ingress_id``'s data subject.

    ``output_tokens`` are those the client already has: the engine continues after them, as if
    it had made them itself. Idempotent by (request_id, attempt).
    """

    request_id: str
    attempt: int
    ingress_id: str
    epoch: int
    replica_id: str
    prompt_tokens: list[int]
    sampling: SamplingParams
    output_tokens: list[int] = msgspec.field(default_factory=list[int])
    slo_class: SloClass = "standard"
    request_type: int = -1  # as the router took it; decides who takes it over in a switch


class AbortRequest(Message, frozen=True, kw_only=True):
    """Stop working on this attempt. Sent once to the replica; a worker that does not know it
    ignores it, and an ingress that still gets chunks of it sends it again."""

    request_id: str
    attempt: int
    replica_id: str


class TokenLogprobs(DataMessage, frozen=True, kw_only=True):
    """Natural-log probabilities at one position: the chosen token's, and the top ones'."""

    logprob: float
    top_tokens: list[int] = msgspec.field(default_factory=list[int])
    top_logprobs: list[float] = msgspec.field(default_factory=list[float])


class TokenChunk(DataMessage, frozen=True, kw_only=True):
    """Tokens that one attempt made since its last chunk, or how it ended, or both.

    ``position`` is the index of the first token among all output tokens of the request, those
    of earlier attempts included, so that the ingress can tell a gap from a repeat.
    A chunk without tokens and finish is the acknowledgement of a submission.
    """

    request_id: str
    attempt: int
    position: int = 0
    tokens: list[int] = msgspec.field(default_factory=list[int])
    finish: FinishReason | None = None
    failure: FailureCode | None = None  # with finish refused or failed
    detail: str = ""
    logprobs: list[TokenLogprobs] | None = None


class TokenChunks(DataMessage, frozen=True, kw_only=True):
    """One message per engine step and ingress; without chunks it is the replica's heartbeat.

    ``incarnation`` names one run of the worker process: when it changes, whatever the former
    run had accepted is lost. A chunk of an attempt that another replica had before means that
    this one has taken it over: ``worker_id`` is where it is aborted from now on.
    """

    replica_id: str
    incarnation: str
    chunks: list[TokenChunk] = msgspec.field(default_factory=list[TokenChunk])
    worker_id: str = ""


class RequestState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A live request as its engine has it, for whoever takes it over. ``output_tokens`` are all
    made so far, those of earlier attempts included. ``counts`` are how many tokens prompt and
    output have where they are left out. The KV cache of the first ``computed`` of
    prompt and output tokens is in ``blocks``, in order. ``admission`` changes whenever its blocks
    are given up: blocks copied under another one are worth nothing."""

    request_id: str
    attempt: int
    ingress_id: str
    prompt_tokens: list[int]
    sampling: SamplingParams
    output_tokens: list[int] = msgspec.field(default_factory=list[int])
    slo_class: SloClass = "standard"
    request_type: int = -1
    computed: int = 0
    blocks: list[int] = msgspec.field(default_factory=list[int])
    admission: int = 0
    counts: tuple[int, int] = (0, 0)


class RequestStates(Message, frozen=True, kw_only=True):
    """What a replica's leader answers to whoever takes its requests over, oldest first; with
    ``more``, another such message follows. ``block_tokens``: of a block of its KV cache.
    ``paused_for_s``: how long it has stood still, 0 while it runs."""

    replica_id: str
    states: tuple[RequestState, ...] = ()
    block_tokens: int = 0
    paused: bool = False
    paused_for_s: float = 0.0
    more: bool = False


class RequestCompleted(Message, frozen=True, kw_only=True):
    """The canonical facts of one ended request. Times in seconds."""

    request_id: str
    outcome: Outcome
    model_id: str
    tenant: str = ""
    slo_class: SloClass = "standard"
    replica_id: str = ""
    request_type: int = -1
    input_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float = 0.0
    overhead_s: float = 0.0
    attempts: int = 1
    epoch: int = 0
    finish: FinishReason | None = None


class RequestsCompleted(Message, frozen=True, kw_only=True):
    """Completions of one ingress since its last such message: batched, since the journal keeps
    every event message and one each would double the broker's work."""

    ingress_id: str
    completed: tuple[RequestCompleted, ...] = ()
