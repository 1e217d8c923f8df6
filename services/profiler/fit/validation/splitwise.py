"""Llama-2-70B on A100 and H100 by the authors of Splitwise: whole runs, with the kernels of early
2024, which are slower than those whose tables are fitted."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from services.profiler.fit.build import Fitted
from services.profiler.fit.csv_source import read_table
from services.profiler.fit.validation.compared import Comparison
from shared.cost.step import PS_PER_S, Prefill, pairs, step_model
from shared.hardware import Parallelism

SOURCE = "Splitwise (Mutinifni/splitwise-sim@8f99e7dc9b40, MIT)"
MODEL = "llama-2-70b"
GPUS = {"a100-80gb": "a100-80", "h100-80gb": "h100"}
CRAMPED = ("h100", 2, 64)
"""GPU, tp and batch of runs that ran out of memory."""


def compare(fitted: Fitted, folder: Path) -> Iterator[Comparison]:
    """Median of the repeats of each configuration."""
    columns = (
        "hardware", "tensor_parallel", "batch_size", "prompt_size", "token_size", "prompt_time",
        "token_time",
    )  # fmt: skip
    repeats: dict[tuple[str, int, int, int, int], list[tuple[float, float]]] = defaultdict(list)
    path = folder / "splitwise_perf_model.csv"
    for hardware, *sizes, prompt_ms, token_ms in read_table(path, columns, model="llama2-70b"):
        if hardware in GPUS:
            tp, batch, prompt, output = map(int, sizes)
            if (GPUS[hardware], tp, batch) != CRAMPED:
                key = (GPUS[hardware], tp, batch, prompt, output)
                repeats[key].append((float(prompt_ms), float(token_ms)))
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (gpu, tp, batch, prompt, output), runs in sorted(repeats.items()):
        model = step_model(fitted.profiles[gpu, MODEL], fitted.gpus[gpu], Parallelism(tp))
        together = Prefill(
            tokens=batch * prompt, chunks=batch, pairs=batch * pairs(0, prompt), ending=batch
        )
        prompt_s = model.step_ps(0, 0, together) / PS_PER_S
        token_s = model.step_ps(batch, batch * (prompt + output // 2)) / PS_PER_S
        found[gpu, "prompt time"].append((prompt_s * 1e3, median(ms for ms, _ in runs)))
        found[gpu, "token time"].append((token_s * 1e3, median(ms for _, ms in runs)))
    for (gpu, what), rows in sorted(found.items()):
        yield Comparison(
            SOURCE, what, gpu, MODEL, rows, "nothing of it", levelled=True,
            notes=("kernels of early 2024", "H100 tp2 batch 64 dropped: out of memory"),
        )  # fmt: skip
