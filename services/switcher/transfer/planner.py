"""Plans the copies of a switch: memory first, then who sends what to whom.

Weights and KV cache are balanced apart, and so are the stages: they follow each other. Of the time
of the KV cache, and of all stages but the first, requests wait.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from services.switcher.transfer.layout import Layout, layout_of
from services.switcher.transfer.links import Loads, Network
from services.switcher.transfer.memory import Staging, stage
from services.switcher.transfer.notes import memory_notes
from services.switcher.transfer.problem import TransferPlan, TransferProblem
from services.switcher.transfer.rounding import Cut, cut, joined
from services.switcher.transfer.sources import choose_sources
from services.switcher.transfer.wants import Want, cache_wants, weight_wants
from shared.errors import ConfigInvalid
from shared.placement.copies import Copy

Divide = Callable[[Sequence[Want], Network], tuple[list[list[Cut]], float]]
"""Cuts each want into pieces with their holders; and how long it takes at least, in seconds."""


def plan_transfer(problem: TransferProblem) -> TransferPlan:
    """The copies of a switch, or why it has to reload instead. Pure; milliseconds, up to half a
    second for tens of GPUs on several nodes: not on an event loop then."""
    return plan_with(problem, _balanced)


def plan_with(problem: TransferProblem, divide: Divide) -> TransferPlan:
    """The same with sources chosen by ``divide``."""
    try:
        layout = layout_of(problem)
    except ConfigInvalid as error:
        return TransferPlan(infeasible=str(error))
    if not layout.sheets:
        return TransferPlan()
    staging = stage(problem, layout)
    if staging.wrong:
        return TransferPlan(infeasible=staging.wrong)
    cache, lost = _cache(problem, layout, staging)
    weights = weight_wants(layout, staging)
    tally = _Tally(Network(problem.links, problem.nodes), divide)
    for number, wants in enumerate(weights):
        tally.enter(wants, number)
    weights_s = tally.seconds
    tally.enter(cache, 0)
    cache_bytes = _to_move(cache)
    return TransferPlan(
        copies=tally.by_worker(),
        stages=staging.stages,
        bytes_by_link=dict(sorted(tally.bytes_by_link.items())),
        bytes_bound=sum(map(_to_move, weights)) + cache_bytes,
        bytes_in_place=tally.in_place,
        cache_bytes=cache_bytes,
        seconds=tally.seconds,
        seconds_bound=tally.bound_s,
        cache_seconds=tally.seconds - weights_s,
        cache_bytes_max=staging.cache_bytes_max,
        replayed=(*((move.source, move.target) for move in staging.replayed), *lost),
        notes=(
            *memory_notes(problem, layout, staging),
            *(f"KV cache of {old} for {new} lay on lost GPUs: replayed" for old, new in lost),
        ),
    )


@dataclass(slots=True)
class _Tally:
    """What is planned so far."""

    network: Network
    divide: Divide
    copies: defaultdict[tuple[str, str], list[Copy]] = field(
        default_factory=lambda: defaultdict(list)
    )
    bytes_by_link: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    in_place: int = 0
    seconds: float = 0.0
    bound_s: float = 0.0

    def enter(self, wants: Sequence[Want], number: int) -> None:
        """Wants that are fetched at one time."""
        divided, bound_s = self.divide(wants, self.network)
        loads = Loads(self.network)
        cuts: defaultdict[tuple[str, str], list[Cut]] = defaultdict(list)
        for want, found in zip(wants, divided, strict=True):
            cuts[want.gpu, want.replica_id] += found
            for (source, _), piece in found if want.counted else ():
                loads.add(source, want.gpu, 0 if want.adopted else piece.bytes)
                if source == want.gpu:
                    self.in_place += piece.bytes
                else:
                    self.bytes_by_link[f"{source or 'disk'}>{want.gpu}"] += piece.bytes
        for key, found in cuts.items():
            self.copies[key] += joined(found, number)
        self.seconds += loads.seconds
        self.bound_s += min(bound_s, loads.seconds)  # ways at no cost are in the bound alone

    def by_worker(self) -> dict[str, dict[str, tuple[Copy, ...]]]:
        found: dict[str, dict[str, tuple[Copy, ...]]] = {}
        for (gpu, replica_id), copies in sorted(self.copies.items()):
            found.setdefault(gpu, {})[replica_id] = tuple(copies)
        return found


def _balanced(wants: Sequence[Want], network: Network) -> tuple[list[list[Cut]], float]:
    sourcing = choose_sources(wants, network)
    pairs = zip(wants, sourcing.shares, strict=True)
    return [cut(want, shares) for want, shares in pairs], sourcing.bound_s


def _cache(
    problem: TransferProblem, layout: Layout, staging: Staging
) -> tuple[list[Want], list[tuple[str, str]]]:
    """Wants of all moves whose KV cache is to be had, and the moves whose KV cache is not."""
    found: list[Want] = []
    lost: list[tuple[str, str]] = []
    for move in problem.moves:
        if move in staging.replayed:
            continue
        wants = cache_wants(layout, move)
        if all(want.holders for want in wants):
            found += wants
        else:
            lost.append((move.source, move.target))
    return found, lost


def _to_move(wants: Iterable[Want]) -> int:
    """Bytes that no plan can leave where they are."""
    return sum(
        want.bytes
        for want in wants
        if want.counted and not any(gpu == want.gpu for gpu, _ in want.holders)
    )
