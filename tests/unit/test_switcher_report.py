"""What a switch did, in figures, and the job that plans its copies."""

from typing import Any

from services.switcher.config import SwitcherConfig
from services.switcher.course import percentile
from services.switcher.events import TransferPlanned, TransferWanted
from services.switcher.planning import plan as plan_copies
from services.switcher.planning import problem_of
from services.switcher.service import planner
from shared.clock import SystemClock
from shared.hardware import GpuSpec
from shared.messages.plans import SwitchEnded, SwitchReport
from shared.messages.replicas import ReplicaPrepared, ReplicaStarted, RequestsTaken
from tests.unit.switcher_runs import SHAPE, Run, hosted, plan, replica

TWO = plan("TWO", replica("r0", "g0"), replica("r1", "g1"))
WIDE = plan("WIDE", replica("r2", "g0", "g1"))
MOVED = RequestsTaken(
    epoch=2,
    worker_id="g0",
    replica_id="r2",
    moved=9,
    replayed=2,
    bytes_by_source={"g0": {"g0": 70, "g1": 30}, "g1": {"g1": 8, "g0": 5}},
    ahead_bytes=25,
    bytes_needed=30,
    detail="two did not fit",
)


def reported(run: Run) -> SwitchReport:
    (ended,) = run.said(SwitchEnded)
    assert ended.report is not None
    return ended.report


def walked() -> Run:
    """A switch in which each phase takes as many seconds as its place in the order, from 1."""
    run = Run(SwitcherConfig(worker_timeout_s=60.0), live=True).in_force(TWO, 1)
    run.adopt(WIDE, 1)
    run.write()
    run.now_s += 1
    run.planned(TransferPlanned(epoch=2, bytes_bound=110, notes=("all fits",)))
    for rank in (0, 1):
        old, new = hosted(f"r{rank}", 1), hosted("r2", 2, "preparing", rank=rank, tp=2)
        run.report(f"g{rank}", old, new)
    for _ in range(2):  # a repeated event counts once
        run.step(
            ReplicaPrepared(
                epoch=2, worker_id="g0", replica_id="r2", bytes_by_source={"g0": 500, "": 40}
            )
        )
    run.prepared("r2@g1", 2, g0=100)
    run.now_s += 2
    run.paused("r0@g0", 2)
    run.paused("r1@g1", 2)
    run.now_s += 3
    run.step(MOVED)
    run.write()
    run.step(MOVED)
    run.now_s += 4
    run.started("r2@g1", 2)
    pauses = ((0.1, 5), (0.3, 4))
    run.step(ReplicaStarted(epoch=2, worker_id="g0", replica_id="r2", pauses=pauses))
    run.started("r2@g0", 2)
    run.now_s += 5
    run.stopped("r0@g0", 2)
    run.stopped("r1@g1", 2)
    return run


def test_the_report_of_a_live_switch() -> None:
    """Otherwise an operator would read figures that nobody measured, or count some twice."""
    run = walked()
    (ended,) = run.said(SwitchEnded)
    assert ended.took_s == 15.0
    report = reported(run)
    assert report.way == "live"
    assert {k: s for k, s in report.phase_s.items() if s} == {
        "preparing": 1.0,
        "pausing": 2.0,
        "taking": 3.0,
        "activating": 4.0,
        "retiring": 5.0,
    }
    assert report.bytes_by_link == {"disk>g0": 40, "g0>g1": 105, "g1>g0": 30}
    assert (report.bytes_in_place, report.bytes_bound) == (578, 110 + 30)
    assert (report.cache_bytes, report.cache_ahead_bytes) == (35, 25)
    assert (report.moved, report.replayed, report.stages) == (9, 2, 1)
    assert (report.pause_p50_s, report.pause_p99_s) == (0.1, 0.3)
    assert report.notes == ("all fits", "r2: two did not fit")


def test_pauses_are_weighted_by_requests() -> None:
    """Otherwise one request's long pause would look like everybody's, or like nobody's."""
    assert percentile([], 0.99) == 0.0
    assert percentile([(0.5, 1), (0.1, 99)], 0.5) == 0.1
    assert percentile([(0.5, 1), (0.1, 99)], 0.99) == 0.1
    assert percentile([(0.5, 2), (0.1, 98)], 0.99) == 0.5
    assert percentile([(0.2, 0), (0.4, 1)], 0.5) == 0.4


def test_the_report_of_a_reload_says_what_was_handed_back() -> None:
    """Otherwise the requests that a reload interrupts would be in no figure."""
    run = Run().in_force(TWO, 1)
    run.adopt(plan("ONE", TWO.replicas[0]), 1)
    run.write()
    run.drained("r1@g1", 2)
    run.stopped("r1@g1", 2)
    run.write()
    report = reported(run)
    assert (report.way, report.replayed, report.bytes_by_link) == ("reload", 0, {})


def wanted(**changes: object) -> TransferWanted:
    facts: dict[str, object] = {
        "epoch": 2,
        "shapes": {"m": SHAPE},
        "nodes": {"g0": "n0", "g1": "n0"},
        "gpus": {"g0": GpuSpec(gpu_id="g0"), "g1": GpuSpec(gpu_id="g1")},
        "leaving": TWO.replicas,
        "staying": (),
        "arriving": WIDE.replicas,
        "dead": (),
        "moves": (),
        "held": {},
        **changes,
    }
    return TransferWanted(**facts)  # type: ignore[arg-type]  # as named above


def test_the_job_plans_the_copies_of_all_ranks() -> None:
    """Otherwise new replicas would read from disk what lies beside them."""
    planned = plan_copies(wanted())
    assert planned.failure == ""
    assert planned.epoch == 2
    assert {w: set(by) for w, by in planned.copies.items()} == {"g0": {"r2"}, "g1": {"r2"}}
    assert all(c.source == w for w in planned.copies for c in planned.copies[w]["r2"])
    assert (planned.bytes_total, planned.bytes_bound) == (0, 0), "each half is there already"


def test_a_planner_that_fails_costs_a_switch_only() -> None:
    """Otherwise an unforeseen placement would end the one writer of the plan."""
    planned = plan_copies(wanted(shapes={}))
    assert planned.failure
    assert planned.copies == {}


def test_budgets_are_those_of_the_kind_of_gpu() -> None:
    """Otherwise copies would fill the memory that the runtime needs, or ignore its limit."""
    gpus = {"g0": GpuSpec(gpu_id="g0", memory_bytes=123), "g1": GpuSpec(gpu_id="g1")}
    assert problem_of(wanted(gpus=gpus)).budget_bytes == {"g0": 123, "g1": 0}
    h100 = {w: GpuSpec(gpu_id=w, kind="h100", memory_bytes=80 << 30) for w in ("g0", "g1")}
    problem = problem_of(wanted(gpus=h100))
    assert 40 << 30 < problem.budget_bytes["g0"] < 80 << 30
    assert not problem.links.one_memory
    odd = {w: GpuSpec(gpu_id=w, kind="odd", memory_bytes=7) for w in ("g0", "g1")}
    assert problem_of(wanted(gpus=odd)).budget_bytes == {"g0": 7, "g1": 7}


async def test_the_job_answers_from_its_thread() -> None:
    """Otherwise a live switch would wait for its copies until its deadline."""
    outcome: Any = planner(SystemClock())(wanted())
    planned: TransferPlanned = await outcome
    assert planned.took_s > 0
    assert planned.copies == plan_copies(wanted()).copies
