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
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import isnan
from typing import Any

import msgspec
import numpy as np

from loadgen.bench.environment import environment
from loadgen.bench.prediction_cases import Case, Figures, measure
from loadgen.bench.prediction_grounds import GROUNDS
from loadgen.stdout import reserved_stdout

LOADS = (0.3, 0.6, 0.8, 0.95)
GOODPUT_TIE = 0.01

Way = Callable[[Case], Sequence[Figures]]
"""What one way to predict foretold of each type; none of a plan that it has no figures for."""


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
                cases += measure(ground, mix, load, seed=arguments.seed)
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
