"""What a joint plan is asked for and what it is: the words of ``joint``, for all that solves,
rounds and checks them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.costs import RANKS, STAGES
from services.scheduler.policies.flow import Array

Goal = Literal["headroom", "gentle", "served", "thrift"]
GREATEST: tuple[Goal, ...] = ("headroom", "served")
"""Goals of which more is better; of the others, less."""
GAP_MAX = 1e-4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Terms:
    """What any plan has to keep to.

    ``wanted``: models that get a replica whatever is expected of them. ``least``: replicas by
    model; where both name one, the larger number counts, and 0 asks for none. ``load``: the largest
    share of a replica's time that "gentle" and "thrift" take. ``cost`` [S, J]: of "gentle".
    ``floor``: replicas that are given, of columns that are ``plannable``. ``survive``: 1 when the
    rest has to do after the loss of any one replica. That cannot be asked of "served", which is the
    answer to too few GPUs. ``prices``: of "thrift", per GPU-hour by kind; 1 where it says nothing.
    """

    wanted: Collection[str] = ()
    least: Mapping[str, int] = field(default_factory=dict[str, int])
    load: float = 1.0
    cost: Array | None = None
    floor: Mapping[Column, int] = field(default_factory=dict[Column, int])
    survive: int = 0
    prices: Mapping[str, float] = field(default_factory=dict[str, float])

    def replicas_min(self) -> dict[str, int]:
        """By model, sorted; those of which none is asked for are left out."""
        each = {model_id: max(1, self.least.get(model_id, 0)) for model_id in self.wanted}
        asked = {**self.least, **each}
        return {model_id: count for model_id, count in sorted(asked.items()) if count > 0}

    def load_after_loss(self) -> float:
        """What replicas may be loaded after a loss: fully, whatever they should be before."""
        return max(1.0, self.load)

    def hourly(self, table: Table) -> Array:
        """[S]: price of one replica for one hour."""
        return np.array(
            [
                column.shape.gpus * self.prices.get(table.pools[column.pool].kind, 1.0)
                for column in table.columns
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """``objective`` in the terms of ``goal`` (t, cost, requests/s, or price per hour); no plan has
    a better one than ``bound``. ``shares`` [S, J]: of each type, what each column gets of it; they
    sum to t, 1, at most 1, or 1."""

    goal: Goal
    counts: Mapping[Column, int]
    shares: Array
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        """Between ``objective`` and ``bound``, relative to the former unless that is 0; infinite
        where nothing is known."""
        apart = abs(self.bound - self.objective)
        return apart / abs(self.objective) if self.objective else apart

    @property
    def optimal(self) -> bool:
        """Whether it is proven to within ``GAP_MAX``."""
        return self.gap <= GAP_MAX


def plannable(column: Column) -> bool:
    """Whether new replicas may have this shape: others are only kept."""
    return column.shape.tp in RANKS and column.shape.pp in STAGES
