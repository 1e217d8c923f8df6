"""Engines of any shape hand requests over in the middle of a text, and the text stays the same."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

from services.worker.engine.interface import Taken
from services.worker.engine.torch_engine.config import TorchEngineConfig
from tests.support import rank_threads
from tests.support.rank_threads import ThreadReplica
from tests.support.torch_ranks import mapped_bytes
from tests.unit.engine_contract import Output, finish_all, step
from tests.unit.torch_oracle import (
    Oracle,
    greedy_request,
    make_oracle,
    prompt_of,
)

pytestmark = pytest.mark.torch

_LENGTHS = {"r0": 5, "r1": 40, "r2": 70, "r3": 33}
_TOKENS = 30


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("uneven"), "uneven")


class Pair:
    """An old replica with four requests under way, and a new one that will take them over."""

    def __init__(
        self,
        oracle: Oracle,
        old: str,
        new: str,
        *,
        old_blocks: int = 128,
        new_blocks: int = 128,
        names: tuple[str, str] = ("old", "new"),
    ) -> None:
        self.oracle = oracle
        self._end = ExitStack()
        self.old = self._replica(old, names[0], blocks=old_blocks)
        self.new = self._replica(new, names[1], blocks=new_blocks)
        self.new.expect_from(self.old)
        self.outputs = {key: Output(0) for key in _LENGTHS}
        for key, length in _LENGTHS.items():
            self.old.engine.add(greedy_request(key, prompt_of(length), _TOKENS))

    def _replica(self, shape: str, name: str, *, blocks: int) -> ThreadReplica:
        config = TorchEngineConfig(
            threads=1, kv_blocks=blocks, block_tokens=4, batch_tokens_max=64, running_max=8
        )
        folder = self.oracle.folder
        made = ThreadReplica(folder, shape, config, name=name, replica_id=name)
        self._end.callback(made.engine.close)
        return made

    def close(self) -> None:
        self._end.close()

    def steps(self, count: int) -> None:
        """Of the old replica."""
        for _ in range(count):
            step(self.old.engine, self.outputs)

    def take(self, *, final: bool) -> Taken:
        states = self.old.engine.states()
        taken = self.new.engine.take(self.old.spec.replica_id, states, final=final)
        if final:
            assert not self.new.engine.has_work, "a held request runs"
        self.new.engine.check()
        return taken

    def go_on(self) -> None:
        """The new replica is in force: the old one has gone."""
        self.old.engine.close()
        self.new.engine.release(keep=True)
        self.new.engine.check()
        finish_all(self.new.engine, self.outputs)

    def check_texts(self) -> None:
        for key, output in self.outputs.items():
            wanted = self.oracle.greedy(prompt_of(_LENGTHS[key]), _TOKENS)
            assert output.tokens == wanted, f"{key} is not what an undisturbed run makes"


@pytest.fixture
def pairs(oracle: Oracle) -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


SHAPES = [
    ("tp1", "tp1"), ("tp1", "tp2"), ("tp2", "tp1"), ("tp2", "tp1pp2"), ("tp1pp2", "tp2"),
    ("tp3", "tp2pp2"), ("tp1pp3", "tp4"),
]  # fmt: skip


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_the_text_goes_on(
    oracle: Oracle, pairs: list[Pair], old: str, new: str, ahead: bool
) -> None:
    """What nobody may notice: each request goes on where it was, on replicas of another shape."""
    pairs.append(pair := Pair(oracle, old, new))
    pair.steps(4)
    before = 0
    if ahead:
        for _ in range(3):
            before += _bytes(pair.take(final=False))
            pair.steps(3)
        assert before > 0, "nothing was copied ahead"
    taken = pair.take(final=True)
    assert not taken.detail
    assert pair.new.link.told > 0, "a rank that hangs in it would not be noticed"
    assert not pair.new.link.working
    assert sorted(taken.moved) == sorted(_LENGTHS)
    assert len(taken.bytes_by_source) == pair.new.world.shape.gpus, "a rank has copied nothing"
    if ahead:
        assert _bytes(taken) < before, "the pause copied again what was there"
    pair.go_on()
    pair.check_texts()


def test_what_happens_between_is_followed(oracle: Oracle, pairs: list[Pair]) -> None:
    """Aborted, ended, new: the final call, not what was copied ahead, says who comes along."""
    pairs.append(pair := Pair(oracle, "tp2", "tp1"))
    short = greedy_request("short", prompt_of(9), 8)
    pair.outputs["short"] = Output(0)
    pair.old.engine.add(short)
    pair.steps(5)
    pair.take(final=False)
    pair.old.engine.abort("r1")
    del pair.outputs["r1"]
    pair.steps(6)
    assert pair.outputs["short"].finish == "length"
    pair.old.engine.add(greedy_request("late", prompt_of(12), _TOKENS))
    pair.outputs["late"] = Output(0)
    pair.steps(1)
    taken = pair.take(final=True)
    assert set(taken.moved) | set(taken.replayed) == {"r0", "r2", "r3", "late"}
    pair.go_on()
    assert pair.outputs.pop("short").tokens == oracle.greedy(prompt_of(9), 8)
    assert pair.outputs.pop("late").tokens == oracle.greedy(prompt_of(12), _TOKENS)
    pair.check_texts()


def test_blocks_that_another_request_got_are_not_believed(
    oracle: Oracle, pairs: list[Pair]
) -> None:
    """A preempted request loses the blocks that were copied ahead, and computes anew elsewhere."""
    pairs.append(pair := Pair(oracle, "tp1", "tp2", old_blocks=50))
    pair.steps(4)
    early = {state.request.key: state.admission for state in pair.old.engine.states()}
    pair.take(final=False)
    while not pair.old.engine.preemptions:
        pair.steps(1)
    while pair.old.engine.load().waiting:
        pair.steps(1)
    late = {state.request.key: state.admission for state in pair.old.engine.states()}
    assert any(late[key] != early[key] for key in late), "nobody was admitted again"
    taken = pair.take(final=True)
    assert set(taken.moved) == late.keys()
    pair.go_on()
    pair.check_texts()


def test_too_few_blocks_mean_replay_not_loss(oracle: Oracle, pairs: list[Pair]) -> None:
    """A replica with a smaller cache computes again what it cannot hold, and loses nothing."""
    pairs.append(pair := Pair(oracle, "tp2", "tp1", new_blocks=30))
    pair.steps(6)
    pair.take(final=False)
    pair.steps(2)
    taken = pair.take(final=True)
    assert taken.replayed
    assert taken.moved
    assert "no KV blocks" in taken.detail
    pair.go_on()
    pair.check_texts()


def test_a_rollback_waits_for_the_steps_under_way(
    oracle: Oracle, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that waits for its logits to be received would not answer, and a replica that stays
    would be lost to a switch that failed."""
    monkeypatch.setattr(rank_threads, "IN_FLIGHT_BYTES", 100)
    pairs.append(pair := Pair(oracle, "tp1", "tp1pp2"))
    pair.steps(4)
    outputs = {f"own{n}": Output(0) for n in range(4)}
    for n, key in enumerate(outputs):
        pair.new.engine.add(greedy_request(key, prompt_of(10 + n), 12))
    pair.take(final=False)
    step(pair.new.engine, outputs)
    pair.new.engine.release(keep=False)
    finish_all(pair.new.engine, outputs)
    for n, output in enumerate(outputs.values()):
        assert output.tokens == oracle.greedy(prompt_of(10 + n), 12)


def test_a_rolled_back_takeover_leaves_no_trace(oracle: Oracle, pairs: list[Pair]) -> None:
    """Before the commit everything can fail: the old replica goes on as if nothing had been."""
    pairs.append(pair := Pair(oracle, "tp1", "tp1pp2"))
    pair.steps(5)
    pair.take(final=False)
    pair.take(final=True)
    pair.new.engine.release(keep=False)
    pair.new.engine.check()
    assert pair.new.engine.load().kv_blocks_used == 0
    finish_all(pair.old.engine, pair.outputs)
    pair.check_texts()


def _bytes(taken: Taken) -> int:
    return sum(sum(sources.values()) for sources in taken.bytes_by_source.values())


def test_closed_engines_give_their_memory_back(oracle: Oracle, pairs: list[Pair]) -> None:
    """The next replica takes it at once: it cannot wait for a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        pairs.append(pair := Pair(oracle, "tp2", "tp1pp2", names=("left", "came")))
        pair.steps(4)
        pair.take(final=False)
        pair.take(final=True)
        assert mapped_bytes("oserve-left") > 0
        pair.go_on()
        assert mapped_bytes("oserve-left") == 0, "the old replica's memory is still here"
        pair.new.engine.close()
        assert mapped_bytes("oserve-came") == 0, "the new replica's memory is still here"
    finally:
        gc.enable()
