"""What may be planned, and what it is worth: the columns of a plan and their rates by type.

A column is a model at one parallelism on one pool of alike GPUs; identical replicas are one column
with a count. Its rate for a type is what one such replica could serve if it saw that type alone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from services.scheduler.policies.capacity_types import Quantile, TypeDemand, looser, types_of
from services.scheduler.policies.costs import ANY_TARGET, RANKS, STAGES
from services.scheduler.policies.flow import Array, Instance
from services.scheduler.policies.interface import GpuOffer, Problem
from shared.cost.limits import EngineLimits
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan
from shared.slo import SloTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """GPUs of one kind that can serve the same models. ``node_gpus``: how many of them each node
    has, the largest first."""

    name: str
    kind: str
    models: tuple[str, ...]
    offers: tuple[GpuOffer, ...]
    node_gpus: tuple[int, ...]

    def fits(self, shape: Parallelism) -> bool:
        """Whether an empty pool has room for one replica."""
        size, units = self.unit(shape)
        return sum(gpus // size for gpus in self.node_gpus) >= units

    def unit(self, shape: Parallelism) -> tuple[int, int]:
        """GPUs of one node that a replica needs, and how many times: all of them on one node where
        any is large enough, else one tensor-parallel group for each stage."""
        if shape.gpus <= self.node_gpus[0]:
            return shape.gpus, 1
        return shape.tp, shape.pp

    def room(self, size: int) -> int:
        """GPUs in whole blocks of ``size`` on a node."""
        return sum(gpus // size * size for gpus in self.node_gpus)


@dataclass(frozen=True, slots=True, order=True)
class Column:
    """``group`` tells identical replicas apart that are sent unlike types (``separation.py``)."""

    model_id: str
    pool: str
    shape: Parallelism
    group: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaKind:
    """What makes two replicas equally fast: GPU, model (by its profile), parallelism, and how many
    GPUs the largest node has."""

    gpu: str
    profile: str
    shape: Parallelism
    node_gpus: int


class RateSource(Protocol):
    """The cost model, as planners see it; one is made up in tests."""

    def fits(self, kind: ReplicaKind) -> bool:
        """Whether it was measured and leaves room for KV cache."""
        ...

    def requests_per_s(
        self,
        kind: ReplicaKind,
        lengths: tuple[float, float],
        target: SloTarget,
        limits: EngineLimits,
    ) -> float:
        """Of (input, output) tokens that it serves within ``target``; 0 when none."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Table:
    """``rates`` [S, J]: requests/s of one replica of column s that saw type j alone, 0 for types
    of other models. ``late``: types that no column serves within their targets; their rates are
    those within the model's looser ones where these can be met, else those without targets."""

    pools: Mapping[str, Pool]
    columns: tuple[Column, ...]
    types: tuple[TypeDemand, ...]
    rates: Array
    late: tuple[int, ...] = ()

    @property
    def demand(self) -> Array:
        return np.array([kind.arrivals_rps for kind in self.types])

    def servable(self) -> tuple[int, ...]:
        """Types that some column can serve."""
        return tuple(int(j) for j in np.flatnonzero(self.rates.any(axis=0)))

    def only(self, kept: Sequence[int]) -> "Table":
        """The table of some types."""
        return Table(
            pools=self.pools,
            columns=self.columns,
            types=tuple(self.types[j] for j in kept),
            rates=self.rates[:, list(kept)],
            late=tuple(i for i, j in enumerate(kept) if j in self.late),
        )

    def shortcomings(self) -> str:
        """Which types cannot be served, or not in time, and why; empty when there are none."""
        fitting = {column.model_id for column in self.columns}
        notes: list[str] = []
        for j, kind in enumerate(self.types):
            name = f"{kind.model_id} type {kind.name}"
            lengths = f"{kind.input_tokens:.0f} tokens in, {kind.output_tokens:.0f} out"
            if kind.model_id not in fitting:
                notes.append(f"{kind.model_id} fits no shape on the GPUs on offer")
            elif not self.rates[:, j].any():
                notes.append(f"no shape on offer holds {name} ({lengths})")
            elif j in self.late:
                notes.append(f"no shape on offer serves {name} ({lengths}) within its targets")
        return "; ".join(dict.fromkeys(notes))

    def instance(self, counts: Mapping[Column, int]) -> Instance:
        """The flow of ``counts`` under the table's demand; rows in the order of ``columns``."""
        copies = np.array([float(counts.get(column, 0)) for column in self.columns])
        return Instance(self.rates, np.full_like(self.rates, np.inf), copies, self.demand)

    def gpus(self) -> int:
        """GPUs on offer."""
        return sum(sum(pool.node_gpus) for pool in self.pools.values())


def pools(offers: Iterable[GpuOffer]) -> dict[str, Pool]:
    """GPUs by what tells them apart, by name."""
    groups: dict[tuple[str, tuple[str, ...]], list[GpuOffer]] = {}
    for offer in offers:
        groups.setdefault((offer.kind, offer.models), []).append(offer)
    kinds = Counter(kind for kind, _ in groups)
    found: dict[str, Pool] = {}
    for (kind, models), members in sorted(groups.items()):
        name = kind if kinds[kind] == 1 else f"{kind} for {', '.join(models) or 'any'}"
        sizes = sorted(Counter(offer.node_id for offer in members).values(), reverse=True)
        found[name] = Pool(
            name=name, kind=kind, models=models, offers=tuple(members), node_gpus=tuple(sizes)
        )
    return found


def shapes(pool: Pool) -> list[Parallelism]:
    """Shapes to consider: tensor parallelism within a node, pipelines also across."""
    options = [Parallelism(tp, pp) for tp, pp in product(RANKS, STAGES)]
    return [shape for shape in options if pool.fits(shape)]


def standing(plan: DeploymentPlan, known: Mapping[str, Pool]) -> Counter[Column]:
    """Replicas in force by column; those that lost a GPU, or span pools, do not count."""
    pool_of = {offer.gpu_id: pool.name for pool in known.values() for offer in pool.offers}
    counts: Counter[Column] = Counter()
    for spec in plan.replicas:
        homes = {pool_of.get(gpu, "") for gpu in spec.gpus}
        if len(homes) == 1 and "" not in homes:
            counts[Column(spec.model_id, homes.pop(), Parallelism.parse(spec.parallelism))] += 1
    return counts


def kind_of(column: Column, problem: Problem, known: Mapping[str, Pool]) -> ReplicaKind:
    pool = known[column.pool]
    profile = problem.profiles[column.model_id]
    return ReplicaKind(pool.kind, profile, column.shape, pool.node_gpus[0])


def build(
    problem: Problem,
    source: RateSource,
    *,
    target: SloTarget | None = None,
    caution: float = 0.0,
    quantile: Quantile | None = None,
    late_share: float = 0.0,
) -> Table:
    """The table of ``problem``. ``target`` replaces those of models and classes. ``quantile``: of
    the arrivals, where forecasts have it; elsewhere ``caution`` times the error of a forecast so
    far is added to it. ``late_share``: columns that serve a type too late, where others are in
    time, count with that share of what they serve at all: replicas that stand do serve it. All
    tables of a problem have the same types and columns. Shapes in force are columns too, whatever
    they are, so that keeping them can be judged."""
    known = pools(problem.offers)
    types = types_of(problem, target=target, caution=caution, quantile=quantile)
    columns = _columns(problem, source, known)
    rates = np.zeros((len(columns), len(types)))
    late: list[int] = []
    for j, kind in enumerate(types):
        own = [(s, column) for s, column in enumerate(columns) if column.model_id == kind.model_id]
        for wanted in looser(kind.target, target or problem.targets[kind.model_id]):
            for s, column in own:
                rates[s, j] = source.requests_per_s(
                    kind_of(column, problem, known),
                    (kind.input_tokens, kind.output_tokens),
                    wanted,
                    problem.limits,
                )
            if rates[:, j].any():
                late += [j] if wanted != kind.target else []
                break
    if late_share > 0.0:
        rates = _with_late(problem, source, known, columns, types, rates, late_share)
    assert np.all(np.isfinite(rates)), "a rate is a finite number"
    assert np.all(rates >= 0), "a rate is 0 or more"
    return Table(pools=known, columns=columns, types=types, rates=rates, late=tuple(late))


def _with_late(  # noqa: PLR0913, PLR0917  # what a rate is made of
    problem: Problem,
    source: RateSource,
    known: Mapping[str, Pool],
    columns: Sequence[Column],
    types: Sequence[TypeDemand],
    rates: Array,
    share: float,
) -> Array:
    """``rates`` with ``share`` of what they serve at all for columns that serve a type too late."""
    found = rates.copy()
    for s, column in enumerate(columns):
        for j, kind in enumerate(types):
            if kind.model_id == column.model_id and rates[s, j] <= 0.0:
                lengths = (kind.input_tokens, kind.output_tokens)
                replica = kind_of(column, problem, known)
                found[s, j] = share * source.requests_per_s(
                    replica, lengths, ANY_TARGET, problem.limits
                )
    return found


def _columns(problem: Problem, source: RateSource, known: Mapping[str, Pool]) -> tuple[Column, ...]:
    models = [model.model_id for model in problem.models]
    wanted = {
        Column(model_id, pool.name, shape)
        for model_id, pool in product(models, known.values())
        for shape in shapes(pool)
        if not pool.models or model_id in pool.models
    }
    wanted |= {column for column in standing(problem.in_force, known) if column.model_id in models}
    return tuple(
        column for column in sorted(wanted) if source.fits(kind_of(column, problem, known))
    )
