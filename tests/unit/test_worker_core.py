"""The worker's core, rule by rule."""

from itertools import pairwise

import pytest

from services.worker.config import WorkerConfig
from services.worker.events import EngineBroken, EngineReady, EngineStart, EngineStop
from shared.core import Draining
from shared.errors import ConfigInvalid
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    DrainReplica,
    ReplicaDrained,
    ReplicaFailed,
    ReplicaReport,
    ReplicaStarted,
    ReplicaStopped,
    ResumeReplica,
    StopReplica,
    WorkerReport,
)
from shared.messages.requests import AbortRequest, TokenChunks
from tests.worker_driver import WORKER, DrivenWorker, spec, start, submit


def drain(epoch: int = 2, timeout_s: float = 10.0) -> DrainReplica:
    return DrainReplica(epoch=epoch, worker_id=WORKER, replica_id="r1", timeout_s=timeout_s)


def stop(epoch: int = 2) -> StopReplica:
    return StopReplica(epoch=epoch, worker_id=WORKER, replica_id="r1")


def resume(epoch: int = 2) -> ResumeReplica:
    return ResumeReplica(epoch=epoch, worker_id=WORKER, replica_id="r1")


def abort(request_id: str = "a", attempt: int = 0) -> AbortRequest:
    return AbortRequest(request_id=request_id, attempt=attempt, replica_id="r1")


@pytest.fixture
def worker() -> DrivenWorker:
    return DrivenWorker()


@pytest.fixture
def serving(worker: DrivenWorker) -> DrivenWorker:
    worker.serve()
    return worker


class TestHosting:
    def test_start_is_followed_to_serving(self, worker: DrivenWorker) -> None:
        """Otherwise the switcher could not tell a replica that loads from one that serves."""
        worker.feed(start())
        assert worker.of(WorkerReport)[-1].replicas[0].phase == "starting"
        assert not worker.of(ReplicaStarted)
        worker.settle_jobs()
        assert worker.of(WorkerReport)[-1].replicas[0].phase == "serving"
        assert [event.epoch for event in worker.of(ReplicaStarted)] == [1]

    def test_repeated_start_repeats_its_event_only(self, serving: DrivenWorker) -> None:
        """Otherwise a lost event would stall the switch, or a repeat load the model again."""
        serving.feed(start())
        assert len(serving.of(ReplicaStarted)) == 1
        assert not serving.jobs

    def test_start_repeated_while_it_loads_starts_one_engine(self, worker: DrivenWorker) -> None:
        """Otherwise commands sent every half second would load the model many times over."""
        for _ in range(3):
            worker.feed(start())
        assert len(worker.jobs) == 1

    def test_command_of_a_past_epoch_is_ignored(self, serving: DrivenWorker) -> None:
        """Otherwise a late command would undo what a newer plan brought about."""
        serving.feed(start(epoch=5))
        serving.sent.clear()
        assert serving.feed(stop(epoch=4)) == []
        assert serving.feed(drain(epoch=4)) == []

    def test_other_shape_under_the_same_name_is_refused(self, serving: DrivenWorker) -> None:
        """Otherwise two workers would disagree on what a replica is."""
        serving.feed(start(2, spec("r1", WORKER, "n0-g1", parallelism="tp2pp1")))
        assert "stop it first" in serving.of(ReplicaFailed)[0].detail
        serving.advance(1.0)
        assert serving.of(WorkerReport)[-1].replicas[0].parallelism == "tp1pp1"

    @pytest.mark.parametrize(
        ("replica", "cause"),
        [
            (spec("r1", "n7-g0"), "not among its GPUs"),
            (spec(model_id="other"), "model other is unknown"),
            (spec(parallelism="tp2pp2"), "needs 4 GPUs"),
            (spec(parallelism="wide"), "tp4pp2"),
        ],
    )
    def test_start_that_cannot_work_fails_with_its_cause(
        self, worker: DrivenWorker, replica: ReplicaSpec, cause: str
    ) -> None:
        """Otherwise the switch would wait for its deadline, and nobody would know why."""
        worker.feed(start(1, replica))
        assert cause in worker.of(ReplicaFailed)[0].detail
        worker.advance(1.0)
        assert worker.of(WorkerReport)[-1].replicas == ()

    def test_replicas_are_bounded(self) -> None:
        """Otherwise a plan gone wrong would fill the GPU until nothing on it works."""
        worker = DrivenWorker(WorkerConfig(worker_id=WORKER, replicas_max=1))
        worker.serve()
        worker.feed(start(1, spec("r2")))
        assert "replicas_max" in worker.of(ReplicaFailed)[0].detail

    def test_member_rank_serves_at_once_without_engine(self, worker: DrivenWorker) -> None:
        """Otherwise replicas across GPUs would wait for engines that only leaders have."""
        worker.feed(start(1, spec("r1", "n0-g1", WORKER, parallelism="tp2pp1")))
        assert not worker.jobs
        assert worker.of(ReplicaStarted)
        hosted = worker.of(WorkerReport)[-1].replicas[0]
        assert (hosted.rank, hosted.phase) == (1, "serving")
        worker.feed(submit())
        assert worker.chunks()[0].failure == "stale_epoch"
        worker.feed(stop())
        assert worker.of(ReplicaStopped)

    def test_stop_frees_before_it_tells(self, serving: DrivenWorker) -> None:
        """Otherwise the next replica would start before the memory is free."""
        serving.feed(submit())
        serving.feed(stop())
        assert [c.failure for c in serving.chunks() if c.finish] == ["draining"]
        assert not serving.of(ReplicaStopped)
        serving.settle_jobs()
        assert serving.of(ReplicaStopped)
        assert serving.of(WorkerReport)[-1].replicas == ()

    def test_stop_of_an_unknown_replica_is_done_already(self, worker: DrivenWorker) -> None:
        """Otherwise a restarted worker would hold up the switch."""
        worker.feed(stop())
        assert worker.of(ReplicaStopped)

    def test_stop_while_starting_waits_for_the_start(self, worker: DrivenWorker) -> None:
        """Otherwise an engine would stay in memory that nobody knows of."""
        worker.feed(start())
        worker.feed(stop())
        assert [type(job) for job in worker.jobs] == [EngineStart, EngineStop]
        worker.feed(EngineReady(replica_id="r1", generation=1))
        assert not worker.of(ReplicaStarted)
        worker.settle_jobs()
        assert worker.of(ReplicaStopped)

    def test_start_while_stopping_waits_for_its_repeat(self, serving: DrivenWorker) -> None:
        """Otherwise old and new engine would be in memory at once."""
        serving.feed(stop())
        serving.feed(start(2))
        assert len(serving.jobs) == 1
        serving.settle_jobs()
        serving.feed(start(2))
        serving.settle_jobs()
        assert [event.epoch for event in serving.of(ReplicaStarted)] == [2]

    def test_outcome_of_a_former_start_is_ignored(self, serving: DrivenWorker) -> None:
        """Otherwise a late failure would take down the engine that replaced it."""
        serving.feed(stop())
        serving.settle_jobs()
        serving.feed(start(2))
        serving.settle_jobs()
        assert serving.feed(EngineBroken(replica_id="r1", generation=1, detail="old")) == []
        assert serving.feed(EngineReady(replica_id="r1", generation=1)) == []

    def test_start_failure_is_told_and_may_be_tried_again(self, worker: DrivenWorker) -> None:
        """Otherwise one failed load would leave the GPU useless until a restart."""
        worker.feed(start())
        worker.jobs.clear()
        worker.feed(EngineBroken(replica_id="r1", generation=1, detail="no memory"))
        assert worker.of(ReplicaFailed)[0].detail == "no memory"
        assert worker.of(WorkerReport)[-1].replicas[0].phase == "failed"
        worker.feed(start())
        worker.settle_jobs()
        assert worker.of(ReplicaStarted)

    def test_engine_failure_fails_its_requests(self, serving: DrivenWorker) -> None:
        """Otherwise the ingress would wait for its stall timeout before it tries elsewhere."""
        serving.feed(submit("a"))
        serving.feed(submit("b"))
        serving.sent.clear()
        serving.break_engine("OutOfMemoryError: 3 GiB")
        assert {(c.request_id, c.finish, c.failure) for c in serving.chunks()} == {
            ("a", "failed", "engine"),
            ("b", "failed", "engine"),
        }
        assert "3 GiB" in serving.of(ReplicaFailed)[0].detail
        serving.feed(submit("c"))
        assert serving.chunks()[-1].finish == "refused"


class TestDraining:
    def test_idle_replica_is_drained_at_once(self, serving: DrivenWorker) -> None:
        """Otherwise each switch would wait for a timeout."""
        serving.feed(drain())
        assert serving.of(ReplicaDrained)[0].handed_back == 0

    def test_running_requests_finish_and_new_ones_are_refused(self, serving: DrivenWorker) -> None:
        """Otherwise a switch would cut streams that were nearly done."""
        serving.feed(submit("a", tokens=3))
        serving.feed(drain())
        serving.feed(submit("b"))
        assert (serving.chunks()[-1].finish, serving.chunks()[-1].failure) == (
            "refused",
            "draining",
        )
        assert not serving.of(ReplicaDrained)
        for _ in range(3):
            serving.step_engines()
        assert serving.of(ReplicaDrained)[0].handed_back == 0
        assert serving.ended["a", 0] == 1

    def test_deadline_hands_back_the_rest(self, serving: DrivenWorker) -> None:
        """Otherwise one long answer would hold up the switch for minutes."""
        serving.feed(submit("a", tokens=400))
        serving.feed(drain(timeout_s=3.0))
        serving.advance(2.9)
        assert not serving.of(ReplicaDrained)
        serving.advance(0.2)
        last = serving.chunks()[-1]
        assert (last.request_id, last.finish, last.failure) == ("a", "failed", "draining")
        assert serving.of(ReplicaDrained)[0].handed_back == 1
        assert not serving.engines["r1", 1].has_work

    def test_repeated_drain_does_not_extend_the_deadline(self, serving: DrivenWorker) -> None:
        """Otherwise the switcher's repeats would keep the drain from ever ending."""
        serving.feed(submit("a", tokens=400))
        for _ in range(8):
            serving.feed(drain(timeout_s=3.0))
            serving.advance(0.5)
        assert serving.of(ReplicaDrained)

    def test_resume_serves_again_and_voids_the_deadline(self, serving: DrivenWorker) -> None:
        """Otherwise a rolled-back switch would still hand back requests."""
        serving.feed(submit("a", tokens=400))
        serving.feed(drain(timeout_s=1.0))
        serving.feed(resume())
        assert serving.of(ReplicaStarted)
        serving.advance(5)
        assert not serving.of(ReplicaDrained)
        serving.feed(submit("b"))
        assert serving.chunks()[-1].finish is None

    def test_deadline_of_a_former_drain_is_void(self, serving: DrivenWorker) -> None:
        """Otherwise the next drain would hand back requests before their time."""
        serving.feed(submit("a", tokens=400))
        serving.feed(drain(timeout_s=1.0))
        serving.feed(resume())
        serving.feed(drain(epoch=3, timeout_s=5.0))
        serving.advance(4.0)
        assert not serving.of(ReplicaDrained)
        serving.advance(2.0)
        assert serving.of(ReplicaDrained)

    def test_what_was_handed_back_is_not_run_again(self, serving: DrivenWorker) -> None:
        """Otherwise a late copy of its submission would run it twice in the mesh."""
        serving.feed(submit("a", tokens=400))
        serving.feed(drain(timeout_s=0.0))
        serving.advance(0.0)
        serving.feed(resume())
        assert serving.feed(submit("a", tokens=400)) == []
        serving.feed(submit("a", 1, tokens=400))
        assert len(serving.core.live) == 1

    def test_late_drain_after_resume_of_its_epoch_is_ignored(self, serving: DrivenWorker) -> None:
        """Otherwise a late copy would take a replica out of service for good."""
        serving.feed(drain())
        serving.feed(resume())
        serving.feed(drain())
        assert serving.of(WorkerReport)[-1].replicas[0].phase == "serving"

    def test_drain_and_resume_of_unknown_replicas_are_answered(self, worker: DrivenWorker) -> None:
        """Otherwise a restarted worker would hold up switch and rollback."""
        worker.feed(drain())
        assert worker.of(ReplicaDrained)
        worker.feed(resume())
        assert "not hosted" in worker.of(ReplicaFailed)[0].detail

    def test_engine_failure_ends_the_drain(self, serving: DrivenWorker) -> None:
        """Otherwise the switcher would wait for requests that are gone."""
        serving.feed(submit("a"))
        serving.feed(drain())
        serving.break_engine("lost")
        assert serving.of(ReplicaDrained)[0].handed_back == 1

    def test_termination_drains_stops_and_leaves(self, serving: DrivenWorker) -> None:
        """Otherwise a rolling restart would lose requests, or never end."""
        serving.feed(submit("a", tokens=2))
        serving.feed(Draining())
        assert serving.of(WorkerReport)[-1].leaving
        assert not serving.core.drained
        serving.feed(start(3, spec("r2")))
        assert "leaving" in serving.of(ReplicaFailed)[0].detail
        serving.step_engines()
        serving.step_engines()
        serving.settle_jobs()
        assert serving.ended["a", 0] == 1
        assert serving.of(ReplicaStopped)
        assert serving.core.drained

    def test_termination_of_an_idle_or_broken_worker(self) -> None:
        """Otherwise a worker without a working replica could not be restarted."""
        empty, broken = DrivenWorker(), DrivenWorker()
        empty.feed(Draining())
        broken.serve()
        broken.break_engine("lost")
        broken.feed(Draining())
        assert empty.core.drained
        assert broken.core.drained


class TestRequests:
    def test_accepted_request_is_acknowledged(self, serving: DrivenWorker) -> None:
        """Otherwise the ingress would take the replica for dead after a second."""
        serving.feed(submit())
        [message] = serving.of(TokenChunks)
        assert (message.replica_id, message.incarnation) == ("r1", "run-1")
        assert [(c.tokens, c.finish) for c in message.chunks] == [([], None)]

    def test_repeat_is_acknowledged_but_not_run_again(self, serving: DrivenWorker) -> None:
        """Otherwise a repeated message would be paid for twice."""
        serving.feed(submit())
        serving.feed(submit())
        assert len(serving.chunks()) == 2
        assert serving.admitted["a/0"] == 1

    def test_repeat_after_the_end_is_ignored(self, serving: DrivenWorker) -> None:
        """Otherwise a late copy would run the whole request again for nobody."""
        serving.feed(submit(tokens=1))
        serving.step_engines()
        assert serving.feed(submit(tokens=1)) == []

    def test_newer_attempt_replaces_the_older(self, serving: DrivenWorker) -> None:
        """Otherwise the abandoned attempt would hold its place in the batch."""
        serving.feed(submit("a", 0, tokens=50))
        serving.feed(submit("a", 1, tokens=50))
        assert [live.attempt for live in serving.core.live] == [1]
        assert serving.engines["r1", 1].load().waiting == 1
        assert serving.feed(submit("a", 0, tokens=50)) == []

    def test_unknown_replica_is_refused_as_stale(self, serving: DrivenWorker) -> None:
        """Otherwise requests of an old plan would vanish."""
        serving.feed(submit(replica_id="r9"))
        [chunk] = serving.chunks()
        assert (chunk.finish, chunk.failure) == ("refused", "stale_epoch")

    def test_starting_replica_refuses(self, worker: DrivenWorker) -> None:
        """Otherwise requests would wait for a model to load."""
        worker.feed(start())
        worker.feed(submit())
        assert worker.chunks()[0].finish == "refused"

    def test_engine_refusal_reaches_the_ingress(self, serving: DrivenWorker) -> None:
        """Otherwise an overloaded replica would swallow requests."""
        for n in range(9):
            serving.feed(submit(f"q{n}"))
        serving.advance(0.0)
        refused = [c for c in serving.chunks() if c.finish]
        assert [(c.request_id, c.failure) for c in refused] == [("q8", "overloaded")]
        assert len(serving.core.live) == 8

    def test_abort_ends_in_silence(self, serving: DrivenWorker) -> None:
        """Otherwise what nobody wants would be computed to its end."""
        serving.feed(submit(tokens=50))
        serving.sent.clear()
        serving.feed(abort())
        assert not serving.sent
        assert not serving.core.live
        assert not serving.engines["r1", 1].has_work

    def test_abort_of_an_older_attempt_spares_the_newer(self, serving: DrivenWorker) -> None:
        """Otherwise a late abort would end the attempt that replaced the aborted one."""
        serving.feed(submit("a", 2))
        serving.feed(abort("a", 1))
        assert [live.attempt for live in serving.core.live] == [2]

    def test_abort_may_overtake_its_submission(self, serving: DrivenWorker) -> None:
        """Otherwise a request that was given up would be run for nobody."""
        serving.feed(abort("a", 0))
        assert serving.feed(submit("a", 0)) == []
        serving.feed(submit("a", 1))
        assert [live.attempt for live in serving.core.live] == [1]

    def test_memory_of_ended_requests_is_bounded(self) -> None:
        """Otherwise a worker's memory would grow with each request it ever served."""
        worker = DrivenWorker(WorkerConfig(worker_id=WORKER, settled_max=3))
        worker.serve()
        for n in range(10):
            worker.feed(abort(f"q{n}"))  # check() runs after each


class TestReports:
    def test_idle_replicas_report_now_and_then(self, serving: DrivenWorker) -> None:
        """Otherwise routers would take the replica for gone, or idle ones would fill the broker."""
        serving.advance(1.0)
        serving.sent.clear()
        at_s: list[float] = []
        for _ in range(200):
            at_s += [serving.now_s] * len(
                [m for m in serving.advance(0.01) if isinstance(m, ReplicaReport)]
            )
        assert 4 <= len(at_s) <= 5
        assert max(b - a for a, b in pairwise(at_s)) <= serving.config.report_keepalive_s + 0.011
        assert 3 <= len(serving.of(WorkerReport)) <= 5

    def test_a_change_is_told_at_the_next_measurement_and_only_then(
        self, serving: DrivenWorker
    ) -> None:
        """Otherwise routers would flood a busy replica, or the broker carry what they know."""
        serving.advance(1.0)
        serving.feed(submit("q1", tokens=50))
        told = [m for m in serving.advance(0.35) if isinstance(m, ReplicaReport)]
        assert [m.running + m.waiting for m in told] == [1]
        serving.feed(abort("q1"))
        told = [m for m in serving.advance(0.25) if isinstance(m, ReplicaReport)]
        assert [m.running + m.waiting for m in told] == [0]

    def test_a_change_of_phase_is_told_at_once(self, serving: DrivenWorker) -> None:
        """Otherwise requests would go on arriving at a replica that refuses them."""
        serving.advance(1.0)
        told = [m for m in serving.feed(drain()) if isinstance(m, ReplicaReport)]
        assert [m.phase for m in told] == ["draining"]

    def test_report_tells_the_measured_load(self, serving: DrivenWorker) -> None:
        """Otherwise least-load routing would send everything to one replica."""
        for n in range(6):
            serving.feed(submit(f"q{n}", tokens=20))
        serving.step_engines()
        serving.advance(0.2)
        report = serving.of(ReplicaReport)[-1]
        assert (report.running, report.waiting) == (4, 2)
        assert report.kv_blocks_used > 0

    def test_heartbeats_reach_each_ingress_that_waits(self, serving: DrivenWorker) -> None:
        """Otherwise long prefills would look like dead replicas."""
        serving.feed(submit("q1", tokens=50))
        serving.feed(submit("q2", tokens=50))
        serving.advance(0.2)
        serving.sent.clear()
        serving.advance(2.0)
        beats = [m for m in serving.of(TokenChunks) if not m.chunks]
        assert 8 <= len(beats) <= 12
        serving.feed(abort("q1"))
        serving.feed(abort("q2"))
        serving.sent.clear()
        serving.advance(2.0)
        assert not serving.of(TokenChunks)

    def test_stuck_engine_sends_no_heartbeats(self, serving: DrivenWorker) -> None:
        """Otherwise requests on a hung GPU would wait for ever."""
        serving.feed(submit("q1", tokens=50))
        serving.stalled = True
        serving.sent.clear()
        serving.advance(3.0)
        assert not serving.of(TokenChunks)
        assert serving.of(ReplicaReport)


@pytest.mark.parametrize(
    "config",
    [
        WorkerConfig(worker_id=WORKER, report_s=0.0),
        WorkerConfig(worker_id=WORKER, report_s=0.9, heartbeat_s=0.5),
        WorkerConfig(worker_id=WORKER, report_keepalive_s=0.05),
        WorkerConfig(worker_id=WORKER, report_keepalive_s=-1.0),
    ],
)
def test_periods_that_do_not_fit_are_refused(config: WorkerConfig) -> None:
    """Otherwise a worker would spin, or send heartbeats too late to count."""
    with pytest.raises(ConfigInvalid, match="report_"):
        config.checked()
