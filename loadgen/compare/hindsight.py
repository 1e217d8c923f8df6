"""Which static deployment was best, known only afterwards."""

import math
from collections.abc import Sequence

from loadgen.compare.metrics import RunMetrics
from loadgen.simulator.deployments import Deployment
from loadgen.simulator.policies import Policy


def best_of(
    scored: Sequence[tuple[Deployment, Sequence[RunMetrics]]],
) -> dict[str, Deployment]:
    """The best by goodput and the best by P99 of E2E, each the other's tie-break."""

    def goodput(entry: tuple[Deployment, Sequence[RunMetrics]]) -> float:
        return -math.fsum(run.goodput_rps for run in entry[1])

    def tail(entry: tuple[Deployment, Sequence[RunMetrics]]) -> float:
        tails = (run.e2e_ms.p99 for run in entry[1])
        return math.fsum(math.inf if p99 is None else p99 for p99 in tails)

    return {
        "best": min(scored, key=lambda entry: (goodput(entry), tail(entry)))[0],
        "best-p99": min(scored, key=lambda entry: (tail(entry), goodput(entry)))[0],
    }


def hindsight(policy: Policy) -> bool:
    """Whether it begins with what was best for the very run."""
    return policy.begin in ("best", "best-p99")
