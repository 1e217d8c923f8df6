"""Single layers timed by others: Vidur on A100 and H100, LLMServingSim on H100."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from services.profiler.fit.build import Fitted
from services.profiler.fit.csv_source import read_table
from services.profiler.fit.validation.compared import Comparison
from shared.cost.profile import Profile, TensorTimes

VIDUR = "Vidur (microsoft/vidur@7d47513363ec, MIT)"
VIDUR_MODELS = {
    "Llama-2-70b-hf": "llama-2-70b",
    "Meta-Llama-3-70B": "llama-3.1-70b",
    "Meta-Llama-3-8B": "llama-3.1-8b",
}
VIDUR_GPUS = {"a100": "a100-80", "h100": "h100"}
VIDUR_NETWORKS = {"a100_dgx": "a100-80", "h100_dgx": "h100"}
VIDUR_OPERATORS = (
    "input_layernorm_ms", "attn_pre_proj_ms", "attn_rope_ms", "attn_post_proj_ms",
    "post_attention_layernorm_ms", "mlp_up_proj_ms", "mlp_act_ms", "mlp_down_proj_ms", "add_ms",
    "add_ms",
)  # fmt: skip
SIMULATED = "LLMServingSim (casys-kaist/LLMServingSim@5daddb21a545, MIT)"
SIMULATED_MODELS = {"Llama-3.1-70B": "llama-3.1-70b", "Llama-3.1-8B": "llama-3.1-8b"}
SIMULATED_OPERATORS = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "rope", "o_proj", "post_layernorm",
    "gate_proj", "up_proj", "act_fn", "down_proj",
)  # fmt: skip
SIMULATED_SIZES = ("1", "8", "32", "64", "128", "256", "512", "1024", "2048")
TOKENS_MIN = 8
"""Below, launches are all there is, and the sources count them differently."""
NOTHING = "nothing of it"


def vidur_layers(fitted: Fitted, folder: Path) -> Iterator[Comparison]:
    """Everything in a layer but attention."""
    columns = ("gpu", "model", "tp", "num_tokens", *VIDUR_OPERATORS)
    repeats: dict[tuple[str, str, int, int], list[float]] = defaultdict(list)
    path = folder / "vidur" / "mlp_layer_median_ms.csv.gz"
    for gpu, model, tp, tokens, *ms in read_table(path, columns):
        if gpu in VIDUR_GPUS and model in VIDUR_MODELS and int(tokens) >= TOKENS_MIN:
            key = (VIDUR_GPUS[gpu], VIDUR_MODELS[model], int(tp), int(tokens))
            repeats[key].append(sum(float(one) for one in ms) * 1e3)
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (gpu, model, tp, tokens), us in sorted(repeats.items()):
        times = _times(fitted.profiles[gpu, model], tp)
        if times is not None and tokens <= times.tokens[-1]:
            found[gpu, model].append((_at(times, times.dense_us, tokens), median(us)))
    for (gpu, model), pairs in sorted(found.items()):
        yield Comparison(
            VIDUR, "layer without attention", gpu, model, pairs, NOTHING, levelled=True
        )


def vidur_collectives(fitted: Fitted, folder: Path) -> Iterator[Comparison]:
    """All-reduces within a node, of as many bytes as a step of Llama-2-70B moves."""
    columns = ("network", "num_workers", "devices_per_node", "bytes", "median_ms")
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    path = folder / "vidur" / "network_median_ms.csv.gz"
    for network, gpus, per_node, size, ms in read_table(path, columns, op="all_reduce"):
        if network not in VIDUR_NETWORKS or gpus != per_node:
            continue
        gpu = VIDUR_NETWORKS[network]
        profile = fitted.profiles[gpu, "llama-2-70b"]
        times = _times(profile, int(gpus))
        tokens = int(size) / (2 * profile.model_facts.hidden)
        if times is not None and TOKENS_MIN <= tokens <= times.tokens[-1]:
            both = _at(times, times.collective_us, tokens)
            once = both / (2 + 1 / profile.model_facts.layers)
            found[gpu].append((once, float(ms) * 1e3))
    for gpu, pairs in sorted(found.items()):
        yield Comparison(
            VIDUR, "all-reduce", gpu, "", pairs, NOTHING, levelled=True,
            notes=("NCCL; vLLM's own all-reduce, which profiles have below 8 MiB, is faster",),
        )  # fmt: skip


def simulated_layers(fitted: Fitted, folder: Path) -> Iterator[Comparison]:
    """Everything in a layer but attention, from the kernel times of a profiler, which leave out the
    gaps between kernels; query, key and value, and gate and up, one by one."""
    columns = ("model", "tp_size", "input", "layer_name", "latency_us")
    layers: dict[tuple[str, int, int], float] = defaultdict(float)
    path = folder / "llmservingsim" / "h100_layers.csv.gz"
    for model, tp, tokens, name, us in read_table(path, columns, kv_cache="0"):
        if tokens in SIMULATED_SIZES and name in SIMULATED_OPERATORS and model in SIMULATED_MODELS:
            layers[SIMULATED_MODELS[model], int(tp), int(tokens)] += float(us)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (model, tp, tokens), us in sorted(layers.items()):
        times = _times(fitted.profiles["h100", model], tp)
        if times is not None and tokens >= TOKENS_MIN:
            found[model].append((_at(times, times.dense_us, tokens), us))
    for model, pairs in sorted(found.items()):
        yield Comparison(
            SIMULATED, "layer without attention", "h100", model, pairs, NOTHING, levelled=True,
            notes=("matrices unfused, as vLLM does not run them",),
        )  # fmt: skip


def _times(profile: Profile, tp: int) -> TensorTimes | None:
    return next((times for times in profile.times if times.tp == tp), None)


def _at(times: TensorTimes, curve: tuple[float, ...], tokens: float) -> float:
    return float(np.interp(tokens, times.tokens, curve))
