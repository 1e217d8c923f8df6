"""Profiles of models on GPUs, made from operator tables."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec

from services.profiler.fit.gpus import KINDS, GpuKind
from services.profiler.fit.layer import Operators, operators, splits, tensor_times
from services.profiler.fit.links import WORDS as LINK_WORDS
from services.profiler.fit.links import measured_links
from services.profiler.fit.models import SHIPPED, SHIPPED_FP8
from services.profiler.fit.overheads import NONE, calibrate
from services.profiler.fit.published import CALIBRATED_ON, INPUT_TOKENS, ITLS, OUTPUT_TOKENS
from services.profiler.fit.published import WORDS as PUBLISHED_WORDS
from services.profiler.fit.rows import HELD_OUT_EACH, OperatorSource
from services.profiler.fit.tables import Measured, measured
from shared.cost.profile import FORMAT, ErrorBar, GpuFacts, ModelFacts, Overheads, Profile

TPS = (1, 2, 4, 8)
FP8_BYTES = 1
CALIBRATION_GPU = "h100"
UNKNOWN = ErrorBar(step_median=0.0, step_p90=0.0, ttft_p90=0.0, itl_p90=0.0)
GPU_WORDS = (
    "memory, bandwidths: aiconfigurator's system files (Apache-2.0); reserved_bytes: KV capacities "
    "of DistServe (Apache-2.0); host, local, disk, engine_start_s, price_per_hour: typical values, "
    "not measured; set your own in a folder of profiles"
)


@dataclass(frozen=True, slots=True)
class Tables:
    """Where rows come from; ``folder`` has what is not of operators, if there is one. Rows of a
    system are read once."""

    source: OperatorSource
    folder: Path | None

    def rows(self, kind: GpuKind) -> Measured:
        return _rows(self.source, kind.system)

    def operators(self, kind: GpuKind, *, fp8: bool, whole: bool = False) -> Operators:
        """Of the rows that fits may see; ``whole``: of all."""
        return _operators(self.source, kind, fp8, whole)


@lru_cache(maxsize=4)
def _rows(source: OperatorSource, system: str) -> Measured:
    return measured(source, system)


@lru_cache(maxsize=16)
def _operators(source: OperatorSource, kind: GpuKind, fp8: bool, whole: bool) -> Operators:
    rows = _rows(source, kind.system)
    return operators(
        rows if whole else rows.fitted(),
        fp8=fp8,
        nvlink=kind.nvlink,
        memory_bytes_per_s=kind.memory_bytes_per_s,
    )


def gpu_of(tables: Tables, kind: GpuKind) -> GpuFacts:
    """Links as measured, where the folder has measurements."""
    peer, network = measured_links(tables.folder, kind) if tables.folder else (None, None)
    words = f"{GPU_WORDS}; {LINK_WORDS}" if peer else f"{GPU_WORDS}; links: data sheet"
    return kind.facts(words, peer, network)


def fit_profile(
    tables: Tables, kind: GpuKind, name: str, facts: ModelFacts, overheads: Overheads
) -> Profile:
    """At every tensor parallelism that the model splits into; without an error bar. Raises
    ConfigInvalid for a model whose like was not measured."""
    fitted = tables.operators(kind, fp8=facts.weight_bytes == FP8_BYTES)
    found = tuple(tensor_times(facts, tp, fitted) for tp in TPS if splits(facts, tp))
    return Profile(
        format=FORMAT,
        gpu=kind.name,
        model=name,
        model_facts=facts,
        times=found,
        overheads=overheads,
        error=UNKNOWN,
        source=profile_words(tables.source),
    )


def profile_words(source: OperatorSource) -> str:
    """Where a profile's numbers come from."""
    return (
        f"{source.words}; one row in {HELD_OUT_EACH} held out; norms, rotary embedding, activation "
        "and sampling: bytes at 80 % of the memory bandwidth and 3 us each; overheads: fitted to "
        f"the ITL of {CALIBRATED_ON} on {CALIBRATION_GPU} ({PUBLISHED_WORDS}; prompts of "
        f"{INPUT_TOKENS} and outputs of {OUTPUT_TOKENS} tokens assumed), the same for all GPUs"
    )


def engine_overheads(tables: Tables, model: str = CALIBRATED_ON) -> Overheads:
    """Calibrated on the published rows of ``model``."""
    kind = KINDS[CALIBRATION_GPU]
    bare = fit_profile(tables, kind, model, SHIPPED[model], NONE)
    rows = [row for row in ITLS if row.model == model and row.gpu == CALIBRATION_GPU]
    return calibrate(bare, gpu_of(tables, kind), rows)


def shipped_models(kind: GpuKind) -> Iterator[tuple[str, ModelFacts]]:
    """By name; the 8-bit ones where the GPU computes so."""
    yield from SHIPPED.items()
    if kind.fp8:
        for name in SHIPPED_FP8:
            yield f"{name}-fp8", eight_bit(SHIPPED[name])


def eight_bit(facts: ModelFacts) -> ModelFacts:
    return msgspec.structs.replace(facts, weight_bytes=FP8_BYTES)


@dataclass(frozen=True, slots=True)
class Fitted:
    """All that is shipped, or what stands in for it."""

    profiles: Mapping[tuple[str, str], Profile]  # by GPU and model
    gpus: Mapping[str, GpuFacts]


def fit_all(tables: Tables, kinds: Collection[GpuKind]) -> Fitted:
    """Shipped models on ``kinds``, without error bars."""
    overheads = engine_overheads(tables)
    kinds = sorted(kinds, key=lambda kind: kind.name)
    profiles = {
        (kind.name, name): fit_profile(tables, kind, name, facts, overheads)
        for kind in kinds
        for name, facts in shipped_models(kind)
    }
    return Fitted(profiles, {kind.name: gpu_of(tables, kind) for kind in kinds})
