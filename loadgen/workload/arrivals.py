"""From a trace to the arrivals of one replay: a window of it, thinned or thickened, resized.

The order of the steps is fixed: window, rate, clock, limit, lengths.

- ``rate_scale`` changes how many requests arrive and keeps the clock, so that bursts and shifts of
  the mix last as long as they did. Below 1 it keeps each request with that probability; above 1
  it adds copies, moved by up to ``JITTER_S`` so that they do not arrive in step. One seed draws one
  number per request of the trace, so a smaller scale keeps a subset of what a larger one keeps.
- ``time_scale`` stretches the clock and keeps the requests: 2 replays at half speed.
- ``length_scale`` multiplies prompt and output lengths, to fit big traces on small machines.
"""

import math
import random
from collections.abc import Iterable, Iterator

import msgspec

from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid, OServeError

JITTER_S = 1.0
REORDER_S = 60.0
"""Rows may be out of order by this much: reading goes on so far beyond the window's end."""
REQUESTS_MAX = 5_000_000
"""Bounds memory; about 1 GB of records."""

_COPY_ID_SHIFT = 44  # copies get hash ids of their own: they are other users, not cache hits


class Selection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of a trace to replay, and how. Window times are on the trace's own clock."""

    start_s: float = 0.0
    duration_s: float | None = None
    rate_scale: float = 1.0
    time_scale: float = 1.0
    length_scale: float = 1.0
    limit: int | None = None
    input_tokens_max: int | None = None
    output_tokens_max: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("rate_scale", "time_scale", "length_scale"):
            value = getattr(self, field)
            if not 0 < value < math.inf:
                raise ConfigInvalid(field=field, value=value, remedy="use a number above 0")
        for field in ("duration_s", "limit", "input_tokens_max", "output_tokens_max"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ConfigInvalid(field=field, value=value, remedy="use a number above 0")
        if not 0 <= self.start_s < math.inf:
            raise ConfigInvalid(field="start_s", value=self.start_s, remedy="use 0 or more")


class NothingSelected(OServeError):
    """The window holds no request; says where the trace's requests are."""


def select(records: Iterable[TraceRecord], selection: Selection) -> list[TraceRecord]:
    """The arrivals to replay, in order of time, the first instant of the window being 0."""
    windowed = _window(records, selection)
    scaled = _scale_rate(windowed, selection)
    arrivals: list[TraceRecord] = []
    for record in scaled:
        arrivals.append(record)
        if len(arrivals) > REQUESTS_MAX:
            raise ConfigInvalid(
                field="duration_s",
                value=selection.duration_s,
                remedy=f"more than {REQUESTS_MAX} requests; choose a shorter window or lower rate",
            )
    arrivals.sort(key=lambda record: record.timestamp_s)
    if selection.limit is not None:
        del arrivals[selection.limit :]
    return [_resize(record, selection) for record in arrivals]


def _window(records: Iterable[TraceRecord], selection: Selection) -> Iterator[TraceRecord]:
    start_s = selection.start_s
    end_s = math.inf if selection.duration_s is None else start_s + selection.duration_s
    first_s, last_s, found = math.inf, -math.inf, 0
    for record in records:
        first_s, last_s = min(first_s, record.timestamp_s), max(last_s, record.timestamp_s)
        if record.timestamp_s >= end_s + REORDER_S:
            break
        if start_s <= record.timestamp_s < end_s:
            found += 1
            yield record
    if found == 0:
        seen = "the trace is empty" if last_s < 0 else f"its requests begin at {first_s:g} s"
        if last_s < start_s and last_s >= 0:
            seen += f" and end at {last_s:g} s"
        raise NothingSelected(
            f"no request between {start_s:g} s and {end_s:g} s of the trace: {seen}"
        )


def _scale_rate(records: Iterable[TraceRecord], selection: Selection) -> Iterator[TraceRecord]:
    draws = random.Random(f"thin/{selection.seed}")
    jitter = random.Random(f"jitter/{selection.seed}")
    last_s = math.inf if selection.duration_s is None else selection.duration_s
    for record in records:
        at_s = record.timestamp_s - selection.start_s
        copies = math.floor(selection.rate_scale + draws.random())
        for copy in range(copies):
            moved_s = at_s
            hash_ids = record.hash_ids
            if copy > 0:
                moved_s = min(max(0.0, at_s + jitter.uniform(-JITTER_S, JITTER_S)), last_s)
                hash_ids = tuple((copy << _COPY_ID_SHIFT) + hash_id for hash_id in hash_ids)
            yield msgspec.structs.replace(record, timestamp_s=moved_s, hash_ids=hash_ids)


def _resize(record: TraceRecord, selection: Selection) -> TraceRecord:
    """A served request has a prompt and an answer, so lengths of 0 become 1."""
    scale = selection.length_scale
    return msgspec.structs.replace(
        record,
        timestamp_s=record.timestamp_s * selection.time_scale,
        input_tokens=_length(record.input_tokens, scale, selection.input_tokens_max),
        output_tokens=_length(record.output_tokens, scale, selection.output_tokens_max),
        hash_block_tokens=_length(record.hash_block_tokens, scale, None),
    )


def _length(tokens: int, scale: float, tokens_max: int | None) -> int:
    scaled = max(1, round(tokens * scale))
    return scaled if tokens_max is None else min(scaled, tokens_max)
