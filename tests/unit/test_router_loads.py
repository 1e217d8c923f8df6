"""What a router counts on top of a replica's last report."""

from services.router.loads import ReplicaLoad
from shared.messages.replicas import ReplicaReport


def report(*, running: int) -> ReplicaReport:
    return ReplicaReport(
        replica_id="r", worker_id="w", incarnation="i", epoch=1, phase="serving",
        running=running, running_max=10,
    )  # fmt: skip


def told(load: ReplicaLoad, *, running: int, now_s: float) -> None:
    load.update(report(running=running), now_s=now_s, decision_lag_s=0.05, decision_settle_s=0.3)


def test_a_decision_is_counted_until_a_report_must_show_it() -> None:
    """A burst would go to the one replica that looked idle; or, since a worker speaks only when
    something changes, requests would be counted twice until it speaks again."""
    load = ReplicaLoad(decisions_max=10)
    told(load, running=0, now_s=0.0)
    load.decide("old", 1.00)
    load.decide("new", 1.09)
    told(load, running=2, now_s=1.1)
    assert load.in_flight == 3, "the newer one may still have been on its way"
    load.decide("later", 1.2)
    assert 1.39 < load.recheck_s < 1.41
    load.settle()
    assert load.in_flight == 3, "what was decided since the report is in none"
    assert load.recheck_s == float("inf")


def test_with_nothing_on_its_way_there_is_nothing_to_settle() -> None:
    """Each decision would look at each replica's decisions."""
    load = ReplicaLoad(decisions_max=10)
    load.decide("old", 1.0)
    told(load, running=1, now_s=2.0)
    assert (load.in_flight, load.recheck_s) == (1, float("inf"))
