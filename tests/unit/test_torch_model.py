"""The torch engine's arithmetic against Hugging Face transformers on the same checkpoints."""

from collections.abc import Callable
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from tests.unit.engine_contract import Output, finish_all, run, step  # noqa: E402
from tests.unit.torch_oracle import (  # noqa: E402
    FAMILIES,
    Oracle,
    greedy_request,
    load,
    make_oracle,
    prompt_of,
)

pytestmark = pytest.mark.torch
OracleOf = Callable[[str], Oracle]


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> OracleOf:
    @cache
    def make(family: str) -> Oracle:
        return make_oracle(tmp_path_factory.mktemp(family), family)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_transformers(oracle_of: OracleOf, family: str) -> None:
    """Otherwise users would get another model's text under this model's name."""
    oracle = oracle_of(family)
    engine = load(oracle.folder)
    prompts = [prompt_of(length) for length in (1, 5, 16, 33, 100)]
    outputs = run(engine, *(greedy_request(f"r{n}", p, 20) for n, p in enumerate(prompts)))
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_transformers(oracle_of: OracleOf, family: str) -> None:
    """Otherwise evaluations by likelihood would rank answers wrongly, and small errors in
    biases, norms or rotary scaling would hide behind equal greedy text."""
    oracle = oracle_of(family)
    prompt = prompt_of(150)
    output = run(load(oracle.folder), greedy_request("a", prompt, 8, logprobs=262))["a"]
    logits = oracle.logits(prompt + output.tokens)[len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    for row, token, entry in zip(expected, output.tokens, output.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), rel=1e-4, abs=1e-5)
        ours = torch.empty(262)
        ours[torch.tensor(entry.top_tokens)] = torch.tensor(entry.top_logprobs)
        torch.testing.assert_close(ours, row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [3, 7, 64])
def test_chunked_prefill_changes_nothing(oracle_of: OracleOf, budget: int) -> None:
    """Otherwise a long prompt cut into chunks would lose sight of its own beginning."""
    oracle = oracle_of("llama")
    engine = load(oracle.folder, batch_tokens_max=budget, running_max=3, block_tokens=4)
    prompts = [prompt_of(length) for length in (90, 2, 47, 130)]
    outputs = run(engine, *(greedy_request(f"r{n}", p, 12) for n, p in enumerate(prompts)))
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 12)


def test_arrivals_at_different_steps_change_nothing(oracle_of: OracleOf) -> None:
    """Otherwise mixing prefill and decode in one step would let requests read each other."""
    oracle = oracle_of("llama-rope-llama3")
    engine = load(oracle.folder, batch_tokens_max=24, running_max=8)
    prompts = [prompt_of(10 + 13 * n, seed=n) for n in range(8)]
    outputs = {f"r{n}": Output(0) for n in range(8)}
    for n, prompt in enumerate(prompts):
        engine.add(greedy_request(f"r{n}", prompt, 15))
        for _ in range(n % 4):
            step(engine, outputs)
    finish_all(engine, outputs)
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 15)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_preemption_changes_nothing(oracle_of: OracleOf, family: str) -> None:
    """Otherwise running out of KV blocks would corrupt the text of whoever gives way."""
    oracle = oracle_of(family)
    engine = load(oracle.folder, kv_blocks=14, block_tokens=4, running_max=6, batch_tokens_max=16)
    prompts = [prompt_of(4 + n, seed=n) for n in range(6)]
    outputs = run(engine, *(greedy_request(f"r{n}", p, 40) for n, p in enumerate(prompts)))
    assert engine.preemptions > 0, "the test must force preemption"
    for n, prompt in enumerate(prompts):
        assert outputs[f"r{n}"].tokens == oracle.greedy(prompt, 40)


def test_long_prefill_is_tiled_correctly(oracle_of: OracleOf) -> None:
    """Otherwise prompts longer than one attention tile would be computed wrongly."""
    oracle = oracle_of("llama")
    prompt = prompt_of(480)
    engine = load(oracle.folder, batch_tokens_max=512)
    output = run(engine, greedy_request("a", prompt, 10), greedy_request("b", prompt[:300], 10))
    assert output["a"].tokens == oracle.greedy(prompt, 10)
    assert output["b"].tokens == oracle.greedy(prompt[:300], 10)


def test_bfloat16_stays_close(oracle_of: OracleOf) -> None:
    """Otherwise the type that production checkpoints come in would not be usable."""
    oracle = oracle_of("llama")
    prompt = prompt_of(60)
    engine = load(oracle.folder, dtype="bfloat16")
    output = run(engine, greedy_request("a", prompt, 1, logprobs=262))["a"]
    expected = oracle.logits(prompt)[-1].log_softmax(dim=-1)
    ours = torch.empty(262)
    ours[torch.tensor(output.logprobs[0].top_tokens)] = torch.tensor(
        output.logprobs[0].top_logprobs
    )
    assert (ours - expected).abs().mean() < 0.1
