"""Measured operators, one row each, in microseconds whatever their source was written in."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

HELD_OUT_EACH = 5
"""One row in so many is kept from the fit, to judge it by."""

US_PER_MS = 1000.0
SMALL_M = 16
HEAD_DIM = 128  # of the attention rows that are read


@dataclass(frozen=True, slots=True)
class GemmRow:
    """Time of (m x k) by (k x n); ``precision`` is ``bfloat16`` or ``fp8``."""

    precision: str
    m: int
    n: int
    k: int
    us: float

    @property
    def usual(self) -> bool:
        """Whether steps have so many tokens. Sizes one past a tile were measured, too, and take up
        to half as long again in fp8; engines pad batches to even sizes, and cut prompts at them."""
        return self.m <= SMALL_M or self.m % 2 == 0

    @property
    def held_out(self) -> bool:
        return chosen("gemm", self.precision, self.m, self.n, self.k)


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """Attention of one layer on one GPU: ``heads`` and ``kv_heads`` of that GPU. ``tokens`` is the
    prompt's length in prefill; in decode, the tokens that each request attends to."""

    phase: str  # prefill, decode
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    us: float

    @property
    def held_out(self) -> bool:
        return chosen(self.phase, self.batch, self.tokens, self.heads, self.kv_heads)


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One collective of 16-bit elements; ``kind`` is ``all_reduce`` or ``all_gather``; ``library``
    is ``nccl`` or ``vllm`` (its own all-reduce, in a CUDA graph)."""

    kind: str
    library: str
    gpus: int
    elements: int
    us: float

    @property
    def held_out(self) -> bool:
        return chosen(self.kind, self.library, self.gpus, self.elements)


class OperatorSource(Protocol):
    """Where the rows of a system, such as ``h100_sxm``, come from."""

    @property
    def words(self) -> str:
        """Source, version and licence."""
        ...

    def gemms(self, system: str) -> Iterator[GemmRow]: ...
    def attentions(self, system: str) -> Iterator[AttentionRow]: ...
    def collectives(self, system: str) -> Iterator[CollectiveRow]: ...


def chosen(*key: object) -> bool:
    """Whether a row is held out: by its own key, so that neither order nor other rows matter."""
    text = "/".join(map(str, key)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_EACH == 0
