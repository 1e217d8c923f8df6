"""When an attempt has been silent for too long, and may be given up."""

from services.ingress.config import IngressConfig
from services.ingress.events import LossReason
from services.ingress.handover import crossing
from services.ingress.journey import Journey


def lost(
    journey: Journey, config: IngressConfig, *, heard_s: float, now_s: float
) -> tuple[LossReason, str] | None:
    """Why a streaming attempt is taken for lost; None if it is not. ``heard_s``: when its replica
    was last heard of."""
    silent_s = now_s - max(journey.heard_s, heard_s)
    if silent_s >= config.stall_s:
        return "stalled", f"no chunk and no heartbeat for {silent_s:.1f} s"
    if journey.probing and now_s >= journey.due_s:
        # Its worker has settled this attempt: the chunk that said so was lost.
        quiet_s = now_s - journey.heard_s
        return "unacknowledged", f"silent for {quiet_s:.1f} s, and its replica does not know it"
    if journey.early and not crossing(journey, now_s):
        return "gap", f"tokens after {len(journey.tokens)} were lost when it was taken over"
    return None


def wants_probe(journey: Journey, now_s: float) -> bool:
    """Whether it should be submitted again, to see if its replica still knows it. Not while nobody
    has said yet which worker leads the replica."""
    quiet = now_s - journey.heard_s >= journey.probe_s
    return quiet and not journey.probing and bool(journey.leader_id)
