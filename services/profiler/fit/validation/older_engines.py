"""Whole engines that are not vLLM of today: prompts of Llama-3.1-8B by the authors of SageServe,
and TGI under closed-loop users by IBM. What can be compared is how times grow, not their level."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from services.profiler.fit.build import Fitted, Tables, fit_profile
from services.profiler.fit.csv_source import read_table
from services.profiler.fit.gpus import KINDS
from services.profiler.fit.validation.compared import Comparison
from shared.cost.model import replica_model
from shared.cost.profile import ModelFacts
from shared.cost.step import PS_PER_S, Prefill, pairs, step_model
from shared.hardware import Parallelism

SAGESERVE = "SageServe (shashwatj07/SageServe@0b95ca2d615b, MIT)"
IBM = "IBM LLM-Pilot (IBM/LLM-performance-prediction@3c66483f55d7, CDLA-Permissive-2.0)"
IBM_GPUS = {"a100": "a100-80", "h100": "h100"}
IBM_MODELS = {
    "llama-7b": ModelFacts(
        layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000
    ),
    "llama-13b": ModelFacts(
        layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, ffn=13824, vocab=32000
    ),
}
IBM_USERS_MAX = 32
"""With more users only short answers ended within the test and were counted."""
NOTHING = "nothing of it"


def sageserve(fitted: Fitted, folder: Path) -> Comparison:
    """One prompt at a time on an idle engine."""
    gpu, model = "a100-80", "llama-3.1-8b"
    replica = step_model(fitted.profiles[gpu, model], fitted.gpus[gpu], Parallelism(4))
    found: list[tuple[float, float]] = []
    path = folder / "sageserve_llama3.1-8b_tp4_prefill.csv"
    for length, seconds in read_table(path, ("PromptLength", "median")):
        tokens = int(length)
        alone = Prefill(tokens=tokens, chunks=1, pairs=pairs(0, tokens), ending=1)
        found.append((replica.step_ps(0, 0, alone) / PS_PER_S, float(seconds)))
    return Comparison(
        SAGESERVE, "prompt, tp4", gpu, model, found, NOTHING, levelled=True,
        notes=("30 ms whatever the prompt, up to some 1,000 tokens: their engine's launches",),
    )  # fmt: skip


def ibm(tables: Tables, fitted: Fitted, folder: Path) -> Iterator[Comparison]:
    """Median ITL with as many requests in flight as there are users; models that are fitted for
    this comparison only."""
    overheads = next(iter(fitted.profiles.values())).overheads
    columns = (
        "model", "gpu", "n_gpus_tp", "concurrent_users", "mean_in", "mean_out", "itl_ms_p50",
    )  # fmt: skip
    rows = [
        row
        for row in read_table(folder / "ibm_llmpilot_summary.csv", columns)
        if row[0] in IBM_MODELS and row[1] in IBM_GPUS and int(row[3]) <= IBM_USERS_MAX
    ]
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (name, gpu), group in sorted(_grouped(rows).items()):
        kind = KINDS[IBM_GPUS[gpu]]
        profile = fit_profile(tables, kind, name, IBM_MODELS[name], overheads)
        for _, _, tp, users, mean_in, mean_out, itl_ms in group:
            model = replica_model(profile, fitted.gpus[kind.name], Parallelism(int(tp)))
            batch = int(users)
            context = batch * (float(mean_in) + float(mean_out) / 2)
            step_s = model.step.step_ps(batch, round(context)) / PS_PER_S
            found[kind.name].append((step_s * 1e3, float(itl_ms)))
    for gpu, pairs_ in sorted(found.items()):
        yield Comparison(
            IBM, f"ITL of TGI, 1 to {IBM_USERS_MAX} users", gpu, "llama-7b, llama-13b", pairs_,
            NOTHING, levelled=True,
            notes=("another engine; rows with more users count short answers only",),
        )  # fmt: skip


def _grouped(rows: list[list[str]]) -> dict[tuple[str, str], list[list[str]]]:
    groups: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    for row in rows:
        groups[row[0], row[1]].append(row)
    return groups
