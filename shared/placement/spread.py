"""Who takes a request over when its replica goes: the same answer wherever it is asked.

Weighted rendezvous hashing (Thaler and Ravishankar, 1998; weights after Schindelhauer and
Schomaker, 2005): each target draws a number from (request, target), and the largest of the draws,
scaled by weight, wins. Nobody has to send a list around, a request keeps its target while the old
replica still runs, and its KV cache can be copied ahead.
"""

import hashlib
import math
from collections.abc import Mapping

ANY_TYPE = "*"


def target_of(request_id: str, request_type: int, rows: Mapping[str, Mapping[str, float]]) -> str:
    """The replica of ``rows[type]`` that takes the request, "" if there is none. A type without
    a row of its own has that of "*"; without that, all replicas named anywhere share alike."""
    row = rows.get(str(request_type)) or rows.get(ANY_TYPE)
    if not row:
        row = {replica_id: 1.0 for other in rows.values() for replica_id in other}
    best, best_key = "", (-math.inf, "")
    for replica_id, weight in row.items():
        if weight <= 0:
            continue
        key = (_draw(request_id, replica_id, weight), replica_id)
        if key > best_key:
            best, best_key = replica_id, key
    return best


def _draw(request_id: str, replica_id: str, weight: float) -> float:
    digest = hashlib.blake2b(f"{request_id}\0{replica_id}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return weight / -math.log(uniform)
