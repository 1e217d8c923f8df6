"""How a model's layers are split into pipeline stages."""

from collections.abc import Sequence

from shared.cost.profile import ModelFacts
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism


def even_stages(layers: int, pp: int) -> tuple[int, ...]:
    """``layers`` in ``pp`` stages that differ by at most one; raises ConfigInvalid."""
    if not 1 <= pp <= layers:
        raise ConfigInvalid(field="pp", value=pp, remedy=f"use 1 to {layers} stages")
    short, longer = divmod(layers, pp)
    return (short + 1,) * longer + (short,) * (pp - longer)


def stages_of(facts: ModelFacts, shape: Parallelism, stages: Sequence[int] = ()) -> tuple[int, ...]:
    """Layers of each stage: ``stages`` checked, or the even split. Raises ConfigInvalid."""
    split = tuple(stages) or even_stages(facts.layers, shape.pp)
    if len(split) != shape.pp or sum(split) != facts.layers or min(split) < 1:
        remedy = f"give {shape.pp} numbers of at least 1 that sum to {facts.layers}"
        raise ConfigInvalid(field="stages", value=split, remedy=remedy)
    return split
