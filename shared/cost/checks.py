"""What no measurement can say: values that a profile or a GPU's facts must not hold.

Each check yields ``Problem``s, the field as a path such as ``times[1].dense_us``; whoever read the
values knows the file and adds its name and line.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from shared.cost.profile import FORMAT, GpuFacts, Link, ModelFacts, Profile, TensorTimes

CURVES = ("dense_us", "collective_us", "head_us")
DECODE_AND_PREFILL = (
    "decode_us", "decode_request_us", "decode_context_ns", "prefill_chunk_us", "prefill_pair_ns",
)  # fmt: skip
LINKS = ("local", "peer", "host", "network", "disk")
DIMENSIONS = (
    "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "weight_bytes", "kv_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One field that cannot be, and what it should be."""

    field: str
    value: object
    remedy: str


def profile_problems(profile: Profile) -> Iterator[Problem]:
    """Everything wrong with ``profile``, in the order of its fields."""
    if profile.format != FORMAT:
        yield Problem("format", profile.format, f"this version reads format {FORMAT}")
    yield from _name("gpu", profile.gpu)
    yield from _name("model", profile.model)
    yield from _facts_problems(profile.model_facts)
    if not profile.times:
        yield Problem("times", [], "at least one [[times]] table is needed")
    for place, (one, after) in enumerate(pairwise(profile.times), 1):
        if after.tp <= one.tp:
            yield Problem(f"times[{place}].tp", after.tp, f"must ascend: {one.tp} came before")
    for place, times in enumerate(profile.times):
        yield from _times_problems(times, f"times[{place}]")
    for name in ("step_us", "request_us", "chunk_us", "hop_us"):
        yield from _not_negative(f"overheads.{name}", getattr(profile.overheads, name))
    for name in ("step_median", "step_p90", "ttft_p90", "itl_p90"):
        yield from _not_negative(f"error.{name}", getattr(profile.error, name))


def _facts_problems(facts: ModelFacts) -> Iterator[Problem]:
    for name in DIMENSIONS:
        value = getattr(facts, name)
        if value < 1:
            yield Problem(f"model_facts.{name}", value, "must be at least 1")
    if facts.kv_heads > 0 and facts.heads % facts.kv_heads:
        yield Problem("model_facts.kv_heads", facts.kv_heads, f"must divide heads ({facts.heads})")
    if facts.positions < 0:
        yield Problem("model_facts.positions", facts.positions, "must be at least 0")


def gpu_problems(facts: GpuFacts) -> Iterator[Problem]:
    """Everything wrong with the facts of a GPU."""
    yield from _name("gpu", facts.gpu)
    if facts.memory_bytes < 1:
        yield Problem("memory_bytes", facts.memory_bytes, "must be at least 1")
    if not 0 < facts.usable <= 1:
        yield Problem("usable", facts.usable, "must be a share above 0 and at most 1")
    if not 0 <= facts.reserved_bytes <= facts.memory_bytes:
        yield Problem("reserved_bytes", facts.reserved_bytes, "must be from 0 to memory_bytes")
    if facts.gpus_per_node < 1:
        yield Problem("gpus_per_node", facts.gpus_per_node, "must be at least 1")
    yield from _not_negative("price_per_hour", facts.price_per_hour)
    yield from _not_negative("engine_start_s", facts.engine_start_s)
    for name in LINKS:
        link: Link = getattr(facts, name)
        if not 0 < link.bytes_per_s < math.inf:
            yield Problem(f"{name}.bytes_per_s", link.bytes_per_s, "must be above 0, and finite")
        yield from _not_negative(f"{name}.latency_s", link.latency_s)


def _times_problems(times: TensorTimes, where: str) -> Iterator[Problem]:
    if times.tp < 1:
        yield Problem(f"{where}.tp", times.tp, "must be at least 1")
    if not times.tokens or times.tokens[0] < 1:
        yield Problem(f"{where}.tokens", times.tokens, "needs knots of at least 1 token")
    if any(after <= one for one, after in pairwise(times.tokens)):
        yield Problem(f"{where}.tokens", times.tokens, "knots must ascend")
    for name in CURVES:
        values: tuple[float, ...] = getattr(times, name)
        if len(values) != len(times.tokens):
            remedy = f"{len(values)} values for {len(times.tokens)} knots of tokens"
            yield Problem(f"{where}.{name}", values, remedy)
        yield from _first(_not_negative(f"{where}.{name}", value) for value in values)
    if min(times.dense_us, default=1.0) <= 0:
        yield Problem(f"{where}.dense_us", min(times.dense_us), "a layer takes time: above 0")
    if times.tp == 1 and any(times.collective_us):
        yield Problem(f"{where}.collective_us", times.collective_us, "one GPU has none: 0 for tp 1")
    for name in DECODE_AND_PREFILL:
        yield from _not_negative(f"{where}.{name}", getattr(times, name))


def _name(field: str, value: str) -> Iterator[Problem]:
    if not value or value != value.lower() or "/" in value:
        yield Problem(field, value, "a lower-case name, as its folder or file is called")


def _not_negative(field: str, value: float) -> Iterator[Problem]:
    if not 0 <= value < math.inf:  # NaN compares to nothing
        yield Problem(field, value, "must be a finite number of at least 0")


def _first(problems: Iterable[Iterator[Problem]]) -> Iterator[Problem]:
    """One complaint for a list of values is enough."""
    for found in problems:
        for problem in found:
            yield problem
            return
