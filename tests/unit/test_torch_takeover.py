"""Requests taken over with their KV cache: what is copied when, what is replayed, and why."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

import msgspec
import torch

from services.worker.engine.interface import EngineRequest, LiveState, Taken
from services.worker.engine.torch_engine import kv_transfer as kv_transfer_module
from services.worker.engine.torch_engine import takeover as takeover_module
from services.worker.engine.torch_engine.batch_scheduler import BatchScheduler
from services.worker.engine.torch_engine.commands import parted
from services.worker.engine.torch_engine.kv_cache import KvBlocks
from services.worker.engine.torch_engine.kv_transfer import KvTransfer, PullOrder
from services.worker.engine.torch_engine.sharding import kv_shards, weight_shards
from services.worker.engine.torch_engine.stages import WeightStages
from services.worker.engine.torch_engine.takeover import PULL, STAGE, Takeover, TakeoverFollower
from shared.errors import PeerLost
from shared.messages.requests import SamplingParams
from shared.placement.copies import Copy
from shared.placement.sheets import Area, Rank, areas_of
from tests.support.torch_ranks import (
    Held,
    Workers,
    arrive,
    hold,
    mapped_bytes,
    noise,
    receiver,
    small_model,
)

pytestmark = pytest.mark.torch

_TOKENS = 4  # of a block
_MODEL = small_model()
_SHAPE = _MODEL.shape("model", "float32")


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


class Old:
    """A replica of one rank on worker ``a`` whose requests the test makes up."""

    def __init__(self, workers: Workers, *, blocks: int = 12) -> None:
        self.full = noise(weight_shards(_MODEL, Rank()), torch.float32, 1)
        whole = kv_shards(_MODEL, Rank(), blocks=blocks, block_tokens=_TOKENS)
        self.full |= noise(whole, torch.float32, 2)
        self.held = hold(
            _MODEL, Rank(), self.full, server=workers["a"],
            replica_id="old", worker_id="a", blocks=blocks,
        )  # fmt: skip


def state(key: str, blocks: list[int], computed: int, *, admission: int = 1) -> LiveState:
    """One that knows a token more than it has computed."""
    sampling = SamplingParams(output_tokens_max=10)
    prompt = list(range(1, computed + 1))
    request = EngineRequest(key=key, prompt_tokens=prompt, sampling=sampling)
    assert len(blocks) == -(-computed // _TOKENS)
    return LiveState(
        request=request, output_tokens=[7], computed=computed, blocks=blocks, admission=admission
    )


class New:
    """The rank that takes over, on worker ``b``."""

    def __init__(
        self,
        workers: Workers,
        *,
        blocks: int = 20,
        rows: int = 4,
        block_tokens: int = _TOKENS,
        remote: bool = False,
    ) -> None:
        areas = areas_of(_SHAPE, Rank())
        self.copies = [Copy(sheet, area, "a", "old") for sheet, area in areas.items()]
        self.peers = workers.peers("ab", remote=remote)
        self.held: Held = arrive(
            _MODEL, Rank(), self.copies, self.peers, worker_id="b", blocks=blocks
        )
        self.kv = receiver(self.held, self.copies, self.peers)
        workers.at_end.callback(self.kv.close)
        pool = KvBlocks(blocks=blocks, block_tokens=block_tokens, rows=rows, row_tokens_max=64)
        self.scheduler = BatchScheduler(pool, batch_tokens_max=32, running_max=rows, waiting_max=4)
        self.takeover = Takeover(self.scheduler, self.kv, _stages(self.held))

    def take(self, *states: LiveState, final: bool) -> Taken:
        return self.takeover.take("old", states, final=final)

    def holds(self, old: Old, one: LiveState, blocks: int | None = None) -> bool:
        """Whether the first ``blocks`` of the request are here, in every layer."""
        sequence = self.scheduler.held[one.request.key]
        assert sequence.row is not None
        count = len(one.blocks) if blocks is None else blocks
        own = self.scheduler.kv.blocks(sequence.row)[:count]
        return all(
            torch.equal(self.held.cache[name][own], old.full[name][one.blocks[:count]])
            for name in self.held.cache
        )


def _stages(held: Held) -> WeightStages:
    assert held.exports is None
    return WeightStages(held.weights, held.arena, None, load=lambda _: {})


def test_what_is_full_goes_ahead_and_the_rest_in_the_pause(workers: Workers) -> None:
    """The pause would otherwise last as long as the whole KV cache takes to copy."""
    old, new = Old(workers), New(workers)
    early = state("r", [5, 2, 9], 10)
    ahead = new.take(early, final=False)
    assert not ahead.moved
    assert ahead.bytes_by_source == {"b": {"a": 2 * new.kv.block_bytes}}
    assert new.holds(old, early, blocks=2)
    assert new.take(early, final=False).bytes_by_source == {}, "copied twice"
    late = state("r", [5, 2, 9, 3], 14)
    taken = new.take(late, final=True)
    assert taken.moved == ["r"]
    assert not taken.replayed
    assert taken.bytes_by_source == {"b": {"a": 2 * new.kv.block_bytes}}, "not the rest alone"
    assert taken.bytes_needed == 4 * new.kv.block_bytes, "all of it, whenever it was copied"
    assert new.holds(old, late)
    assert new.scheduler.held["r"].computed == 14
    new.scheduler.check()


def test_one_that_got_other_blocks_is_copied_again(workers: Workers) -> None:
    """It was preempted: the blocks that were copied are another request's by now."""
    old, new = Old(workers), New(workers)
    new.take(state("r", [5, 2], 8), final=False)
    again = state("r", [1, 0], 8, admission=2)
    taken = new.take(again, final=True)
    assert taken.bytes_by_source == {"b": {"a": 2 * new.kv.block_bytes}}
    assert taken.bytes_needed == 2 * new.kv.block_bytes, "copied twice, needed once"
    assert new.holds(old, again)


def test_one_that_gave_way_is_copied_again(workers: Workers) -> None:
    """Blocks that another request has written to meanwhile would be taken for its own."""
    old, new = Old(workers), New(workers)
    one = state("r", [5, 2, 9], 12)
    new.take(one, final=False)
    new.scheduler.forget_held("r")
    taken = new.take(one, final=True)
    assert taken.bytes_by_source == {"b": {"a": 3 * new.kv.block_bytes}}
    assert new.holds(old, one)


def test_tokens_that_were_left_out_ahead_come_in_the_pause(workers: Workers) -> None:
    """The request would go on after a prompt of zeros, here or after the next switch."""
    old, new = Old(workers), New(workers)
    one = state("r", [5, 2], 8)
    bare = replace(one.request, prompt_tokens=[0] * 8, output_tokens=[0])
    new.take(replace(one, request=bare, output_tokens=[0]), final=False)
    assert new.take(one, final=True).moved == ["r"]
    assert new.holds(old, one)
    [released] = new.scheduler.release_held(keep=True)
    assert released.tokens == [*range(1, 9), 7]
    assert new.scheduler.states()[0].request == one.request


def test_what_lacks_a_block_is_copied_as_far_as_it_goes(workers: Workers) -> None:
    """Otherwise it would be copied from its beginning again and again."""
    old, new = Old(workers), New(workers, blocks=7)
    assert new.scheduler.take(state("other", [1, 2, 3], 12)) is not None
    new.take(state("r", [5, 2], 8), final=False)
    late = state("r", [5, 2, 9, 3], 16)
    short = new.take(late, final=False)
    assert short.bytes_by_source == {"b": {"a": new.kv.block_bytes}}, "it has room for three"
    assert new.holds(old, late, blocks=3)
    new.scheduler.forget_held("other")
    assert new.take(late, final=True).bytes_by_source == {"b": {"a": new.kv.block_bytes}}
    assert new.holds(old, late)


def test_one_that_ended_meanwhile_is_forgotten(workers: Workers) -> None:
    """Its ingress has had all of it: nobody would ever end it here."""
    _, new = Old(workers), New(workers)
    new.take(state("ended", [5, 2], 8), state("r", [1], 4), final=False)
    assert set(new.scheduler.held) == {"ended", "r"}
    new.take(state("r", [1], 4), final=True)
    assert set(new.scheduler.held) == {"r"}
    assert new.scheduler.kv.used == 2, "its blocks are still taken"
    new.scheduler.check()


def test_of_one_that_lost_its_blocks_meanwhile_nothing_is_copied(workers: Workers) -> None:
    """A preempted request has no KV cache to copy, and what went ahead is not its any more."""
    _, new = Old(workers), New(workers)
    new.take(state("r", [5, 2], 8), final=False)
    waiting = replace(state("r", [5, 2], 8), computed=0, blocks=[])
    new.take(waiting, final=False)
    assert not new.scheduler.held
    taken = new.take(waiting, final=True)
    assert (taken.moved, taken.replayed) == (["r"], []), "there is nothing to compute again"
    assert new.scheduler.held["r"].row is None
    assert new.scheduler.kv.used == 0
    new.scheduler.check()


def test_what_does_not_fit_is_replayed_and_said(workers: Workers) -> None:
    """Fewer blocks at the target is the usual case of a merge: no request may be lost by it."""
    old, new = Old(workers), New(workers, blocks=8)
    big, small = state("big", [0, 1, 2, 3, 4], 18), state("small", [7, 8, 6, 5], 14)
    taken = new.take(big, small, final=True)
    assert (taken.moved, taken.replayed) == (["big"], ["small"])
    assert "no KV blocks" in taken.detail
    assert new.holds(old, big)
    assert list(new.scheduler.held) == ["big", "small"]
    new.scheduler.check()


def test_too_few_rows_replay_as_well(workers: Workers) -> None:
    """Rows bound the batch: the fifth request of a merge of two must wait, not be lost."""
    _, new = Old(workers), New(workers, rows=1)
    taken = new.take(state("r", [1], 4), state("s", [2], 4), final=True)
    assert (taken.moved, taken.replayed) == (["r"], ["s"])


def test_what_can_never_run_here_is_held_without_cache(workers: Workers) -> None:
    """Whoever gives it away forgets it: here it has to end."""
    _, new = Old(workers), New(workers, blocks=3)
    assert not new.take(state("r", [1], 4), final=False).bytes_by_source
    taken = new.take(state("r", [1], 4), final=True)
    assert (taken.moved, taken.replayed) == ([], ["r"])
    assert "longer" in taken.detail
    assert new.scheduler.held["r"].row is None
    assert not new.scheduler.kv.used


def test_a_call_ahead_is_bounded(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else that the taking engine does waits for it."""
    old, new = Old(workers), New(workers)
    monkeypatch.setattr(takeover_module, "AHEAD_BYTES_MAX", 2 * new.kv.block_bytes)
    states = [state("r", [5, 2, 9], 12), state("s", [1, 0], 8)]
    copied: list[int] = []
    while made := new.take(*states, final=False).bytes_by_source:
        copied.append(made["b"]["a"] // new.kv.block_bytes)
    assert copied == [2, 2, 1]
    assert new.holds(old, states[0])
    assert new.holds(old, states[1])
    assert new.take(*states, final=True).bytes_by_source in ({}, {"b": {}})


def test_a_source_that_goes_ahead_of_time_is_told_and_forgotten(workers: Workers) -> None:
    """Nothing is lost yet: the worker that asked decides whether to go on."""
    old, new = Old(workers), New(workers, remote=True)
    new.take(state("r", [5], 4), final=False)
    old.held.close()
    with pytest.raises(PeerLost):
        new.take(state("r", [5, 3], 8), final=False)
    assert not new.scheduler.held
    assert new.scheduler.kv.used == 0


def test_a_source_that_goes_in_the_pause_means_replay(workers: Workers) -> None:
    """The requests themselves are known here: only what was computed is lost."""
    old, new = Old(workers), New(workers, remote=True)
    done = state("done", [5], 4)
    new.take(done, final=False)
    old.held.close()
    taken = new.take(done, state("r", [1, 2], 8), final=True)
    assert (taken.moved, taken.replayed) == (["done"], ["r"])
    assert "worker a" in taken.detail
    new.scheduler.check()


def test_a_source_that_stands_still_is_not_waited_for(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that stays would make no step meanwhile, and its own requests be replayed."""
    monkeypatch.setattr(kv_transfer_module, "SOURCE_S", 0.05)
    old, new = Old(workers), New(workers)
    thawed = threading.Event()
    workers["a"].offer("tensors/old", lambda _link, _hello: assert_set(thawed))
    one = state("r", [5, 2, 9], 10)
    with pytest.raises(PeerLost, match="silent"):
        new.take(one, final=False)
    taken = new.take(one, final=True)
    assert (taken.moved, taken.replayed) == ([], ["r"])
    assert "silent" in taken.detail
    thawed.set()
    old.held.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(20), "the test has ended without"


def test_other_block_sizes_are_refused_with_replay(workers: Workers) -> None:
    """Block 3 is other tokens there: the text would go on from somebody else's words."""
    _, new = Old(workers), New(workers, block_tokens=8)
    shards = kv_shards(_MODEL, Rank(), blocks=20, block_tokens=8)
    cache = {shard.name: torch.zeros(shard.shape) for shard in shards}
    kv = KvTransfer(shards, cache, worker_id="b")
    kv.expect(new.copies, new.peers, verify=False)
    takeover = Takeover(new.scheduler, kv, _stages(new.held))
    taken = takeover.take("old", [state("r", [1, 2], 8)], final=True)
    assert taken.replayed == ["r"]
    assert "block_tokens" in taken.detail


def test_copies_that_leave_a_gap_are_refused_with_replay(workers: Workers) -> None:
    """A layer without its KV cache answers as if nothing had been said."""
    _, new = Old(workers), New(workers)
    part = Copy("cache", Area((0, 2), (0, 2)), "a", "old")
    new.takeover.expect([part], new.peers, verify=False)
    taken = new.take(state("r", [1, 2], 8), final=True)
    assert taken.replayed == ["r"]
    assert "KV cache of old" in taken.detail


def test_only_confirmed_requests_are_released(workers: Workers) -> None:
    """One whose final state never came would run here and there."""
    _, new = Old(workers), New(workers)
    new.take(state("r", [5], 4), final=False)
    new.takeover.settle()
    assert not new.scheduler.held
    new.take(state("s", [5], 4), final=True)
    new.takeover.settle()
    assert set(new.scheduler.held) == {"s"}


def test_a_rollback_lets_go_of_the_old_cache(workers: Workers) -> None:
    """The old replica goes on, and when it closes one day its memory must be free."""
    old, new = Old(workers), New(workers)
    new.take(state("r", [5], 4), final=False)
    mine = mapped_bytes("oserve-old-kv")
    new.takeover.settle()
    assert mapped_bytes("oserve-old-kv") < mine, "the taker still has it mapped"
    old.held.close()


def test_new_copies_are_followed(workers: Workers) -> None:
    """The next switch may find the same replica's cache elsewhere: the way of the former one, that
    was rolled back, leads to a worker that may be gone."""
    old, new = Old(workers), New(workers)
    new.take(state("r", [5], 4), final=False)
    moved = hold(
        _MODEL, Rank(), old.full, server=workers["c"],
        replica_id="old", worker_id="c", blocks=12,
    )  # fmt: skip
    copies = [Copy(one.sheet, one.area, "c", "old") for one in new.copies]
    new.takeover.expect(copies, workers.peers("c"), verify=False)
    taken = new.take(state("r", [5, 6], 8), final=True)
    assert taken.bytes_by_source == {"b": {"c": new.kv.block_bytes}}
    moved.close()


def test_checksums_are_compared_if_asked(workers: Workers) -> None:
    """Verification must reach the KV cache, too: a wrong key is wrong text."""
    old, new = Old(workers), New(workers)
    new.takeover.expect(new.copies, new.peers, verify=True)
    one = state("r", [5, 2, 9], 10)
    assert new.take(one, final=True).moved == ["r"]
    assert new.holds(old, one)


class Session:
    """A leader's session to one follower that answers at once."""

    def __init__(self, follower: TakeoverFollower) -> None:
        self.follower = follower
        self.told: list[int] = []

    def broadcast(self, payload: bytes) -> None:
        tag, body = parted(payload)
        self.told.append(tag)
        self.follower.handlers[tag](body)

    def recv(self, rank: int, timeout_s: float) -> bytes:
        assert rank == 1
        return ANSWERS.pop()


ANSWERS: list[bytes] = []


class Up:
    def send(self, payload: bytes) -> None:
        ANSWERS.append(payload)


def test_every_rank_pulls_its_own_part(workers: Workers) -> None:
    """tp1 to tp2: each rank has half of the heads, and blocks of the same numbers."""
    old, new = Old(workers), New(workers)
    halves: list[Held] = []
    for number in range(2):
        rank = Rank(tp=2, tp_rank=number)
        areas = areas_of(_SHAPE, rank)
        copies = [Copy(sheet, area, "a", "old") for sheet, area in areas.items()]
        halves.append(arrive(_MODEL, rank, copies, new.peers, worker_id=f"n{number}", blocks=20))
    kvs = [
        receiver(
            half,
            [Copy("cache", areas_of(_SHAPE, Rank(tp=2, tp_rank=n))["cache"], "a", "old")],
            new.peers,
        )
        for n, half in enumerate(halves)
    ]
    follower = TakeoverFollower(kvs[1], _stages(halves[1]), Up())
    session = Session(follower)
    takeover = Takeover(new.scheduler, kvs[0], _stages(halves[0]), followers=session, size=2)
    one = state("r", [5, 2, 9], 10)
    taken = takeover.take("old", [one], final=True)
    assert taken.bytes_by_source == {
        "n0": {"a": 3 * kvs[0].block_bytes}, "n1": {"a": 3 * kvs[1].block_bytes}
    }  # fmt: skip
    row = new.scheduler.held["r"].row
    assert row is not None
    own = new.scheduler.kv.blocks(row)[:3]
    for half in halves:
        for shard in half.cache_shards:
            wanted = old.full[shard.name][shard.index][one.blocks]
            assert torch.equal(half.cache[shard.name][own], wanted), shard
    takeover.advance_stage(1, (0, 1))
    assert session.told == [PULL, STAGE]
    assert all(0 not in half.weights.layers for half in halves)


def test_a_follower_that_fails_means_replay(workers: Workers) -> None:
    """A request with half of its heads' cache would go on with nonsense."""
    _, new = Old(workers), New(workers)

    class Failing:
        def broadcast(self, payload: bytes) -> None:
            tag, body = parted(payload)
            assert tag == PULL
            self.order = msgspec.msgpack.decode(body, type=PullOrder)

        def recv(self, rank: int, timeout_s: float) -> bytes:
            return msgspec.msgpack.encode(("n1", {}, "worker z is gone"))

    takeover = Takeover(new.scheduler, new.kv, _stages(new.held), followers=Failing(), size=2)
    taken = takeover.take("old", [state("r", [5, 2], 8)], final=True)
    assert taken.replayed == ["r"]
    assert taken.detail == "worker z is gone"
    assert new.scheduler.kv.used == 0
