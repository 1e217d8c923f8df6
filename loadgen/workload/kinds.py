"""Four kinds of requests, where a trace names none: short or long input, short or long output.

The splits are the geometric means of the records that they are made of, so that a kind means the
same at every load and in every part of a trace.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadgen.workload.records import TraceRecord


@dataclass(frozen=True, slots=True)
class Split:
    """Up to these lengths, in tokens, a request is short."""

    input_tokens: float
    output_tokens: float

    def kind(self, record: TraceRecord) -> str:
        """Such as ``long-in/short-out``."""
        into = "short" if record.input_tokens <= self.input_tokens else "long"
        out = "short" if record.output_tokens <= self.output_tokens else "long"
        return f"{into}-in/{out}-out"


def split_of(records: Sequence[TraceRecord]) -> Split:
    """The split of ``records``, of which there is at least one."""
    return Split(
        _geometric_mean([record.input_tokens for record in records]),
        _geometric_mean([record.output_tokens for record in records]),
    )


def _geometric_mean(tokens: Sequence[int]) -> float:
    return math.exp(sum(math.log(max(1, count)) for count in tokens) / len(tokens))
