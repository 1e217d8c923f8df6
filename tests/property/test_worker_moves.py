"""Requests on their way through several switches, between workers and within one.

The switcher here is honest: it commits only what was taken, and rolls back otherwise. Everything
else is left to chance: when engines do what they were told, repeats and late copies of commands,
what clients do meanwhile.
"""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages.base import Message
from shared.messages.plans import ReplicaSpec
from shared.messages.replicas import (
    PauseReplica,
    ReplicaPaused,
    ReplicaPrepared,
    RequestsTaken,
    ResumeReplica,
    StopReplica,
    TakeRequests,
)
from shared.messages.requests import AbortRequest, TokenChunks
from tests.worker_driver import DrivenWorker, prepare, shares, spec, start, submit

WORKERS = ("n0-g0", "n0-g1")
TOKENS = 12

ACTIONS = ("say", "again", "settle", "step", "submit", "resubmit", "abort", "back", "advance")


class Mesh:
    """Two workers, one replica at a time that serves, and whoever commands them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.mesh: dict[str, DrivenWorker] = {}
        for worker_id in WORKERS:
            DrivenWorker(worker_id=worker_id, mesh=self.mesh)
        self.epoch, self.count = 1, 1
        self.old = spec("r1", WORKERS[0])
        self.new: ReplicaSpec | None = None
        self.committed = False
        self.said: list[tuple[str, Message]] = []
        self.homes: dict[str, tuple[str, str]] = {}  # request -> worker, replica as submitted
        self.aborted: set[str] = set()
        self.say(self.leader(self.old), start(1, self.old))
        self.leader(self.old).settle_jobs()

    def leader(self, replica: ReplicaSpec) -> DrivenWorker:
        return self.mesh[replica.gpus[0]]

    def say(self, worker: DrivenWorker, command: Message) -> None:
        self.said.append((worker.config.worker_id, command))
        worker.feed(command)

    def heard(self, kind: type[Any]) -> bool:
        return any(event.epoch == self.epoch for w in self.mesh.values() for event in w.of(kind))

    def advance(self, target: str) -> None:
        """The switch's next command, or the one that is due again."""
        if self.new is None:
            self.count += 1
            self.epoch += 1
            self.new, self.committed = spec(f"r{self.count}", target), False
        old, new = self.old, self.new
        source = (old.replica_id, old.gpus[0])
        gone: Any = {"epoch": self.epoch, "worker_id": old.gpus[0], "replica_id": old.replica_id}
        came: Any = {"epoch": self.epoch, "worker_id": new.gpus[0], "replica_id": new.replica_id}
        if not self.heard(ReplicaPrepared):
            self.say(self.leader(new), prepare(self.epoch, new, source=source))
        elif not self.heard(ReplicaPaused):
            self.say(self.leader(old), PauseReplica(shares=shares(new), **gone))
        elif not self.heard(RequestsTaken):
            take = TakeRequests(sources=dict([source]), shares=shares(new), **came)
            self.say(self.leader(new), take)
        else:
            self.committed = True
            self.say(self.leader(new), start(self.epoch, new))
            self.say(self.leader(old), StopReplica(**gone))
            if self.serves(new) and not self.hosts(old):
                self.old, self.new = new, None

    def roll_back(self) -> None:
        if self.new is None or self.committed:
            return
        self.epoch += 1
        new, old, self.new = self.new, self.old, None
        resume = ResumeReplica(epoch=self.epoch, worker_id=old.gpus[0], replica_id=old.replica_id)
        self.say(self.leader(old), resume)
        stop = StopReplica(epoch=self.epoch, worker_id=new.gpus[0], replica_id=new.replica_id)
        self.say(self.leader(new), stop)

    def hosts(self, replica: ReplicaSpec) -> bool:
        return replica.replica_id in self.leader(replica).core.replicas

    def serves(self, replica: ReplicaSpec) -> bool:
        hosted = self.leader(replica).core.replicas.get(replica.replica_id)
        return hosted is not None and hosted.phase == "serving"

    def submit(self, request_id: str) -> None:
        where = self.new if self.new is not None and self.committed else self.old
        self.homes[request_id] = (where.gpus[0], where.replica_id)
        self.resubmit(request_id)

    def resubmit(self, request_id: str) -> None:
        worker_id, replica_id = self.homes[request_id]
        request = submit(request_id, replica_id=replica_id, tokens=TOKENS)
        self.mesh[worker_id].feed(request)

    def abort(self, request_id: str) -> None:
        """To where it was submitted, at least: its ingress may not have heard that it moved."""
        self.aborted.add(request_id)
        told = {
            message.worker_id
            for worker in self.mesh.values()
            for message in worker.of(TokenChunks)
            if message.worker_id and any(c.request_id == request_id for c in message.chunks)
        }
        worker_id, replica_id = self.homes[request_id]
        for name in {worker_id} | (told if self.rng.random() < 0.5 else set[str]()):
            abort = AbortRequest(request_id=request_id, attempt=0, replica_id=replica_id)
            self.mesh[name].feed(abort)

    def act(self, action: str) -> None:
        rng = self.rng
        worker = self.mesh[rng.choice(WORKERS)]
        match action:
            case "say":
                self.advance(rng.choice(WORKERS))
            case "back":
                self.roll_back()
            case "again":
                worker_id, command = rng.choice(self.said[-12:])
                self.mesh[worker_id].feed(command)
            case "settle":
                worker.settle_jobs(1)
            case "step":
                worker.step_engines()
            case "submit":
                self.submit(f"q{len(self.homes)}")
            case "advance":
                worker.advance(0.3)
            case _ if self.homes:
                request_id = rng.choice(list(self.homes)[-8:])
                (self.abort if action == "abort" else self.resubmit)(request_id)
            case _:
                pass

    def finish(self) -> None:
        """The switch under way ends, and everything runs out."""
        for _ in range(12):
            if self.new is not None:
                self.advance(WORKERS[0])
            for worker in self.mesh.values():
                worker.settle_jobs()
        assert self.new is None, "the switch never ends"
        for worker in self.mesh.values():
            here = {request.request_id for request in worker.core.live}
            assert not here & self.aborted, "an abort did not follow its request"
        for _ in range(TOKENS * len(self.homes) + 1):  # enough, even one after the other
            for worker in self.mesh.values():
                worker.advance(0.0)
                worker.step_engines()
                worker.settle_jobs()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_each_attempt_ends_once_wherever_it_has_moved_to(seed: int) -> None:
    """Otherwise a switch would lose requests or run them twice, in some order of commands, repeats
    and deeds of clients. The cores' own invariants are checked after every event."""
    rng = random.Random(seed)
    mesh = Mesh(rng)
    weights = [rng.choice((1, 3, 9)) for _ in ACTIONS]
    weights[ACTIONS.index("back")] = rng.choice((0, 0, 1))
    for action in rng.choices(ACTIONS, weights, k=150):
        mesh.act(action)
    mesh.finish()
    for request_id in mesh.homes:
        times = sum(worker.ended[request_id, 0] for worker in mesh.mesh.values())
        assert times <= 1, request_id
        assert times == 1 or request_id in mesh.aborted, f"{request_id} is lost"
        admitted = sum(worker.admitted[f"{request_id}/0"] for worker in mesh.mesh.values())
        assert admitted <= 1, f"{request_id} was run {admitted} times"
    for worker in mesh.mesh.values():
        assert not worker.core.live
        assert not worker.core.held
        for engine in worker.engines.values():
            assert not engine.has_work
            assert not engine.states()
