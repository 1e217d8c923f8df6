"""Replicas of plans as columns of a table, and what each column is worth there."""

from collections.abc import Iterable

import numpy as np

from services.scheduler.policies.capacity import Column, Table
from services.scheduler.policies.flow import Array
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec


def columns_of(table: Table, specs: Iterable[ReplicaSpec]) -> dict[str, Column]:
    """By replica. Those on GPUs that are not on offer, or of shapes that were not measured, are
    left out."""
    pool_of = {offer.gpu_id: pool.name for pool in table.pools.values() for offer in pool.offers}
    known = set(table.columns)
    found: dict[str, Column] = {}
    for spec in specs:
        homes = {pool_of.get(gpu, "") for gpu in spec.gpus}
        if len(homes) == 1:
            shape = Parallelism.parse(spec.parallelism)
            column = Column(spec.model_id, homes.pop(), shape)
            if column in known:
                found[spec.replica_id] = column
    return found


def mix_headrooms(table: Table) -> Array:
    """[S]: times the demand of its model that one replica of each column could carry of what it
    can serve at all, types in the proportion in which they are expected."""
    demand = table.demand
    needed = np.divide(demand, table.rates, out=np.zeros_like(table.rates), where=table.rates > 0)
    time = needed.sum(axis=1)
    return np.divide(1.0, time, out=np.zeros_like(time), where=time > 0)
