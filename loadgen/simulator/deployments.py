"""Static deployments of a topology: which shapes fit, how many replicas of them, on which GPUs.

Shapes come from where the scheduler's policies take them, replicas are placed by the code that
places theirs, and what fits is what the engines' own timing says: a static deployment is one that a
plan could be.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from math import comb

import msgspec

from loadgen.simulator.demand import Demand
from loadgen.simulator.policies import Policy
from loadgen.simulator.site import Site
from services.scheduler.policies.placing import place
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import MeshConfig, ReplicaWish
from shared.messages.plans import DeploymentPlan

Counts = Mapping[tuple[str, Parallelism], int]
"""Replicas by model and shape."""

ROOM = 0.3
"""Share of the GPUs' memory that a default deployment leaves to the KV cache."""
SHAPES_KEPT = 2  # of each model, for each number of GPUs
SPLITS_MAX = 20_000
_PART = re.compile(r"(\d+) (?:\S+ )?(tp\d+(?:pp\d+)?)")


@dataclass(frozen=True, slots=True)
class Deployment:
    """``name`` as in the words of a switch: ``4 tp4``, by model where there are several."""

    name: str
    replicas: tuple[ReplicaWish, ...]

    @property
    def shapes(self) -> dict[str, str]:
        """The shape of each model's replicas; the first one's where they are unlike."""
        return {w.model_id: w.parallelism for w in reversed(self.replicas)}

    def on(self, mesh: MeshConfig) -> MeshConfig:
        """The topology with these replicas in place of its own."""
        return msgspec.structs.replace(mesh, replicas=self.replicas)


def deployment(site: Site, counts: Counts) -> Deployment | None:
    """The replicas on the topology's GPUs; None where they find no room."""
    placed = place(counts, site.offers, DeploymentPlan(plan_id=""))
    if placed.dropped:
        return None
    wishes = tuple(
        ReplicaWish(
            replica_id=spec.replica_id,
            model_id=spec.model_id,
            parallelism=spec.parallelism,
            gpus=spec.gpus,
        )
        for spec in placed.replicas
    )
    return Deployment(_words(site.mesh, counts), wishes)


def uniform(site: Site, model_id: str, shape: Parallelism) -> Deployment:
    """As many replicas of one shape as there is room for; raises ConfigInvalid for none."""
    if shape in site.fitting(model_id):
        for count in range(site.gpus // shape.gpus, 0, -1):
            found = deployment(site, {(model_id, shape): count})
            if found is not None:
                return found
    known = ", ".join(str(s).removesuffix("pp1") for s in site.fitting(model_id))
    raise ConfigInvalid(
        field="policy",
        value=f"static-{shape}",
        remedy=f"{model_id} does not fit in that shape here; use one of: {known or 'none fits'}",
    )


def uniforms(site: Site, model_id: str) -> tuple[Deployment, ...]:
    """Every uniform deployment of one model."""
    return tuple(uniform(site, model_id, shape) for shape in site.fitting(model_id))


def default(site: Site, demand: Sequence[Demand]) -> Deployment:
    """The fewest pipeline stages, then the least tensor parallelism, that leave ROOM for the KV
    cache (or the most room, where none leaves so much); GPUs are split by tokens offered."""
    models = site.mesh.model_ids
    tokens = dict.fromkeys(models, 0.0)
    for kind in demand:
        tokens[kind.model_id] += kind.rps * (kind.input_tokens + kind.output_tokens)
    shape_of = {model_id: _default_shape(site, model_id) for model_id in models}
    total = sum(tokens.values())
    left, counts = site.gpus, dict[tuple[str, Parallelism], int]()
    for place_, model_id in enumerate(models):
        share = tokens[model_id] / total if total else 1.0 / len(models)
        gpus = left if place_ == len(models) - 1 else round(share * site.gpus)
        count = max(1, min(gpus, left) // shape_of[model_id].gpus)
        counts[model_id, shape_of[model_id]] = count
        left -= count * shape_of[model_id].gpus
    found = _shrunk(site, counts)
    if found is None:
        raise ConfigInvalid(
            field="policy",
            value="static-default",
            remedy=f"{_words(site.mesh, counts)} do not fit the topology's GPUs: add nodes",
        )
    return found


def splits(site: Site, demand: Sequence[Demand], *, most: int) -> tuple[Deployment, ...]:
    """Static splits of the GPUs among several models, one shape for each, the best ``most`` by
    fluid load: the busiest model's replicas are least busy, then all together."""
    models = len(site.mesh.model_ids)
    if comb(site.gpus - 1, models - 1) > SPLITS_MAX:
        raise ConfigInvalid(
            field="policies",
            value="static-best",
            remedy=f"{models} models on {site.gpus} GPUs have too many splits to look at; compare "
            "policies that begin with the topology's replicas, or fewer models",
        )
    ranked: list[tuple[float, float, str, Counts]] = []
    for budget in _budgets(site.gpus, models):
        options = [
            _options(site, model_id, gpus, demand)
            for model_id, gpus in zip(site.mesh.model_ids, budget, strict=True)
        ]
        for chosen in product(*options):
            counts = {key: count for _, key, count in chosen}
            loads = [load for load, _, _ in chosen]
            ranked.append((max(loads), sum(loads), _words(site.mesh, counts), counts))
    found: dict[str, Deployment] = {}
    for _, _, name, counts in sorted(ranked, key=lambda entry: entry[:3]):
        if name not in found and (placed := deployment(site, counts)) is not None:
            found[name] = placed
        if len(found) == most:
            break
    return tuple(found.values())


def own(site: Site) -> Deployment:
    """The topology's replicas; raises ConfigInvalid if it names none."""
    mesh = site.mesh
    if not mesh.replicas:
        raise ConfigInvalid(
            field="mesh.replicas", value=(), remedy="policy static needs replicas of these models"
        )
    return Deployment(wished_words(mesh), mesh.replicas)


def wished_words(mesh: MeshConfig) -> str:
    """The topology's replicas as a plan in words."""
    return _words(
        mesh,
        Counter(
            (mesh.model_of(wish.model_id).model_id, Parallelism.parse(wish.parallelism))
            for wish in mesh.replicas
        ),
    )


def candidates(site: Site, demand: Sequence[Demand], *, most: int) -> tuple[Deployment, ...]:
    """The static deployments to look at in hindsight: all uniform ones, or of several models the
    best splits; at most ``most``, those least busy by the fluid model."""
    if len(site.mesh.model_ids) > 1:
        return splits(site, demand, most=most)
    model_id = site.mesh.model.model_id
    found = uniforms(site, model_id)

    def load(option: Deployment) -> tuple[float, str]:
        shape = Parallelism.parse(option.shapes[model_id])
        return site.load(model_id, shape, demand) / len(option.replicas), option.name

    return tuple(sorted(found, key=load)[:most])


def fluid_scale(site: Site, option: Deployment, demand: Sequence[Demand]) -> float:
    """How many times ``demand`` the replicas bear as a fluid, each model's of one shape: those of
    the busiest model; 1 where nothing is offered."""
    busiest = 0.0
    for model_id, shape in option.shapes.items():
        count = sum(wish.model_id == model_id for wish in option.replicas)
        load = site.load(model_id, Parallelism.parse(shape), demand)
        busiest = max(busiest, load / count)
    return 1.0 / busiest if busiest > 0.0 else 1.0


def begun(site: Site, policy: Policy, demand: Sequence[Demand]) -> MeshConfig:
    """The topology with the replicas that ``policy`` begins with. One that is best in hindsight, or
    that plans for a warm-up, begins with the topology's own: only a comparison knows these."""
    if policy.begin == "shape":
        shape = Parallelism.parse(policy.shape)
        if len(site.mesh.model_ids) == 1:
            return uniform(site, site.mesh.model.model_id, shape).on(site.mesh)
        raise ConfigInvalid(
            field="policy",
            value=policy.name,
            remedy="one shape for several models is no split of the GPUs: use static-best",
        )
    if policy.begin == "default" or not site.mesh.replicas:
        return default(site, demand).on(site.mesh)
    return site.mesh


def gpus_by_shape(words: str) -> dict[str, int]:
    """How many GPUs each shape has, of a plan in words."""
    gpus: Counter[str] = Counter()
    for count, shape in _PART.findall(words):
        gpus[shape] += int(count) * Parallelism.parse(shape).gpus
    return dict(gpus)


def _default_shape(site: Site, model_id: str) -> Parallelism:
    options = site.fitting(model_id)
    if not options:
        raise ConfigInvalid(
            field="model", value=model_id, remedy="no shape of it fits the topology's GPUs"
        )
    rooms = {shape: site.room(model_id, shape) for shape in options}
    roomy = [shape for shape in options if rooms[shape] >= ROOM]
    if not roomy:
        return max(options, key=lambda shape: rooms[shape])
    return min(roomy, key=lambda shape: (shape.pp, shape.tp))


def _budgets(gpus: int, models: int) -> Iterator[tuple[int, ...]]:
    """All ways to give each model at least one GPU."""
    for bars in combinations(range(1, gpus), models - 1):
        edges = (0, *bars, gpus)
        yield tuple(b - a for a, b in pairwise(edges))


def _options(
    site: Site, model_id: str, gpus: int, demand: Sequence[Demand]
) -> list[tuple[float, tuple[str, Parallelism], int]]:
    """Load of each replica, model and shape, and count: the best few with ``gpus`` GPUs."""
    options = [
        (site.load(model_id, shape, demand) / (gpus // shape.gpus), (model_id, shape),
         gpus // shape.gpus)
        for shape in site.fitting(model_id)
        if shape.gpus <= gpus
    ]  # fmt: skip
    return sorted(options)[:SHAPES_KEPT]


def _shrunk(site: Site, counts: dict[tuple[str, Parallelism], int]) -> Deployment | None:
    """``counts``, or as many of them as find room, taken from the most numerous; None if not even
    one replica of each does."""
    while True:
        found = deployment(site, counts)
        if found is not None:
            return found
        key = max(counts, key=lambda key: (counts[key], key))
        if counts[key] == 1:
            return None
        counts = {**counts, key: counts[key] - 1}


def _words(mesh: MeshConfig, counts: Counts) -> str:
    several = len(mesh.model_ids) > 1
    return ", ".join(
        f"{count} {model_id + ' ' if several else ''}{str(shape).removesuffix('pp1')}"
        for (model_id, shape), count in sorted(counts.items())
    )
