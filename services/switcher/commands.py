"""The commands to workers: which there are, whom each is for, and how it is sent."""

from typing import Any

from services.switcher.view import Part
from shared import subjects
from shared.core import Publish
from shared.messages.replicas import (
    AdvanceStage,
    DrainReplica,
    GrowCache,
    PauseReplica,
    PrepareReplica,
    ResumeReplica,
    StartReplica,
    StopReplica,
    TakeRequests,
)
from shared.subjects import Subject

Command = (
    StartReplica
    | DrainReplica
    | StopReplica
    | ResumeReplica
    | PrepareReplica
    | PauseReplica
    | TakeRequests
    | AdvanceStage
    | GrowCache
)


SUBJECTS: dict[type[Command], Subject[Any]] = {
    StartReplica: subjects.START_REPLICA,
    DrainReplica: subjects.DRAIN_REPLICA,
    StopReplica: subjects.STOP_REPLICA,
    ResumeReplica: subjects.RESUME_REPLICA,
    PrepareReplica: subjects.PREPARE_REPLICA,
    PauseReplica: subjects.PAUSE_REPLICA,
    TakeRequests: subjects.TAKE_REQUESTS,
    AdvanceStage: subjects.ADVANCE_STAGE,
    GrowCache: subjects.GROW_CACHE,
}


def publish(command: Command) -> Publish:
    return SUBJECTS[type(command)].send(command, worker_id=command.worker_id)


def part_of(command: Command) -> Part:
    if isinstance(command, StartReplica | PrepareReplica):
        return (command.worker_id, command.replica.replica_id)
    return (command.worker_id, command.replica_id)


def step_of(command: Command) -> int:
    """What tells two commands of one kind, part and epoch apart: the stage."""
    return command.stage if isinstance(command, AdvanceStage) else 0
