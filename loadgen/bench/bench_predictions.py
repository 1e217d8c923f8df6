"""How well plans are predicted: ``python -m loadgen.bench.bench_predictions``.

For each demand (a model, a mix of types, a load) and each plan (every uniform shape on its GPUs,
and some of unlike shapes; all replicas have equal weights) the simulator says how requests fare
under arrivals of that kind: Poisson, with log-normal lengths. Predictions are put beside
it: the formulas of ``joint_latency`` and a rehearsal, which know the demand and not those arrivals;
and, to tell what chance has to do with it, a rehearsal of just those arrivals ("hindsight").

Printed, as one JSON line for each way to predict, and as a table on stderr: the median and the 90th
percentile of the relative errors of each figure (of goodput: of the difference of the shares), for
plans whose replicas bear their load and for those that do not; and what is lost by
taking the plan predicted to be the best instead of the one that was, in P99 of E2E and in goodput.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isnan, nan
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from loadgen.bench.environment import environment
from loadgen.simulator.outcome import Requests
from loadgen.simulator.policies import policy_named
from loadgen.simulator.run import SimulationSpec, Traffic, run
from loadgen.stdout import reserved_stdout
from loadgen.workload.records import TraceRecord
from services.scheduler.policies.capacity import Column, Table, build
from services.scheduler.policies.capacity_plan import brief
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.flow import Array
from services.scheduler.policies.interface import GpuOffer, ModelDemand, Problem
from services.scheduler.policies.joint_choice import Judge
from services.scheduler.policies.joint_latency import Load, Tail, tails
from services.scheduler.policies.rehearsal import Scene, rehearse, requests
from services.scheduler.policies.rehearsal_outcome import Fared
from services.scheduler.policies.rehearsal_requests import Drawn
from shared.cost.limits import EngineLimits
from shared.hardware import Parallelism
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.messages.demand import TypeForecast
from shared.messages.plans import DeploymentPlan
from shared.models import ModelSpec
from shared.slo import DEFAULT_TARGETS

KIND, NODE_GPUS = "h100", 8
TARGET = DEFAULT_TARGETS["standard"]
LOADS = (0.3, 0.6, 0.8, 0.95)
SECONDS = (60.0, 400.0)  # of a simulated run, at least and at most
REHEARSED_S, HORIZON_S = 120.0, 300.0
REQUESTS = 2500.0  # simulated, if the time allows
REHEARSED_SEED = 1234  # not one of the arrivals simulated
GOODPUT_TIE = 0.01
OVERLOAD_MAX = (
    1.5  # plans that are asked for more than that are left out: any way to predict sees it
)
WAITING_MAX = 65536  # nobody is refused, so that overload shows as waiting
Figures = Mapping[str, float]
Mix = tuple[tuple[float, float, float], ...]  # of each type: weight, tokens in, tokens out


@dataclass(frozen=True, slots=True)
class Ground:
    """A model on some GPUs, and plans of unlike shapes for it."""

    model: str
    gpus: int
    unlike: tuple[tuple[tuple[str, int], ...], ...]
    mixes: Mapping[str, Mix]


GROUNDS = (
    Ground(
        "llama-2-70b",
        16,
        ((("tp8", 1), ("tp4", 2)), (("tp4", 2), ("tp2", 4)), (("tp8", 1), ("tp4", 1), ("tp2", 2))),
        {
            "chat": ((3.0, 400.0, 120.0), (2.0, 1200.0, 320.0), (1.0, 2300.0, 40.0)),
            "long prompts": ((1.0, 4000.0, 60.0), (2.0, 700.0, 150.0)),
            "long answers": ((1.0, 200.0, 800.0), (1.0, 600.0, 250.0)),
            "alike": ((1.0, 1000.0, 200.0),),
        },
    ),
    Ground(
        "llama-3.1-8b",
        4,
        ((("tp2", 1), ("tp1", 2)),),
        {
            "chat": ((3.0, 400.0, 120.0), (2.0, 1200.0, 320.0), (1.0, 2300.0, 40.0)),
            "long prompts": ((1.0, 4000.0, 60.0), (2.0, 700.0, 150.0)),
        },
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan under one demand: what was ``seen`` and ``played`` (rehearsed) of all requests;
    ``each``, what was seen of each type, and what was foretold of it."""

    ground: str
    mix: str
    load: float
    plan: str
    utilisation: float
    lateness: float
    seen: Figures
    played: Figures
    each: Sequence[Figures]
    formula: Sequence[Figures]
    rehearsal: Sequence[Figures]
    formula_s: float
    rehearsal_s: float
    hindsight: tuple[Figures, Sequence[Figures]]


Way = Callable[[Case], Sequence[Figures]]
"""What one way to predict foretold of each type; none of a plan that it has no figures for."""


def problem(ground: Ground, mix: Mix, arrivals_rps: float) -> Problem:
    total = sum(weight for weight, _, _ in mix)
    types = tuple(
        TypeForecast(
            request_type=j,
            arrivals_rps=arrivals_rps * weight / total,
            input_tokens_mean=tokens_in,
            output_tokens_mean=tokens_out,
        )
        for j, (weight, tokens_in, tokens_out) in enumerate(mix)
    )
    offers = tuple(
        GpuOffer(gpu_id=f"g{i:03d}", node_id=f"n{i // NODE_GPUS}", kind=KIND)
        for i in range(ground.gpus)
    )
    return Problem(
        now_s=0.0,
        epoch=1,
        models=(ModelDemand(model_id=ground.model, horizon_s=HORIZON_S, types=types),),
        offers=offers,
        in_force=DeploymentPlan(plan_id="none"),
        kinds={offer.gpu_id: KIND for offer in offers},
        profiles={ground.model: ground.model},
        targets={ground.model: TARGET},
        limits=EngineLimits(),
    )


def plans(ground: Ground, table: Table) -> Iterator[Counter[Column]]:
    """Every uniform shape that fits the GPUs without rest, then the unlike ones."""
    by_shape = {column.shape: column for column in table.columns}
    for shape, column in by_shape.items():
        if ground.gpus % shape.gpus == 0 and table.rates[table.columns.index(column)].all():
            yield Counter({column: ground.gpus // shape.gpus})
    for unlike in ground.unlike:
        yield Counter({by_shape[Parallelism.parse(shape)]: count for shape, count in unlike})


def equal_weights(table: Table, counts: Counter[Column]) -> Array:
    each = np.array([counts[column] / counts.total() for column in table.columns])
    return np.repeat(each[:, None], len(table.types), axis=1)


def simulated(
    ground: Ground, counts: Counter[Column], drawn: Drawn
) -> tuple[Figures, list[Figures]]:
    """Of all requests, and of each type's."""
    wishes = [
        ReplicaWish(replica_id=f"{column.shape}-{i}", parallelism=str(column.shape))
        for column, count in sorted(counts.items(), key=lambda item: -item[0].shape.gpus)
        for i in range(count)
    ]
    nodes = -(-ground.gpus // NODE_GPUS)
    mesh = MeshConfig(
        name="predictions",
        model=ModelSpec(model_id=ground.model, context_tokens_max=131072),
        engine=EngineSpec(
            kind="modelled",
            modelled=ModelledEngineSettings(timing="profile", waiting_max=WAITING_MAX),
        ),
        nodes=tuple(
            NodeSpec(node_id=f"n{i}", gpus=min(NODE_GPUS, ground.gpus), gpu_kind=KIND)
            for i in range(nodes)
        ),
        replicas=tuple(wishes),
    )
    records = [
        TraceRecord(timestamp_s=at_s, input_tokens=tokens_in, output_tokens=tokens_out)
        for at_s, tokens_in, tokens_out in zip(
            drawn.at_s.tolist(),
            drawn.input_tokens.tolist(),
            drawn.output_tokens.tolist(),
            strict=True,
        )
    ]
    traffic = Traffic(model_id=ground.model, records=records)
    spec = SimulationSpec(mesh=mesh, traffic=(traffic,), policy=policy_named("static"))
    seen = run(spec).requests
    if not seen.completed.all():
        raise SystemExit(f"{int((~seen.completed).sum())} simulated requests did not complete")
    counted = seen.arrived_s >= drawn.warm_s
    kinds = drawn.kinds
    each = [_figures(seen, counted & (kinds == j)) for j in range(int(kinds.max()) + 1)]
    return _figures(seen, counted), each


def _figures(seen: Requests, counted: npt.NDArray[np.bool_]) -> Figures:
    ttft_s, e2e_s = seen.ttft_s[counted], seen.e2e_s[counted]
    gaps = seen.output_tokens[counted] - 1
    several = gaps > 0
    tpot_s = (e2e_s[several] - ttft_s[several]) / gaps[several]
    met = ttft_s <= TARGET.ttft_s
    met[several] &= tpot_s <= TARGET.tpot_s
    found = {"goodput": float(met.mean())}
    for name, values in (("ttft", ttft_s), ("tpot", tpot_s), ("e2e", e2e_s)):
        found[f"{name}_mean"] = float(values.mean())
        found[f"{name}_p50"] = float(np.quantile(values, 0.5))
        found[f"{name}_p99"] = float(np.quantile(values, 0.99))
    return found


def rehearsed(
    judge: Judge, counts: Counter[Column], shares: Array, drawn: Drawn
) -> tuple[Figures, list[Figures]]:
    scene = Scene(
        table=judge.table,
        model_of=judge.model,
        limits=judge.problem.limits,
        goals=[[(1.0, TARGET)]] * len(judge.table.types),
    )
    found = rehearse(scene, counts, shares, drawn)
    return _of(found.whole), [_of(fared) for fared in found.types]


def _of(fared: Fared) -> Figures:
    return {
        "goodput": fared.goodput_share if fared.goodput_share is not None else nan,
        **{
            f"{name}_{what}": value if value is not None else nan
            for name, spread in (
                ("ttft", fared.ttft_s), ("tpot", fared.tpot_s), ("e2e", fared.e2e_s)
            )
            for what, value in (("mean", spread.mean), ("p50", spread.p50), ("p99", spread.p99))
        },
    }  # fmt: skip


def by_formula(judge: Judge, counts: Counter[Column]) -> list[Figures]:
    """Of uniform plans only: what tails of a mixture of replicas are the formulas do not say."""
    if len(counts) > 1:
        return []
    ((column, count),) = counts.items()
    loads = [
        Load(
            arrivals_rps=kind.arrivals_rps / count,
            input_tokens=kind.input_tokens,
            output_tokens=kind.output_tokens,
        )
        for kind in judge.table.types
    ]
    found = tails(judge.model(column), loads, judge.problem.limits, horizon_s=judge.horizon_s)
    return [_tail_figures(tail) for tail in found]


def _tail_figures(tail: Tail) -> Figures:
    return {"ttft_p99": tail.ttft_s, "tpot_p99": tail.tpot_s}


def measure(ground: Ground, name: str, load: float, seed: int) -> Iterator[Case]:
    """Every plan under one demand, a share ``load`` of what the best uniform plan carries."""
    source, mix = CostRates(), ground.mixes[name]
    table = build(problem(ground, mix, 1.0), source)
    every = list(plans(ground, table))
    most = max(
        min(
            1.0 / float(np.sum(table.demand * shares[s] / table.rates[s])) * counts[column]
            for s, column in enumerate(table.columns)
            if counts[column]
        )
        for counts in every
        if len(counts) == 1
        for shares in (equal_weights(table, counts),)
    )
    case = problem(ground, mix, load * most)
    table = build(case, source)
    judge = Judge(problem=case, table=table, source=source, horizon_s=HORIZON_S)
    seconds = min(SECONDS[1], max(SECONDS[0], REQUESTS / (load * most)))
    drawn = requests(table, seconds=seconds, seed=seed)
    foretold = requests(table, seconds=REHEARSED_S, seed=REHEARSED_SEED)
    for counts in every:
        shares = equal_weights(table, counts)
        if _utilisation(table, counts, shares) > OVERLOAD_MAX:
            continue
        whole, each = simulated(ground, counts, drawn)
        start_s = time.process_time()
        lateness = judge.lateness(counts, shares)
        formula_s = time.process_time() - start_s
        formula = by_formula(judge, counts)
        start_s = time.process_time()
        played, played_each = rehearsed(judge, counts, shares, foretold)
        rehearsal_s = time.process_time() - start_s
        yield Case(
            ground=ground.model,
            mix=name,
            load=load,
            plan=brief(counts),
            utilisation=_utilisation(table, counts, shares),
            lateness=lateness,
            seen=whole,
            played=played,
            each=each,
            formula=formula,
            rehearsal=played_each,
            formula_s=formula_s,
            rehearsal_s=rehearsal_s,
            hindsight=rehearsed(judge, counts, shares, drawn),
        )


def _utilisation(table: Table, counts: Counter[Column], shares: Array) -> float:
    """Of the replicas that have least to spare."""
    return max(
        float(np.sum(table.demand * shares[s] / table.rates[s])) / counts[column]
        for s, column in enumerate(table.columns)
        if counts[column]
    )


def errors(cases: Sequence[Case], way: Way) -> dict[str, dict[str, float]]:
    """Of each figure of each type: relative, those of goodput as differences of shares."""
    found: dict[str, list[float]] = {}
    for case in cases:
        for seen, told in zip(case.each, way(case), strict=False):
            for figure, value in told.items():
                apart = abs(value - seen[figure])
                if not isnan(apart):
                    error = apart if figure == "goodput" else apart / seen[figure]
                    found.setdefault(figure, []).append(error)
    return {
        figure: {
            "median": round(float(np.quantile(values, 0.5)), 4),
            "p90": round(float(np.quantile(values, 0.9)), 4),
        }
        for figure, values in sorted(found.items())
    }


def regret(cases: Sequence[Case], pick: Callable[[Sequence[Case]], Case]) -> dict[str, float]:
    """What taking the picked plans loses against those that were the best by ``best``."""
    groups: dict[tuple[str, str, float], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.ground, case.mix, case.load), []).append(case)
    times: list[float] = []
    shares: list[float] = []
    hits = 0
    for group in groups.values():
        taken, truth = pick(group), best([(case.seen, case) for case in group])
        hits += taken is truth
        times.append(taken.seen["e2e_p99"] / truth.seen["e2e_p99"] - 1.0)
        shares.append(truth.seen["goodput"] - taken.seen["goodput"])
    return {
        "demands": len(groups),
        "best_taken": hits,
        "e2e_p99_lost_mean": round(float(np.mean(times)), 4),
        "e2e_p99_lost_max": round(max(times), 4),
        "goodput_lost_mean": round(float(np.mean(shares)), 4),
        "goodput_lost_max": round(max(shares), 4),
    }


def best(told: Sequence[tuple[Figures, Case]]) -> Case:
    """By goodput, where that is a tie by P99 of E2E."""
    most = max(figures["goodput"] for figures, _ in told)
    close = [pair for pair in told if pair[0]["goodput"] >= most - GOODPUT_TIE]
    return min(close, key=lambda pair: pair[0]["e2e_p99"])[1]


WAYS: Mapping[str, tuple[Way, Callable[[Sequence[Case]], Case]]] = {
    "formula": (
        lambda case: case.formula,
        lambda group: min(group, key=lambda case: case.lateness),
    ),
    "rehearsal": (
        lambda case: case.rehearsal,
        lambda group: best([(case.played, case) for case in group]),
    ),
    "hindsight": (
        lambda case: case.hindsight[1],
        lambda group: best([(case.hindsight[0], case) for case in group]),
    ),
}


def lines(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    for name, (way, pick) in WAYS.items():
        borne = [case for case in cases if case.utilisation < 1.0]
        beyond = [case for case in cases if case.utilisation >= 1.0]
        seconds = sorted(
            case.formula_s if name == "formula" else case.rehearsal_s for case in cases
        )
        yield {
            "benchmark": f"predictions_{name}",
            "plans": len(cases),
            "errors": errors(borne, way),
            "errors_overloaded": errors(beyond, way),
            "choice": regret(cases, pick),
            "seconds_p50": round(seconds[len(seconds) // 2], 4),
            "seconds_max": round(seconds[-1], 4),
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_predictions")
    parser.add_argument("--load", type=float, action="append")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals simulated")
    parser.add_argument("--verbose", action="store_true", help="each plan, on stderr")
    arguments = parser.parse_args()
    cases: list[Case] = []
    for ground, load in product(GROUNDS, arguments.load or LOADS):
        for mix in ground.mixes:
            with reserved_stdout():
                cases += measure(ground, mix, load, arguments.seed)
    if arguments.verbose:
        for case in cases:
            sys.stderr.write(_told(case))
    where = msgspec.to_builtins(environment())
    for line in lines(cases):
        line["environment"] = where
        sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    return 0


def _told(case: Case) -> str:
    def both(figure: str) -> str:
        return f"{case.seen[figure]:8.3f} {case.played[figure]:8.3f}"

    return (
        f"{case.ground:<13} {case.mix:<13} {case.load:4.2f} {case.plan:<24} "
        f"{case.utilisation:5.2f} lateness {case.lateness:7.2f} goodput {both('goodput')} "
        f"E2E p99 {both('e2e_p99')} TTFT p99 {both('ttft_p99')} TPOT p99 {both('tpot_p99')}\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
