"""How good plans of copies are, and how long they take: ``python -m loadgen.bench.bench_transfer``.

Switches of Llama 3 70B over up to 32 H100s on four nodes: other tensor parallelism, pipelines made
and unmade, replicas added, GPUs lost, all of it moved to other GPUs, memory short. The time of the
busiest link, against the bound that no plan beats, and OServe's way to choose sources. All of it is
planned; no byte is moved here. Prints one JSON line a case.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import msgspec

from loadgen.bench.environment import Environment, environment
from services.switcher.transfer import (
    Held,
    Links,
    Move,
    TransferPlan,
    TransferProblem,
    plan_transfer,
    verify_transfer,
)
from services.switcher.transfer.greedy import greedy_transfer
from shared.cost.library import gpu_facts
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec
from shared.placement.sheets import ModelShape, Rank, weight_bytes

MODEL = ModelShape(
    model_id="llama-3-70b", layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8,
    head_dim=128, vocabulary=128256, item_bytes=2,
)  # fmt: skip
GPU = "h100"
PER_NODE = 8
TOKENS = 20_000
"""In the KV cache, from each old replica to each new one."""
MEMORY_SHARE = 0.5
"""Of the smaller of old and new, that fits beside the larger where memory is short."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """``moved``: how far every new rank is from where the old ones began, in GPUs; "shuffled":
    anywhere. ``keep``: of the old replicas, how many stay. ``lost``: GPUs."""

    name: str
    old: Sequence[str]
    new: Sequence[str]
    moved: int = 0
    shuffled: bool = False
    keep: int = 0
    lost: int = 0
    tight: bool = False


CASES = (
    Case(name="4 x tp8 to 8 x tp4", old=["tp8"] * 4, new=["tp4"] * 8),
    Case(name="8 x tp4 to 4 x tp8", old=["tp4"] * 8, new=["tp8"] * 4),
    Case(name="4 x tp4pp2 to 4 x tp8", old=["tp4pp2"] * 4, new=["tp8"] * 4),
    Case(name="4 x tp8 to 4 x tp2pp4", old=["tp8"] * 4, new=["tp2pp4"] * 4),
    Case(
        name="mixed to mixed", old=["tp8", "tp4", "tp4", "tp2pp2", "tp2pp2", "tp8"],
        new=["tp4pp2", "tp2pp4", "tp4", "tp4", "tp2pp2", "tp4"],
    ),
    Case(name="8 x tp4 to 4 x tp8, moved", old=["tp4"] * 8, new=["tp8"] * 4, moved=12),
    Case(name="16 x tp2 to 4 x tp4pp2, shuffled", old=["tp2"] * 16, new=["tp4pp2"] * 4,
         shuffled=True),
    Case(name="8 x tp4 to 2 x tp8pp2, shuffled", old=["tp4"] * 8, new=["tp8pp2"] * 2,
         shuffled=True),
    Case(name="2 x tp4 to 8 x tp4", old=["tp4"] * 2, new=["tp4"] * 6, keep=2, moved=8),
    Case(name="1 x tp2 to 15 x tp2 on two nodes", old=["tp2"], new=["tp2"] * 7, keep=1, moved=2),
    Case(name="4 x tp8 to 7 x tp4, three GPUs lost", old=["tp8"] * 4, new=["tp4"] * 7, lost=3),
    Case(name="4 x tp8 to 8 x tp4, tight", old=["tp8"] * 4, new=["tp4"] * 8, tight=True),
    Case(name="4 x tp8 to 4 x tp2pp4, tight", old=["tp8"] * 4, new=["tp2pp4"] * 4, tight=True),
)  # fmt: skip


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """``ratio_*``: planned time of the busiest link over the bound. Times are planned ones, but
    for ``plan_ms_*``."""

    benchmark: str
    case: str
    gpus: int
    layers: int
    repeats: int
    plan_ms_p50: float
    plan_ms_max: float
    greedy_ms_p50: float
    transfer_s: float
    bound_s: float
    greedy_s: float
    ratio_planner: float
    ratio_greedy: float
    bytes_moved: int
    bytes_bound: int
    bytes_in_place: int
    copies: int
    stages: int
    replayed: int
    environment: Environment


def problem_of(case: Case, *, seed: int) -> TransferProblem:
    rng = random.Random(seed)
    gpus = [f"n{i // PER_NODE}-g{i % PER_NODE}" for i in range(32)]
    dead = frozenset(rng.sample(gpus, case.lost))
    places = gpus[case.moved :] + gpus[: case.moved]
    if case.shuffled:
        rng.shuffle(places)
    old = _replicas("old", case.old, gpus)
    new = _replicas("new", case.new, [gpu for gpu in places if gpu not in dead])
    leaving = old[case.keep :]
    problem = TransferProblem(
        models={MODEL.model_id: MODEL},
        nodes={gpu: gpu.split("-")[0] for gpu in gpus},
        leaving=leaving,
        staying=old[: case.keep],
        arriving=new,
        dead=dead,
        moves=tuple(
            Move(source=one.replica_id, target=other.replica_id, tokens=TOKENS)
            for one in leaving
            for other in new
        ),
        links=Links.of(gpu_facts(GPU)),
    )
    return _tight(problem) if case.tight else problem


def measure(case: Case, *, repeats: int, seed: int, where: Environment) -> Result:
    """Plans with both; the planner's plan is verified."""
    problem = problem_of(case, seed=seed)
    plan_transfer(problem)  # loads scipy, once in a process
    took_ms: list[float] = []
    greedy_ms: list[float] = []
    plan, greedy = TransferPlan(), TransferPlan()
    for _ in range(repeats):
        start_ns = time.perf_counter_ns()
        plan = plan_transfer(problem)
        between_ns = time.perf_counter_ns()
        greedy = greedy_transfer(problem)
        took_ms.append((between_ns - start_ns) / 1e6)
        greedy_ms.append((time.perf_counter_ns() - between_ns) / 1e6)
    assert not plan.infeasible, plan.infeasible
    wrong = verify_transfer(problem, plan)
    assert not wrong, wrong
    bound_s = plan.seconds_bound
    specs = (*problem.leaving, *problem.staying, *problem.arriving)
    return Result(
        benchmark="transfer_planner",
        case=case.name,
        gpus=len({gpu for spec in specs for gpu in spec.gpus}),
        layers=MODEL.layers,
        repeats=repeats,
        plan_ms_p50=round(median(took_ms), 1),
        plan_ms_max=round(max(took_ms), 1),
        greedy_ms_p50=round(median(greedy_ms), 1),
        transfer_s=round(plan.seconds, 4),
        bound_s=round(bound_s, 4),
        greedy_s=round(greedy.seconds, 4),
        ratio_planner=round(plan.seconds / bound_s, 4) if bound_s else 1.0,
        ratio_greedy=round(greedy.seconds / bound_s, 4) if bound_s else 1.0,
        bytes_moved=sum(plan.bytes_by_link.values()),
        bytes_bound=plan.bytes_bound,
        bytes_in_place=plan.bytes_in_place,
        copies=sum(len(c) for by_replica in plan.copies.values() for c in by_replica.values()),
        stages=len(plan.stages),
        replayed=len(plan.replayed),
        environment=where,
    )


def _replicas(name: str, shapes: Sequence[str], gpus: Sequence[str]) -> tuple[ReplicaSpec, ...]:
    left = iter(gpus)
    return tuple(
        ReplicaSpec(
            replica_id=f"{name}{i}",
            model_id=MODEL.model_id,
            parallelism=shape,
            gpus=tuple(next(left) for _ in range(Parallelism.parse(shape).gpus)),
        )
        for i, shape in enumerate(shapes)
    )


def _tight(problem: TransferProblem) -> TransferProblem:
    cache_bytes = 4_000_000_000
    budget: dict[str, int] = {}
    for gpu in problem.nodes:
        old, new = _on(gpu, problem.leaving), _on(gpu, problem.arriving)
        budget[gpu] = max(old, new) + int(MEMORY_SHARE * min(old, new)) + 2 * cache_bytes
    held = Held(cache_bytes=cache_bytes, cache_used_bytes=cache_bytes // 2)
    return replace(problem, budget_bytes=budget, held=dict.fromkeys(problem.nodes, held))


def _on(gpu: str, specs: Sequence[ReplicaSpec]) -> int:
    return sum(
        weight_bytes(MODEL, Rank.of(spec.gpus.index(gpu), Parallelism.parse(spec.parallelism)))
        for spec in specs
        if gpu in spec.gpus
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_transfer")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    where = environment()
    for case in CASES:
        result = measure(case, repeats=arguments.repeats, seed=arguments.seed, where=where)
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


if __name__ == "__main__":
    main()
