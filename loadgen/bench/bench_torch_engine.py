"""How fast the torch engine is beside transformers' ``generate`` on the same CPU and weights.

``python -m loadgen.bench.bench_torch_engine`` measures, for each shape and batch, prefill and
decode in tokens/s, interleaved with ``generate`` at the same batch and on as many threads as the
shape has ranks; ``decode_ratio`` and ``prefill_ratio`` are transformers' time per token over ours,
so above 1 we are faster. Then requests of unlike lengths at the same concurrency: ours as they
come and go, ``generate`` in groups that last as long as their longest member. ``stream_ratio`` as
above.
"""

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadgen.bench.environment import environment
from loadgen.bench.torch_ranks import started
from services.worker.engine.interface import Engine, EngineRequest
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.engine.torch_engine.make_model import make_model
from services.worker.measure.stopwatch import stopwatch
from shared.hardware import Parallelism
from shared.messages.requests import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32
STREAM_LENGTHS = (8, 64)
"""Least and most output tokens of the requests of unlike lengths."""
STREAM_ROUNDS = 3
"""So many times the concurrency are there of them."""


class Transformers:
    """``generate``, on ``threads`` threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._torch: Any = import_module("torch")
        self._threads = threads
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own
            loader: Any = import_module("transformers").AutoModelForCausalLM
            self._model: Any = loader.from_pretrained(folder).eval()

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        ids = self._torch.tensor(prompts)
        self._torch.set_num_threads(self._threads)
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        self._torch.set_num_threads(1)  # each rank of ours has one


def prompts_of(count: int) -> list[list[int]]:
    random = np.random.default_rng(3)
    return random.integers(0, 256, (count, PROMPT_TOKENS)).tolist()


def serve(engine: Engine, prompts: list[list[int]], lengths: list[int]) -> None:
    for number, (prompt, tokens) in enumerate(zip(prompts, lengths, strict=True)):
        sampling = SamplingParams(output_tokens_max=tokens, temperature=0.0, ignore_eos=True)
        engine.add(EngineRequest(key=str(number), prompt_tokens=prompt, sampling=sampling))
    while engine.has_work:
        engine.step()


def alike(engine: Engine, other: Transformers, batch: int, repeats: int) -> dict[str, float]:
    """Tokens/s of both at one batch. The first token's step is the prefill, what more tokens take
    is the decode."""
    read, prompts = stopwatch(), prompts_of(batch)
    took: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for tokens in (1, 1 + OUTPUT_TOKENS):
            began_s = read()
            serve(engine, prompts, [tokens] * batch)
            ours_s = read()
            other.generate(prompts, tokens)
            ended_s = read()
            took.setdefault(("ours", tokens), []).append(ours_s - began_s)
            took.setdefault(("transformers", tokens), []).append(ended_s - ours_s)
    found: dict[str, float] = {}
    for name in ("ours", "transformers"):
        prefill_s = statistics.median(took[name, 1])
        decode_s = statistics.median(took[name, 1 + OUTPUT_TOKENS]) - prefill_s
        found[f"{name}_prefill_tps"] = round(batch * PROMPT_TOKENS / prefill_s, 1)
        found[f"{name}_decode_tps"] = round(batch * OUTPUT_TOKENS / decode_s, 1)
    for phase in ("prefill", "decode"):
        ours, theirs = found[f"ours_{phase}_tps"], found[f"transformers_{phase}_tps"]
        found[f"{phase}_ratio"] = round(ours / theirs, 3)
    return found


def unlike(engine: Engine, other: Transformers, batch: int) -> dict[str, float]:
    """Output tokens/s of both over requests of unlike lengths."""
    read, count = stopwatch(), STREAM_ROUNDS * batch
    random, prompts = np.random.default_rng(5), prompts_of(count)
    lengths: list[int] = random.integers(*STREAM_LENGTHS, count, endpoint=True).tolist()
    began_s = read()
    serve(engine, prompts, lengths)
    ours_s = read()
    for first in range(0, count, batch):
        group = slice(first, first + batch)
        other.generate(prompts[group], max(lengths[group]))
    ended_s = read()
    ours = sum(lengths) / (ours_s - began_s)
    theirs = sum(lengths) / (ended_s - ours_s)
    return {
        "ours_stream_tps": round(ours, 1),
        "transformers_stream_tps": round(theirs, 1),
        "stream_ratio": round(ours / theirs, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_torch_engine")
    parser.add_argument("--model", default="small", choices=("tiny", "small"))
    parser.add_argument("--shapes", nargs="+", default=["tp1", "tp2", "tp1pp2"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / asked.model
        make_model(folder, asked.model)
        for shape in asked.shapes:
            ranks = Parallelism.parse(shape).gpus
            other = Transformers(folder, min(ranks, len(os.sched_getaffinity(0))))
            for batch in asked.batches:
                config = TorchEngineConfig(threads=1, running_max=batch)
                with started(folder, shape, config) as engine:
                    serve(engine, prompts_of(batch), [4] * batch)
                    other.generate(prompts_of(batch), 4)
                    found = alike(engine, other, batch, asked.repeats)
                    found |= unlike(engine, other, batch)
                line = {
                    "benchmark": "torch_engine",
                    "model": asked.model,
                    "shape": shape,
                    "batch": batch,
                    **found,
                    "environment": msgspec.to_builtins(environment()),
                }
                sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
