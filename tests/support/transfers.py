"""Random switches for the planner of copies, and what performs its plans on real bytes."""

import random
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from services.switcher.transfer.problem import Held, Links, Move, TransferPlan, TransferProblem
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.placement.copies import DISK
from shared.placement.sheets import (
    ModelShape,
    Rank,
    SheetName,
    areas_of,
    cache_token_bytes,
    sheets_of,
    weight_bytes,
)

SMALL = ModelShape(
    model_id="m", layers=6, hidden=8, intermediate=24, heads=8, kv_heads=4, head_dim=4,
    vocabulary=20, item_bytes=2,
)  # fmt: skip
LLAMA_70B = ModelShape(
    model_id="llama-70b", layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8,
    head_dim=128, vocabulary=128256, item_bytes=2,
)  # fmt: skip


def gpus_of(nodes: int, per_node: int) -> list[str]:
    return [f"n{node}-g{gpu}" for node in range(nodes) for gpu in range(per_node)]


def replicas(name: str, shapes: Iterable[str], gpus: Iterable[str], model_id: str = "m") -> tuple[
    ReplicaSpec, ...
]:  # fmt: skip
    """Replicas of these shapes on the GPUs, one after the other."""
    left = iter(gpus)
    return tuple(
        ReplicaSpec(
            replica_id=f"{name}{i}",
            model_id=model_id,
            parallelism=shape,
            gpus=tuple(next(left) for _ in range(Parallelism.parse(shape).gpus)),
        )
        for i, shape in enumerate(shapes)
    )


def every_move(
    old: Iterable[ReplicaSpec], new: Iterable[ReplicaSpec], tokens: int
) -> tuple[Move, ...]:
    targets = list(new)
    return tuple(
        Move(source=one.replica_id, target=other.replica_id, tokens=tokens)
        for one in old
        for other in targets
        if one.model_id == other.model_id
    )


def random_switch(seed: int) -> TransferProblem:
    """Any shapes onto any GPUs: split, merged, moved, with lost GPUs and several models."""
    rng = random.Random(seed)
    gpus = gpus_of(rng.randint(1, 3), rng.randint(1, 6))
    models = {f"m{i}": _model(f"m{i}", rng) for i in range(rng.randint(1, 2))}
    old = _random_plan("old", gpus, models, rng)
    staying = tuple(spec for spec in old if rng.random() < 0.25)
    leaving = tuple(spec for spec in old if spec not in staying)
    taken = {gpu for spec in staying for gpu in spec.gpus}
    dead = frozenset(gpu for gpu in gpus if rng.random() < rng.choice((0.0, 0.2)))
    free = [gpu for gpu in gpus if gpu not in taken | dead]
    if rng.random() < 0.5:
        rng.shuffle(free)
    arriving = _random_plan("new", free, models, rng)
    takers = [*arriving, *(spec for spec in staying if not dead & set(spec.gpus))]
    moves = tuple(move for move in every_move(leaving, takers, 0) if rng.random() < 0.6)
    return TransferProblem(
        models=models,
        nodes={gpu: gpu.split("-")[0] for gpu in gpus},
        leaving=leaving,
        staying=staying,
        arriving=arriving,
        dead=dead,
        moves=tuple(
            Move(source=move.source, target=move.target, tokens=rng.choice((0, 3, 50)))
            for move in moves
        ),
        links=rng.choice((Links(), Links.cpu(), Links(peer=3e10, network=1e10))),
    )


def tightened(problem: TransferProblem, seed: int) -> TransferProblem:
    """The same, with budgets between what the larger of old and new needs, and both."""
    rng = random.Random(seed)
    held: dict[str, Held] = {}
    budget: dict[str, int] = {}
    slack = rng.random()
    for gpu in problem.nodes:
        old = _weights_on(gpu, (*problem.leaving, *problem.staying), problem.models)
        new = _weights_on(gpu, problem.arriving, problem.models)
        used = rng.randint(0, 60) * _token_bytes_on(
            gpu, (*problem.leaving, *problem.staying), problem.models
        )
        held[gpu] = Held(cache_bytes=used, cache_used_bytes=used)
        least = max(old, new) + used + 2 * _token_bytes_on(gpu, problem.arriving, problem.models)
        budget[gpu] = int(least + slack * (min(old, new) + used)) + 1
    return TransferProblem(
        models=problem.models,
        nodes=problem.nodes,
        leaving=problem.leaving,
        staying=problem.staying,
        arriving=problem.arriving,
        dead=problem.dead,
        moves=problem.moves,
        links=problem.links,
        budget_bytes=budget,
        held=held,
    )


class Sheets:
    """Every weight and every token's KV cache as one number that occurs once, on GPUs and disk."""

    def __init__(self, problem: TransferProblem, tokens: int = 2) -> None:
        self._problem = problem
        self._specs = {
            spec.replica_id: spec
            for spec in (*problem.leaving, *problem.staying, *problem.arriving)
        }
        self._whole = {
            (model_id, name): _numbers(sheet.layers, sheet.units, start=1)
            for model_id, model in problem.models.items()
            for name, sheet in sheets_of(model).items()
            if name != "cache"
        }
        self._cache = {
            spec.replica_id: _numbers(
                sheets_of(problem.models[spec.model_id])["cache"].layers,
                sheets_of(problem.models[spec.model_id])["cache"].units * tokens,
                start=1 + 1000 * number,
            )
            for number, spec in enumerate(problem.leaving)
        }
        self._tokens = tokens

    def perform(self, plan: TransferPlan) -> int:
        """Makes each arriving rank's sheets by its copies, from what each source holds, freeing
        stage by stage; compares every number. The ranks compared."""
        ranks = 0
        for gpu, by_replica in plan.copies.items():
            for replica_id, copies in by_replica.items():
                spec = self._specs[replica_id]
                ranks += 1
                held = self._areas(spec, gpu)
                for name, area in held.items():
                    if name == "cache":
                        self._check_cache(plan, gpu, spec)
                        continue
                    if spec not in self._problem.arriving:
                        continue
                    made = np.zeros_like(self._whole[spec.model_id, name])
                    for copy in copies:
                        if copy.sheet == name:
                            at = _slices(copy.area.layers, copy.area.units)
                            made[at] = self._read(copy.source, copy.replica_id, spec, name)[at]
                    at = _slices(area.layers, area.units)
                    expected = np.zeros_like(made)
                    expected[at] = self._whole[spec.model_id, name][at]
                    assert (made == expected).all(), (gpu, replica_id, name)
        return ranks

    def _check_cache(self, plan: TransferPlan, gpu: str, spec: ReplicaSpec) -> None:
        area = self._areas(spec, gpu)["cache"]
        for move in self._problem.moves:
            given_up = (move.source, move.target) in plan.replayed
            if move.target != spec.replica_id or given_up:
                continue
            whole = self._cache[move.source]
            made = np.zeros_like(whole)
            for copy in plan.copies[gpu][spec.replica_id]:
                if copy.sheet == "cache" and copy.replica_id == move.source:
                    source = self._specs[move.source]
                    lies = self._areas(source, copy.source)["cache"]
                    there = np.zeros_like(whole)
                    at = self._in_cache(lies.layers, lies.units)
                    there[at] = whole[at]
                    at = self._in_cache(copy.area.layers, copy.area.units)
                    made[at] = there[at]
            expected = np.zeros_like(whole)
            at = self._in_cache(area.layers, area.units)
            expected[at] = whole[at]
            assert (made == expected).all(), (gpu, spec.replica_id, move)

    def _read(
        self, source: str, replica_id: str, spec: ReplicaSpec, name: SheetName
    ) -> NDArray[np.int64]:
        """What the source has of the sheet: zeros elsewhere."""
        whole = self._whole[spec.model_id, name]
        if source == DISK:
            return whole
        assert source not in self._problem.dead, source
        area = self._areas(self._specs[replica_id], source)[name]
        there = np.zeros_like(whole)
        at = _slices(area.layers, area.units)
        there[at] = whole[at]
        return there

    def _areas(self, spec: ReplicaSpec, gpu: str):  # noqa: ANN202
        shape = Parallelism.parse(spec.parallelism)
        return areas_of(self._problem.models[spec.model_id], Rank.of(spec.gpus.index(gpu), shape))

    def _in_cache(self, layers: tuple[int, int], units: tuple[int, int]) -> tuple[slice, slice]:
        return _slices(layers, (units[0] * self._tokens, units[1] * self._tokens))


def _slices(layers: tuple[int, int], units: tuple[int, int]) -> tuple[slice, slice]:
    return slice(*layers), slice(*units)


def _numbers(layers: int, units: int, *, start: int) -> NDArray[np.int64]:
    return np.arange(start, start + layers * units, dtype=np.int64).reshape(layers, units)


def _model(model_id: str, rng: random.Random) -> ModelShape:
    kv_heads = rng.choice((1, 2, 3, 4))
    return ModelShape(
        model_id=model_id,
        layers=rng.randint(1, 9),
        hidden=8,
        intermediate=rng.randint(8, 30),
        heads=kv_heads * rng.choice((2, 4)),
        kv_heads=kv_heads,
        head_dim=4,
        vocabulary=rng.randint(8, 30),
        item_bytes=2,
        tied_embeddings=rng.random() < 0.3,
        qkv_bias=rng.random() < 0.3,
    )


def _random_plan(
    name: str, gpus: list[str], models: Mapping[str, ModelShape], rng: random.Random
) -> tuple[ReplicaSpec, ...]:
    left = list(gpus)
    found: list[ReplicaSpec] = []
    while left and rng.random() < 0.9:
        model = models[rng.choice(sorted(models))]
        tp = rng.randint(1, min(len(left), model.heads))
        pp = rng.randint(1, min(len(left) // tp, model.layers))
        found.append(
            ReplicaSpec(
                replica_id=f"{name}{len(found)}",
                model_id=model.model_id,
                parallelism=f"tp{tp}pp{pp}",
                gpus=tuple(left[: tp * pp]),
            )
        )
        left = left[tp * pp :]
    return tuple(found)


def _weights_on(gpu: str, specs: Iterable[ReplicaSpec], models: Mapping[str, ModelShape]) -> int:
    return sum(
        weight_bytes(models[spec.model_id], _rank(spec, gpu)) for spec in specs if gpu in spec.gpus
    )


def _token_bytes_on(
    gpu: str, specs: Iterable[ReplicaSpec], models: Mapping[str, ModelShape]
) -> int:
    return sum(
        cache_token_bytes(models[spec.model_id], _rank(spec, gpu))
        for spec in specs
        if gpu in spec.gpus
    )


def _rank(spec: ReplicaSpec, gpu: str) -> Rank:
    return Rank.of(spec.gpus.index(gpu), Parallelism.parse(spec.parallelism))
