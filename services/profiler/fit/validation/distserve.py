"""OPT on A100 by the authors of DistServe: coefficients that they fitted to their measurements, and
the KV capacities that their engines have."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from services.profiler.fit.build import UNKNOWN, Fitted
from services.profiler.fit.csv_source import read_table
from services.profiler.fit.models import OPT_13B, OPT_66B, OPT_175B
from services.profiler.fit.overheads import NONE
from services.profiler.fit.validation.compared import Comparison
from shared.cost.memory import kv_capacity_tokens
from shared.cost.profile import FORMAT, Profile
from shared.cost.step import PS_PER_S, Prefill, pairs, step_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

SOURCE = "DistServe (LLMServe/DistServe@82831f1604cc, Apache-2.0)"
GPU, MODEL = "a100-80", "opt-66b"
THEIR_USABLE = 0.95
"""Share of the memory that weights, KV cache and ``reserved_bytes`` fill on their engines."""
OPTS = {"facebook/opt-13b": OPT_13B, "facebook/opt-66b": OPT_66B, "facebook/opt-175b": OPT_175B}
RESERVED_ON = "facebook/opt-13b"
BATCHES, CONTEXTS = (1, 4, 16, 32, 64, 95, 128, 256), (128, 256, 512, 1024)
PROMPTS = (128, 256, 512, 768, 1024, 1536, 2048)


class _Coefficients(msgspec.Struct):
    """Milliseconds; prefill by tokens and their squares, decode by context and batch."""

    decoding_large_small_bs_threshold: int
    prefill: tuple[float, float, float]
    decoding_smallbs: tuple[float, float, float]
    decoding_largebs: tuple[float, float, float]

    def prompt_ms(self, tokens: int) -> float:
        fixed, each, square = self.prefill
        return fixed + each * tokens + square * tokens**2

    def decode_ms(self, batch: int, context: int) -> float:
        small = batch < self.decoding_large_small_bs_threshold
        fixed, by_context, by_batch = self.decoding_smallbs if small else self.decoding_largebs
        return fixed + by_context * context + by_batch * batch


def compare_times(fitted: Fitted, folder: Path) -> Iterator[Comparison]:
    """Both of their engines, on a grid of sizes within what they measured."""
    for engine in ("vllm", "distserve"):
        path = folder / "distserve" / f"profiler-a100-80g.{engine}.json"
        shapes = _coefficients(path)[f"facebook/{MODEL}"]
        decode: list[tuple[float, float]] = []
        prompt: list[tuple[float, float]] = []
        for times in fitted.profiles[GPU, MODEL].times:
            known = shapes.get(str(times.tp))
            if known is None:
                continue
            profile = fitted.profiles[GPU, MODEL]
            model = step_model(profile, fitted.gpus[GPU], Parallelism(times.tp))
            for batch in BATCHES:
                for context in (batch * each for each in CONTEXTS):
                    found_s = model.step_ps(batch, context) / PS_PER_S
                    decode.append((found_s * 1e3, known.decode_ms(batch, context)))
            for tokens in PROMPTS:
                alone = Prefill(tokens=tokens, chunks=1, pairs=pairs(0, tokens), ending=1)
                prompt.append(
                    (model.step_ps(0, 0, alone) / PS_PER_S * 1e3, known.prompt_ms(tokens))
                )
        for what, rows in (("decode step", decode), ("prompt", prompt)):
            yield Comparison(
                SOURCE, f"{what}, engine {engine}", GPU, MODEL, rows, "nothing of it",
                levelled=True, notes=("their coefficients at sizes of ours, no single runs",),
            )  # fmt: skip


def compare_capacities(fitted: Fitted, folder: Path) -> Iterator[Comparison]:
    """Two settings: vLLM's share of the memory, which profiles have, and theirs."""
    columns = ("model", "tp", "pp", "max_num_tokens")
    rows = list(read_table(folder / "distserve" / "max_num_tokens.csv", columns))
    ours = fitted.gpus[GPU]
    theirs = msgspec.structs.replace(ours, usable=THEIR_USABLE)
    for gpu in (theirs, ours):
        for name, facts in OPTS.items():
            profile = Profile(
                format=FORMAT, gpu=GPU, model=name, model_facts=facts, times=(), overheads=NONE,
                error=UNKNOWN,
            )  # fmt: skip
            found = [
                (
                    float(kv_capacity_tokens(profile, gpu, Parallelism(int(tp), int(pp)))),
                    float(most),
                )
                for model, tp, pp, most in rows
                if model == name
            ]
            own = name == RESERVED_ON
            yield Comparison(
                SOURCE,
                f"KV capacity at {gpu.usable:.0%} of the memory",
                GPU,
                name.removeprefix("facebook/"),
                found,
                "reserved bytes, on these very rows" if own else "reserved bytes, on OPT-13B",
            )


def _coefficients(path: Path) -> dict[str, dict[str, _Coefficients]]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, _Coefficients]])
    except (OSError, msgspec.DecodeError) as error:
        remedy = f"cannot be read: {error}"
        raise ConfigInvalid(field="tables", value=str(path), remedy=remedy) from None
