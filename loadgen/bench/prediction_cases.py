"""What ``bench_predictions`` measures: plans under demands, simulated and foretold."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from time import process_time

import numpy as np
import numpy.typing as npt

from loadgen.bench.prediction_grounds import (
    HORIZON_S,
    KIND,
    NODE_GPUS,
    TARGET,
    Ground,
    equal_weights,
    plans,
    problem,
    utilisation,
)
from loadgen.simulator.outcome import Requests
from loadgen.simulator.policies import policy_named
from loadgen.simulator.run import SimulationSpec, Traffic, run
from loadgen.workload.records import TraceRecord
from services.scheduler.policies.capacity import Column, build
from services.scheduler.policies.capacity_plan import brief
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.flow import Array
from services.scheduler.policies.joint_choice import Judge
from services.scheduler.policies.joint_latency import Load, Tail, tails
from services.scheduler.policies.rehearsal import rehearse, requests
from services.scheduler.policies.rehearsal_choice import scene_of
from services.scheduler.policies.rehearsal_outcome import Fared
from services.scheduler.policies.rehearsal_requests import Drawn
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec, ReplicaWish
from shared.models import ModelSpec

SECONDS = (60.0, 400.0)  # of a simulated run, at least and at most
REHEARSED_S = 120.0
REQUESTS = 2500.0  # simulated, if the time allows
REHEARSED_SEED = 1234  # not one of the arrivals simulated
OVERLOAD_MAX = 1.5  # plans of which more is asked are left out: any way to predict sees that
WAITING_MAX = 65536  # nobody is refused, so that overload shows as waiting
Figures = Mapping[str, float]


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
    """The same, as a rehearsal of ``drawn`` foretells them."""
    found = rehearse(scene_of(judge), counts, shares, drawn)
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
    return {
        "ttft_mean": tail.ttft_s_mean,
        "ttft_p50": tail.ttft_s_p50,
        "ttft_p99": tail.ttft_s,
        "tpot_mean": tail.tpot_s_mean,
        "tpot_p50": tail.tpot_s_p50,
        "tpot_p99": tail.tpot_s,
    }


def measure(
    ground: Ground, name: str, load: float, *, seed: int, requests_aimed: float = REQUESTS
) -> Iterator[Case]:
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
    seconds = min(SECONDS[1], max(SECONDS[0], requests_aimed / (load * most)))
    drawn = requests(table, seconds=seconds, seed=seed)
    foretold = requests(table, seconds=REHEARSED_S, seed=REHEARSED_SEED)
    for counts in every:
        shares = equal_weights(table, counts)
        if utilisation(table, counts, shares) > OVERLOAD_MAX:
            continue
        whole, each = simulated(ground, counts, drawn)
        start_s = process_time()
        lateness = judge.lateness(counts, shares)
        formula_s = process_time() - start_s
        formula = by_formula(judge, counts)
        start_s = process_time()
        played, played_each = rehearsed(judge, counts, shares, foretold)
        rehearsal_s = process_time() - start_s
        yield Case(
            ground=ground.model,
            mix=name,
            load=load,
            plan=brief(counts),
            utilisation=utilisation(table, counts, shares),
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
