"""A KV cache that was small beside old replicas grows under live requests, and nobody notices."""

from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

from services.worker.engine.interface import EngineRequest
from services.worker.engine.torch_engine.config import TorchEngineConfig
from shared.errors import Rejected
from tests.support.rank_threads import ThreadReplica
from tests.support.torch_ranks import mapped_bytes
from tests.unit.engine_contract import Output, finish_all, step
from tests.unit.torch_oracle import Oracle, greedy_request, make_oracle, prompt_of

pytestmark = pytest.mark.torch

_LENGTHS = {"r0": 5, "r1": 40, "r2": 70, "r3": 33}
_TOKENS = 30
_FULL, _SMALL = 128, 32


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("uneven"), "uneven")


class Replicas:
    """Replicas, and the requests that they are to carry on for each other."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._made: list[ThreadReplica] = []
        self.outputs: dict[str, Output] = {}
        self._requests: dict[str, EngineRequest] = {}

    def make(self, shape: str, name: str, *, small: int = 0, full: int = _FULL) -> ThreadReplica:
        config = TorchEngineConfig(
            threads=1, kv_blocks=full, block_tokens=4, batch_tokens_max=64, running_max=8
        )
        folder = self._oracle.folder
        made = ThreadReplica(folder, shape, config, name=name, replica_id=name, cache_blocks=small)
        self._made.append(made)
        return made

    def close(self) -> None:
        for made in self._made:
            made.engine.close()

    def add(self, replica: ThreadReplica, **lengths: int) -> None:
        for key, length in lengths.items():
            self._requests[key] = greedy_request(key, prompt_of(length), _TOKENS)
            self.outputs[key] = Output(0)
            replica.engine.add(self._requests[key])

    def steps(self, replica: ThreadReplica, count: int) -> None:
        for _ in range(count):
            step(replica.engine, self.outputs)

    def finish(self, replica: ThreadReplica) -> None:
        finish_all(replica.engine, self.outputs)
        for key, output in self.outputs.items():
            wanted = self._oracle.greedy(self._requests[key].prompt_tokens, _TOKENS)
            assert output.tokens == wanted, f"{key} is not what an undisturbed run makes"


@pytest.fixture
def replicas(oracle: Oracle) -> Iterator[Replicas]:
    made = Replicas(oracle)
    yield made
    made.close()


def _total(replica: ThreadReplica) -> int:
    return replica.engine.load().kv_blocks_total


@pytest.mark.parametrize("shape", ["tp1", "tp2", "tp1pp2", "tp2pp2", "tp3"])
def test_text_does_not_notice(replicas: Replicas, shape: str) -> None:
    """What each request has in the cache must be where it was, on every rank."""
    one = replicas.make(shape, "one", small=_SMALL)
    ranks = (one.engine, *one.followers.values())
    assert _total(one) == _SMALL
    assert [_FULL * r.cache_bytes for r in ranks] == [_SMALL * r.cache_bytes_full for r in ranks]
    replicas.add(one, **_LENGTHS)
    replicas.steps(one, 6)
    told = one.link.told
    one.engine.grow_cache()
    assert one.link.told > told, "a rank that hangs in it would not be noticed"
    assert not one.link.working
    one.engine.check()
    assert _total(one) == _FULL
    assert [r.cache_bytes for r in ranks] == [r.cache_bytes_full for r in ranks]
    replicas.steps(one, 2)
    one.engine.grow_cache()  # a late copy of the command
    replicas.add(one, late=90)
    replicas.finish(one)


def test_old_memory_is_given_back(replicas: Replicas) -> None:
    """Otherwise a GPU would hold the small cache and the full one for good."""
    one = replicas.make("tp1", "grown", small=_SMALL)
    replicas.add(one, **_LENGTHS)
    replicas.steps(one, 6)
    small = mapped_bytes("oserve-grown-kv")
    assert 0 < small <= one.engine.cache_bytes
    one.engine.grow_cache()
    assert mapped_bytes("oserve-grown-kv") <= small, "copied, and what it was is still here"
    replicas.finish(one)


@pytest.mark.parametrize(("old", "new"), [("tp2", "tp1pp2"), ("tp1", "tp2")])
def test_a_grown_cache_moves_on(replicas: Replicas, old: str, new: str) -> None:
    """The next switch reads the cache where it lies now, new blocks included."""
    one, two = replicas.make(old, "one", small=_SMALL), replicas.make(new, "two")
    replicas.add(one, r1=40)
    replicas.steps(one, 4)
    one.engine.grow_cache()
    replicas.add(one, r2=70, r3=33, r4=60)
    replicas.steps(one, 8)
    assert one.engine.load().kv_blocks_used > _SMALL
    two.expect_from(one)
    two.engine.take("one", one.engine.states(), final=False)
    replicas.steps(one, 3)
    taken = two.engine.take("one", one.engine.states(), final=True)
    assert len(taken.moved) == 4, taken
    one.engine.close()
    two.engine.release(keep=True)
    replicas.finish(two)


def test_it_waits_for_whoever_reads(replicas: Replicas) -> None:
    """A reader has the old memory open, and would miss what is written from then on."""
    one, two = replicas.make("tp2", "one", small=_SMALL), replicas.make("tp1", "two", small=_SMALL)
    replicas.add(one, r1=40)
    replicas.steps(one, 4)
    two.expect_from(one)
    assert two.engine.take("one", one.engine.states(), final=False).bytes_by_source
    one.engine.grow_cache()
    assert _total(one) == _SMALL
    two.engine.grow_cache()
    assert _total(two) == _SMALL, "what it takes over goes to the blocks that it has now"
    replicas.steps(one, 3)
    assert two.engine.take("one", one.engine.states(), final=True).moved == ["r1"]
    two.engine.release(keep=False)
    while _total(one) == _SMALL:  # until it has noticed that the other has gone
        one.engine.grow_cache()
    two.engine.grow_cache()
    assert _total(two) == _FULL
    replicas.finish(one)


def test_what_only_the_full_cache_has_room_for_waits(replicas: Replicas) -> None:
    """It may not be lost, or refused for good, because the new replica is small for a second."""
    one, two = replicas.make("tp1", "one"), replicas.make("tp2", "two", small=12)
    replicas.add(one, big=60, small=5)
    replicas.steps(one, 4)
    two.expect_from(one)
    taken = two.engine.take("one", one.engine.states(), final=True)
    assert (taken.moved, taken.replayed) == (["small"], ["big"])
    one.engine.close()
    two.engine.release(keep=True)
    before = len(replicas.outputs["big"].tokens)
    replicas.add(two, new=60)
    with pytest.raises(Rejected, match="too_long"):
        two.engine.add(greedy_request("long", prompt_of(500), _TOKENS))
    while two.engine.has_work:
        replicas.steps(two, 1)
    assert replicas.outputs["small"].finish == "length"
    assert len(replicas.outputs["big"].tokens) == before
    assert not replicas.outputs["new"].tokens
    two.engine.grow_cache()
    assert two.engine.has_work
    replicas.finish(two)


def test_what_outgrows_a_small_cache_waits(replicas: Replicas) -> None:
    """It runs as long as there is room, and is neither failed nor in a loop when there is none."""
    one, two = replicas.make("tp1", "one"), replicas.make("tp1", "two", small=8)
    replicas.add(one, r=20)
    replicas.steps(one, 2)
    two.expect_from(one)
    assert two.engine.take("one", one.engine.states(), final=True).moved == ["r"]
    two.engine.release(keep=True)
    while two.engine.has_work:
        replicas.steps(two, 1)
    assert 5 < len(replicas.outputs["r"].tokens) < _TOKENS
    two.engine.grow_cache()
    replicas.finish(two)


def test_what_never_fits_ends_once(replicas: Replicas) -> None:
    """Forgotten in silence, its client would wait for ever."""
    one, two = replicas.make("tp1", "one"), replicas.make("tp1", "two", full=8)
    replicas.add(one, r=20, gone=25)
    replicas.steps(one, 2)
    two.expect_from(one)
    two.engine.take("one", one.engine.states(), final=False)
    taken = two.engine.take("one", one.engine.states(), final=True)
    assert (taken.moved, taken.replayed) == ([], ["r", "gone"])
    assert taken.detail
    two.engine.check()
    assert two.engine.abort("gone")
    two.engine.release(keep=True)
    (chunk,) = two.engine.step().chunks
    assert (chunk.key, chunk.finish, chunk.position) == ("r", "failed", 2)
    assert chunk.detail
    two.engine.check()
    assert not two.engine.has_work
