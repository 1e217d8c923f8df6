"""Lateness of plans under two demands: the usual one, and the high one that is seldom exceeded.

A plan is made for the high demand, whose capacity it should have, and lives mostly under the usual
one. Its lateness is the mean of both, weighted as Swanson's rule weights the 10th, 50th and 90th
percentile (0.3, 0.4, 0.3), the first two taken together: below the median replicas are hardly
faster than at it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array, best_flow
from services.scheduler.policies.horizon import Foreseen
from services.scheduler.policies.joint_choice import Judge, LatencySource

USUAL = 0.7  # weight of the usual demand


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed(Judge):
    """A judge of the high demand's table that asks one of the ``usual`` demand as well."""

    usual: Judge

    def lateness(self, counts: Mapping[Column, int], shares: Array) -> float:
        high = Judge.lateness(self, counts, shares)
        return USUAL * self.usual.lateness(counts, shares) + (1.0 - USUAL) * high

    def within(self, horizon_s: float) -> "Weighed":
        """The same over another time, in which queues grow for shorter or longer."""
        return replace(self, horizon_s=horizon_s, usual=replace(self.usual, horizon_s=horizon_s))

    def usual_headroom(self, counts: Mapping[Column, int]) -> float:
        """Times the usual demand that ``counts`` can carry."""
        flow = best_flow(self.usual.table.instance(counts), "headroom")
        return flow.headroom if flow else 0.0


def weighed(
    foreseen: Foreseen, table: Table, source: LatencySource, *, horizon_s: float
) -> Weighed:
    """For the ``table`` of the high demand."""
    usual = Judge(
        problem=foreseen.high, table=foreseen.usual(table), source=source, horizon_s=horizon_s
    )
    return Weighed(
        problem=foreseen.high, table=table, source=source, horizon_s=horizon_s, usual=usual
    )
