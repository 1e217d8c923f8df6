"""The job ``plan_transfer``: which bytes go where in a switch. It may take up to a second."""

from services.switcher.events import TransferPlanned, TransferWanted
from services.switcher.transfer import Held, Links, Move, TransferProblem, plan_transfer
from shared.cost.library import gpu_facts
from shared.cost.profile import GpuFacts
from shared.errors import ConfigInvalid
from shared.hardware import GpuSpec

CPU = "cpu"


def plan(wanted: TransferWanted) -> TransferPlanned:
    """Never raises: what cannot be planned is said in ``failure``, and costs a live switch, not the
    service."""
    try:
        made = plan_transfer(problem_of(wanted))
    except Exception as error:  # noqa: BLE001  # whatever it is: named in the log and the reason
        return TransferPlanned(epoch=wanted.epoch, failure=f"{type(error).__name__}: {error}")
    if made.infeasible:
        return TransferPlanned(epoch=wanted.epoch, failure=made.infeasible)
    return TransferPlanned(
        epoch=wanted.epoch,
        copies=made.copies,
        stages=made.stages,
        cache_bytes_max=made.cache_bytes_max,
        bytes_total=max(0, sum(made.bytes_by_link.values()) - made.cache_bytes),
        bytes_bound=made.bytes_bound - made.cache_bytes,
        bytes_in_place=made.bytes_in_place,
        notes=made.notes,
    )


def problem_of(wanted: TransferWanted) -> TransferProblem:
    """The planner's view of the switch: budgets and links are those of the kinds of GPU."""
    kinds = {gpu.kind: _facts(gpu.kind) for gpu in wanted.gpus.values()}
    return TransferProblem(
        models=wanted.shapes,
        nodes=wanted.nodes,
        leaving=wanted.leaving,
        staying=wanted.staying,
        arriving=wanted.arriving,
        dead=frozenset(wanted.dead),
        moves=tuple(Move(source=m.source, target=m.target, tokens=m.tokens) for m in wanted.moves),
        links=_links(kinds),
        budget_bytes={w: _budget(gpu, kinds[gpu.kind]) for w, gpu in wanted.gpus.items()},
        cache_tokens_min=wanted.cache_tokens_min,
        held={
            worker_id: Held(cache_bytes=held.cache_bytes, cache_used_bytes=held.used_bytes)
            for worker_id, held in wanted.held.items()
        },
    )


def _facts(kind: str) -> GpuFacts | None:
    """None where nobody has measured that kind: then its memory is what its worker says, and its
    links are those of a common GPU."""
    try:
        return gpu_facts(kind)
    except ConfigInvalid:
        return None


def _links(kinds: dict[str, GpuFacts | None]) -> Links:
    """Of mixed kinds the slower ones: the busiest link is most likely theirs."""
    if set(kinds) <= {CPU}:
        return Links.cpu()
    known = [Links.of(facts) for facts in kinds.values() if facts is not None]
    return min(known, key=lambda links: links.peer, default=Links())


def _budget(gpu: GpuSpec, facts: GpuFacts | None) -> int:
    """Bytes for weights and KV cache; 0 where the worker sets no limit."""
    if not gpu.memory_bytes or facts is None:
        return gpu.memory_bytes
    return max(1, int((gpu.memory_bytes - facts.reserved_bytes) * facts.usable))
