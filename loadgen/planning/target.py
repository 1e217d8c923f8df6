"""The plan that a person means by ``tp2*1,tp1*2``: these shapes, on GPUs so that least has to move.

Replicas of a wanted shape stay where they are, the rest of the model's go. A new replica goes to
GPUs of one node where that is possible, and there to those of replicas that go, which hold weights
and KV cache already. Other models are left alone. Same input, same plan.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.placing import SLUG_MAX, brief, choose
from services.scheduler.policies.weights import ANY_TYPE, joined
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec
from shared.messages.replicas import WorkerReport

FIELD = "--to"
CHOICES_MAX = 4096  # of which standing replicas stay: beyond, the first ones decide
_TERM = re.compile(r"(tp[0-9]+(?:pp[0-9]+)?)(?:\*([0-9]+))?")
_DIGEST = 6  # characters of a replica's id that tell its GPUs and epoch

Counts = dict[Parallelism, int]


def read_shapes(text: str) -> Counts:
    """``tp2pp1*1,tp1*2`` as counts; ``tp2`` is one of them. Raises ConfigInvalid."""
    counts: Counter[Parallelism] = Counter()
    for term in text.replace(" ", "").split(","):
        match = _TERM.fullmatch(term)
        if match is None:
            remedy = 'write shapes with their number, as in "tp2*1" or "tp2pp1*1,tp1*2"'
            raise ConfigInvalid(field=FIELD, value=text, remedy=remedy)
        try:
            shape = Parallelism.parse(match[1])
        except ConfigInvalid as error:
            raise ConfigInvalid(field=FIELD, value=match[1], remedy=error.remedy) from None
        count = int(match[2] or 1)
        if count == 0:
            remedy = "ask for 1 or more of each shape, or leave it out"
            raise ConfigInvalid(field=FIELD, value=term, remedy=remedy)
        counts[shape] += count
    return dict(counts)


def offers_of(workers: Iterable[WorkerReport]) -> tuple[GpuOffer, ...]:
    """The GPUs of workers that stay."""
    return tuple(
        GpuOffer(
            gpu_id=report.worker_id,
            node_id=report.node_id,
            kind=report.gpu.kind,
            models=report.models,
        )
        for report in sorted(workers, key=lambda report: report.worker_id)
        if not report.leaving
    )


def which_model(wished: str, plan: DeploymentPlan, offers: Sequence[GpuOffer]) -> str:
    """The model that is meant: the only one there is, if ``wished`` is empty. Raises
    ConfigInvalid."""
    known = {spec.model_id for spec in plan.replicas}
    known.update(model_id for offer in offers for model_id in offer.models)
    if wished in known or (wished and not known):
        return wished
    names = ", ".join(sorted(known)) or "none: no worker has reported"
    if wished or len(known) != 1:
        remedy = f"name one of those that are served: {names}"
        raise ConfigInvalid(field="--model", value=wished, remedy=remedy)
    return known.pop()


def target_plan(
    counts: Counts,
    model_id: str,
    *,
    offers: Sequence[GpuOffer],
    in_force: DeploymentPlan,
    epoch: int,
    taken: Collection[str] = (),
) -> DeploymentPlan:
    """The plan with ``counts`` of ``model_id``, instead of what it has in force as ``epoch``. Equal
    shares for equal GPUs. No id of a new replica is in force, in ``taken``, or was ever given to
    another replica. Raises ConfigInvalid where GPUs are too few."""
    others = tuple(spec for spec in in_force.replicas if spec.model_id != model_id)
    used = {gpu for spec in others for gpu in spec.gpus}
    free = [offer for offer in offers if offer.serves(model_id) and offer.gpu_id not in used]
    needed = sum(shape.gpus * count for shape, count in counts.items())
    if needed > len(free):
        remedy = f"needs {needed} GPUs, {len(free)} are there for {model_id}: ask for fewer"
        raise ConfigInvalid(field=FIELD, value=_words(counts), remedy=remedy)
    standing = tuple(spec for spec in in_force.replicas if spec.model_id == model_id)
    layout = _best(counts, standing, free)
    if layout is None:
        remedy = f"it finds no room on {len(free)} GPUs: a tensor-parallel group needs one node"
        raise ConfigInvalid(field=FIELD, value=_words(counts), remedy=remedy)
    known = {spec.replica_id for spec in in_force.replicas} | set(taken)
    own = list(layout.kept)
    for shape, gpus in layout.new:
        replica_id = _new_id(model_id, shape, gpus, epoch=epoch, known=known)
        known.add(replica_id)
        spec = ReplicaSpec(
            replica_id=replica_id, model_id=model_id, parallelism=str(shape), gpus=gpus
        )
        own.append(spec)
    rows = _rows_of(in_force, others)
    rows[model_id] = {ANY_TYPE: {spec.replica_id: float(len(spec.gpus)) for spec in own}}
    return make_plan((*others, *own), joined(rows), reason=f"switched by hand to {_words(counts)}")


@dataclass(frozen=True, slots=True)
class _Layout:
    """Standing replicas that stay, and GPUs of new ones. ``at_home``: GPUs of new ones that hold a
    part of a replica that goes; ``spread``: nodes that new ones span beyond one each."""

    kept: tuple[ReplicaSpec, ...]
    new: tuple[tuple[Parallelism, tuple[str, ...]], ...]
    at_home: int
    spread: int

    @property
    def rank(self) -> tuple[int, int, int]:
        return sum(len(spec.gpus) for spec in self.kept), -self.spread, self.at_home


def _best(
    counts: Counts, standing: Sequence[ReplicaSpec], free: Sequence[GpuOffer]
) -> _Layout | None:
    """Most GPUs that stay as they are, then fewest nodes, then most new replicas at home."""
    best: _Layout | None = None
    for kept in itertools.islice(_choices(counts, standing, free), CHOICES_MAX):
        if best is not None and sum(len(spec.gpus) for spec in kept) < best.rank[0]:
            break  # they come with the largest first
        layout = _filled(counts, standing, kept, free)
        if layout is not None and (best is None or layout.rank > best.rank):
            best = layout
    return best or _filled(counts, standing, (), free)


def _choices(
    counts: Counts, standing: Sequence[ReplicaSpec], free: Sequence[GpuOffer]
) -> Iterator[tuple[ReplicaSpec, ...]]:
    """Which replicas could stay: as many of each wanted shape as there are first, then one fewer in
    all, and so on."""
    there = {offer.gpu_id for offer in free}
    by_shape: dict[Parallelism, list[ReplicaSpec]] = {}
    for spec in sorted(standing, key=lambda spec: spec.replica_id):
        shape = Parallelism.parse(spec.parallelism)
        if shape in counts and there.issuperset(spec.gpus):
            by_shape.setdefault(shape, []).append(spec)
    numbers = itertools.product(
        *(range(min(counts[shape], len(specs)), -1, -1) for shape, specs in by_shape.items())
    )
    sizes = [shape.gpus for shape in by_shape]

    def gpus(each: tuple[int, ...]) -> int:
        return sum(number * size for number, size in zip(each, sizes, strict=True))

    for each in sorted(itertools.islice(numbers, CHOICES_MAX), key=gpus, reverse=True):
        picks = [
            itertools.combinations(specs, number)
            for specs, number in zip(by_shape.values(), each, strict=True)
        ]
        for chosen in itertools.product(*picks):
            yield tuple(spec for specs in chosen for spec in specs)


def _filled(
    counts: Counts,
    standing: Sequence[ReplicaSpec],
    kept: tuple[ReplicaSpec, ...],
    offers: Sequence[GpuOffer],
) -> _Layout | None:
    """New replicas beside ``kept``, the largest first; None where one finds no room."""
    in_use = {gpu for spec in kept for gpu in spec.gpus}
    leaving = {gpu for spec in standing if spec not in kept for gpu in spec.gpus}
    free = [offer for offer in offers if offer.gpu_id not in in_use]
    have = Counter(Parallelism.parse(spec.parallelism) for spec in kept)
    wanted = [shape for shape, count in counts.items() for _ in range(count - have[shape])]
    new: list[tuple[Parallelism, tuple[str, ...]]] = []
    spread = 0
    for shape in sorted(wanted, key=lambda shape: (-shape.tp, -shape.gpus)):
        gpus = _on_one_node(shape, free, leaving)
        if not gpus:
            gpus = choose(shape, free)
            nodes = {offer.node_id for offer in free if offer.gpu_id in gpus}
            spread += len(nodes) - 1
        if not gpus:
            return None
        new.append((shape, gpus))
        free = [offer for offer in free if offer.gpu_id not in gpus]
    at_home = sum(gpu in leaving for _, gpus in new for gpu in gpus)
    return _Layout(kept, tuple(new), at_home, spread)


def _on_one_node(
    shape: Parallelism, free: Sequence[GpuOffer], leaving: Collection[str]
) -> tuple[str, ...]:
    """GPUs of one kind on one node, those of replicas that go first, in the order of their names;
    empty where no node has enough. Of equal nodes, the one where fewest GPUs are left over."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for offer in free:
        nodes.setdefault((offer.node_id, offer.kind), []).append(offer.gpu_id)
    best, best_rank = (), None
    for key, gpus in sorted(nodes.items()):
        if len(gpus) < shape.gpus:
            continue
        chosen = sorted(gpus, key=lambda gpu: (gpu not in leaving, gpu))[: shape.gpus]
        rank = (-sum(gpu in leaving for gpu in chosen), len(gpus), key)
        if best_rank is None or rank < best_rank:
            best, best_rank = tuple(sorted(chosen)), rank
    return best


def _new_id(
    model_id: str,
    shape: Parallelism,
    gpus: tuple[str, ...],
    *,
    epoch: int,
    known: Collection[str],
) -> str:
    """Such as ``tiny-tp2-3fa9c1``: the same again for the same question alone."""
    slug = re.sub(r"[^A-Za-z0-9_-]", "-", model_id)[:SLUG_MAX]
    for salt in itertools.count():
        text = "\0".join([model_id, str(shape), *gpus, str(epoch), str(salt)])
        digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
        replica_id = f"{slug}-{brief(shape)}-{digest}"
        if replica_id not in known:
            return replica_id
    raise AssertionError("endless")


def _rows_of(
    plan: DeploymentPlan, specs: Iterable[ReplicaSpec]
) -> dict[str, dict[str, dict[str, float]]]:
    """The weights of ``specs`` by model, as they are."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    models = {spec.replica_id: spec.model_id for spec in specs}
    for name, row in plan.weights.items():
        for replica_id, share in row.items():
            if replica_id in models:
                rows.setdefault(models[replica_id], {}).setdefault(name, {})[replica_id] = share
    for model_id in set(models.values()) - rows.keys():
        rows[model_id] = {ANY_TYPE: {i: 1.0 for i, of in models.items() if of == model_id}}
    return rows


def _words(counts: Counts) -> str:
    return ",".join(f"{brief(shape)}*{count}" for shape, count in counts.items())
