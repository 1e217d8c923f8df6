"""How long one plan takes, and what it is worth: ``python -m loadgen.bench.bench_planners``.

Random demands of Llama-2-70B on H100 by the shipped profile, at a tenth to all of what the GPUs can
carry. For each size: the time of a first decision by each policy, of the joint program alone, and
the headroom that the paper's search ends with (same rates) as a share of the proven optimum. Times
include nothing remembered from former decisions but rates. Prints one JSON line per size.
"""

import argparse
import random
import sys
import time
from collections import Counter
from math import exp
from statistics import median

import msgspec

from loadgen.bench.environment import Environment, environment
from services.scheduler.policies.capacity import Table, build
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.costs import ANY_TARGET
from services.scheduler.policies.interface import GpuOffer, ModelDemand, Problem
from services.scheduler.policies.joint import Terms, best_joint
from services.scheduler.policies.joint_policy import OServe
from services.scheduler.policies.oserve_paper import search
from services.scheduler.policies.oserve_paper_policy import OServePaper
from shared.cost.limits import EngineLimits
from shared.messages.demand import TypeForecast
from shared.messages.plans import DeploymentPlan
from shared.slo import DEFAULT_TARGETS

MODEL, KIND, NODE_GPUS = "llama-2-70b", "h100", 8
SIZES = ((8, 4), (16, 4), (32, 4), (32, 9), (64, 9))
TIME_LIMIT_S = 30.0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    benchmark: str
    gpus: int
    types: int
    demands: int
    oserve_s_p50: float
    oserve_s_max: float
    joint_program_s_p50: float
    joint_program_s_max: float
    oserve_paper_s_p50: float
    oserve_paper_s_max: float
    search_headroom_mean: float  # of the proven optimum
    search_headroom_min: float
    environment: Environment


def problem(gpus: int, types: int, load: float, rng: random.Random) -> Problem:
    offers = tuple(
        GpuOffer(gpu_id=f"g{i:03d}", node_id=f"n{i // NODE_GPUS}", kind=KIND) for i in range(gpus)
    )
    demand = ModelDemand(
        model_id=MODEL,
        horizon_s=60.0,
        types=tuple(
            TypeForecast(
                request_type=i,
                arrivals_rps=load * rng.uniform(0.2, 2.0),
                input_tokens_mean=exp(rng.uniform(4.0, 8.5)),
                output_tokens_mean=exp(rng.uniform(2.5, 6.8)),
            )
            for i in range(types)
        ),
    )
    return Problem(
        now_s=0.0,
        epoch=1,
        models=(demand,),
        offers=offers,
        in_force=DeploymentPlan(plan_id="none"),
        kinds=dict.fromkeys((offer.gpu_id for offer in offers), KIND),
        profiles={MODEL: MODEL},
        targets={MODEL: DEFAULT_TARGETS["standard"]},
        limits=EngineLimits(),
        time_limit_s=TIME_LIMIT_S,
    )


def measure(gpus: int, types: int, demands: int) -> Result:
    ours: list[float] = []
    program: list[float] = []
    paper: list[float] = []
    shares: list[float] = []
    source = CostRates()
    for seed in range(demands):
        whole = _table(problem(gpus, types, 1.0, random.Random(seed)), source)
        found = best_joint(whole, "headroom", Terms(wanted=(MODEL,)), time_limit_s=TIME_LIMIT_S)
        assert found is not None, "the shipped profile fits these GPUs"
        load = found.objective * (0.1 + 0.9 * seed / max(1, demands - 1))
        case = problem(gpus, types, load, random.Random(seed))
        build(case, source, target=ANY_TARGET)  # rates are remembered across decisions
        table = _table(case, source)
        terms = Terms(wanted=(MODEL,))
        start = time.perf_counter()
        best = best_joint(table, "headroom", terms, time_limit_s=TIME_LIMIT_S)
        program.append(time.perf_counter() - start)
        assert best is not None
        start = time.perf_counter()
        OServe(source).plan(case)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        OServePaper(source).plan(case)
        paper.append(time.perf_counter() - start)
        searched = search(table, Counter(), (MODEL,))
        shares.append(searched.even.headroom / best.objective)
    return Result(
        benchmark="planners",
        gpus=gpus,
        types=types,
        demands=demands,
        oserve_s_p50=round(median(ours), 4),
        oserve_s_max=round(max(ours), 4),
        joint_program_s_p50=round(median(program), 4),
        joint_program_s_max=round(max(program), 4),
        oserve_paper_s_p50=round(median(paper), 4),
        oserve_paper_s_max=round(max(paper), 4),
        search_headroom_mean=round(sum(shares) / len(shares), 4),
        search_headroom_min=round(min(shares), 4),
        environment=environment(),
    )


def _table(case: Problem, source: CostRates) -> Table:
    table = build(case, source)
    return table.only(table.servable())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demands", type=int, default=10)
    args = parser.parse_args()
    for gpus, types in SIZES:
        result = measure(gpus, types, args.demands)
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
