"""What one rank has to fetch, and from whom, to become part of a new replica."""

import msgspec

from shared.placement.sheets import Area, SheetName

DISK = ""
"""The source of what no GPU holds: the checkpoint on the target's own disk."""


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Fetch ``area`` of ``sheet`` from ``source``'s part of ``replica_id``. Of the cache: the part
    of every request that comes from that replica. ``stage`` orders copies where memory is too
    short for all of the old and the new at once; 0 where it is not."""

    sheet: SheetName
    area: Area
    source: str  # worker_id, or DISK
    replica_id: str = ""
    stage: int = 0
