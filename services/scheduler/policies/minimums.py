"""How many replicas each model has at least, and what gives where GPUs do not suffice."""

from collections.abc import Mapping, Sequence

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.interface import Problem
from services.scheduler.policies.joint_terms import plannable


def minimums(problem: Problem, table: Table) -> list[dict[str, int]]:
    """The ladder of the problem's models."""
    models = [model.model_id for model in problem.models]
    return ladder(table, models, problem.needs.replicas_min)


def ladder(
    table: Table, models: Sequence[str], replicas_min: Mapping[str, int]
) -> list[dict[str, int]]:
    """Least replicas by model, to be tried in turn: what the operator asks for, one of each model
    of which any are asked for, one of those that anything is expected of, none. A model that fits
    no shape is asked for none."""
    fitting = {column.model_id for column in table.columns if plannable(column)}
    busy = {kind.model_id for kind in table.types}
    asked = {model_id: replicas_min.get(model_id, 1) for model_id in models if model_id in fitting}
    one = {model_id: min(1, count) for model_id, count in asked.items()}
    needed = {model_id: int(model_id in busy) for model_id in asked}
    rungs: list[dict[str, int]] = []
    for rung in (asked, one, needed, {}):
        least = {model_id: count for model_id, count in rung.items() if count > 0}
        if least not in rungs:
            rungs.append(least)
    return rungs


def left_out(problem: Problem, models: set[str]) -> str:
    """Which models have no replica though one was asked for; empty when none."""
    needs = problem.needs.replicas_min
    without = [
        model.model_id
        for model in problem.models
        if model.model_id not in models and (model.types or needs.get(model.model_id, 1) > 0)
    ]
    return f"no GPUs for {', '.join(without)}" if without else ""
