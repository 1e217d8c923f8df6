"""What the client saw of one request, and whether it ended as it should."""

from array import array
from dataclasses import dataclass, field

from shared.slo import SloClass

OK = ""
"""The ``error_code`` of a request that completed. The others below are ours; any further code
is the server's own."""

NOT_SENT = "connections_exhausted"  # refused here: connections_max were in use
CONNECT_FAILED = "connect_failed"
CONNECTION_LOST = "connection_lost"  # before the answer's end
TIMED_OUT = "client_timeout"
BAD_ANSWER = "bad_answer"  # not HTTP, or not the promised JSON
UNFINISHED = "unfinished"  # the stream ended without finish_reason or [DONE]
ENDED_TWICE = "ended_twice"
TOKENS_NOT_CONTIGUOUS = "tokens_not_contiguous"  # a position repeated or left out
WRONG_LENGTH = "wrong_length"  # other than the trace asked for
STOPPED = "stopped"  # the replay was interrupted


def _times() -> "array[float]":
    return array("d")


def _counts() -> "array[int]":
    return array("I")


@dataclass(slots=True, kw_only=True)
class RequestResult:
    """Times are seconds: ``scheduled_s``, ``sent_s`` and ``chunk_times_s`` since the replay began,
    ``ttft_s`` and ``e2e_s`` since the request was sent."""

    index: int
    scheduled_s: float
    input_tokens: int
    output_tokens_asked: int
    label: str = ""
    tenant: str = ""
    slo_class: SloClass = "standard"

    sent_s: float | None = None
    status: int = 0  # HTTP's; 0 while no answer has begun
    error_code: str = UNFINISHED
    error_message: str = ""
    ttft_s: float | None = None
    e2e_s: float | None = None
    output_tokens: int = 0
    chunk_times_s: "array[float]" = field(default_factory=_times)
    chunk_tokens: "array[int]" = field(default_factory=_counts)
    chunks_unrecorded: int = 0  # beyond ClientOptions.chunk_times_max
    token_ids: list[int] = field(default_factory=list[int])  # when ClientOptions.keep_tokens
    usage_input_tokens: int | None = None
    usage_output_tokens: int | None = None
    finish_reason: str = ""
    finishes: int = 0
    dones: int = 0
    resends: int = 0  # a kept connection had closed before the request reached it
    request_id: str = ""
    replica_id: str = ""
    overhead_ms: float | None = None

    @property
    def completed(self) -> bool:
        return self.error_code == OK

    @property
    def ended_s(self) -> float | None:
        """When the last byte came, on the replay's clock; None if it was never sent."""
        if self.sent_s is None or self.e2e_s is None:
            return None
        return self.sent_s + self.e2e_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first, by the last token and not the last byte."""
        if self.ttft_s is None or self.sent_s is None or self.output_tokens <= 1:
            return None
        if not self.chunk_times_s or self.chunks_unrecorded:
            last_s = self.e2e_s if self.e2e_s is not None else self.ttft_s
        else:
            last_s = self.chunk_times_s[-1] - self.sent_s
        return max(0.0, last_s - self.ttft_s) / (self.output_tokens - 1)
