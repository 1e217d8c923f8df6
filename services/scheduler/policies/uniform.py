"""Policy ``uniform``: in each period the best deployment of one shape per model, on all GPUs.

The naive comparator of unlike replicas: no hysteresis, no switch cost, no routing by type. It goes
where this period's forecast points, however little it gains.

For each choice of one shape for each model, GPUs are handed out to whichever model is loaded most.
The load of a model with r[j] requests/s of type j per replica within its targets, n replicas and
d[j] arrivals is sum_j d[j] / (n r[j]). Choices that load no model above ``LOAD_MAX`` are ranked by
the mean time of a request (E2E) at that load; the others, which queues would overrun, by their
highest load.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import inf, prod

from services.scheduler.policies.costs import (
    ANY_TARGET,
    Mix,
    mix_of,
    served,
    shapes,
    speed,
)
from services.scheduler.policies.filling import Pool, Room, fill
from services.scheduler.policies.interface import ModelDemand, Planned, Problem
from services.scheduler.policies.placing import brief
from services.scheduler.policies.starting import changes, place_by_kind
from services.scheduler.policies.weights import ANY_TYPE, joined, planned
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.hardware import Parallelism
from shared.slo import SloTarget

PERIOD_S = 60.0
LOAD_MAX = 0.85
CHOICES_MAX = 512
"""Combinations of shapes tried; with more models than that allows for, each keeps the shapes that
serve most per GPU."""


@dataclass(slots=True, kw_only=True)
class _Option:
    """One shape of one model: by kind of GPU, what a replica serves of the mix."""

    model_id: str
    shape: Parallelism
    within: bool  # whether its targets can be met
    rates: dict[str, float] = field(default_factory=dict[str, float])
    models: dict[str, CostModel] = field(default_factory=dict[str, CostModel])

    @property
    def kinds(self) -> list[str]:
        """Best first."""
        return sorted(self.rates, key=lambda kind: (-self.rates[kind], kind))

    @property
    def merit(self) -> tuple[bool, float]:
        return self.within, max(self.rates.values()) / self.shape.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    options: tuple[_Option, ...]
    counts: Counter[Pool]
    load: float
    e2e_s: float

    @property
    def rank(self) -> tuple[int, bool, float, float]:
        """Less is better: replicas for every model, within targets and room to spare, then E2E
        or the load."""
        served_ids = {model_id for _, model_id in self.counts}
        missing = sum(1 for option in self.options if option.model_id not in served_ids)
        missing += sum(1 for option in self.options if not option.within)
        return missing, self.full, self.load if self.full else self.e2e_s, self.e2e_s

    @property
    def full(self) -> bool:
        return self.load > LOAD_MAX or self.e2e_s == inf

    @property
    def merit(self) -> str:
        if self.full:
            return f"the least loaded, since every choice loads some model above {LOAD_MAX:.0%}"
        return f"expected E2E {self.e2e_s:.2f} s"


class Uniform:
    period_s = PERIOD_S
    slow = True  # tens of milliseconds the first time that lengths are met

    def plan(self, problem: Problem) -> Planned:
        options = {demand.model_id: _options(problem, demand) for demand in problem.models}
        unknown = [model_id for model_id, found in options.items() if not found]
        mixes = {demand.model_id: mix_of(demand) for demand in problem.models}
        room = Room(problem.offers)
        choices = [
            _choice(chosen, room, mixes, problem.limits)
            for chosen in product(*_pruned([found for found in options.values() if found]))
            if chosen
        ]
        if not choices:
            return Planned(plan=None, reason=f"uniform: {_unknown(unknown)}")
        best = min(choices, key=lambda choice: choice.rank)
        placement = place_by_kind(
            best.counts, {option.model_id: option.shape for option in best.options}, problem
        )
        rows: dict[str, dict[str, dict[str, float]]] = {}
        kind_of = {offer.gpu_id: offer.kind for offer in problem.offers}
        for option in best.options:
            rows[option.model_id] = {
                ANY_TYPE: {
                    spec.replica_id: option.rates[kind_of[spec.gpus[0]]]
                    for spec in placement.replicas
                    if spec.model_id == option.model_id
                }
            }
        words = [_in_words(option, best.counts, mixes) for option in best.options]
        words += [best.merit, changes(problem.in_force, placement)]
        words += [_unknown(unknown)] if unknown else []
        reason = f"uniform, best of {len(choices)} choices: {'; '.join(words)}"
        return planned(placement.replicas, joined(rows), reason=reason)


def _options(problem: Problem, demand: ModelDemand) -> list[_Option]:
    """Every shape that some kind of GPU has room for. Where the targets can be met by none, as if
    there were none."""
    for target in (problem.targets[demand.model_id], ANY_TARGET):
        found: dict[Parallelism, _Option] = {}
        offers = [offer for offer in problem.offers if offer.serves(demand.model_id)]
        for kind in sorted({offer.kind for offer in offers}):
            models = shapes(kind, problem.profiles[demand.model_id], offers)
            for shape, model in models.items():
                rate = _rate(model, demand, target, problem)
                if rate > 0.0:
                    option = found.setdefault(
                        shape,
                        _Option(
                            model_id=demand.model_id,
                            shape=shape,
                            within=target is not ANY_TARGET,
                        ),
                    )
                    option.rates[kind], option.models[kind] = rate, model
        if found:
            return list(found.values())
    return []


def _rate(model: CostModel, demand: ModelDemand, target: SloTarget, problem: Problem) -> float:
    """Requests/s of the model's mix that one replica serves; 0 if it cannot serve some type."""
    if not demand.types:
        mix = mix_of(demand)
        lengths = (mix.input_tokens, mix.output_tokens)
        return served(model, lengths, target, problem.limits).requests_per_s
    busy = 0.0
    for kind in demand.types:
        lengths = (kind.input_tokens_mean, kind.output_tokens_mean)
        rate = served(model, lengths, target, problem.limits).requests_per_s
        if rate <= 0.0:
            return 0.0
        busy += kind.arrivals_rps / rate
    return demand.arrivals_rps / busy


def _pruned(options: list[list[_Option]]) -> list[list[_Option]]:
    """The options of each model, fewer where all combinations would be too many."""
    kept = [sorted(found, key=lambda option: option.merit, reverse=True) for found in options]
    while prod(len(found) for found in kept) > CHOICES_MAX:
        max(kept, key=len).pop()
    return kept


def _choice(
    chosen: tuple[_Option, ...], room: Room, mixes: Mapping[str, Mix], limits: EngineLimits
) -> _Choice:
    by_id = {option.model_id: option for option in chosen}

    def need(model_id: str, counts: Mapping[Pool, int]) -> float:
        """The model's load, infinite without a replica. One without demand still takes what
        nobody else wants."""
        rate = _rate_of(by_id[model_id], counts)
        arrivals = max(mixes[model_id].arrivals_rps, 1e-9)
        return arrivals / rate if rate > 0.0 else inf

    counts = fill(
        room.copy(),
        shapes={option.model_id: option.shape for option in chosen},
        kinds={option.model_id: option.kinds for option in chosen},
        need=need,
    )
    load = max(
        mixes[option.model_id].arrivals_rps / rate if (rate := _rate_of(option, counts)) else inf
        for option in chosen
    )
    return _Choice(
        options=chosen, counts=counts, load=load, e2e_s=_e2e_s(chosen, counts, mixes, limits)
    )


def _rate_of(option: _Option, counts: Mapping[Pool, int]) -> float:
    return sum(option.rates[kind] * counts.get((kind, option.model_id), 0) for kind in option.rates)


def _e2e_s(
    chosen: Iterable[_Option],
    counts: Mapping[Pool, int],
    mixes: Mapping[str, Mix],
    limits: EngineLimits,
) -> float:
    """Mean over requests of all models; of equal weight where nothing is expected."""
    total = weights = 0.0
    for option in chosen:
        mix, rate = mixes[option.model_id], _rate_of(option, counts)
        if rate <= 0.0:
            return inf
        load = min(mix.arrivals_rps / rate, 1.0)
        weight = mix.arrivals_rps or 1e-9
        for kind, own in option.rates.items():
            share = own * counts.get((kind, option.model_id), 0) / rate
            if share > 0.0:
                lengths = (mix.input_tokens, mix.output_tokens)
                e2e_s = speed(option.models[kind], lengths, load * own, limits).e2e_s
                total += weight * share * e2e_s
        weights += weight
    return total / weights


def _in_words(option: _Option, counts: Mapping[Pool, int], mixes: Mapping[str, Mix]) -> str:
    mix, rate = mixes[option.model_id], _rate_of(option, counts)
    replicas = ", ".join(
        f"{counts[kind, option.model_id]} x {brief(option.shape)} on {kind}"
        for kind in option.kinds
        if counts.get((kind, option.model_id))
    )
    words = f"{option.model_id} {replicas or 'without room'}"
    if rate > 0.0:
        words += f", {rate:.2f} requests/s served, loaded {mix.arrivals_rps / rate:.0%}"
    return words + ("" if option.within else ", its targets met by no shape on offer")


def _unknown(models: Iterable[str]) -> str:
    return f"no shape on offer fits {', '.join(models)}, or there is no cost profile for it"
