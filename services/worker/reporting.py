"""Whether a replica's load has changed so much that routers should hear of it. Pure.

A replica that idles says so now and then only: with hundreds of them, ten reports a second from
each would be most of what the broker carries.
"""

from shared.messages.replicas import ReplicaReport

KV_SHARE_NOTICED = 0.02  # of the KV blocks; below, it moves no router's choice
_EXACT = (
    "epoch", "phase", "running", "waiting", "requests_total", "running_max", "waiting_max",
    "kv_blocks_total",
)  # fmt: skip


def noticeable(report: ReplicaReport, told: ReplicaReport) -> bool:
    """Whether ``report`` says anything that a router that heard ``told`` should know.

    ``requests_total`` counts too: a request that ended while another began changes no load, but
    the router still counts its own decision on top of it.
    """
    if any(getattr(report, field) != getattr(told, field) for field in _EXACT):
        return True
    moved_blocks = abs(report.kv_blocks_used - told.kv_blocks_used)
    return moved_blocks > KV_SHARE_NOTICED * report.kv_blocks_total
