"""The worker's core in a live switch, rule by rule."""

from typing import Any

import msgspec
import pytest

from services.worker.config import WorkerConfig
from services.worker.events import (
    EngineExpect,
    EnginePause,
    EngineReady,
    EngineRelease,
    EngineResume,
    EngineStart,
    EngineStop,
    EngineTake,
)
from shared.core import Draining
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    AdvanceStage,
    HostedReplica,
    PauseReplica,
    ReplicaFailed,
    ReplicaPaused,
    ReplicaPrepared,
    ReplicaStarted,
    ReplicaStopped,
    RequestsTaken,
    ResumeReplica,
    StopReplica,
    TakeRequests,
    WorkerReport,
)
from shared.messages.requests import AbortRequest, TokenChunks
from shared.placement.copies import Copy
from shared.placement.sheets import Area
from tests.worker_driver import DrivenWorker, prepare, shares, spec, start, submit

OLD, NEW = "n0-g0", "n0-g1"
R1, R2 = spec("r1", OLD), spec("r2", NEW)


def named(replica: ReplicaSpec, epoch: int = 2) -> Any:
    return {"epoch": epoch, "worker_id": replica.gpus[0], "replica_id": replica.replica_id}


def pause(epoch: int = 2) -> PauseReplica:
    return PauseReplica(shares=shares(R2), **named(R1, epoch))


def take(epoch: int = 2) -> TakeRequests:
    return TakeRequests(sources={"r1": OLD}, shares=shares(R2), **named(R2, epoch))


def abort(request_id: str, attempt: int = 0) -> AbortRequest:
    return AbortRequest(request_id=request_id, attempt=attempt, replica_id="r1")


class Switch:
    """The old leader serves r1; the new one is to come with r2."""

    def __init__(self) -> None:
        mesh: dict[str, DrivenWorker] = {}
        self.old = DrivenWorker(worker_id=OLD, mesh=mesh)
        self.new = DrivenWorker(worker_id=NEW, mesh=mesh)
        self.old.serve(R1)

    def prepare(self, epoch: int = 2, **more: Any) -> None:
        self.new.feed(prepare(epoch, R2, source=("r1", OLD), **more))
        self.new.settle_jobs()

    def pause(self, epoch: int = 2) -> None:
        self.old.feed(pause(epoch))
        self.old.settle_jobs()

    def take(self, epoch: int = 2) -> None:
        self.new.feed(take(epoch))
        self.new.settle_jobs()

    def hold(self, *request_ids: str) -> None:
        """Up to the point at which the new leader holds these requests."""
        for request_id in request_ids:
            self.old.feed(submit(request_id, tokens=50))
        self.old.step_engines()
        self.prepare()
        self.pause()
        self.take()


@pytest.fixture
def switch() -> Switch:
    return Switch()


def hosted(worker: DrivenWorker) -> HostedReplica:
    worker.advance(0.6)
    [replica] = worker.of(WorkerReport)[-1].replicas
    return replica


class TestPreparing:
    def test_a_replica_is_prepared_beside_what_runs(self, switch: Switch) -> None:
        """Otherwise the switcher could not tell when the pause may begin."""
        switch.new.feed(prepare(2, R2, source=("r1", OLD)))
        assert hosted(switch.new).phase == "preparing"
        assert not switch.new.of(ReplicaPrepared)
        switch.new.settle_jobs()
        assert [event.epoch for event in switch.new.of(ReplicaPrepared)] == [2]
        assert (hosted(switch.new).phase, hosted(switch.new).prepared) == ("prepared", 2)
        assert not switch.new.of(ReplicaStarted)
        [expected] = switch.new.expected
        assert (expected.epoch, expected.sources) == (2, {"r1": OLD})

    def test_the_engine_gets_copies_of_weights_and_later_those_of_the_cache(
        self, switch: Switch
    ) -> None:
        """Otherwise weights would come from disk, or KV cache be asked for as weights."""
        weights = Copy("mlp", Area((0, 1), (0, 4)), OLD, "r1")
        cache = Copy("cache", Area((0, 1), (0, 2)), OLD, "r1")
        command = prepare(2, R2, source=("r1", OLD))
        switch.new.feed(msgspec.structs.replace(command, copies=(weights, cache)))
        [job] = switch.new.jobs
        assert isinstance(job, EngineStart)
        assert (job.copies, job.epoch, job.rank) == ((weights,), 2, 0)
        switch.new.settle_jobs()
        assert switch.new.expected[0].copies == (cache,)

    def test_a_repeat_repeats_its_event_only(self, switch: Switch) -> None:
        """Otherwise a lost event would stall the switch, or a repeat fetch all weights again."""
        switch.prepare()
        switch.prepare()
        assert len(switch.new.of(ReplicaPrepared)) == 2
        assert len(switch.new.expected) == 1
        assert not switch.new.jobs

    def test_one_of_a_switch_that_is_over_is_too_late(self, switch: Switch) -> None:
        """Otherwise what nobody wants any more would take memory beside what comes."""
        switch.new.feed(prepare(3, spec("r3", NEW)))
        switch.new.settle_jobs()
        switch.new.feed(prepare(2, R2, source=("r1", OLD)))
        assert not switch.new.jobs
        assert hosted(switch.new).replica_id == "r3"

    def test_requests_are_refused_until_it_is_started(self, switch: Switch) -> None:
        """Otherwise requests would run on a replica that no plan knows."""
        switch.prepare()
        switch.new.feed(submit("a", replica_id="r2"))
        assert switch.new.chunks()[-1].finish == "refused"
        switch.new.feed(start(2, R2))
        switch.new.feed(submit("b", replica_id="r2"))
        assert switch.new.chunks()[-1].finish is None

    def test_a_preparation_for_another_switch_begins_anew(self, switch: Switch) -> None:
        """Otherwise ranks would wait for each other under different epochs."""
        switch.prepare(2)
        switch.new.feed(prepare(3, R2, source=("r1", OLD)))
        assert [type(job) for job in switch.new.jobs] == [EngineStop]
        switch.new.settle_jobs()
        switch.prepare(3)
        assert switch.new.of(ReplicaPrepared)[-1].epoch == 3

    def test_a_failed_preparation_is_told(self, switch: Switch) -> None:
        """Otherwise the switch would wait for its deadline."""
        switch.prepare()
        switch.new.break_engine("no memory")
        assert switch.new.of(ReplicaFailed)[0].detail == "no memory"
        assert hosted(switch.new).phase == "failed"
        switch.prepare()
        assert hosted(switch.new).phase == "prepared"

    def test_a_start_that_overtakes_the_preparation_waits_for_it(self, switch: Switch) -> None:
        """Otherwise a switch that was decided meanwhile would wait for another repair."""
        switch.new.feed(prepare(2, R2))
        switch.new.feed(start(2, R2))
        switch.new.settle_jobs()
        assert switch.new.of(ReplicaStarted)[0].epoch == 2

    def test_followers_have_a_part_of_the_engine_where_it_has_parts(self) -> None:
        """Otherwise the leader would wait for ranks that nobody has started."""
        worker = DrivenWorker(followers=True)
        replica = spec("r1", NEW, OLD, parallelism="tp2")
        worker.feed(start(1, replica))
        [job] = worker.jobs
        assert isinstance(job, EngineStart)
        assert (job.rank, job.epoch) == (1, 1)
        assert not worker.of(ReplicaStarted)
        worker.feed(EngineReady(replica_id="r1", generation=1, cache_bytes=7))
        assert worker.of(ReplicaStarted)
        assert hosted(worker).cache_bytes == 7

    def test_without_an_engine_part_there_is_nothing_to_prepare(self) -> None:
        """Otherwise switches of modelled replicas across GPUs would never get anywhere."""
        worker = DrivenWorker()
        worker.feed(prepare(2, spec("r1", NEW, OLD, parallelism="tp2")))
        assert worker.of(ReplicaPrepared)
        worker.feed(start(2, spec("r1", NEW, OLD, parallelism="tp2")))
        assert worker.of(ReplicaStarted)


class TestPausing:
    def test_it_stands_still_with_all_its_requests(self, switch: Switch) -> None:
        """Otherwise requests would be copied while they change."""
        switch.old.feed(submit("a", tokens=50))
        switch.old.feed(pause())
        assert [type(job) for job in switch.old.jobs] == [EnginePause]
        assert not switch.old.of(ReplicaPaused)
        switch.old.settle_jobs()
        assert switch.old.of(ReplicaPaused)[0].requests == 1
        assert hosted(switch.old).phase == "paused"
        switch.pause()
        assert len(switch.old.of(ReplicaPaused)) == 2
        assert not switch.old.jobs

    def test_what_is_submitted_is_kept_until_it_is_resumed(self, switch: Switch) -> None:
        """Otherwise a switch would refuse requests that it could serve a moment later."""
        switch.pause()
        switch.old.feed(submit("late", tokens=2))
        assert switch.old.chunks()[-1].finish is None
        switch.old.feed(ResumeReplica(**named(R1, 3)))
        assert switch.old.of(ReplicaStarted)[-1].epoch == 3
        switch.old.settle_jobs()
        for _ in range(3):
            switch.old.step_engines()
        assert switch.old.ended["late", 0] == 1

    def test_a_resume_that_overtakes_the_pause_wins(self, switch: Switch) -> None:
        """Otherwise a replica would stand still that nobody wants paused."""
        switch.old.feed(pause())
        switch.old.feed(ResumeReplica(**named(R1, 3)))
        assert [type(job) for job in switch.old.jobs] == [EnginePause, EngineResume]
        switch.old.settle_jobs()
        assert hosted(switch.old).phase == "serving"
        switch.old.feed(pause(2))  # a late copy
        assert not switch.old.jobs

    def test_heartbeats_go_on_for_a_while_only(self, switch: Switch) -> None:
        """Otherwise ingresses would give up in each pause, or wait for ever for a dead switcher."""
        switch.old.feed(submit("a", tokens=50))
        switch.pause()
        switch.old.sent.clear()
        switch.old.advance(5.0)
        beats = [m.worker_id for m in switch.old.of(TokenChunks)]
        assert set(beats) == {OLD}
        assert 8 <= len(beats) <= 13
        switch.old.advance(6.0)
        switch.old.sent.clear()
        switch.old.advance(5.0)
        assert not switch.old.of(TokenChunks)

    def test_stopped_it_forgets_what_moved_and_hands_back_the_rest(self, switch: Switch) -> None:
        """Otherwise a moved request would be run twice, or a late one lost."""
        switch.hold("moved")
        switch.old.feed(submit("late", tokens=5))
        switch.old.sent.clear()
        switch.old.feed(StopReplica(**named(R1)))
        assert [(c.request_id, c.failure) for c in switch.old.chunks()] == [("late", "draining")]
        assert switch.old.feed(submit("moved", tokens=50)) == []
        assert switch.old.feed(submit("late", tokens=5)) == []

    def test_broken_it_fails_what_it_has(self, switch: Switch) -> None:
        """Otherwise its requests would wait for a replica that is gone."""
        switch.old.feed(submit("a", tokens=50))
        switch.pause()
        switch.old.break_engine("lost")
        assert (switch.old.chunks()[-1].finish, switch.old.chunks()[-1].failure) == (
            "failed",
            "engine",
        )
        assert hosted(switch.old).phase == "failed"

    def test_unknown_it_is_told(self, switch: Switch) -> None:
        """Otherwise a switch would wait for a worker that has lost the replica in a restart."""
        switch.new.feed(pause())
        assert "not hosted" in switch.new.of(ReplicaFailed)[0].detail

    def test_a_worker_that_leaves_waits_for_the_end_of_the_switch(self, switch: Switch) -> None:
        """Otherwise it would hand back requests that run elsewhere already."""
        switch.hold("a")
        switch.old.sent.clear()
        switch.old.feed(Draining())
        assert not switch.old.chunks()
        switch.old.feed(StopReplica(**named(R1)))
        switch.old.settle_jobs()
        assert switch.old.core.drained
        assert not switch.old.chunks()

    def test_a_worker_that_leaves_does_not_wait_for_ever(self, switch: Switch) -> None:
        """Otherwise a dead switcher would keep it, and its requests, from ever ending."""
        switch.hold("a")
        switch.old.feed(Draining())
        switch.old.advance(switch.old.config.pause_patience_s + 0.1)
        assert switch.old.chunks()[-1].failure == "draining"
        switch.old.settle_jobs()
        assert switch.old.core.drained

    def test_a_drain_lets_it_run_out(self, switch: Switch) -> None:
        """Otherwise a switch by reload after one that failed would never come to its end."""
        switch.old.feed(submit("a", tokens=50))
        switch.pause()
        switch.old.feed(Draining())
        switch.old.feed(ResumeReplica(**named(R1, 3)))
        assert LEAVING in switch.old.of(ReplicaFailed)[0].detail
        assert [type(job) for job in switch.old.jobs] == [EngineResume]
        assert hosted(switch.old).phase == "draining"


LEAVING = "leaving"


class TestTaking:
    def test_requests_are_held_until_the_plan_is_in_force(self, switch: Switch) -> None:
        """Otherwise two replicas would tell the same stream."""
        switch.hold("a", "b")
        assert switch.new.of(RequestsTaken)[0].moved == 2
        assert hosted(switch.new).taken == 2
        assert {request.request_id for request in switch.new.core.held} == {"a", "b"}
        assert not switch.new.chunks()
        assert not switch.new.core.live

    def test_started_they_go_on_and_their_ingresses_hear_of_it(self, switch: Switch) -> None:
        """Otherwise ingresses would wait for a replica that is gone."""
        switch.hold("a", "b")
        switch.new.feed(start(2, R2))
        told = switch.new.of(TokenChunks)
        assert {(m.replica_id, m.worker_id) for m in told} == {("r2", NEW)}
        assert {(c.request_id, c.attempt, c.finish) for c in switch.new.chunks()} == {
            ("a", 0, None),
            ("b", 0, None),
        }
        assert not switch.new.of(ReplicaStarted)
        switch.new.settle_jobs()
        assert switch.new.of(ReplicaStarted)[0].pauses == ((0.1, 1),)
        switch.new.feed(start(2, R2))
        assert switch.new.of(ReplicaStarted)[1].pauses == ((0.1, 1),)
        assert hosted(switch.new).taken == 0
        for _ in range(50):
            switch.new.step_engines()
        assert switch.new.ended["a", 0] == switch.new.ended["b", 0] == 1

    @pytest.mark.parametrize(
        "command",
        [start(3, R2), ResumeReplica(**named(R2, 3)), StopReplica(**named(R2, 3))],
        ids=["start", "resume", "stop"],
    )
    def test_told_otherwise_they_are_given_up(self, switch: Switch, command: Any) -> None:
        """Otherwise a switch that was rolled back would leave two copies of each request."""
        switch.hold("a")
        switch.new.feed(command)
        switch.new.settle_jobs()
        assert not switch.new.core.held
        assert not switch.new.core.live
        assert not any(engine.has_work for engine in switch.new.engines.values())
        assert not switch.new.chunks()

    def test_given_up_during_the_taking_they_are_given_up(self, switch: Switch) -> None:
        """Otherwise an answer that comes too late would bring back what was rolled back."""
        switch.old.feed(submit("a", tokens=50))
        switch.prepare()
        switch.pause()
        switch.new.feed(take())
        switch.new.feed(start(3, R2))
        assert [type(job) for job in switch.new.jobs] == [EngineTake, EngineRelease]
        switch.new.settle_jobs()
        assert not switch.new.core.held
        assert not any(engine.states() for engine in switch.new.engines.values())

    def test_a_repeat_repeats_its_event_only(self, switch: Switch) -> None:
        """Otherwise a lost event would stall all streams, or a repeat copy everything again."""
        switch.hold("a")
        switch.take()
        assert len(switch.new.of(RequestsTaken)) == 2
        switch.new.feed(start(2, R2))
        switch.new.settle_jobs()
        switch.take()
        assert len(switch.new.of(RequestsTaken)) == 2

    def test_a_source_that_runs_is_told_and_taken_later(self, switch: Switch) -> None:
        """Otherwise a failed taking would count as a switch without requests."""
        switch.old.feed(submit("a", tokens=50))
        switch.prepare()
        switch.take()
        assert "does not stand still" in switch.new.of(ReplicaFailed)[0].detail
        switch.pause()
        switch.take()
        assert switch.new.of(RequestsTaken)[0].moved == 1

    def test_a_replica_that_stays_takes_requests_too(self, switch: Switch) -> None:
        """Otherwise the last of several replicas could not take over what the others leave."""
        switch.new.serve(R2)
        switch.new.feed(submit("mine", replica_id="r2", tokens=50))
        switch.hold("a")
        assert isinstance(switch.new.expected[0], EngineExpect)
        assert hosted(switch.new).phase == "serving"
        assert [request.request_id for request in switch.new.core.live] == ["mine"]
        switch.new.feed(start(2, R2))
        switch.new.settle_jobs()
        assert {request.request_id for request in switch.new.core.live} == {"a", "mine"}

    def test_broken_it_leaves_them_where_they_are(self, switch: Switch) -> None:
        """Otherwise a failed switch would fail requests that are safe."""
        switch.hold("a")
        switch.new.break_engine("lost")
        assert not switch.new.chunks()
        assert not switch.new.core.held
        assert [request.request_id for request in switch.old.core.live] == ["a"]

    def test_a_worker_that_leaves_gives_them_up(self, switch: Switch) -> None:
        """Otherwise it would go with requests that nobody else has."""
        switch.hold("a")
        switch.new.feed(Draining())
        switch.new.settle_jobs()
        assert switch.new.core.drained
        assert not switch.new.chunks()

    def test_on_the_same_worker_they_change_hands_once(self) -> None:
        """Otherwise a worker with part in the old and the new shape would run them twice."""
        worker = DrivenWorker()
        here = spec("r2", OLD)
        worker.serve(R1)
        worker.feed(submit("a", tokens=50))
        worker.feed(prepare(2, here, source=("r1", OLD)))
        worker.feed(PauseReplica(shares=shares(here), **named(R1)))
        worker.settle_jobs()
        worker.feed(TakeRequests(sources={"r1": OLD}, shares=shares(here), **named(here)))
        worker.settle_jobs()
        worker.feed(start(2, here))
        assert [request.replica_id for request in worker.core.live] == ["r2"]
        worker.feed(StopReplica(**named(R1)))
        worker.settle_jobs()
        assert [request.replica_id for request in worker.core.live] == ["r2"]


class TestAborts:
    def test_one_between_pause_and_taking_is_not_taken(self, switch: Switch) -> None:
        """Otherwise the new leader would run what nobody wants."""
        switch.old.feed(submit("a", tokens=50))
        switch.prepare()
        switch.pause()
        switch.old.feed(abort("a"))
        switch.take()
        assert switch.new.of(RequestsTaken)[0].moved == 0

    def test_one_of_a_held_request_reaches_its_new_leader(self, switch: Switch) -> None:
        """Otherwise it would go on there after the switch."""
        switch.hold("a")
        switch.old.feed(abort("a"))
        assert not switch.new.core.held
        assert not any(engine.states() for engine in switch.new.engines.values())

    def test_one_that_overtakes_the_taking_is_remembered(self, switch: Switch) -> None:
        """Otherwise it would be forgotten as that of a request that is not here."""
        switch.old.feed(submit("a", tokens=50))
        switch.prepare()
        switch.pause()
        switch.new.feed(abort("a"))
        switch.take()
        assert not switch.new.core.held

    def test_one_of_a_moved_request_follows_it(self, switch: Switch) -> None:
        """Otherwise an ingress that has not heard of the move would pay for the whole answer."""
        switch.hold("a")
        switch.new.feed(start(2, R2))
        switch.new.settle_jobs()
        switch.old.feed(StopReplica(**named(R1)))
        switch.old.settle_jobs()
        switch.old.feed(abort("a"))
        assert not switch.new.core.live

    def test_one_follows_a_moved_request_once(self, switch: Switch) -> None:
        """Otherwise two workers that have moved a request to each other, where it has ended since,
        would send its abort to and fro for ever."""
        switch.hold("a")
        switch.new.feed(start(2, R2))
        switch.new.settle_jobs()
        switch.old.feed(StopReplica(**named(R1)))
        switch.old.settle_jobs()
        switch.old.feed(abort("a"))
        switch.old.feed(abort("a"))
        assert len(switch.old.of(AbortRequest)) == 1
        switch.old.serve(spec("r3", OLD))
        switch.old.feed(submit("a", replica_id="r3", tokens=50))
        assert not switch.old.core.live  # it is forgotten that it moved, not that it is aborted

    def test_memory_of_moved_requests_is_bounded(self) -> None:
        """Otherwise a worker's memory would grow with each switch."""
        worker = DrivenWorker(WorkerConfig(worker_id=OLD, moved_max=2))
        worker.serve(R1)
        for n in range(4):
            worker.feed(submit(f"q{n}", tokens=50))
        worker.feed(pause())
        worker.settle_jobs()
        worker.feed(StopReplica(**named(R1)))  # check() runs after each event


class TestStages:
    def test_one_that_comes_fetches_them_one_by_one(self, switch: Switch) -> None:
        """Otherwise the switcher could not tell when the old may free their layers."""
        switch.prepare(stages=3)
        command = AdvanceStage(stage=1, **named(R2))
        switch.new.feed(command)
        switch.new.feed(command)
        assert len(switch.new.jobs) == 1
        switch.new.settle_jobs()
        assert hosted(switch.new).stage == 1
        assert switch.new.of(ReplicaPrepared)[-1].bytes_by_source == {"n0-g1": 5}

    def test_one_with_layers_missing_takes_no_requests(self, switch: Switch) -> None:
        """Otherwise a switcher that knows less of the stages would have it go on with half of its
        weights."""
        switch.old.feed(submit("a", tokens=50))
        switch.prepare(stages=2)
        switch.pause()
        switch.take()
        assert not switch.new.of(RequestsTaken)
        switch.new.feed(AdvanceStage(stage=1, **named(R2)))
        switch.new.settle_jobs()
        switch.take()
        assert [event.epoch for event in switch.new.of(RequestsTaken)] == [2]

    def test_one_with_layers_missing_does_not_serve(self, switch: Switch) -> None:
        """Otherwise it would tell nonsense."""
        switch.prepare(stages=2)
        switch.new.feed(start(2, R2))
        assert [type(job) for job in switch.new.jobs] == [EngineStop]
        assert not switch.new.of(ReplicaStarted)

    def test_a_rank_that_does_not_lead_leaves_them_to_the_one_that_does(self) -> None:
        """Otherwise each rank but the first would stop when a replica whose weights came in stages
        is started: it is told of none of them."""
        worker = DrivenWorker(worker_id=NEW, followers=True)
        both = spec("r2", OLD, NEW, parallelism="tp2")
        worker.feed(prepare(2, both, source=("r1", OLD), stages=3))
        worker.settle_jobs()
        worker.feed(start(2, both))
        assert hosted(worker).phase == "serving"
        assert not worker.jobs

    def test_one_that_has_freed_layers_is_not_resumed(self, switch: Switch) -> None:
        """Otherwise it would tell nonsense, and its requests never end."""
        switch.hold("a")
        switch.old.feed(AdvanceStage(stage=1, layers=(0, 2), **named(R1)))
        switch.old.settle_jobs()
        switch.old.feed(ResumeReplica(**named(R1, 3)))
        assert switch.old.chunks()[-1].failure == "draining"
        switch.old.settle_jobs()
        assert switch.old.of(ReplicaStopped)
