"""What one rank does for a step, leader and follower alike.

The first stage looks tokens up, each stage runs its layers and hands the hidden states on to the
rank of the same tp_rank in the next, and the last stage's rank 0 returns the logits to the leader.
Each stage answers plans in the order in which they were told, so that several can be under way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from services.worker.engine.torch_engine.batch import Batch, BatchBuilder
from services.worker.engine.torch_engine.kv_cache import BlockTable
from services.worker.engine.torch_engine.model import DecoderStage
from services.worker.engine.torch_engine.ranks.group import RankGroup
from services.worker.engine.torch_engine.step_plan import StepPlan

LEADER = 0
"""Its number among a replica's ranks."""


def _unwatched(busy: bool) -> None:  # a replica of one rank is watched by nobody
    pass


class RankRunner:
    """``table``: the KV block table as of the plan that is run. ``pipe``: all ranks by number;
    None where there is one. ``busy`` is told when work begins and ends that should show progress;
    waiting for another stage does not."""

    def __init__(
        self,
        stage: DecoderStage,
        table: BlockTable,
        *,
        pipe: RankGroup | None = None,
        busy: Callable[[bool], None] = _unwatched,
    ) -> None:
        self._stage = stage
        self._table = table
        self._pipe = pipe
        self._busy = busy
        self._builder = BatchBuilder(
            heads_per_kv_head=stage.heads_per_kv_head, dtype=stage.dtype, device=stage.device
        )

    @property
    def stages(self) -> int:
        return self._stage.rank.pp

    @property
    def in_flight_bytes(self) -> int:
        """What can be sent to another stage before the sender waits for it."""
        return 0 if self._pipe is None else self._pipe.in_flight_bytes

    def hidden_bytes(self, plan: StepPlan) -> int:
        """Of what each stage hands on to the next."""
        return len(plan.tokens) * self._stage.hidden * self._stage.dtype.itemsize

    def logits_bytes(self, plan: StepPlan) -> int:
        """Of what the last stage returns."""
        return _logits_rows(plan) * self._stage.vocabulary * torch.float32.itemsize

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor | None:
        """This rank's part of a step. Logits [sampled, vocabulary] at a leader whose stage is the
        last one as well; of others it has them sent (``receive``). Raises RankLost."""
        batch = self._builder.build(plan, self._table)
        hidden = self._received_hidden(batch)
        self._busy(True)
        try:
            return self._compute(batch, hidden)
        finally:
            self._busy(False)

    @torch.inference_mode()
    def receive(self, plan: StepPlan) -> Tensor:
        """The logits of the oldest plan that was run and not received: at the leader, where the
        last stage is another's. Raises RankLost."""
        assert self._pipe is not None, "a replica of one stage has its logits at once"
        rank = self._stage.rank
        shape = (_logits_rows(plan), self._stage.vocabulary)
        logits = torch.empty(shape, dtype=torch.float32, device=self._stage.device)
        self._pipe.recv(logits, source=(rank.pp - 1) * rank.tp)
        return logits

    def _received_hidden(self, batch: Batch) -> Tensor | None:
        rank, stage = self._stage.rank, self._stage
        if rank.first_stage:
            return None
        assert self._pipe is not None, rank
        shape = (len(batch.tokens), stage.hidden)
        hidden = torch.empty(shape, dtype=stage.dtype, device=stage.device)
        self._pipe.recv(hidden, source=rank.number - rank.tp)
        return hidden

    def _compute(self, batch: Batch, hidden: Tensor | None) -> Tensor | None:
        rank, stage = self._stage.rank, self._stage
        if hidden is None:
            hidden = stage.embed(batch)
        hidden = stage.run_layers(hidden, batch)
        if not rank.last_stage:
            assert self._pipe is not None, rank
            self._pipe.send(hidden, to=rank.number + rank.tp)
            return None
        logits = stage.logits(hidden, batch)
        if logits is None or rank.number == LEADER:
            return logits
        if rank.pp > 1:
            assert self._pipe is not None, rank
            self._pipe.send(logits, to=LEADER)
        return None


def _logits_rows(plan: StepPlan) -> int:
    """Where nothing is sampled there is one all the same, which nobody reads."""
    return max(1, int(plan.samples.sum()))
