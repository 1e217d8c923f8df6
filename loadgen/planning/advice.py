"""What more hardware would bring: answers found by planning again with it."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from loadgen.planning.answer import Answer
from loadgen.planning.demand import Expected
from loadgen.planning.machine import Site, plus_gpus, with_network
from shared.cost.links import reload_s
from shared.cost.model import cost_model
from shared.hardware import Parallelism
from shared.messages.decisions import PlanOutlook
from shared.messages.plans import DeploymentPlan, ReplicaSpec

Ask = Callable[[Site, Expected], Answer]

MORE = (1, 2, 4, 8)
"""GPUs added, until they bring something: the numbers that a tensor-parallel group may have."""
GAIN_MIN = 0.01  # of headroom or lateness: below is not worth a GPU
GOODPUT_GAIN_MIN = 0.001


class Brought(msgspec.Struct, frozen=True, kw_only=True):
    """``what`` was added, and what the plan is worth then. ``gain``: of headroom, as a share of it,
    None where nothing was carried before; ``worth_it``: whether anything gets better by more than a
    prediction's error."""

    what: str
    plan: str
    headroom: float
    gain: float | None
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
    what = "a network as fast as the links in a node"
    return _compared(what, base, ask(faster, expected))


def start_words(site: Site, plan: DeploymentPlan) -> tuple[str, ...]:
    """How long replicas of the plan's shapes take to start, and what of it a faster link would
    save: weights come from the nodes' disks, so it is that one."""
    found: dict[str, set[str]] = {}
    for model_id, kind, shape, nodes in sorted({_placed(site, spec) for spec in plan.replicas}):
        cost = cost_model(kind, site.mesh.model_of(model_id).profile_name, shape, nodes=nodes)
        weights_s = reload_s(cost.profile, cost.gpu, shape, nodes=nodes)
        disk = f"{cost.gpu.disk.bytes_per_s / 1e9:.3g} GB/s"
        text = (
            f"of {model_id} on {kind} takes {cost.start_s:.0f} s to start: "
            f"{cost.gpu.engine_start_s:.0f} s of engine and {weights_s:.0f} s to read its weights "
            f"from a disk of {disk}. A disk twice as fast saves {weights_s / 2:.0f} s of that; a "
            "faster network saves nothing."
        )
        found.setdefault(text, set()).add(str(shape).removesuffix("pp1"))
    return tuple(f"A new {' or '.join(sorted(names))} {text}" for text, names in found.items())


def _placed(site: Site, spec: ReplicaSpec) -> tuple[str, str, Parallelism, int]:
    """Model, kind of GPU, shape, and nodes that it spans."""
    kinds = {gpu.gpu_id: gpu.kind for gpu in site.mesh.gpus()}
    nodes = len({site.mesh.node_of(gpu) for gpu in spec.gpus})
    return spec.model_id, kinds[spec.gpus[0]], Parallelism.parse(spec.parallelism), nodes


def _compared(what: str, base: Answer, other: Answer) -> Brought | None:
    """None where there is no plan even so."""
    before, after = base.decision.chosen, other.decision.chosen
    if after is None:
        return None
    carried = before.headroom if before is not None else 0.0
    return Brought(
        what=what,
        plan=after.plan,
        headroom=after.headroom,
        gain=after.headroom / carried - 1.0 if carried > 0.0 else None,
        goodput_share=after.goodput_share,
        e2e_s_p99=after.e2e_s_p99,
        lateness=after.lateness,
        worth_it=before is None or _better(before, after),
    )


def _better(before: PlanOutlook, after: PlanOutlook) -> bool:
    """More is carried, or what is carried is served better without carrying less than the demand
    that was carried before."""
    if after.headroom > before.headroom * (1.0 + GAIN_MIN):
        return True
    if after.headroom < min(1.0, before.headroom):
        return False
    if after.lateness < before.lateness * (1.0 - GAIN_MIN):
        return True
    first, second = before.goodput_share, after.goodput_share
    return first is not None and second is not None and second - first > GOODPUT_GAIN_MIN
