"""Whether a replica's load has changed so much that routers should hear of it. Pure.

A replica that idles says so now and then only: with hundreds of them, ten reports a second from
each would be most of what the broker carries.
"""

from shared.messages.replicas import ReplicaReport

KV_SHARE_NOTICED = 0.02  # of the KV blocks; below, it moves no router's choice


def noticeable(report: ReplicaReport, told: ReplicaReport) -> bool:
    """Whether ``report`` says anything that a router that heard ``told`` should know.

    ``requests_total`` counts too: a request that ended while another began changes no load, but
    the router still counts its own decision on top of it.
    """
    if (
        report.requests_total != told.requests_total
        or report.running != told.running
        or report.waiting != told.waiting
        or report.phase != told.phase
        or report.epoch != told.epoch
        or report.running_max != told.running_max
        or report.waiting_max != told.waiting_max
        or report.kv_blocks_total != told.kv_blocks_total
    ):
        return True
    moved_blocks = abs(report.kv_blocks_used - told.kv_blocks_used)
    return moved_blocks > KV_SHARE_NOTICED * report.kv_blocks_total
