"""Whole engines of today: published ITLs of vLLM, and the runs in aiconfigurator-core."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from services.profiler.fit.build import CALIBRATION_GPU, Fitted, Tables, engine_overheads
from services.profiler.fit.gpus import KINDS
from services.profiler.fit.overheads import predicted_itl_ms
from services.profiler.fit.published import (
    CALIBRATED_ON,
    INPUT_TOKENS,
    ITLS,
    OTHER_LENGTHS,
    OUTPUT_TOKENS,
)
from services.profiler.fit.validation.compared import Comparison
from shared.cost.estimate import estimate
from shared.cost.model import replica_model
from shared.hardware import Parallelism

PUBLISHED = "published vLLM runs"
RUNS = "aiconfigurator-core end-to-end runs"
RUNS_FILE = "silicon_sample.csv"
RUN_MODELS = {"meta-llama/Llama-3.1-70B": "llama-3.1-70b-fp8"}
QUEUED_MS = 4000.0
"""A first token later than this had waited for room in the KV cache: its batch was not the one that
the row says."""


def published(tables: Tables, fitted: Fitted) -> Iterator[Comparison]:
    """The rows that overheads were calibrated on, then each model's with the other's overheads."""
    yield from (one for one in _published(fitted, CALIBRATED_ON) if one.model == CALIBRATED_ON)
    yield from published_crossed(tables, fitted)
    for lengths in OTHER_LENGTHS:
        yield from _published(fitted, CALIBRATED_ON, lengths)


def published_crossed(tables: Tables, fitted: Fitted) -> Iterator[Comparison]:
    """Each model's rows with overheads that were calibrated on the other one's."""
    for model in sorted({row.model for row in ITLS}):
        overheads = engine_overheads(tables, model)
        profiles = {
            key: msgspec.structs.replace(profile, overheads=overheads)
            for key, profile in fitted.profiles.items()
            if key[0] == CALIBRATION_GPU
        }
        for one in _published(Fitted(profiles, fitted.gpus), model):
            if one.model != model:
                yield one


def _published(
    fitted: Fitted, calibrated_on: str, lengths: tuple[int, int] = (INPUT_TOKENS, OUTPUT_TOKENS)
) -> Iterator[Comparison]:
    for model in sorted({row.model for row in ITLS}):
        rows = [row for row in ITLS if row.model == model]
        found = [
            (
                predicted_itl_ms(
                    fitted.profiles[row.gpu, row.model], fitted.gpus[row.gpu], row, lengths
                ),
                row.itl_ms,
            )
            for row in rows
        ]
        own = model == calibrated_on
        yield Comparison(
            PUBLISHED,
            f"ITL, were it {lengths[0]} in, {lengths[1]} out",
            rows[0].gpu,
            model,
            found,
            "overheads, on these very rows" if own else f"overheads, on {calibrated_on}",
            notes=(f"batch {rows[0].batch} to {rows[-1].batch}",),
        )


def runs(fitted: Fitted, package: Path) -> Iterator[Comparison]:
    """Llama-3.1-70B in fp8 with vLLM at 4 to 64 requests in flight: nothing was fitted to them."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    queued = 0
    for row in _rows(package / "systems" / RUNS_FILE):
        if float(row["silicon_ttft_ms"]) > QUEUED_MS:
            queued += 1
            continue
        kind = next(kind for kind in KINDS.values() if kind.system == row["system"])
        profile = fitted.profiles[kind.name, RUN_MODELS[row["model_path"]]]
        model = replica_model(profile, fitted.gpus[kind.name], Parallelism(int(row["tp_size"])))
        tokens = (int(row["isl"]), int(row["osl"]))
        batch = round(float(row["batch_size"]))
        itl = estimate(model, batch=batch, input_tokens=tokens[0], output_tokens=tokens[1]).itl_s
        found[kind.name].append((itl * 1e3, float(row["silicon_tpot_ms"])))
    for gpu, pairs in sorted(found.items()):
        yield Comparison(
            RUNS, "TPOT, batch 4 to 64, tp1 to tp8", gpu, "llama-3.1-70b-fp8", pairs,
            f"overheads, on {CALIBRATED_ON}", notes=(f"{queued} rows dropped: they queued",),
        )  # fmt: skip


def _rows(path: Path) -> Iterator[dict[str, str]]:
    systems = {kind.system for kind in KINDS.values()}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if (
                row["backend"] == "vllm"
                and row["mode"] == "agg"
                and row["pp_size"] in {"1", "1.0"}
                and row["system"] in systems
                and row["model_path"] in RUN_MODELS
            ):
                yield {**row, "tp_size": str(round(float(row["tp_size"])))}
