"""How long planning takes, and what it is worth: ``python -m loadgen.bench.bench_planners``.

Llama-3.1-70B on H100 by the shipped profile, at a tenth to all of what the GPUs can carry, for
random demands and for windows of public traces (``OSERVE_TRACES`` names their folder). For each
size one JSON line:

- the joint program alone (greatest headroom, on rates worked out before): seconds, and how many
  were proven to ``GAP_MAX``, the largest gap with them;
- up to ``COMPARED_MAX`` GPUs, side by side with the paper's search and with exhaustive search on
  the same rates: their time over the program's, and the headroom they end with over the program's;
  and against what policy "oserve" decides, with the seconds that this takes, each deployment under
  its best shares: predicted tails by formula (lateness), and of a rehearsal with requests that the
  policy has not seen, the P99 of E2E (for both, above 1 the others answer later) and the goodput.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import msgspec

from loadgen.bench.environment import Environment, environment
from loadgen.bench.planner_demands import MODEL, TraceDemands, problem, random_demand
from services.scheduler.policies.capacity import Column, Table, build, standing
from services.scheduler.policies.capacity_rates import CostRates
from services.scheduler.policies.exhaustive import exhaust
from services.scheduler.policies.joint import GAP_MAX, Terms, best_joint
from services.scheduler.policies.joint_choice import Candidate, Judge
from services.scheduler.policies.joint_policy import OServe
from services.scheduler.policies.oserve_paper import search
from services.scheduler.policies.rehearsal import rehearse, requests
from services.scheduler.policies.rehearsal_choice import REQUESTS, SECONDS, SEED, scene_of
from shared.messages.demand import TypeForecast

TRACES = Path(os.environ.get("OSERVE_TRACES", "../shared/traces"))
SIZES = ((8, 4), (16, 4), (64, 8), (256, 8), (1024, 16))
DEMANDS = 20
COMPARED_MAX = 16  # GPUs: beyond, the others take minutes
TIME_LIMIT_S = 30.0
LOAD_MIN = 0.1  # of what the GPUs can carry
LATENESS_S = 300.0  # tails are predicted for so long a time
Demand = Sequence[TypeForecast]


class Comparator(msgspec.Struct, frozen=True, kw_only=True):
    """Ratios are of the comparator's figure over ours. ``unserved``: demands of which it leaves a
    type without any replica that could serve it within its target, which is a headroom of 0."""

    solve_s_p50: float
    solve_s_max: float
    solve_s_ratio_p50: float
    headroom_ratio_mean: float
    headroom_ratio_min: float
    unserved: int
    lateness_ratio_p50: float
    lateness_ratio_mean: float
    lateness_ratio_min: float
    e2e_p99_ratio_p50: float
    e2e_p99_ratio_mean: float
    e2e_p99_ratio_min: float
    goodput_share_mean: float


class Measured(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Over all demands of one source. ``decision_s`` and ``goodput_share`` are of policy
    "oserve"."""

    demands: int
    types_mean: float
    solve_s_p50: float
    solve_s_max: float
    proven: int
    gap_max: float
    decision_s_p50: float | None = None
    decision_s_max: float | None = None
    goodput_share_mean: float | None = None
    others: dict[str, Comparator] = {}  # msgspec copies defaults


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """``real`` is None where there are no traces."""

    benchmark: str
    gpus: int
    types: int
    random: Measured
    real: Measured | None
    environment: Environment


@dataclass(slots=True)
class Others:
    """What one comparator did: seconds, and ratios, one for each demand."""

    seconds: list[float] = field(default_factory=list[float])
    slower: list[float] = field(default_factory=list[float])
    headroom: list[float] = field(default_factory=list[float])
    lateness: list[float] = field(default_factory=list[float])
    e2e_p99: list[float] = field(default_factory=list[float])
    goodput: list[float] = field(default_factory=list[float])

    def told(self) -> Comparator:
        return Comparator(
            solve_s_p50=round(median(self.seconds), 4),
            solve_s_max=round(max(self.seconds), 4),
            solve_s_ratio_p50=round(median(self.slower), 2),
            headroom_ratio_mean=round(fmean(self.headroom), 5),
            headroom_ratio_min=round(min(self.headroom), 5),
            unserved=sum(ratio <= 0.0 for ratio in self.headroom),
            lateness_ratio_p50=round(median(self.lateness), 4),
            lateness_ratio_mean=round(fmean(self.lateness), 4),
            lateness_ratio_min=round(min(self.lateness), 4),
            e2e_p99_ratio_p50=round(median(self.e2e_p99), 4),
            e2e_p99_ratio_mean=round(fmean(self.e2e_p99), 4),
            e2e_p99_ratio_min=round(min(self.e2e_p99), 4),
            goodput_share_mean=round(fmean(self.goodput), 4),
        )


Solver = Callable[[Table], Mapping[Column, int]]


def by_search(table: Table) -> Mapping[Column, int]:
    return search(table, Counter(), (MODEL,)).counts


def by_exhaustion(table: Table) -> Mapping[Column, int]:
    found = exhaust(table, {MODEL: 1})
    assert found is not None, "the model fits these GPUs"
    assert found.exact, "there are few enough deployments"
    return found.counts


SOLVERS: dict[str, Solver] = {"oserve-paper": by_search, "exhaustive": by_exhaustion}


def fared(judge: Judge, candidate: Candidate) -> tuple[float, float]:
    """P99 of E2E of a rehearsal's requests, those that had not ended by then included, and the
    share that met its targets."""
    least, most = SECONDS
    seconds = min(most, max(least, REQUESTS / float(judge.table.demand.sum())))
    drawn = requests(judge.table, seconds=seconds, seed=SEED + 1)
    whole = rehearse(scene_of(judge), candidate.counts, candidate.shares, drawn).whole
    assert whole.e2e_s.p99 is not None, "it lasts until requests have come"
    assert whole.goodput_share is not None, "it lasts until requests have come"
    return whole.e2e_s.p99, whole.goodput_share


class Bench:
    """Measures one source of demands on one number of GPUs."""

    def __init__(self, gpus: int) -> None:
        self._gpus, self._source = gpus, CostRates()
        self._solve_s: list[float] = []
        self._gaps: list[float] = []
        self._decision_s: list[float] = []
        self._goodput: list[float] = []
        self._others = {name: Others() for name in SOLVERS}

    def measure(self, demands: Sequence[Demand]) -> Measured:
        for number, demand in enumerate(demands):
            self._one(demand, LOAD_MIN + (1 - LOAD_MIN) * number / max(1, len(demands) - 1))
        compared = bool(self._decision_s)
        return Measured(
            demands=len(demands),
            types_mean=round(fmean(len(demand) for demand in demands), 2),
            solve_s_p50=round(median(self._solve_s), 4),
            solve_s_max=round(max(self._solve_s), 4),
            proven=sum(gap <= GAP_MAX for gap in self._gaps),
            gap_max=max(self._gaps),
            decision_s_p50=round(median(self._decision_s), 4) if compared else None,
            decision_s_max=round(max(self._decision_s), 4) if compared else None,
            goodput_share_mean=round(fmean(self._goodput), 4) if compared else None,
            others={name: other.told() for name, other in self._others.items()} if compared else {},
        )

    def _one(self, demand: Demand, load: float) -> None:
        """The first solve says how much fits, and warms up what is loaded once."""
        terms = Terms(least={MODEL: 1})
        whole = self._table(demand, 1.0)
        most = best_joint(whole, "headroom", terms, time_limit_s=TIME_LIMIT_S)
        assert most is not None, "the model fits these GPUs"
        scale = load * most.objective
        table = self._table(demand, scale)
        began = time.perf_counter()
        best = best_joint(table, "headroom", terms, time_limit_s=TIME_LIMIT_S)
        took_s = time.perf_counter() - began
        assert best is not None, "it was solved a moment ago"
        self._solve_s.append(took_s)
        self._gaps.append(best.gap)
        if self._gpus <= COMPARED_MAX:
            self._compare(demand, scale, table, (took_s, best.objective))

    def _compare(
        self, demand: Demand, scale: float, table: Table, ours: tuple[float, float]
    ) -> None:
        case = problem(self._gpus, demand, scale=scale, limit_s=TIME_LIMIT_S)
        judge = Judge(problem=case, table=table, source=self._source, horizon_s=LATENESS_S)
        policy = OServe(self._source)
        began = time.perf_counter()
        answer = policy.plan(case)
        self._decision_s.append(time.perf_counter() - began)
        assert answer.plan is not None, answer.reason
        decided = judge.dispatched(standing(answer.plan, table.pools))
        e2e_s, goodput = fared(judge, decided)
        self._goodput.append(goodput)
        for name, solver in SOLVERS.items():
            began = time.perf_counter()
            counts = solver(table)
            took_s = time.perf_counter() - began
            found, other = judge.dispatched(counts), self._others[name]
            other.seconds.append(took_s)
            other.slower.append(took_s / ours[0])
            other.headroom.append(found.headroom / ours[1])
            other.lateness.append(found.lateness / decided.lateness)
            their_e2e_s, their_goodput = fared(judge, found)
            other.e2e_p99.append(their_e2e_s / e2e_s)
            other.goodput.append(their_goodput)

    def _table(self, demand: Demand, scale: float) -> Table:
        case = problem(self._gpus, demand, scale=scale, limit_s=TIME_LIMIT_S)
        every = build(case, self._source)
        return every.only(every.servable())


def measure(gpus: int, types: int, demands: int, traces: TraceDemands) -> Result:
    drawn = [random_demand(types, random.Random(seed)) for seed in range(demands)]
    real = traces.take(demands, types)
    return Result(
        benchmark="planners",
        gpus=gpus,
        types=types,
        random=Bench(gpus).measure(drawn),
        real=Bench(gpus).measure(real) if real else None,
        environment=environment(),
    )


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """``16x4,64x8`` as GPUs and types."""
    pairs = [part.partition("x") for part in text.split(",")]
    return tuple((int(gpus), int(types)) for gpus, _, types in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demands", type=int, default=DEMANDS, help="of each source, per size")
    parser.add_argument("--sizes", type=sizes, default=SIZES, help="GPUs x types, as 16x4,64x8")
    args = parser.parse_args()
    traces = TraceDemands(TRACES)
    if traces.missing:
        names = ", ".join(traces.missing)
        sys.stderr.write(f"bench_planners: random only, no {names} in {TRACES} (OSERVE_TRACES)\n")
    for gpus, types in args.sizes:
        result = measure(gpus, types, args.demands, traces)
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
