"""Who holds what, and who needs what: the parts of replicas on GPUs."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.switcher.transfer.problem import TransferProblem
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.placement.sheets import (
    Area,
    ModelShape,
    Rank,
    Sheet,
    SheetName,
    areas_of,
    check_shape,
    sheets_of,
)

EDGES: frozenset[SheetName] = frozenset({"embedding", "output", "final_norm"})
"""Sheets that belong to no layer: they are never freed before the replica is."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One rank of one replica. ``goes``: its replica is leaving, and whole: it frees layers when it
    is told so. One that has lost a rank does nothing any more until it is stopped."""

    gpu: str
    replica_id: str
    model_id: str
    areas: dict[SheetName, Area]
    goes: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """``old``: parts on GPUs that live, of leaving and staying replicas. ``new``: arriving ones."""

    sheets: dict[str, dict[SheetName, Sheet]]  # by model
    old: tuple[Part, ...]
    new: tuple[Part, ...]

    @property
    def layers(self) -> int:
        """Of the deepest model."""
        return max(sheets["layer"].layers for sheets in self.sheets.values())

    def token_bytes(self, part: Part) -> int:
        return part.areas["cache"].cells * self.sheets[part.model_id]["cache"].cell_bytes


def layout_of(problem: TransferProblem) -> Layout:
    """Raises ConfigInvalid where a replica cannot be what it says, or a move is of none."""
    _check_names(problem)
    whole = [spec for spec in problem.leaving if not problem.dead.intersection(spec.gpus)]
    others = [spec for spec in problem.leaving if spec not in whole]
    old = (
        *_parts(whole, problem.models, goes=True),
        *_parts((*others, *problem.staying), problem.models, goes=False),
    )
    new = tuple(_parts(problem.arriving, problem.models, goes=False))
    for part in (*old, *new):
        if part.gpu not in problem.nodes:
            raise ConfigInvalid(field="gpus", value=part.gpu, remedy="name a GPU of a known node")
    for part in new:
        if part.gpu in problem.dead:
            raise ConfigInvalid(field="gpus", value=part.gpu, remedy="use GPUs that live")
    used = {part.model_id for part in (*old, *new)}
    return Layout(
        sheets={model_id: sheets_of(problem.models[model_id]) for model_id in sorted(used)},
        old=tuple(part for part in old if part.gpu not in problem.dead),
        new=new,
    )


def _check_names(problem: TransferProblem) -> None:
    targets = [spec.replica_id for spec in (*problem.staying, *problem.arriving)]
    sources = [spec.replica_id for spec in problem.leaving]
    twice = [name for name, count in Counter((*sources, *targets)).items() if count > 1]
    if twice:
        raise ConfigInvalid(field="replica_id", value=twice[0], remedy="give the new one another")
    for move, count in Counter((m.source, m.target) for m in problem.moves).items():
        if count > 1 or move[0] not in sources or move[1] not in targets:
            remedy = "name a pair of one that leaves and one that does not, once"
            raise ConfigInvalid(field="moves", value=move, remedy=remedy)


def _parts(
    specs: Iterable[ReplicaSpec], models: Mapping[str, ModelShape], *, goes: bool
) -> list[Part]:
    parts: list[Part] = []
    for spec in specs:
        model = models.get(spec.model_id)
        if model is None:
            raise ConfigInvalid(
                field="model_id", value=spec.model_id, remedy="use a model whose shape is reported"
            )
        shape = Parallelism.parse(spec.parallelism)
        check_shape(model, shape)
        if len(spec.gpus) != shape.gpus:
            raise ConfigInvalid(field="gpus", value=spec.gpus, remedy=f"name {shape.gpus} of them")
        parts += (
            Part(gpu, spec.replica_id, spec.model_id, areas_of(model, Rank.of(i, shape)), goes)
            for i, gpu in enumerate(spec.gpus)
        )
    return parts
