"""The batch scheduler under random requests, aborts and memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.interface import EngineRequest
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler, Sequence
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from shared.errors import Rejected
from shared.messages.requests import SamplingParams

_STEPS_MAX = 20_000


class Driver:
    """Stands for the model: computes what is scheduled, and invents a token where one is due."""

    def __init__(self, draw: st.DataObject) -> None:
        ints = st.integers
        self.running_max = draw.draw(ints(1, 5), "running_max")
        self.waiting_max = draw.draw(ints(1, 5), "waiting_max")
        self.budget = draw.draw(ints(self.running_max, 20), "batch_tokens_max")
        self.kv = KvBlocks(
            blocks=draw.draw(ints(1, 12), "kv_blocks"),
            block_tokens=draw.draw(ints(1, 4), "block_tokens"),
            rows=self.running_max,
            row_tokens_max=40,
        )
        self.scheduler = BatchScheduler(
            self.kv,
            batch_tokens_max=self.budget,
            running_max=self.running_max,
            waiting_max=self.waiting_max,
        )
        self.live: dict[str, Sequence] = {}
        self.ended: set[str] = set()

    def add(self, key: str, prompt: int, output: int) -> None:
        request = EngineRequest(
            key=key,
            prompt_tokens=[0] * prompt,
            sampling=SamplingParams(output_tokens_max=output),
        )
        sequence = Sequence(request)
        full = len(self.live) >= self.running_max + self.waiting_max
        fits = prompt + output - 1 <= self.kv.total * self.kv.block_tokens
        if fits and not full:
            self.scheduler.add(sequence)
            self.live[key] = sequence
        else:
            with pytest.raises(Rejected, match="overloaded" if fits else "too_long"):
                self.scheduler.add(sequence)

    def abort(self, key: str) -> None:
        assert self.scheduler.remove(key) == (self.live.pop(key, None) is not None)

    def step(self) -> int:
        oldest = min(self.live.values(), key=lambda s: s.number, default=None)
        chunks = self.scheduler.schedule()
        assert sum(chunk.count for chunk in chunks) <= self.budget
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        assert not self.live or chunks, "live requests, and nothing is done"
        if oldest is not None and self.budget > self.running_max:
            assert oldest.number in {c.sequence.number for c in chunks}, "the oldest must progress"
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.count > 0
            assert sequence.row is not None
            samples = chunk.samples
            self.scheduler.commit(chunk)
            if samples:
                sequence.tokens.append(0)
                if len(sequence.tokens) == sequence.tokens_max:
                    key = sequence.request.key
                    assert key not in self.ended
                    self.ended.add(key)
                    assert self.scheduler.remove(key)
                    del self.live[key]
        self.scheduler.check()
        return len(chunks)


@given(st.data())
def test_everything_ends_once_within_budget(data: st.DataObject) -> None:
    """Otherwise some mix of lengths and memory would starve a request, leak KV blocks, or make
    a step longer than the operator allowed."""
    driver = Driver(data)
    for n in range(data.draw(st.integers(1, 25), "events")):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "abort"]), "action")
        if action == "add":
            prompt, output = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)), "lengths")
            driver.add(f"r{n}", prompt, output)
        elif action == "abort":
            driver.abort(f"r{data.draw(st.integers(0, 25), 'victim')}")
        else:
            driver.step()
        driver.scheduler.check()
    for _ in range(_STEPS_MAX):
        if not driver.live:
            break
        driver.step()
    assert not driver.live, "requests starve"
    assert driver.kv.used == 0
    assert driver.scheduler.schedule() == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=40))
def test_blocks_have_one_owner(moves: list[tuple[int, int]]) -> None:
    """Otherwise two requests would write to the same part of the KV cache."""
    kv = KvBlocks(blocks=10, block_tokens=4, rows=4, row_tokens_max=40)
    rows: dict[int, int] = {}
    for slot, tokens in moves:
        if slot not in rows:
            rows[slot] = kv.open()
            used = kv.used
            fits = kv.blocks_for(tokens) <= kv.free
            assert kv.grow(rows[slot], tokens=tokens) == fits
            assert kv.used == used + (kv.blocks_for(tokens) if fits else 0)
        else:
            kv.close(rows.pop(slot))
        kv.check()
    for row in rows.values():
        kv.close(row)
    assert kv.used == 0
