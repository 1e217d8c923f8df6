"""The planner of copies on random switches: against a checker, brute force, and real bytes."""

import itertools
import random
from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.switcher.transfer import (
    Links,
    TransferPlan,
    TransferProblem,
    plan_transfer,
    verify_transfer,
)
from services.switcher.transfer.greedy import greedy_transfer
from services.switcher.transfer.stages import Ledger, stages_of
from shared.placement.sheets import ModelShape, sheets_of
from tests.support.transfers import (
    LLAMA_70B,
    Sheets,
    every_move,
    gpus_of,
    random_switch,
    replicas,
    tightened,
)

SEEDS = st.integers(0, 2**32)


def largest_cell_s(problem: TransferProblem) -> float:
    """How long the largest thing that cannot be cut takes on the slowest way."""
    links = problem.links
    slowest = min(links.local, links.peer, links.network, links.disk, links.host)
    tokens = max([1, *(move.tokens for move in problem.moves)])
    return max(
        sheet.cell_bytes * (tokens if sheet.name == "cache" else 1) / slowest
        for model in problem.models.values()
        for sheet in sheets_of(model).values()
    )


def check(problem: TransferProblem) -> TransferPlan:
    """Nothing wrong, every byte in its place, and near the bound but for what cannot be cut."""
    plan = plan_transfer(problem)
    assert verify_transfer(problem, plan) == []
    if not plan.infeasible:
        Sheets(problem).perform(plan)
        assert plan.seconds_bound <= plan.seconds * (1 + 1e-9)
        parts = len(plan.stages) + 1
        assert plan.seconds <= 1.05 * plan.seconds_bound + 2 * parts * largest_cell_s(problem)
    return plan


@settings(max_examples=250, deadline=None)
@given(seed=SEEDS)
def test_plans_of_any_switch(seed: int) -> None:
    """Otherwise a rank would lack weights, or fetch them twice, or have wrong ones."""
    plan = check(random_switch(seed))
    assert not plan.infeasible
    assert plan.stages == ((0, 0),)


@settings(max_examples=250, deadline=None)
@given(seed=SEEDS)
def test_plans_where_memory_is_short(seed: int) -> None:
    """Otherwise a GPU would run out of memory in the middle of a switch."""
    check(tightened(random_switch(seed), seed))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_the_greedy_comparator_plans_rightly(seed: int) -> None:
    """Otherwise the planner would be compared with something that does not work."""
    problem = random_switch(seed)
    plan = greedy_transfer(problem)
    assert verify_transfer(problem, plan) == []
    Sheets(problem).perform(plan)
    assert plan.seconds >= plan_transfer(problem).seconds_bound * (1 - 1e-9)


def nodes_full_of_replicas(rng: random.Random, nodes: int) -> list[str]:
    """Shapes that fill up to ``nodes`` times eight GPUs, one at least."""
    layouts = (["tp8"], ["tp4pp2"], ["tp2pp4"], ["tp1pp8"], ["tp4", "tp4"], ["tp2pp2"], ["tp2"] * 4)
    return [shape for _ in range(rng.randint(1, nodes)) for shape in rng.choice(layouts)]


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_large_models_are_within_five_percent_of_the_bound(seed: int) -> None:
    """Otherwise a link would be busy while others wait."""
    rng = random.Random(seed)
    gpus = gpus_of(rng.randint(1, 4), 8)
    places = rng.sample(gpus, len(gpus))
    old = replicas("old", nodes_full_of_replicas(rng, len(gpus) // 8), gpus, LLAMA_70B.model_id)
    new = replicas("new", nodes_full_of_replicas(rng, len(gpus) // 8), places, LLAMA_70B.model_id)
    problem = TransferProblem(
        models={LLAMA_70B.model_id: LLAMA_70B},
        nodes={gpu: gpu.split("-")[0] for gpu in gpus},
        leaving=old,
        arriving=new,
        moves=every_move(old, new, 20_000),
        links=rng.choice((Links(), Links(network=2.8e11), Links(peer=2e11, network=5e10))),
    )
    plan = plan_transfer(problem)
    assert verify_transfer(problem, plan) == []
    assert plan.seconds <= 1.05 * plan.seconds_bound


def tiny(rng: random.Random) -> TransferProblem:
    """A few cells for one or two ranks, that two or three others hold."""
    model = ModelShape(
        model_id="m", layers=1, hidden=rng.choice((1, 3)), intermediate=rng.randint(1, 3), heads=1,
        kv_heads=1, head_dim=1, vocabulary=rng.randint(1, 2), item_bytes=1,
    )  # fmt: skip
    gpus = gpus_of(2, 3)
    rng.shuffle(gpus)
    holders, targets = rng.randint(2, 3), rng.randint(1, 2)
    return TransferProblem(
        models={"m": model},
        nodes={gpu: gpu.split("-")[0] for gpu in gpus},
        staying=replicas("old", ["tp1"] * holders, gpus),
        arriving=replicas("new", ["tp1"] * targets, gpus[holders:]),
        links=Links(peer=1.0, network=rng.choice((0.5, 1.0, 4.0))),
    )


def best_by_brute_force(problem: TransferProblem) -> float:
    """Every way to choose a source for every cell, as the set of reachable loads; the least time
    of the busiest link, in seconds."""
    sheets = [s for s in sheets_of(problem.models["m"]).values() if s.name != "cache"]
    sizes = [sheet.cell_bytes for sheet in sheets for _ in range(sheet.layers * sheet.units)]
    holders = [spec.gpus[0] for spec in problem.staying]
    reached: set[tuple[tuple[str, int], ...]] = {()}
    for spec, size in itertools.product(problem.arriving, sizes):
        target = spec.gpus[0]
        following: set[tuple[tuple[str, int], ...]] = set()
        for loads, source in itertools.product(reached, holders):
            sums = defaultdict[str, int](int, dict(loads))
            sums[f"out {source}"] += size
            sums[f"in {target}"] += size
            if problem.nodes[source] != problem.nodes[target]:
                sums[f"network out {problem.nodes[source]}"] += size
                sums[f"network in {problem.nodes[target]}"] += size
            following.add(tuple(sorted(sums.items())))
        reached = following
    network = problem.links.network
    return min(
        max(size / (network if name.startswith("network") else 1.0) for name, size in loads)
        for loads in reached
    )


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_tiny_switches_against_brute_force(seed: int) -> None:
    """Otherwise the bound would be none, or the planner would leave easy gains."""
    problem = tiny(random.Random(seed))
    best_s = best_by_brute_force(problem)
    plan = plan_transfer(problem)
    assert verify_transfer(problem, plan) == []
    assert plan.seconds_bound <= best_s * (1 + 1e-9)
    slowest = min(problem.links.peer, problem.links.network)
    cell_s = max(s.cell_bytes for s in sheets_of(problem.models["m"]).values()) / slowest
    assert plan.seconds <= best_s + cell_s


def random_ledger(rng: random.Random) -> Ledger:
    """Few GPUs, few layers: old and new have the same layers in all, as replicas do."""
    gpus, layers = rng.randint(1, 4), rng.randint(1, 5)

    def cut() -> np.ndarray:
        held = np.zeros((gpus, layers), dtype=np.int64)
        for layer in range(layers):
            for _ in range(4):
                held[rng.randrange(gpus) if rng.random() < 0.5 else layer % gpus, layer] += 1
        return held

    old, new = cut(), cut()
    full = np.maximum(old.sum(axis=1), new.sum(axis=1))
    return Ledger(
        gpus=tuple(f"g{gpu}" for gpu in range(gpus)),
        budget=full + rng.randint(0, 5),
        fixed=np.zeros(gpus, dtype=np.int64),
        edges=np.array([rng.randint(0, 2) for _ in range(gpus)], dtype=np.int64),
        old=old,
        new=new,
    )


def fewest_by_brute_force(ledger: Ledger) -> int | None:
    """Every order of spans, with the edges first or last."""
    layers = ledger.old.shape[1]
    free = ledger.budget - ledger.fixed - ledger.old.sum(axis=1)
    found: list[int] = []
    for edges_first in (True, False):
        start = free - ledger.edges if edges_first else free
        if start.min() < 0:
            continue
        reached = {frozenset[int](): start}
        for count in range(1, layers + 1):
            following: dict[frozenset[int], np.ndarray] = {}
            for done, left in reached.items():
                for first, stop in itertools.combinations(range(layers + 1), 2):
                    span = frozenset(range(first, stop))
                    after = left - ledger.new[:, first:stop].sum(axis=1)
                    if span & done or after.min() < 0:
                        continue
                    freed = after + ledger.old[:, first:stop].sum(axis=1)
                    if len(done | span) < layers:
                        following[done | span] = freed
                    elif edges_first or (after - ledger.edges).min() >= 0:
                        found.append(count)
                    elif (freed - ledger.edges).min() >= 0:
                        found.append(count + 1)
            reached = following
    return min(found, default=None)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_stages_against_brute_force(seed: int) -> None:
    """Otherwise a switch would reload that could be staged, or would be cut into needless parts."""
    ledger = random_ledger(random.Random(seed))
    found = stages_of(ledger, np.zeros(len(ledger.gpus), dtype=np.int64))
    fewest = fewest_by_brute_force(ledger)
    if found is None or fewest is None:
        assert found is None
        assert fewest is None
    else:
        assert found.slack.min() >= 0
        assert fewest <= len(found.spans) <= fewest + 1
