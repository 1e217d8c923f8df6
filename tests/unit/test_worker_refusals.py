"""What a worker says at once to a command that waiting would not help."""

from typing import Any

import pytest

from services.worker.events import EngineTook
from shared.core import Draining
from shared.messages.replicas import (
    AdvanceStage,
    DrainReplica,
    PauseReplica,
    ReplicaFailed,
    ReplicaPaused,
    ReplicaPrepared,
    RequestsTaken,
    TakeRequests,
    WorkerReport,
)
from tests.worker_driver import DrivenWorker, prepare, shares, spec, start, submit

WORKER, OTHER = "n0-g0", "n0-g1"
R1, R2 = spec("r1", WORKER), spec("r2", OTHER)


def named(epoch: int = 2) -> Any:
    return {"epoch": epoch, "worker_id": WORKER, "replica_id": "r1"}


PREPARE = prepare(2, R1, source=("r2", OTHER))
PAUSE = PauseReplica(shares=shares(R2), **named())
TAKE = TakeRequests(sources={"r2": OTHER}, shares=shares(R1), **named())
ADVANCE = AdvanceStage(stage=1, **named())


def serving() -> DrivenWorker:
    worker = DrivenWorker()
    worker.serve(R1)
    worker.feed(submit("a", tokens=50))
    return worker


def paused() -> DrivenWorker:
    worker = serving()
    worker.feed(PauseReplica(shares=shares(R2), **named()))
    worker.settle_jobs()
    return _quiet(worker)


def draining() -> DrivenWorker:
    worker = serving()
    worker.feed(DrainReplica(timeout_s=30.0, **named()))
    return _quiet(worker)


def leaving() -> DrivenWorker:
    worker = serving()
    worker.feed(Draining())
    return _quiet(worker)


def starting() -> DrivenWorker:
    worker = DrivenWorker()
    worker.feed(start(1, R1))
    return _quiet(worker)


def prepared(*, stages: int = 1) -> DrivenWorker:
    worker = DrivenWorker()
    worker.feed(prepare(1, R1, source=("r2", OTHER), stages=stages))
    worker.settle_jobs()
    return _quiet(worker)


def failed() -> DrivenWorker:
    worker = serving()
    worker.break_engine("lost")
    return _quiet(worker)


def _quiet(worker: DrivenWorker) -> DrivenWorker:
    worker.sent.clear()
    return worker


def phase(worker: DrivenWorker) -> str:
    worker.advance(0.6)
    [replica] = worker.of(WorkerReport)[-1].replicas
    return replica.phase


HELPLESS = {
    "prepare paused": (paused, PREPARE, "cannot get ready: it is paused"),
    "prepare draining": (draining, PREPARE, "cannot get ready: it is draining"),
    "prepare leaving": (leaving, PREPARE, "the worker is leaving"),
    "pause draining": (draining, PAUSE, "cannot stand still: it is draining"),
    "pause leaving": (leaving, PAUSE, "cannot stand still: it is draining"),
    "pause prepared": (prepared, PAUSE, "cannot stand still: it is prepared"),
    "take paused": (paused, TAKE, "cannot take requests over: it is paused"),
    "take draining": (draining, TAKE, "cannot take requests over: it is draining"),
    "take without layers": (
        lambda: prepared(stages=2),
        TAKE,
        "cannot take requests over: it is prepared, and lacks layers",
    ),
    "advance serving": (serving, ADVANCE, "cannot go on to stage 1: it is serving"),
    "advance draining": (draining, ADVANCE, "cannot go on to stage 1: it is draining"),
}


@pytest.mark.parametrize("case", HELPLESS)
def test_what_will_not_pass_by_itself_is_told(case: str) -> None:
    """Otherwise the switch would wait for the time of its phase, for nothing; or take a replica
    for broken that is not, and have it stopped."""
    made, command, detail = HELPLESS[case]
    worker = made()
    before = phase(worker)
    worker.feed(command)
    [told] = worker.of(ReplicaFailed)
    assert (told.refused, told.epoch, told.detail) == (True, 2, detail)
    assert (phase(worker), worker.jobs) == (before, [])


@pytest.mark.parametrize("command", [PREPARE, PAUSE, TAKE, ADVANCE])
def test_what_passes_by_itself_is_not(command: Any) -> None:
    """Otherwise a replica that starts, and could do it a moment later, would end the switch."""
    worker = starting()
    worker.feed(command)
    assert not worker.of(ReplicaFailed)


@pytest.mark.parametrize("command", [PAUSE, TAKE, ADVANCE])
def test_what_failed_says_so(command: Any) -> None:
    """Otherwise a replica that broke would be taken for one that stands still, and be asked for
    requests that it has lost."""
    worker = failed()
    worker.feed(command)
    [told] = worker.of(ReplicaFailed)
    assert (told.refused, told.epoch, told.detail) == (False, 2, "lost")
    assert not worker.of(ReplicaPaused)


@pytest.mark.parametrize("command", [PAUSE, TAKE, ADVANCE])
def test_late_copies_of_its_own_switch_are_not_answered(command: Any) -> None:
    """Otherwise a copy that comes late would tell of a refusal where all went well."""
    worker = DrivenWorker()
    worker.serve(R1, epoch=2)
    worker.feed(command)
    assert worker.sent == []


def test_a_taking_that_fails_leaves_the_replica_as_it_was() -> None:
    """Otherwise a replica that stays, and serves, would be stopped for it."""
    worker = serving()
    worker.feed(PREPARE)
    assert worker.of(ReplicaPrepared)
    worker.feed(TAKE)
    worker.jobs.clear()
    worker.feed(EngineTook(replica_id="r1", generation=1, epoch=2, failure="no answer"))
    [told] = worker.of(ReplicaFailed)
    assert told.refused
    assert not worker.of(RequestsTaken)
    assert phase(worker) == "serving"
    assert [request.request_id for request in worker.core.live] == ["a"]


def test_one_that_is_hosted_otherwise_has_to_be_stopped() -> None:
    """Otherwise nobody would ever make room for the replica that is wanted under that name."""
    worker = serving()
    worker.feed(start(3, spec("r1", WORKER, OTHER, parallelism="tp2pp1")))
    [told] = worker.of(ReplicaFailed)
    assert (told.refused, told.detail) == (False, "hosted otherwise: stop it first")
