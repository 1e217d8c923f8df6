"""Times of operators at any size, from the rows measured of one GPU."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from services.profiler.fit.grid import Floats, bracket, log_log
from services.profiler.fit.rows import AttentionRow, CollectiveRow, GemmRow, OperatorSource
from shared.errors import ConfigInvalid

CUSTOM_BYTES_MAX = 8 << 20
"""vLLM's own all-reduce takes messages up to this size, NCCL larger ones."""
ELEMENT_BYTES = 2
PCIE_CUSTOM_GPUS_MAX = 2
"""Without NVLink vLLM uses its own all-reduce between two GPUs only."""


@dataclass(frozen=True, slots=True)
class Measured:
    """All rows of one system."""

    gemms: tuple[GemmRow, ...]
    attentions: tuple[AttentionRow, ...]
    collectives: tuple[CollectiveRow, ...]

    def fitted(self) -> "Measured":
        """Without those held out."""
        return Measured(
            tuple(row for row in self.gemms if not row.held_out),
            tuple(row for row in self.attentions if not row.held_out),
            tuple(row for row in self.collectives if not row.held_out),
        )


def measured(source: OperatorSource, system: str) -> Measured:
    """Raises ConfigInvalid if the source has nothing of it."""
    found = Measured(
        tuple(row for row in source.gemms(system) if row.usual),
        tuple(source.attentions(system)),
        tuple(source.collectives(system)),
    )
    for name, rows in (
        ("gemm", found.gemms),
        ("attention", found.attentions),
        ("collectives", found.collectives),
    ):
        if not rows:
            remedy = f"the tables hold no {name} rows of it"
            raise ConfigInvalid(field="system", value=system, remedy=remedy)
    return found


class GemmTable:
    """Latency by (m, n, k): each (n, k) a curve over m, between four of them log-linear."""

    def __init__(self, rows: Iterable[GemmRow], precision: str) -> None:
        points: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        for row in rows:
            if row.precision == precision:
                points[row.n, row.k].append((row.m, row.us))
        if not points:
            remedy = "the GPU's tables have no such GEMMs: use bfloat16"
            raise ConfigInvalid(field="precision", value=precision, remedy=remedy)
        self._curves = {key: _curve(found) for key, found in points.items()}
        self._ns = sorted({n for n, _ in points})
        self._ks = {n: sorted(k for other, k in points if other == n) for n in self._ns}
        self.sizes = tuple(sorted({m for found in points.values() for m, _ in found}))

    def us(self, ms: Floats, n: int, k: int) -> Floats:
        """Beyond the largest n or k measured in proportion, below the smallest as the smallest."""
        low_n, high_n, share_n = bracket(self._ns, n)
        both = set(self._ks[low_n]) & set(self._ks[high_n])
        low_k, high_k, share_k = bracket(sorted(both), k)
        logs = np.zeros(len(ms))
        for place_n, weight_n in ((low_n, 1 - share_n), (high_n, share_n)):
            for place_k, weight_k in ((low_k, 1 - share_k), (high_k, share_k)):
                if weight := weight_n * weight_k:
                    logs += weight * np.log(log_log(*self._curves[place_n, place_k], ms))
        return np.exp(logs) * max(1.0, n / high_n) * max(1.0, k / high_k)


class CollectiveTable:
    """Latency by bytes, as vLLM chooses between its own all-reduce and NCCL."""

    def __init__(self, rows: Iterable[CollectiveRow], *, nvlink: bool) -> None:
        points: dict[tuple[str, str, int], list[tuple[int, float]]] = defaultdict(list)
        for row in rows:
            points[row.kind, row.library, row.gpus].append((row.elements, row.us))
        self._curves = {key: _curve(found) for key, found in points.items()}
        self._nvlink = nvlink

    def all_reduce_us(self, elements: Floats, gpus: int) -> Floats:
        nccl = log_log(*self._of("all_reduce", "nccl", gpus), elements)
        if not self._nvlink and gpus > PCIE_CUSTOM_GPUS_MAX:
            return nccl
        custom = log_log(*self._of("all_reduce", "vllm", gpus), elements)
        return np.where(elements * ELEMENT_BYTES <= CUSTOM_BYTES_MAX, custom, nccl)

    def all_gather_us(self, elements: Floats, gpus: int) -> Floats:
        """``elements``: of the whole that every GPU has in the end."""
        return log_log(*self._of("all_gather", "nccl", gpus), elements)

    def _of(self, kind: str, library: str, gpus: int) -> tuple[Floats, Floats]:
        found = self._curves.get((kind, library, gpus))
        if found is None:
            known = sorted({g for k, lib, g in self._curves if (k, lib) == (kind, library)})
            remedy = f"{library} {kind} was measured between {known} GPUs"
            raise ConfigInvalid(field="tp", value=gpus, remedy=remedy)
        return found


@dataclass(frozen=True, slots=True)
class AttentionPoints:
    """Rows of one phase and one split of heads, as columns."""

    batch: Floats
    tokens: Floats
    us: Floats


class AttentionTable:
    """Measured attention by the heads that a GPU holds."""

    def __init__(self, rows: Iterable[AttentionRow], phase: str) -> None:
        points: dict[tuple[int, int], list[AttentionRow]] = defaultdict(list)
        for row in rows:
            if row.phase == phase:
                points[row.heads, row.kv_heads].append(row)
        self._points = points

    def points(self, heads: int, kv_heads: int) -> AttentionPoints | None:
        """None if this split was not measured."""
        rows = self._points.get((heads, kv_heads))
        return _columns(rows) if rows else None

    def heads_with(self, kv_heads: int) -> Sequence[int]:
        """Ascending numbers of query heads that were measured with so many KV heads."""
        return sorted(heads for heads, kv in self._points if kv == kv_heads)


def _columns(rows: Sequence[AttentionRow]) -> AttentionPoints:
    ordered = sorted(rows, key=lambda row: (row.batch, row.tokens))
    return AttentionPoints(
        np.array([row.batch for row in ordered], dtype=np.float64),
        np.array([row.tokens for row in ordered], dtype=np.float64),
        np.array([row.us for row in ordered], dtype=np.float64),
    )


def _curve(points: Iterable[tuple[int, float]]) -> tuple[Floats, Floats]:
    by_x: dict[int, list[float]] = defaultdict(list)
    for x, y in points:
        by_x[x].append(y)
    xs = sorted(by_x)
    return (
        np.array(xs, dtype=np.float64),
        np.array([np.median(by_x[x]) for x in xs], dtype=np.float64),
    )
