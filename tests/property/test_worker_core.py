"""The worker's core under arbitrary orders of commands, requests, engine outcomes and time."""

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core import Command
from services.worker.reporting import KV_SHARE_NOTICED
from shared.messages.replicas import (
    AdvanceStage,
    DrainReplica,
    GrowCache,
    PauseReplica,
    ReplicaReport,
    ResumeReplica,
    StopReplica,
    TakeRequests,
)
from shared.messages.requests import AbortRequest
from tests.worker_driver import WORKER, DrivenWorker, prepare, shares, spec, start, submit

REPLICAS = ("r1", "r2")
replica_ids = st.sampled_from(REPLICAS)
epochs = st.integers(-1, 1)  # relative to the highest so far: past, present, next
requests = st.tuples(st.sampled_from(("qa", "qb", "qc", "qd", "qe")), st.integers(0, 3))

actions = st.one_of(
    st.tuples(st.just("start"), replica_ids, epochs),
    st.tuples(st.just("drain"), replica_ids, epochs),
    st.tuples(st.just("stop"), replica_ids, epochs),
    st.tuples(st.just("resume"), replica_ids, epochs),
    st.tuples(st.just("prepare"), replica_ids, epochs),
    st.tuples(st.just("pause"), replica_ids, epochs),
    st.tuples(st.just("take"), replica_ids, epochs),
    st.tuples(st.just("stage"), replica_ids, epochs),
    st.tuples(st.just("grow"), replica_ids, epochs),
    st.tuples(st.just("submit"), replica_ids, requests),
    st.tuples(st.just("submit"), replica_ids, requests),
    st.tuples(st.just("submit"), replica_ids, requests),
    st.tuples(st.just("abort"), replica_ids, requests),
    st.tuples(st.just("step"), replica_ids, epochs),
    st.tuples(st.just("settle"), replica_ids, epochs),
    st.tuples(st.just("settle"), replica_ids, epochs),
    st.tuples(st.just("advance"), replica_ids, epochs),
    st.tuples(st.just("break"), replica_ids, epochs),
)  # fmt: skip


class Scenario:
    """Applies actions, and knows which attempts were aborted or replaced, and so end in silence.
    Those of a paused replica that is stopped are somebody else's: perhaps nobody's here, where no
    switcher cares."""

    def __init__(self) -> None:
        self.worker = DrivenWorker()
        self.epoch = 1
        self.silent: set[tuple[str, int]] = set()
        self.left: set[tuple[str, int]] = set()

    def apply(self, action: tuple[str, str, int | tuple[str, int]]) -> None:
        worker = self.worker
        match action:
            case (str(verb), replica_id, int(offset)) if verb in VERBS:
                epoch = max(1, self.epoch + offset)
                self.epoch = max(self.epoch, epoch)
                paused = {h.replica_id: h.moves.moving for h in worker.core.replicas.values()}
                moving = paused.get(replica_id, {})
                self.left |= {
                    (r.request_id, r.attempt) for r in worker.core.live if r.request_id in moving
                }
                worker.feed(_command(verb, replica_id, epoch))
            case ("submit", replica_id, (str(request_id), int(attempt))):
                self._submit(replica_id, request_id, attempt)
            case ("abort", replica_id, (str(request_id), int(attempt))):
                live = {(r.request_id, r.attempt) for r in worker.core.live}
                self.silent |= {key for key in live if key[0] == request_id and key[1] <= attempt}
                worker.feed(
                    AbortRequest(request_id=request_id, attempt=attempt, replica_id=replica_id)
                )
            case ("step", _, _):
                worker.step_engines()
            case ("settle", _, _):
                worker.settle_jobs()
            case ("break", _, _):
                if worker.engines:
                    worker.break_engine("lost")
            case _:
                worker.advance(0.15)

    def _submit(self, replica_id: str, request_id: str, attempt: int) -> None:
        worker = self.worker
        before = {(r.request_id, r.attempt) for r in worker.core.live}
        worker.feed(submit(request_id, attempt, replica_id=replica_id, tokens=3))
        after = {(r.request_id, r.attempt) for r in worker.core.live}
        self.silent |= {key for key in before - after if key[0] == request_id}

    def finish(self) -> None:
        """Let everything run out; what is paused is not for ever."""
        self.worker.settle_jobs()
        for replica_id in REPLICAS:
            self.apply(("resume", replica_id, 1))
        for _ in range(12):
            self.worker.settle_jobs()
            self.worker.step_engines()
            self.worker.advance(0.5)


VERBS = ("start", "drain", "stop", "resume", "prepare", "pause", "take", "stage", "grow")


def _command(verb: str, replica_id: str, epoch: int) -> Command:
    other = REPLICAS[1 - REPLICAS.index(replica_id)]
    named: Any = {"epoch": epoch, "worker_id": WORKER, "replica_id": replica_id}
    commands: dict[str, Callable[[], Command]] = {
        "start": lambda: start(epoch, spec(replica_id)),
        "drain": lambda: DrainReplica(timeout_s=0.1 * (epoch % 4), **named),
        "stop": lambda: StopReplica(**named),
        "resume": lambda: ResumeReplica(**named),
        "prepare": lambda: prepare(
            epoch, spec(replica_id), source=(other, WORKER), stages=1 + epoch % 2
        ),
        "pause": lambda: PauseReplica(shares=shares(spec(other)), **named),
        "take": lambda: TakeRequests(
            sources={other: WORKER}, shares=shares(spec(replica_id)), **named
        ),
        "stage": lambda: AdvanceStage(stage=1, **named),
        "grow": lambda: GrowCache(**named),
    }
    return commands[verb]()


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=60))
def test_each_admitted_attempt_ends_exactly_once(
    steps: list[tuple[str, str, int | tuple[str, int]]],
) -> None:
    """Otherwise requests would be lost, answered twice, or run twice, in some order of events
    that nobody thought of. The core's own invariants are checked after every event."""
    scenario = Scenario()
    for action in steps:
        scenario.apply(action)
    scenario.finish()
    worker = scenario.worker
    assert not worker.core.live
    for key, times in worker.admitted.items():
        request_id, _, attempt = key.rpartition("/")
        ended = (request_id, int(attempt))
        assert times == 1, f"{key} was admitted {times} times"
        if ended in scenario.left:
            assert worker.ended[ended] <= 1, key
        else:
            assert worker.ended[ended] == (0 if ended in scenario.silent else 1), key
    for engine in worker.engines.values():
        assert not engine.has_work


@given(st.lists(st.sampled_from(("submit", "step", "abort", "wait")), max_size=40))
def test_routers_know_each_load_that_was_measured(events: list[str]) -> None:
    """Reports left out as no news would leave routers with a load that is not there."""
    worker = DrivenWorker()
    worker.serve()
    worker.advance(1.0)
    (engine,) = worker.engines.values()
    for number, event in enumerate(events):
        match event:
            case "submit":
                worker.feed(submit(f"q{number}", tokens=6))
            case "step":
                worker.step_engines()
            case "abort" if worker.core.live:
                live = worker.core.live[0]
                worker.feed(AbortRequest(request_id=live.request_id, attempt=0, replica_id="r1"))
            case _:
                worker.advance(0.11)
                load, told = engine.load(), worker.of(ReplicaReport)[-1]
                assert (told.running, told.waiting) == (load.running, load.waiting)
                hidden_blocks = abs(told.kv_blocks_used - load.kv_blocks_used)
                assert hidden_blocks <= KV_SHARE_NOTICED * load.kv_blocks_total
