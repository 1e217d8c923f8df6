"""One engine request on its way through the mesh, and the rule that makes tokens exactly once.

A journey outlives replicas. Every attempt carries the tokens the client already has, every chunk
says at which position it starts, so what comes twice is cut off and what is missing is noticed.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from shared.messages.requests import FinishReason, SamplingParams, TokenChunk, TokenLogprobs
from shared.slo import SloClass

Phase = Literal["routing", "backing_off", "submitted", "streaming", "ended"]
HELD: tuple[Phase, ...] = ("submitted", "streaming")  # a worker may be at work on it
EXCLUDED_MAX = 8


class Home(msgspec.Struct, frozen=True):
    """A replica that works on an attempt, and the worker that leads it ("" while unknown)."""

    replica_id: str
    leader_id: str


@dataclass(slots=True, kw_only=True)
class Journey:
    """State of one request; times are the ingress's monotonic seconds."""

    request_id: str
    model_id: str
    prompt_tokens: list[int]
    sampling: SamplingParams
    slo_class: SloClass
    tenant: str
    arrived_s: float
    deadline_s: float
    seeking_s: float = float("-inf")  # when a replica that had taken it gave it back
    prefix_hashes: tuple[int, ...] = ()

    phase: Phase = "routing"
    attempt: int = 0
    moves: int = 0  # attempts that were given up
    replica_id: str = ""
    leader_id: str = ""
    former: tuple[Home, ...] = ()  # homes of this attempt before the present one, newest last
    taken_over_s: float = float("-inf")  # when the present home took the attempt over
    handovers: int = 0  # times that it was taken over by another replica in a live switch
    early: list[TokenChunk] = field(
        default_factory=list[TokenChunk]
    )  # before them some are missing
    epoch: int = 0
    incarnation: str = ""
    request_type: int = -1
    tokens: list[int] = field(default_factory=list[int])
    excluded: tuple[str, ...] = ()
    trouble: str = ""  # why it has no replica now, in words
    due_s: float = 0.0  # when the present phase has lasted too long
    probe_s: float = 0.0  # present patience with a silent stream
    probing: bool = False  # submitted again, and not acknowledged since
    heard_s: float = 0.0
    submitted_s: float | None = None  # of the attempt in progress
    accepted_s: float | None = None
    first_token_s: float | None = None
    finish: FinishReason | None = None

    def overhead_s(self, now_s: float) -> float:
        """Arrival to the submission that a replica took: what the mesh added before an engine had
        the request. Without one, everything until now was ours."""
        handed_over_s = self.submitted_s if self.accepted_s is not None else None
        return (now_s if handed_over_s is None else handed_over_s) - self.arrived_s

    def sought_s(self, now_s: float) -> float:
        """For how long it has looked for a replica: what it waited in the queue of one that took
        it, and then had to give it back, is no reason to give up."""
        return now_s - max(self.arrived_s, self.seeking_s)

    @property
    def live(self) -> bool:
        return self.phase != "ended"

    def exclude(self, replica_id: str) -> None:
        """Prefer other replicas from now on; the oldest exclusion is forgotten first."""
        if replica_id and replica_id not in self.excluded:
            self.excluded = (*self.excluded, replica_id)[-EXCLUDED_MAX:]


class Taken(msgspec.Struct, frozen=True):
    """What a chunk brought that the client does not have yet."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    position: int


Verdict = Literal["new", "nothing", "gap"]


def take(journey: Journey, chunk: TokenChunk) -> tuple[Verdict, Taken | None]:
    """Add the new tokens of ``chunk`` to the journey. ``gap``: tokens before it never came, so
    nothing of it may be shown."""
    have = len(journey.tokens)
    start = chunk.position
    end = start + len(chunk.tokens)
    if start > have:
        return "gap", None
    if end <= have:
        return "nothing", None
    skip = have - start
    room = journey.sampling.output_tokens_max - have
    tokens = chunk.tokens[skip:] if skip else chunk.tokens
    if len(tokens) > room:  # nobody asked for more, whatever a worker sends
        tokens = tokens[:room]
        if not tokens:
            return "nothing", None
    logprobs = chunk.logprobs[skip : skip + len(tokens)] if chunk.logprobs is not None else None
    journey.tokens += tokens
    return "new", Taken(tokens, logprobs, have)
