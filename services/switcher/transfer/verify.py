"""Finds what is wrong with a plan of copies, without the planner: from the placement alone.

It goes cell by cell over the finest grid of each sheet, so it is slow where the planner is not.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from services.switcher.transfer.problem import Held, TransferPlan, TransferProblem
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.placement.copies import DISK, Copy
from shared.placement.sheets import (
    Area,
    ModelShape,
    Rank,
    SheetName,
    areas_of,
    cache_token_bytes,
    sheets_of,
)

UNLAYERED = ("embedding", "output", "final_norm")


def verify_transfer(problem: TransferProblem, plan: TransferPlan) -> list[str]:
    """Every fault found; none for a plan that says it is infeasible and has nothing."""
    if plan.infeasible:
        return ["infeasible, yet with copies"] if plan.copies else []
    checker = _Checker(problem, plan)
    return [
        *checker.stages(),
        *checker.strangers(),
        *checker.weights(),
        *checker.cache(),
        *checker.totals(),
        *checker.memory(),
    ]


class _Checker:
    def __init__(self, problem: TransferProblem, plan: TransferPlan) -> None:
        self._problem = problem
        self._plan = plan
        self._specs: Mapping[str, ReplicaSpec] = {
            spec.replica_id: spec
            for spec in (*problem.leaving, *problem.staying, *problem.arriving)
        }
        self._leaving = {spec.replica_id for spec in problem.leaving}
        self._arriving = {spec.replica_id for spec in problem.arriving}

    def stages(self) -> Iterator[str]:
        spans = [span for span in self._plan.stages if span[0] != span[1]]
        for one, other in zip(sorted(spans), sorted(spans)[1:], strict=False):
            if one[1] > other[0]:
                yield f"stages {one} and {other} overlap"
        for _, _, copy in self._all():
            if not 0 <= copy.stage < len(self._plan.stages):
                yield f"no stage {copy.stage}"
            elif copy.sheet == "cache" and copy.stage:
                yield "KV cache in a later stage"

    def strangers(self) -> Iterator[str]:
        """Copies for ranks, of sheets or from sources that do not exist."""
        for gpu, replica_id, copy in self._all():
            spec = self._specs.get(replica_id)
            if spec is None or gpu not in spec.gpus:
                yield f"{replica_id} has no rank on {gpu}"
                continue
            if copy.sheet != "cache" and replica_id not in self._arriving:
                yield f"{replica_id} has its weights"
            if copy.source == DISK:
                if copy.sheet == "cache":
                    yield "KV cache from disk"
                continue
            held = self._held(copy.source, copy.replica_id, copy.sheet)
            if held is None or held.meet(copy.area) != copy.area:
                yield f"{copy.source} does not hold {copy}"
            elif self._specs[copy.replica_id].model_id != spec.model_id:
                yield f"{copy} is of another model"
            elif not self._still_there(copy):
                yield f"{copy} comes after {copy.replica_id} has freed it"

    def weights(self) -> Iterator[str]:
        for spec in self._problem.arriving:
            for gpu, areas in _ranks(spec, self._model(spec)):
                copies = self._plan.copies.get(gpu, {}).get(spec.replica_id, ())
                for name in sheets_of(self._model(spec)):
                    found = [copy for copy in copies if copy.sheet == name]
                    if name != "cache":
                        yield from self._fetched(spec, gpu, name, areas.get(name), found)

    def cache(self) -> Iterator[str]:
        kept = {(move.source, move.target) for move in self._problem.moves}
        kept -= set(self._plan.replayed)
        for spec in (*self._problem.arriving, *self._problem.staying):
            for gpu, areas in _ranks(spec, self._model(spec)):
                copies = self._plan.copies.get(gpu, {}).get(spec.replica_id, ())
                by_source: defaultdict[str, list[Copy]] = defaultdict(list)
                for copy in copies:
                    if copy.sheet == "cache":
                        by_source[copy.replica_id].append(copy)
                due = {source for source, target in kept if target == spec.replica_id}
                for source in due | set(by_source):
                    area = areas["cache"] if source in due else None
                    yield from self._fetched(
                        spec, gpu, "cache", area, by_source[source], only=source
                    )

    def totals(self) -> Iterator[str]:
        by_link: defaultdict[str, int] = defaultdict(int)
        in_place = cache = 0
        for gpu, replica_id, copy in self._all():
            spec = self._specs[replica_id]
            size = copy.area.cells * sheets_of(self._model(spec))[copy.sheet].cell_bytes
            if copy.sheet == "cache":
                size *= self._tokens(copy.replica_id, replica_id)
                cache += size if copy.source != gpu else 0
            if copy.source == gpu:
                in_place += size
            elif size:
                by_link[f"{copy.source or 'disk'}>{gpu}"] += size
        if by_link != self._plan.bytes_by_link:
            yield f"bytes by link are {dict(by_link)}"
        if in_place != self._plan.bytes_in_place:
            yield f"bytes in place are {in_place}"
        if cache != self._plan.cache_bytes:
            yield f"bytes of KV cache are {cache}"
        if sum(by_link.values()) != self._plan.bytes_bound:
            yield "bytes moved are not the least"

    def memory(self) -> Iterator[str]:
        """Each GPU at its fullest in each stage: all of the stage fetched, nothing of it freed."""
        for gpu, budget in self._problem.budget_bytes.items():
            if not budget or gpu in self._problem.dead:
                continue
            pools = self._problem.held.get(gpu, Held()).cache_bytes
            for spec in self._problem.arriving:
                if gpu in spec.gpus:
                    pool = self._plan.cache_bytes_max.get(gpu, 0)
                    least = self._least(spec, gpu)
                    if pool < least:
                        yield f"{gpu}: {pool} bytes of KV cache, {least} are needed"
                    pools += pool
            for stage in range(len(self._plan.stages)):
                used = pools + self._old_bytes(gpu, stage) + self._new_bytes(gpu, stage)
                if used > budget and self._hosts_new(gpu):
                    yield f"{gpu}: {used} of {budget} bytes in stage {stage}"

    def _fetched(
        self,
        spec: ReplicaSpec,
        gpu: str,
        name: SheetName,
        area: Area | None,
        copies: list[Copy],
        *,
        only: str = "",
    ) -> Iterator[str]:
        """``area`` once, nothing beside it, nothing from afar that is near, no disk without need.
        ``only``: the replica that the KV cache is of."""
        where = f"{gpu} of {spec.replica_id}, {name}"
        if area is None:
            if copies:
                yield f"{where}: nothing is needed"
            return
        holders = self._holders(spec.model_id, name, only)
        grid = _Grid([area, *(copy.area for copy in copies), *(held for _, held in holders)])
        times = grid.zeros()
        own, anywhere = grid.zeros(), grid.zeros()
        for holder, held in holders:
            anywhere[grid.at(held)] += 1
            if holder == gpu:
                own[grid.at(held)] += 1
        for copy in copies:
            times[grid.at(copy.area)] += 1
            if copy.source != gpu and own[grid.at(copy.area)].any():
                yield f"{where}: {copy} is in place"
            if copy.source == DISK and anywhere[grid.at(copy.area)].any():
                yield f"{where}: {copy} is on a GPU"
        needed = grid.zeros()
        needed[grid.at(area)] = 1
        if (times != needed).any():
            yield f"{where}: {int((times != needed).sum())} cells are not fetched exactly once"

    def _holders(self, model_id: str, name: SheetName, only: str) -> list[tuple[str, Area]]:
        found: list[tuple[str, Area]] = []
        for spec in (*self._problem.leaving, *self._problem.staying):
            if spec.model_id != model_id or only not in {"", spec.replica_id}:
                continue
            for gpu, areas in _ranks(spec, self._model(spec)):
                if gpu not in self._problem.dead and name in areas:
                    found.append((gpu, areas[name]))
        return found

    def _held(self, gpu: str, replica_id: str, name: SheetName) -> Area | None:
        spec = self._specs.get(replica_id)
        if spec is None or replica_id in self._arriving or gpu in self._problem.dead:
            return None
        return next(
            (areas.get(name) for held, areas in _ranks(spec, self._model(spec)) if held == gpu),
            None,
        )

    def _still_there(self, copy: Copy) -> bool:
        if copy.replica_id not in self._leaving or copy.sheet in {*UNLAYERED, "cache"}:
            return True
        freed = self._plan.stages[: copy.stage]
        return all(
            max(span[0], copy.area.layers[0]) >= min(span[1], copy.area.layers[1]) for span in freed
        )

    def _old_bytes(self, gpu: str, stage: int) -> int:
        freed = {layer for span in self._plan.stages[:stage] for layer in range(*span)}
        total = 0
        for spec in (*self._problem.leaving, *self._problem.staying):
            sheets = sheets_of(self._model(spec))
            for held, areas in _ranks(spec, self._model(spec)):
                for name, area in areas.items() if held == gpu else ():
                    layers = set(range(*area.layers))
                    whole = not self._problem.dead.intersection(spec.gpus)
                    if spec.replica_id in self._leaving and whole and name not in UNLAYERED:
                        layers -= freed
                    units = area.units[1] - area.units[0]
                    if name != "cache":
                        total += len(layers) * units * sheets[name].cell_bytes
        return total

    def _new_bytes(self, gpu: str, stage: int) -> int:
        return sum(
            copy.area.cells * sheets_of(self._model(self._specs[replica_id]))[copy.sheet].cell_bytes
            for replica_id, copies in self._plan.copies.get(gpu, {}).items()
            for copy in copies
            if copy.sheet != "cache" and copy.stage <= stage
        )

    def _least(self, spec: ReplicaSpec, gpu: str) -> int:
        """KV cache that the new rank on ``gpu`` must have: for what is moved, and to be of use."""
        shape = Parallelism.parse(spec.parallelism)
        token_bytes = cache_token_bytes(self._model(spec), Rank.of(spec.gpus.index(gpu), shape))
        moved = sum(
            move.tokens
            for move in self._problem.moves
            if move.target == spec.replica_id
            and (move.source, move.target) not in self._plan.replayed
        )
        configured = self._problem.cache_bytes.get(gpu, 0)
        needed = moved * token_bytes
        needed = min(needed, configured) if configured else needed
        return max(needed, self._problem.cache_tokens_min * token_bytes)

    def _tokens(self, source: str, target: str) -> int:
        return sum(
            move.tokens
            for move in self._problem.moves
            if (move.source, move.target) == (source, target)
        )

    def _hosts_new(self, gpu: str) -> bool:
        return any(gpu in spec.gpus for spec in self._problem.arriving)

    def _model(self, spec: ReplicaSpec) -> ModelShape:
        return self._problem.models[spec.model_id]

    def _all(self) -> Iterator[tuple[str, str, Copy]]:
        for gpu, by_replica in self._plan.copies.items():
            for replica_id, copies in by_replica.items():
                for copy in copies:
                    yield gpu, replica_id, copy


class _Grid:
    """A sheet cut at every border of ``areas``: each cell of it is in all of an area or in none."""

    def __init__(self, areas: Iterable[Area]) -> None:
        areas = list(areas)
        self._layers = sorted({edge for area in areas for edge in area.layers})
        self._units = sorted({edge for area in areas for edge in area.units})

    def zeros(self) -> NDArray[np.int64]:
        return np.zeros((len(self._layers), len(self._units)), dtype=np.int64)

    def at(self, area: Area) -> tuple[slice, slice]:
        (top, bottom), (first, last) = area.layers, area.units
        return (
            slice(self._layers.index(top), self._layers.index(bottom)),
            slice(self._units.index(first), self._units.index(last)),
        )


def _ranks(spec: ReplicaSpec, model: ModelShape) -> Iterator[tuple[str, dict[SheetName, Area]]]:
    shape = Parallelism.parse(spec.parallelism)
    for number, gpu in enumerate(spec.gpus):
        yield gpu, areas_of(model, Rank.of(number, shape))
