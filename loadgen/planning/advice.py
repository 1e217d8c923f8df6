"""What more hardware would bring: answers found by planning again with it."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from loadgen.planning.demand import Expected
from loadgen.planning.machine import Site, plus_gpus, with_network
from loadgen.planning.planner import Answer
from shared.cost.links import reload_s
from shared.cost.model import cost_model
from shared.hardware import Parallelism
from shared.messages.decisions import PlanOutlook
from shared.messages.plans import DeploymentPlan

Ask = Callable[[Site, Expected], Answer]

MORE = (1, 2, 4, 8)
"""GPUs added, until they bring something: the numbers that a tensor-parallel group may have."""
GAIN_MIN = 0.01  # of headroom or lateness: below is not worth a GPU
GOODPUT_GAIN_MIN = 0.001


class Brought(msgspec.Struct, frozen=True, kw_only=True):
    """``what`` was added, and what the plans with and without it are worth. ``gain``: of headroom,
    as a share of it; ``worth_it``: whether anything changed by more than a plan's rounding."""

    what: str
    plan: str
    headroom: float
    gain: float
    goodput_share: float | None
    e2e_s_p99: float | None
    lateness: float
    worth_it: bool


def more_gpus(site: Site, expected: Expected, base: Answer, ask: Ask) -> tuple[Brought, ...]:
    """One more GPU of each kind there is; where it brings nothing, the smallest number that does,
    too, up to ``MORE``'s last."""
    found: list[Brought] = []
    for kind in sorted({node.gpu_kind for node in site.mesh.nodes}):
        for count in MORE:
            grown = Site(mesh=plus_gpus(site.mesh, count, kind=kind), scheduler=site.scheduler)
            brought = _compared(f"{count} more {kind}", base, ask(grown, expected))
            if brought is None:
                continue
            if count == 1 or brought.worth_it or count == MORE[-1]:
                found.append(brought)
            if brought.worth_it:
                break
    return tuple(found)


def better_link(
    site: Site, expected: Expected, base: Answer, ask: Ask, folder: Path
) -> Brought | None:
    """A network as fast as the links inside a node; None where there is one node."""
    if len(site.mesh.nodes) < 2:  # noqa: PLR2004  # a network joins two
        return None
    faster = Site(mesh=with_network(site.mesh, folder, None), scheduler=site.scheduler)
    what = "a network between nodes as fast as the links inside them"
    return _compared(what, base, ask(faster, expected))


def start_words(site: Site, plan: DeploymentPlan) -> tuple[str, ...]:
    """How long replicas of the plan's shapes take to start, and what of it a faster link would
    save: weights come from the nodes' disks, so it is that one."""
    kinds = {gpu.gpu_id: gpu.kind for gpu in site.mesh.gpus()}
    found: dict[tuple[str, str, str], str] = {}
    for spec in plan.replicas:
        key = (spec.model_id, spec.parallelism, kinds[spec.gpus[0]])
        if key in found:
            continue
        shape = Parallelism.parse(spec.parallelism)
        nodes = len({site.mesh.node_of(gpu) for gpu in spec.gpus})
        name = site.mesh.model_of(spec.model_id).profile_name
        cost = cost_model(key[2], name, shape, nodes=nodes)
        weights_s = reload_s(cost.profile, cost.gpu, shape, nodes=nodes)
        disk = f"{cost.gpu.disk.bytes_per_s / 1e9:.3g} GB/s"
        found[key] = (
            f"A new {spec.parallelism.removesuffix('pp1')} of {spec.model_id} on {key[2]} takes "
            f"{cost.start_s:.0f} s to start: {cost.gpu.engine_start_s:.0f} s of engine and "
            f"{weights_s:.0f} s to read its weights from a disk of {disk}. A disk twice as fast "
            f"saves {weights_s / 2:.0f} s of that; a faster network saves nothing."
        )
    return tuple(text for _, text in sorted(found.items()))


def _compared(what: str, base: Answer, other: Answer) -> Brought | None:
    """None where either has no plan."""
    before, after = base.decision.chosen, other.decision.chosen
    if before is None or after is None:
        return None
    return Brought(
        what=what,
        plan=after.plan,
        headroom=after.headroom,
        gain=after.headroom / before.headroom - 1.0 if before.headroom > 0.0 else 0.0,
        goodput_share=after.goodput_share,
        e2e_s_p99=after.e2e_s_p99,
        lateness=after.lateness,
        worth_it=_better(before, after),
    )


def _better(before: PlanOutlook, after: PlanOutlook) -> bool:
    if after.headroom > before.headroom * (1.0 + GAIN_MIN):
        return True
    if after.lateness < before.lateness * (1.0 - GAIN_MIN):
        return True
    shares = (before.goodput_share, after.goodput_share)
    return None not in shares and (shares[1] or 0.0) - (shares[0] or 0.0) > GOODPUT_GAIN_MIN
