"""How tokens are chosen from logits."""

import math

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from services.worker.engine.torch_engine.sampling import choose, logprobs, uniform  # noqa: E402
from shared.messages.requests import SamplingParams  # noqa: E402

pytestmark = pytest.mark.torch


def params(**changes: float) -> SamplingParams:
    return SamplingParams(**{"output_tokens_max": 1, **changes})  # pyright: ignore[reportArgumentType]  # ints and floats by name


def draw_many(probabilities: list[float], count: int, **changes: float) -> list[float]:
    """Observed frequencies of ``count`` draws, each at its own position."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    tokens = choose(logits, [params(**changes)] * count, list(range(count)))
    return [tokens.count(token) / count for token in range(len(probabilities))]


def test_uniform_is_uniform_and_depends_on_both() -> None:
    """Otherwise random output would be biased, or repeat itself from position to position."""
    draws = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0.0 <= draw < 1.0 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.01)
    for tenth in range(10):
        share = sum(tenth / 10 <= draw < (tenth + 1) / 10 for draw in draws) / len(draws)
        assert share == pytest.approx(0.1, abs=0.015)
    assert uniform(-3, 5) == uniform(-3, 5)


def test_frequencies_follow_the_distribution() -> None:
    """Otherwise temperature sampling would not be sampling from the model."""
    expected = [0.5, 0.3, 0.15, 0.05]
    assert draw_many(expected, 20_000, temperature=1.0) == pytest.approx(expected, abs=0.015)


def test_temperature_sharpens() -> None:
    """Otherwise the temperature knob would do something else than clients expect."""
    squared = [0.64, 0.16, 0.04]
    total = sum(squared)
    seen = draw_many([0.8, 0.4, 0.2], 20_000, temperature=0.5)
    assert seen == pytest.approx([share / total for share in squared], abs=0.015)
    assert draw_many([0.5, 0.49, 0.01], 100, temperature=1e-6)[0] == 1.0
    assert draw_many([0.2, 0.5, 0.3], 10, temperature=0.0)[1] == 1.0


def test_top_k_keeps_the_k_most_likely() -> None:
    """Otherwise unlikely tokens would slip into output that must not have them."""
    seen = draw_many([0.1, 0.4, 0.2, 0.3], 10_000, temperature=1.0, top_k=2)
    assert seen == pytest.approx([0.0, 4 / 7, 0.0, 3 / 7], abs=0.02)


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    """Otherwise nucleus sampling would cut too much or too little."""
    kept = draw_many([0.1, 0.4, 0.2, 0.3], 10_000, temperature=1.0, top_p=0.69)
    assert kept == pytest.approx([0.0, 4 / 7, 0.0, 3 / 7], abs=0.02)
    one = draw_many([0.1, 0.4, 0.2, 0.3], 200, temperature=1.0, top_p=1e-9)
    assert one == [0.0, 1.0, 0.0, 0.0]


def test_top_k_comes_before_top_p() -> None:
    """Otherwise the two knobs together would differ from what other servers do."""
    seen = draw_many([0.4, 0.3, 0.2, 0.1], 10_000, temperature=1.0, top_k=2, top_p=0.5)
    assert seen == [1.0, 0.0, 0.0, 0.0]  # 0.4 is 4/7 of what top_k leaves


def test_rounding_does_not_change_draws() -> None:
    """Otherwise a resumed request would go astray where two tokens are almost equally likely."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 500, generator=generator).mul(1e-4)  # all almost equal
    noise = torch.randn(200, 500, generator=generator).mul(1e-6)
    many = [params(temperature=1.0, top_p=1.0, seed=3)] * 200
    positions = list(range(200))
    same = [
        a == b
        for a, b in zip(
            choose(logits, many, positions), choose(logits + noise, many, positions), strict=True
        )
    ]
    assert sum(same) >= 198


def test_rows_are_independent() -> None:
    """Otherwise one request's sampling would depend on who shares its batch."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 50, generator=generator)
    mixed = [
        params(temperature=0.0), params(temperature=1.0, seed=1), params(temperature=0.7, top_k=3),
        params(temperature=1.0, top_p=0.5), params(temperature=0.0), params(temperature=2.0),
    ]  # fmt: skip
    positions = [0, 5, 9, 2, 4, 1]
    together = choose(logits, mixed, positions)
    alone = [choose(logits[[n]], [mixed[n]], [positions[n]])[0] for n in range(6)]
    assert together == alone


def test_logprobs_are_natural_and_of_the_models_distribution() -> None:
    """Otherwise logprobs would disagree with OpenAI's and vLLM's."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]).log() + 3.0
    first, second = logprobs(logits, [1, 2], [2, 0])
    assert first.logprob == pytest.approx(math.log(0.3), abs=1e-5)
    assert first.top_tokens == [0, 1]
    assert first.top_logprobs == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-5)
    assert second.logprob == pytest.approx(math.log(0.6), abs=1e-5)
    assert (second.top_tokens, second.top_logprobs) == ([], [])
