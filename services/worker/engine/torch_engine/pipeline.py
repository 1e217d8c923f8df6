"""The steps under way at the leader: as many at once as there are pipeline stages."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from services.worker.engine.torch_engine.batch_scheduler import Chunk
from services.worker.engine.torch_engine.commands import STEP, command
from services.worker.engine.torch_engine.rank_runner import RankRunner
from services.worker.engine.torch_engine.step_plan import PlanWriter, StepPlan


class Announcer(Protocol):
    """The part of a LeaderSession that tells the followers what to do."""

    def broadcast(self, payload: bytes) -> None: ...


@dataclass(slots=True)
class MicroBatch:
    """One step under way. ``logits``: None until they have come."""

    chunks: list[Chunk]
    plan: StepPlan
    logits: Tensor | None = None


class Pipeline:
    """``followers``: the replica's other ranks; None where there are none."""

    def __init__(
        self, runner: RankRunner, writer: PlanWriter, followers: Announcer | None = None
    ) -> None:
        self._runner: RankRunner | None = runner
        self._stages = runner.stages
        self._writer = writer
        self._followers = followers
        self._under_way: deque[MicroBatch] = deque()
        self._broken = False  # by a rank that failed in the middle of a step

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    @property
    def full(self) -> bool:
        return len(self._under_way) >= self._stages

    @property
    def tokens(self) -> int:
        """In all steps under way."""
        return sum(chunk.count for step in self._under_way for chunk in step.chunks)

    def close(self) -> None:
        """Let go of the weights and the cache."""
        self._runner = None

    def submit(self, chunks: list[Chunk]) -> None:
        """Have all ranks compute ``chunks``, and do our own part. Raises RankLost."""
        assert self._runner is not None, "the engine is closed"
        assert not self.full
        plan = self._writer.plan(chunks)
        self._make_way(self._runner, plan)
        step = MicroBatch(chunks, plan)
        self._under_way.append(step)
        self._broken = True
        if self._followers is not None:
            self._followers.broadcast(command(STEP, self._writer.encode(plan, chunks)))
        step.logits = self._runner.run(plan)
        self._broken = False

    def collect(self) -> tuple[list[Chunk], Tensor]:
        """The oldest step's chunks, and the logits [sampled, vocabulary] of those that sample.
        Waits for it. Raises RankLost."""
        step = self._under_way[0]
        logits = self._arrived(step)
        self._under_way.popleft()
        return step.chunks, logits

    def quiesce(self) -> None:
        """Wait until all ranks have done what they were told. The results are kept for
        ``collect``. Raises RankLost. After a failure there is nothing to wait for."""
        for step in () if self._broken else self._under_way:
            self._arrived(step)

    def abandon(self) -> list[Chunk]:
        """Forget all steps under way, and what comes of them; what they computed."""
        chunks = [chunk for step in self._under_way for chunk in step.chunks]
        self._under_way.clear()
        return chunks

    def _make_way(self, runner: RankRunner, plan: StepPlan) -> None:
        """Receive logits, the oldest first, until those left under way, or else all hidden states,
        fit between two ranks. Else we could wait for the next stage to receive hidden states, and
        the last one for us to receive logits, for ever."""
        coming = [step for step in self._under_way if step.logits is None]
        room = runner.in_flight_bytes
        while (
            sum(runner.logits_bytes(step.plan) for step in coming) > room
            and sum(runner.hidden_bytes(one) for one in (plan, *(s.plan for s in coming))) > room
        ):
            self._arrived(coming.pop(0))

    def _arrived(self, step: MicroBatch) -> Tensor:
        if step.logits is None:
            assert self._runner is not None, "the engine is closed"
            self._broken = True
            step.logits = self._runner.receive(step.plan)
            self._broken = False
        return step.logits
