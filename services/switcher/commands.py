"""The commands to workers: which there are, whom each is for, and how it is sent."""

from services.switcher.view import Part
from shared import subjects
from shared.core import Publish
from shared.messages.replicas import (
    AdvanceStage,
    DrainReplica,
    PauseReplica,
    PrepareReplica,
    ResumeReplica,
    StartReplica,
    StopReplica,
    TakeRequests,
)

Command = (
    StartReplica
    | DrainReplica
    | StopReplica
    | ResumeReplica
    | PrepareReplica
    | PauseReplica
    | TakeRequests
    | AdvanceStage
)


def publish(command: Command) -> Publish:
    worker_id = command.worker_id
    match command:
        case StartReplica():
            return subjects.START_REPLICA.send(command, worker_id=worker_id)
        case DrainReplica():
            return subjects.DRAIN_REPLICA.send(command, worker_id=worker_id)
        case StopReplica():
            return subjects.STOP_REPLICA.send(command, worker_id=worker_id)
        case ResumeReplica():
            return subjects.RESUME_REPLICA.send(command, worker_id=worker_id)
        case PrepareReplica():
            return subjects.PREPARE_REPLICA.send(command, worker_id=worker_id)
        case PauseReplica():
            return subjects.PAUSE_REPLICA.send(command, worker_id=worker_id)
        case TakeRequests():
            return subjects.TAKE_REQUESTS.send(command, worker_id=worker_id)
        case AdvanceStage():
            return subjects.ADVANCE_STAGE.send(command, worker_id=worker_id)


def part_of(command: Command) -> Part:
    if isinstance(command, StartReplica | PrepareReplica):
        return (command.worker_id, command.replica.replica_id)
    return (command.worker_id, command.replica_id)


def step_of(command: Command) -> int:
    """What tells two commands of one kind, part and epoch apart: the stage."""
    return command.stage if isinstance(command, AdvanceStage) else 0
