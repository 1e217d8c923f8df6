"""The torch engine's arithmetic for every shape, against Hugging Face transformers."""

from collections.abc import Callable
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from shared.errors import EngineFailed  # noqa: E402
from tests.support import rank_threads  # noqa: E402
from tests.unit.engine_contract import Output, finish_all, run, step  # noqa: E402
from tests.unit.torch_oracle import (  # noqa: E402
    Oracle,
    greedy_request,
    load_ranks,
    make_oracle,
    prompt_of,
)

pytestmark = pytest.mark.torch
OracleOf = Callable[[str], Oracle]

CASES = [
    *(("uneven", shape) for shape in (
        "tp1", "tp2", "tp3", "tp4", "tp5", "tp6", "tp1pp2", "tp1pp3", "tp1pp5", "tp2pp2", "tp3pp2",
        "tp5pp3",
    )),
    *(("uneven-tied", shape) for shape in ("tp2", "tp3", "tp4", "tp6", "tp1pp3", "tp2pp2")),
    *((family, shape)
      for family in ("llama", "llama-biased", "mistral", "qwen2", "qwen3")
      for shape in ("tp2", "tp4", "tp1pp2", "tp2pp2")),
]  # fmt: skip


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> OracleOf:
    @cache
    def make(family: str) -> Oracle:
        return make_oracle(tmp_path_factory.mktemp(family), family)

    return make


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_greedy_output_is_that_of_transformers(
    oracle_of: OracleOf, family: str, shape: str
) -> None:
    """Otherwise a replica's text would depend on its shape, and change with a switch."""
    oracle = oracle_of(family)
    engine = load_ranks(oracle.folder, shape).engine
    prompts = [prompt_of(length) for length in (1, 5, 16, 33, 100)]
    outputs = run(engine, *(greedy_request(f"r{n}", p, 20) for n, p in enumerate(prompts)))
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 20)
    engine.close()


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_logits_are_those_of_transformers(oracle_of: OracleOf, family: str, shape: str) -> None:
    """Otherwise biases added once for each rank, or a part of a matrix left out, could hide behind
    equal greedy text."""
    oracle = oracle_of(family)
    prompt = prompt_of(150)
    engine = load_ranks(oracle.folder, shape, batch_tokens_max=64).engine
    output = run(engine, greedy_request("a", prompt, 4, logprobs=262))["a"]
    logits = oracle.logits(prompt + output.tokens)[len(prompt) - 1 : -1]
    for row, entry in zip(logits.log_softmax(dim=-1), output.logprobs, strict=True):
        ours = torch.empty(262)
        ours[torch.tensor(entry.top_tokens)] = torch.tensor(entry.top_logprobs)
        torch.testing.assert_close(ours, row, rtol=1e-4, atol=1e-4)
    engine.close()


@pytest.mark.parametrize("shape", ["tp2", "tp1pp3", "tp2pp2"])
def test_arrivals_at_different_steps_change_nothing(oracle_of: OracleOf, shape: str) -> None:
    """Otherwise steps under way at once would let requests read each other's KV cache."""
    oracle = oracle_of("uneven")
    engine = load_ranks(oracle.folder, shape, batch_tokens_max=24, running_max=8).engine
    prompts = [prompt_of(10 + 13 * n, seed=n) for n in range(8)]
    outputs = {f"r{n}": Output(0) for n in range(8)}
    for n, prompt in enumerate(prompts):
        engine.add(greedy_request(f"r{n}", prompt, 15))
        for _ in range(n % 4):
            step(engine, outputs)
    finish_all(engine, outputs)
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 15)
    engine.close()


@pytest.mark.parametrize("shape", ["tp2", "tp1pp2", "tp1pp5"])
def test_preemption_changes_nothing(oracle_of: OracleOf, shape: str) -> None:
    """Otherwise a row of the block table that another request has taken over would be read as
    the former one's."""
    oracle = oracle_of("uneven")
    engine = load_ranks(
        oracle.folder, shape, kv_blocks=14, block_tokens=4, running_max=6, batch_tokens_max=16
    ).engine
    prompts = [prompt_of(4 + n, seed=n) for n in range(6)]
    outputs = run(engine, *(greedy_request(f"r{n}", p, 40) for n, p in enumerate(prompts)))
    assert engine.preemptions > 0, "the test must force preemption"
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 40)
    engine.close()


@pytest.mark.parametrize("shape", ["tp1pp2", "tp2pp2", "tp1pp3"])
def test_more_than_fits_between_two_stages_goes_through(
    oracle_of: OracleOf, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Otherwise the first stage would wait for the last to take hidden states, and the last for the
    first to take logits: long prompts and a large vocabulary would hang a replica for ever."""
    monkeypatch.setattr(rank_threads, "IN_FLIGHT_BYTES", 6000)
    oracle = oracle_of("uneven")
    engine = load_ranks(oracle.folder, shape, batch_tokens_max=128, running_max=32).engine
    prompts = [prompt_of(3 + n % 2, seed=n) for n in range(30)]
    prompts += [prompt_of(300, seed=n) for n in range(2)]
    outputs = run(engine, *(greedy_request(f"r{n}", p, 6) for n, p in enumerate(prompts)))
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 6)
    engine.close()


@pytest.mark.parametrize("shape", ["tp1", "tp3", "tp1pp2"])
def test_states_and_aborts_between_steps(oracle_of: OracleOf, shape: str) -> None:
    """Otherwise a request that is under way in the pipeline could be handed over half-computed,
    with a token that nobody was told, or be written to after its blocks were given away."""
    oracle = oracle_of("uneven")
    engine = load_ranks(oracle.folder, shape).engine
    requests = [greedy_request(f"r{n}", prompt_of(20 + n), 12) for n in range(6)]
    outputs = {request.key: Output(0) for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(7):
        step(engine, outputs)
        told = {state.request.key: state for state in engine.states()}
        for key, output in outputs.items():
            if output.finish is not None:
                assert key not in told
                continue
            state = told[key]
            assert state.output_tokens == output.tokens
            known = len(state.request.prompt_tokens) + len(output.tokens)
            assert state.computed < known
            assert len(state.blocks) == -(-state.computed // engine.block_tokens)
    assert engine.abort("r1")
    assert engine.abort("r4")
    engine.add(greedy_request("r1", prompt_of(33), 9))
    outputs["r1"] = Output(0)
    del outputs["r4"]
    finish_all(engine, outputs)
    assert outputs.pop("r1").tokens == oracle.greedy(prompt_of(33), 9)
    for n in (0, 2, 3, 5):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt_of(20 + n), 12)
    engine.close()


@pytest.mark.parametrize(("stages", "requests"), [(2, 2), (3, 6)])
def test_all_stages_work_at_once(oracle_of: OracleOf, stages: int, requests: int) -> None:
    """Otherwise a pipeline of n stages would be as fast as one of its GPUs. Each step yields what
    the oldest of n micro-batches made; the others are under way meanwhile."""
    engine = load_ranks(oracle_of("uneven").folder, f"tp1pp{stages}").engine
    outputs = {f"r{n}": Output(0) for n in range(requests)}
    for key in outputs:
        engine.add(greedy_request(key, prompt_of(5), 30))
    for _ in range(9):
        step(engine, outputs)
    yielded = [{chunk.key for chunk in engine.step().chunks} for _ in range(stages)]
    assert [len(keys) for keys in yielded] == [requests // stages] * stages
    assert {key for keys in yielded for key in keys} == set(outputs)
    engine.drop_all()
    engine.close()


def test_bfloat16_stays_close(oracle_of: OracleOf) -> None:
    """Otherwise the type that production checkpoints come in could not be sharded."""
    oracle = oracle_of("llama")
    prompt = prompt_of(60)
    engine = load_ranks(oracle.folder, "tp2pp2", dtype="bfloat16").engine
    output = run(engine, greedy_request("a", prompt, 1, logprobs=262))["a"]
    expected = oracle.logits(prompt)[-1].log_softmax(dim=-1)
    ours = torch.empty(262)
    ours[torch.tensor(output.logprobs[0].top_tokens)] = torch.tensor(
        output.logprobs[0].top_logprobs
    )
    assert (ours - expected).abs().mean() < 0.1
    engine.close()


def test_step_plans_stay_small(oracle_of: OracleOf) -> None:
    """Otherwise each step would tell the followers what they know already."""
    replica = load_ranks(oracle_of("uneven").folder, "tp2", running_max=8)
    requests = [greedy_request(f"r{n}", prompt_of(200, seed=n), 40) for n in range(8)]
    run(replica.engine, *requests)
    decodes = replica.link.plan_bytes[-10:]
    assert max(decodes) <= 1 + 4 * (3 + 8 * (6 + 1 + 1)), "8 chunks, a token and a block each"
    replica.engine.close()


def test_failure_of_a_follower_loses_the_replica(oracle_of: OracleOf) -> None:
    """Otherwise the leader would wait for ever, and its requests with it."""
    replica = load_ranks(oracle_of("uneven").folder, "tp2pp2")
    parts = replica.followers[3]._parts  # pyright: ignore[reportPrivateUsage]
    assert parts is not None
    parts.runner._stage.weights.layers[4].down.resize_(1, 1)  # pyright: ignore[reportPrivateUsage]
    replica.engine.add(greedy_request("a", [1, 2, 3], 5))
    with pytest.raises(EngineFailed):
        replica.engine.step()
    assert replica.engine.drop_all() == ["a"]
    replica.engine.close()
    assert replica.failures, "the follower must have said why"
