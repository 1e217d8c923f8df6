"""A journey's home: the replica that works on its attempt, which a live switch may change.

Replicas that go hand their requests to those that come, in the middle of a stream and under the
same attempt. The first chunk of it from another replica says so. Words of both may cross for a
moment, ``HANDOVER_S``: what the former home still says brings tokens at most, a gap may yet be
filled, and what is to be stopped is said to both.
"""

from services.ingress.journey import Home, Journey
from shared.messages.requests import TokenChunk

HANDOVER_S = 1.0
FORMER_MAX = 4  # former homes remembered of one attempt
EARLY_MAX = 256  # chunks kept of one journey while tokens before them are on their way
LEADERS_MAX = 4096


class Leaders:
    """Which worker led each replica last; the oldest is forgotten beyond ``LEADERS_MAX``."""

    def __init__(self) -> None:
        self._workers: dict[str, str] = {}

    def of(self, replica_id: str) -> str:
        """Empty if that is not known."""
        return self._workers.get(replica_id, "")

    def learn(self, replica_id: str, worker_id: str) -> None:
        if len(self._workers) >= LEADERS_MAX and replica_id not in self._workers:
            self._workers.pop(next(iter(self._workers)))
        self._workers[replica_id] = worker_id


def settle(journey: Journey, home: Home) -> None:
    """A router chose ``home`` for a new attempt: nothing of former ones counts."""
    journey.replica_id, journey.leader_id = home.replica_id, home.leader_id
    journey.former = ()
    journey.early.clear()
    journey.taken_over_s = float("-inf")


def rehome(journey: Journey, home: Home, incarnation: str, now_s: float) -> None:
    """``home`` has taken the attempt over. Its leader may be unknown yet."""
    before = Home(journey.replica_id, journey.leader_id)
    others = [one for one in journey.former if one.replica_id != home.replica_id]
    journey.former = (*others, before)[-FORMER_MAX:]
    journey.replica_id, journey.leader_id = home.replica_id, home.leader_id
    journey.incarnation = incarnation
    journey.taken_over_s = now_s
    journey.handovers += 1


def crossing(journey: Journey, now_s: float) -> bool:
    """Whether words of a former home may still be on their way."""
    return now_s - journey.taken_over_s < HANDOVER_S


def was_home(journey: Journey, replica_id: str) -> bool:
    """Of the attempt in progress, before it was taken over."""
    return any(home.replica_id == replica_id for home in journey.former)


def holders(journey: Journey, now_s: float) -> tuple[Home, ...]:
    """Who is told to stop: its home, and the former one too as long as it may not know, or alone
    while nobody has said who leads the new one, since it passes that on. Nobody while no leader of
    the attempt is known: the next words of its home tell, and are answered by an abort."""
    home = Home(journey.replica_id, journey.leader_id)
    former = [one for one in journey.former if one.leader_id][-1:]
    if not home.leader_id:
        return tuple(former)
    return (home, *former) if crossing(journey, now_s) else (home,)


def keep_early(journey: Journey, chunk: TokenChunk, now_s: float) -> bool:
    """Keep a chunk whose predecessors have not come, if they may be on their way still."""
    if not crossing(journey, now_s) or len(journey.early) >= EARLY_MAX:
        return False
    journey.early.append(chunk)
    return True


def unpack_early(journey: Journey) -> list[TokenChunk]:
    """The chunks kept, in the order of their tokens; they are the caller's now."""
    early, journey.early = journey.early, []
    early.sort(key=lambda chunk: (chunk.position + len(chunk.tokens), chunk.finish is not None))
    return early
