"""A batch that leaps, one that goes a step at a time, and a naive one, driven and compared."""

from collections.abc import Sequence as SequenceOf
from typing import Literal

import msgspec
import pytest

from services.worker.engine.batching import Batch
from services.worker.engine.batching_types import Plan, Progress, Sequence
from shared.cost.limits import EngineLimits
from shared.errors import Rejected
from tests.property.naive_batch import NaiveBatch, PrimeTimes, Request, Step


class Add(msgspec.Struct, frozen=True):
    prompt: int
    output: int
    earlier: int
    prefix: int  # which of a few common beginnings it has
    common: int  # how many pieces of it
    piece: int  # tokens, beyond a block


class Remove(msgspec.Struct, frozen=True):
    which: int
    how: Literal["abort", "finish"]


class Run(msgspec.Struct, frozen=True):
    """Perform the plan up to this share of it, while ``meanwhile`` happens."""

    share: float
    meanwhile: tuple[Add | Remove, ...] = ()


class World(msgspec.Struct, frozen=True):
    limits: EngineLimits
    kv_blocks: int
    caching: bool


class Twins:
    """The batch in question, a twin that goes a step at a time, and the naive one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.batch, self.single = self._batch(), self._batch()
        self.naive = NaiveBatch(world.limits, kv_blocks=world.kv_blocks)
        self.steps = 0
        self.count = 0

    def _batch(self) -> Batch:
        return Batch(
            self.world.limits,
            PrimeTimes(),
            kv_blocks=self.world.kv_blocks,
            prefix_caching=self.world.caching,
        )

    def add(self, add: Add) -> str | None:
        """To the batch in question only; its key if it was taken."""
        self.count += 1
        key, limits = f"r{self.count}", self.world.limits
        refusal = ""
        if len(self.batch.sequences) == limits.running_max + limits.waiting_max:
            refusal = "overloaded"
        if add.prompt + add.output - 1 > self.world.kv_blocks * limits.block_tokens:
            refusal = "too_long"
        if refusal:
            with pytest.raises(Rejected, match=refusal):
                self._add(self.batch, key, add)
            return None
        self._add(self.batch, key, add)
        return key

    def follow(self, key: str, add: Add) -> None:
        """To the others as well."""
        self._add(self.single, key, add)
        request = Request(key, add.prompt, add.prompt + add.output, add.prompt + _earlier(add))
        if self.world.caching:
            request.piece = self._piece(add)
            request.hashes = self._hashes(add, key)[: request.known // request.piece]
        self.naive.waiting.append(request)

    def _add(self, batch: Batch, key: str, add: Add) -> None:
        batch.add(
            key,
            prompt_tokens=add.prompt,
            output_tokens=add.output,
            earlier_tokens=_earlier(add),
            hashes=self._hashes(add, key),
            hash_tokens=self._piece(add),
        )

    def _piece(self, add: Add) -> int:
        return self.world.limits.block_tokens + add.piece

    def _hashes(self, add: Add, key: str) -> tuple[int, ...]:
        """Of more pieces than there are tokens, as a trace that hashes what is to come gives."""
        piece = self._piece(add)
        common = [hash((piece, add.prefix, i)) for i in range(add.common)]
        return (*common, *(hash((piece, int(key[1:]), i)) for i in range(add.common, 99 // piece)))

    def remove(self, key: str, how: str) -> None:
        if how == "abort":
            assert self.batch.abort(key)
            assert not self.batch.abort(key)
        else:
            self.batch.finish(self.batch.sequences[key])

    def follow_removal(self, key: str) -> None:
        self.single.abort(key)
        self.naive.remove(key)

    def run(self, run: Run) -> None:
        plan = self.batch.plan()
        if plan is None:
            assert not self.naive.live
            return
        assert self.batch.plan() is plan
        elapsed_ps = int(plan.duration_ps * run.share)
        steps, end_ps = self.batch.steps_until(elapsed_ps)
        assert 1 <= steps <= plan.steps
        assert end_ps >= elapsed_ps or steps == plan.steps
        added, removed = self._meanwhile(run.meanwhile)
        progress = self.batch.advance(steps)
        whole = self._step_others(steps, plan, progress, removed=removed)
        assert whole[-1] == end_ps
        assert steps == 1 or whole[-2] < elapsed_ps, "an earlier step ends late enough"
        for key in removed:
            self.follow_removal(key)
        for key, add in added:
            if key not in removed:
                self.follow(key, add)

    def _meanwhile(
        self, events: SequenceOf[Add | Remove]
    ) -> tuple[list[tuple[str, Add]], list[str]]:
        added: list[tuple[str, Add]] = []
        removed: list[str] = []
        for event in events:
            if isinstance(event, Add):
                key = self.add(event)
                if key is not None:
                    added.append((key, event))
            elif self.batch.sequences:
                removed.append(self.pick(event))
                self.remove(removed[-1], event.how)
            self.batch.check()
        return added, removed

    def pick(self, event: Remove) -> str:
        keys = list(self.batch.sequences)
        return keys[event.which % len(keys)]

    def _step_others(
        self, steps: int, plan: Plan, progress: Progress, *, removed: list[str]
    ) -> list[int]:
        """Steps of the other two, compared with each other and at the end with the leap; the times
        at which they end."""
        ends: list[int] = []
        now_ps = 0
        for number in range(1, steps + 1):
            step, single = self.naive.step(), self._single_step()
            now_ps += step.duration_ps
            ends.append(now_ps)
            assert single == step
            if number < steps:
                assert not step.first
                assert not step.ended, "a plan goes on after an end"
            if number > 1:
                assert not step.preempted
            if number == 1:
                assert [s.key for s in plan.preempted] == step.preempted
            if number == steps:
                assert keys_of(progress.ended) == [k for k in step.ended if k not in removed]
                assert keys_of(progress.first) == [k for k in step.first if k not in removed]
                assert keys_of(progress.resumed) == [k for k in step.resumed if k not in removed]
        if steps == plan.steps:
            assert now_ps == plan.duration_ps
        self.steps += steps
        return ends

    def _single_step(self) -> Step:
        steps, duration_ps = self.single.steps_until(0)
        assert steps == 1
        done = self.single.advance(1)
        return Step(
            duration_ps,
            keys_of(done.first),
            keys_of(done.resumed),
            keys_of(done.ended),
            keys_of(done.preempted),
        )

    def compare(self) -> None:
        naive = self.naive
        for batch in (self.batch, self.single):
            batch.check()
            load = batch.load()
            assert list(batch.running) == [r.key for r in naive.running]
            assert list(batch.waiting) == [r.key for r in naive.waiting]
            assert load.kv_blocks_used == naive.used <= self.world.kv_blocks
            assert load.tokens_pending == naive.pending
            assert batch.steps_total == self.steps
            assert len(batch.kv.cache) == len(naive.sizes)
            for request in naive.live:
                sequence = batch.sequences[request.key]
                assert batch.computed(sequence) == request.computed
                assert batch.made(sequence) == request.known - request.prompt
        assert self.batch.preemptions == self.single.preemptions
        assert self.batch.hit_tokens_total == self.single.hit_tokens_total


def _earlier(add: Add) -> int:
    return add.earlier % add.output


def keys_of(sequences: SequenceOf[Sequence]) -> list[str]:
    return [sequence.key for sequence in sequences]
