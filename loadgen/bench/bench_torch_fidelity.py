"""Whether a measured profile tells what the engine does.

``python -m loadgen.bench.bench_torch_fidelity`` sweeps the torch engine on a made checkpoint, then
runs the same Poisson arrivals through that engine in real time and through the modelled engine with
the measured profile in virtual time. Prints mean and p99 of TTFT, TPOT and E2E of both, and the
errors. Times in which the thread waited for a CPU that others had are taken off the real run, as
they are in the sweep.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from loadgen.bench.environment import environment
from services.worker.engine.interface import EngineRequest, StepResult
from services.worker.engine.modelled import ModelledEngine
from services.worker.engine.modelled_timing import ModelledReplica
from services.worker.engine.torch_engine.make_model import make_model
from services.worker.measure.__main__ import main as measure
from services.worker.measure.stopwatch import stopwatch
from services.worker.measure.target import Target, open_target
from shared.cost.library import load_profile
from shared.cost.limits import EngineLimits
from shared.cost.memory import kv_blocks
from shared.cost.model import cost_model
from shared.hardware import Parallelism
from shared.mesh import ModelledEngineSettings
from shared.messages.requests import SamplingParams
from shared.text import load_tokenizer

SETTINGS = {"threads": "1"}
PROMPT_TOKENS, OUTPUT_TOKENS = (16, 600), (8, 80)
WARM_UP = 0.1
"""The share of requests at the start that no figure counts."""


class _Engine(Protocol):
    def add(self, request: EngineRequest) -> None: ...
    def step(self) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    request: EngineRequest


@dataclass(slots=True)
class Times:
    first_s: dict[str, float] = field(default_factory=dict[str, float])
    last_s: dict[str, float] = field(default_factory=dict[str, float])


class Virtual:
    """A clock that moves with the modelled engine's steps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def read(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def arrivals(count: int, rate: float, vocabulary: int) -> list[Arrival]:
    """Poisson arrivals, lengths log-uniform: the same for the same arguments."""
    random = np.random.default_rng(11)
    at_s = np.cumsum(random.exponential(1 / rate, count)).tolist()

    def lengths(low: int, high: int) -> list[int]:
        return np.exp(random.uniform(np.log(low), np.log(high), count)).astype(int).tolist()

    made: list[Arrival] = []
    for number, (prompt, output) in enumerate(
        zip(lengths(*PROMPT_TOKENS), lengths(*OUTPUT_TOKENS), strict=True)
    ):
        tokens: list[int] = random.integers(0, vocabulary, prompt).tolist()
        sampling = SamplingParams(output_tokens_max=output, ignore_eos=True)
        request = EngineRequest(key=str(number), prompt_tokens=tokens, sampling=sampling)
        made.append(Arrival(at_s[number], request))
    return made


def serve(
    engine: _Engine, arriving: list[Arrival], read: Callable[[], float],
    sleep: Callable[[float], None],
) -> Times:  # fmt: skip
    """Open loop: requests are added when they are due, however busy the engine is."""
    times, live, following = Times(), 0, 0
    began_s = read()
    while live or following < len(arriving):
        now_s = read() - began_s
        while following < len(arriving) and arriving[following].at_s <= now_s:
            engine.add(arriving[following].request)
            following += 1
            live += 1
        if not live:
            sleep(max(0.0, arriving[following].at_s - now_s))
            continue
        result = engine.step()
        if result.duration_s:
            sleep(result.duration_s)
        now_s = read() - began_s
        for chunk in result.chunks:
            times.first_s.setdefault(chunk.key, now_s)
            times.last_s[chunk.key] = now_s
            live -= chunk.finish is not None
    return times


def figures(arriving: list[Arrival], times: Times) -> dict[str, float]:
    """Milliseconds."""
    counted = arriving[round(len(arriving) * WARM_UP) :]
    found: dict[str, list[float]] = {"ttft": [], "tpot": [], "e2e": []}
    for arrival in counted:
        key, output = arrival.request.key, arrival.request.sampling.output_tokens_max
        first_s, last_s = times.first_s[key], times.last_s[key]
        found["ttft"].append(first_s - arrival.at_s)
        found["tpot"].append((last_s - first_s) / (output - 1))
        found["e2e"].append(last_s - arrival.at_s)
    told: dict[str, float] = {}
    for name, values in found.items():
        told[f"{name}_ms_mean"] = round(1e3 * float(np.mean(values)), 2)
        told[f"{name}_ms_p99"] = round(1e3 * float(np.quantile(values, 0.99)), 2)
    return told


def modelled(target: Target, folder: Path, checkpoint: Path) -> ModelledEngine:
    cost = cost_model("cpu", checkpoint.name, Parallelism(), folders=(folder,))
    limits = EngineLimits(
        block_tokens=target.block_tokens,
        batch_tokens_max=target.batch_tokens_max,
        running_max=target.running_max,
    )
    blocks = kv_blocks(cost.profile, cost.gpu, Parallelism(), block_tokens=target.block_tokens)
    assert blocks == target.kv_blocks, "the profile holds another KV cache than the engine has"
    replica = ModelledReplica(
        limits=limits, times=cost.step, kv_blocks=blocks, start_s=0.0, prefix_caching=False
    )
    return ModelledEngine(
        ModelledEngineSettings(),
        context_tokens_max=target.context_tokens_max,
        tokenizer=load_tokenizer(str(checkpoint)),
        replica=replica,
    )


def swept(checkpoint: Path, out: Path, seconds: float) -> None:
    """Measure as a user does; what it says goes to stderr."""
    asked = ["--engine", "torch", "--model", str(checkpoint), "--out", str(out)]
    asked += ["--seconds", str(seconds)]
    for name, value in SETTINGS.items():
        asked += ["--set", f"{name}={value}"]
    with contextlib.redirect_stdout(sys.stderr):
        code = measure(asked)
    if code:
        raise SystemExit(code)


def told_by_model(engine: ModelledEngine, arriving: list[Arrival]) -> tuple[Times, float]:
    """And how long all of it took, in virtual seconds."""
    clock = Virtual()
    return serve(engine, arriving, clock.read, clock.sleep), clock.now_s


def compared(model: str, *, sweep_s: float, requests: int, loads: list[float]) -> dict[str, Any]:
    """Loads are shares of the rate at which the modelled engine works off requests that are all
    there at once."""
    with tempfile.TemporaryDirectory() as place:
        checkpoint, out = Path(place) / model, Path(place) / "profiles"
        make_model(checkpoint, model)
        swept(checkpoint, out, sweep_s)
        target = open_target("torch", checkpoint, SETTINGS)
        flood = arrivals(4 * target.running_max, 1e9, target.facts.vocab)
        _, flood_s = told_by_model(modelled(target, out, checkpoint), flood)
        saturation = len(flood) / flood_s
        runs: list[dict[str, Any]] = []
        for load in loads:
            arriving = arrivals(requests, load * saturation, target.facts.vocab)
            told, _ = told_by_model(modelled(target, out, checkpoint), arriving)
            seen = serve(target.engine, arriving, stopwatch(), time.sleep)
            predicted, measured = figures(arriving, told), figures(arriving, seen)
            errors = {name: round(predicted[name] / measured[name] - 1, 4) for name in measured}
            run = {"load": load, "rate_rps": round(load * saturation, 2)}
            runs.append({**run, "measured": measured, "predicted": predicted, "error": errors})
        target.engine.close()
        bar = load_profile("cpu", model, (out,)).error
    return {
        "model": model,
        "requests": requests,
        "profile_error": msgspec.to_builtins(bar),
        "runs": runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_torch_fidelity")
    parser.add_argument("--model", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--sweep-s", type=float, default=120.0)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.8])
    asked = parser.parse_args()
    found = compared(asked.model, sweep_s=asked.sweep_s, requests=asked.requests, loads=asked.loads)
    line = {
        "benchmark": "torch_fidelity", **found, "environment": msgspec.to_builtins(environment())
    }  # fmt: skip
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
