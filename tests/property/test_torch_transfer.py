"""Whatever the old and the new placement, every byte of every target shard is what it should be."""

import random
from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.engine.torch_engine.kv_transfer import PullOrder
from services.worker.engine.torch_engine.model_config import ModelConfig
from services.worker.engine.torch_engine.sharding import kv_shards, weight_shards
from shared.hardware import Parallelism
from shared.placement.sheets import Rank
from tests.support.torch_ranks import (
    Placed,
    Workers,
    arrive,
    hold,
    noise,
    plan,
    receiver,
    small_model,
)

pytestmark = pytest.mark.torch

_BLOCKS = 7
_HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return small_model(
        vocabulary=draw(st.integers(8, 40)),
        hidden=draw(st.integers(1, 3)) * 4,
        intermediate=draw(st.integers(6, 30)),
        layers=draw(st.integers(1, 4)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


def shapes(model: ModelConfig) -> st.SearchStrategy[Parallelism]:
    return st.builds(
        Parallelism, st.integers(1, min(4, model.heads)), st.integers(1, min(2, model.layers))
    )


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=_HEALTH)
def test_every_byte_arrives(workers: Workers, data: st.DataObject) -> None:
    """A shard with one wrong row, or KV cache of another head, gives wrong text without a sign."""
    model = data.draw(models(), "model")
    draw = random.Random(data.draw(st.integers(0, 2**16), "seed"))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    remote, verify = data.draw(st.booleans(), "remote"), data.draw(st.booleans(), "verify")
    old: list[Placed] = []
    first = 0
    for number, shape in enumerate(data.draw(st.lists(shapes(model), min_size=1, max_size=2))):
        ids = [f"w{first + rank}" for rank in range(shape.gpus)]
        old.append(Placed(f"old{number}", shape, ids))
        first += shape.gpus
    new_shape = data.draw(shapes(model), "new")
    new_workers = draw.sample([f"w{number}" for number in range(16)], new_shape.gpus)
    whole = weight_shards(model, Rank())
    full = noise(whole, dtype, 1)
    caches = {
        placed.replica_id: noise(
            kv_shards(model, Rank(), blocks=_BLOCKS, block_tokens=4), dtype, number + 2
        )
        for number, placed in enumerate(old)
    }
    held = [
        hold(
            model, rank, full | caches[placed.replica_id], server=workers[worker_id],
            replica_id=placed.replica_id, worker_id=worker_id, blocks=_BLOCKS, dtype=dtype,
        )
        for placed in old
        for worker_id, rank in placed.ranks()
    ]  # fmt: skip
    peers = workers.peers([f"w{number}" for number in range(first)], remote=remote)
    try:
        for worker_id, rank in Placed("new", new_shape, new_workers).ranks():
            copies = plan(model, old, rank, draw)
            came = arrive(
                model, rank, copies, peers,
                worker_id=worker_id, blocks=_BLOCKS, dtype=dtype, verify=verify,
            )  # fmt: skip
            for shard in came.weights.shards:
                wanted = full[shard.name][shard.index]
                assert torch.equal(came.weights.named[shard.name], wanted), shard
            total = sum(came.weights.named[shard.name].nbytes for shard in came.weights.shards)
            assert sum(came.fetched.values()) == total, "bytes are miscounted"
            kv = receiver(came, copies, peers, verify=verify)
            for placed in old:
                count = draw.randint(1, _BLOCKS)
                start = draw.randint(0, _BLOCKS - count)
                theirs = draw.sample(range(_BLOCKS), count)
                own = draw.choice(
                    [draw.sample(range(_BLOCKS), count), [*range(start, start + count)]]
                )
                theirs = draw.choice([theirs, sorted(theirs), [*range(start, start + count)]])
                pulled = kv.pull(PullOrder(placed.replica_id, theirs, own, last=True))
                assert not pulled.failure
                for shard in came.cache_shards:
                    wanted = caches[placed.replica_id][shard.name][shard.index][theirs]
                    assert torch.equal(came.cache[shard.name][own], wanted), shard
            kv.close()
            came.close()
    finally:
        for one in held:
            one.close()
