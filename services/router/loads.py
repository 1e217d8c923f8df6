"""What a router believes of a replica's load: its last report, and our own decisions since.

Reports come at most ten times a second, decisions a thousand times: without counting its own
decisions a router would send a whole burst to the replica that looked idle in the last report.
"""

from shared.messages.replicas import ReplicaReport

UNKNOWN_PRESSURE = 1.0
"""What a silent replica is taken for: one whose every slot is busy. Others come first, and still
it is not shunned for a number from the past."""

QUEUE_FULL = 16
"""Requests in a replica's queue that count as much as all of its slots. A queue is no matter of
slots: whoever waits makes no progress, since prompts come faster than they are computed, and one
long prompt may be the work of a hundred tokens' decoding. Measured by the slots alone, five such
prompts would look like nothing beside a few percent of the KV cache."""


class ReplicaLoad:
    """Load of one replica at one leader. ``pressure`` is kept ready, since each decision reads
    those of all replicas while only a report or a decision changes one."""

    __slots__ = (
        "_decided_s", "_decisions_max", "in_flight", "incarnation", "keeps", "open", "phase",
        "pressure", "recheck_s", "report", "reported_s", "slots",
    )  # fmt: skip

    def __init__(self, *, decisions_max: int) -> None:
        self.report: ReplicaReport | None = None
        self.reported_s = float("-inf")
        self.phase = ""
        self.open = False  # serving, and its queue has room
        self.keeps = False  # paused, and its queue has room: what comes is kept and handed over
        self.pressure = UNKNOWN_PRESSURE
        self.in_flight = 0
        self.slots = 0
        self.incarnation = ""
        self.recheck_s = float("inf")  # when decisions counted on top of the report have shown
        self._decisions_max = decisions_max
        self._decided_s: dict[str, float] = {}  # request -> when, the oldest first

    @property
    def decisions(self) -> int:
        """Own decisions that no report shows yet."""
        return len(self._decided_s)

    def update(
        self,
        report: ReplicaReport,
        *,
        now_s: float,
        decision_lag_s: float,
        decision_settle_s: float = float("inf"),
    ) -> None:
        """Take a report. It shows what we decided before, except what may have been on its way: if
        no other report comes within ``decision_settle_s``, it was not."""
        if report.incarnation != self.incarnation:
            self._decided_s.clear()
            self.incarnation = report.incarnation
        decided_s = self._decided_s
        if decided_s:
            horizon_s = now_s - decision_lag_s
            self._decided_s = {r: at_s for r, at_s in decided_s.items() if at_s > horizon_s}
        self.recheck_s = now_s + decision_settle_s if self._decided_s else float("inf")
        self.report = report
        self.reported_s = now_s
        self.phase = report.phase
        self._recompute(report)

    def settle(self) -> None:
        """A worker reports what has changed, and has not: the report shows what was decided before
        it came."""
        self.recheck_s = float("inf")
        decided_s, reported_s = self._decided_s, self.reported_s
        self._decided_s = {r: at_s for r, at_s in decided_s.items() if at_s > reported_s}
        if self.report is not None:
            self._recompute(self.report)

    def decide(self, request_id: str, now_s: float) -> None:
        """Count a request just sent there, once however often it was asked for: a router that was
        held up finds each question many times, and must not take them for a crowd."""
        decided_s = self._decided_s
        if request_id in decided_s:
            del decided_s[request_id]  # to the end of the order
        elif len(decided_s) >= self._decisions_max:
            del decided_s[next(iter(decided_s))]
        decided_s[request_id] = now_s
        if self.report is not None:
            self._recompute(self.report)

    def _recompute(self, report: ReplicaReport) -> None:
        """Pressure: slots taken or KV blocks taken, whichever is scarcer, relative to the replica's
        own size, so that unlike replicas compare; and the queue on top."""
        recent = len(self._decided_s)
        self.slots = report.running_max or max(1, report.running)
        self.in_flight = report.running + report.waiting + recent
        queued = report.waiting + max(0, recent - max(0, self.slots - report.running))
        blocks = report.kv_blocks_used / report.kv_blocks_total if report.kv_blocks_total else 0.0
        self.pressure = max(self.in_flight / self.slots, blocks)
        self.pressure += queued / min(self.slots, QUEUE_FULL)
        full = 0 < report.waiting_max <= queued
        self.open = report.phase == "serving" and not full
        self.keeps = report.phase == "paused" and not full


def freshness(age_s: float, *, stale_s: float, dead_s: float) -> float:
    """How far a report of this age is believed: 1 up to ``stale_s``, falling to 0 at ``dead_s``."""
    if age_s <= stale_s:
        return 1.0
    return max(0.0, (dead_s - age_s) / (dead_s - stale_s))


def decayed(pressure: float, fresh: float) -> float:
    """Pressure as a report of freshness ``fresh`` still supports it."""
    return fresh * pressure + (1.0 - fresh) * max(pressure, UNKNOWN_PRESSURE)
