"""Chooses tokens from logits.

The random number at a position is a hash of (seed, position), and picks from the distribution in
the order of token ids. So a resumed, preempted or differently batched request draws the same
tokens: rounding moves the borders between tokens by an ulp, while an order by probability would
swap whole neighbours.
"""

from typing import TypeVar, cast

import torch
from torch import Tensor

from shared.messages.requests import SamplingParams, TokenLogprobs

_MASK = 2**64 - 1


Scalar = TypeVar("Scalar", int, float, bool)


def as_list(tensor: Tensor, kind: type[Scalar]) -> list[Scalar]:
    """A vector's elements; torch leaves the type of ``tolist`` open."""
    del kind
    return cast("list[Scalar]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from two rounds of SplitMix64 (Steele, Lea and Flood, 2014)."""
    return (_mix(_mix(seed & _MASK) + position) >> 11) * 2.0**-53


def choose(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
    """The next token of each row; ``positions`` count the row's output tokens before it."""
    tokens = logits.argmax(dim=-1)
    random = [row for row, sampling in enumerate(params) if sampling.temperature > 0]
    if random:
        draws = [uniform(params[row].seed, positions[row]) for row in random]
        rows = torch.tensor(random, device=logits.device)
        chosen = _draw(logits[rows], [params[row] for row in random], draws)
        tokens.index_copy_(0, rows, chosen)
    return as_list(tokens, int)


def logprobs(logits: Tensor, tokens: list[int], top_counts: list[int]) -> list[TokenLogprobs]:
    """Natural-log probabilities of each row's token and its ``top_counts`` most likely ones, in
    the model's own distribution: temperature, top_k and top_p do not show."""
    all_logprobs = logits.log_softmax(dim=-1)
    chosen = all_logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    top = all_logprobs.topk(max(top_counts), dim=-1)
    width = top.indices.shape[-1]
    ids, values = as_list(top.indices.view(-1), int), as_list(top.values.view(-1), float)
    return [
        TokenLogprobs(
            logprob=logprob,
            top_tokens=ids[row * width : row * width + count],
            top_logprobs=values[row * width : row * width + count],
        )
        for row, (logprob, count) in enumerate(zip(as_list(chosen, float), top_counts, strict=True))
    ]


def _draw(logits: Tensor, params: list[SamplingParams], draws: list[float]) -> Tensor:
    device = logits.device
    temperatures = torch.tensor([sampling.temperature for sampling in params], device=device)
    # The maximum goes first: a tiny temperature then cannot overflow.
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = (scaled / temperatures[:, None]).double().softmax(dim=-1)
    cut = [
        row
        for row, sampling in enumerate(params)
        if sampling.top_p < 1 or 0 < sampling.top_k < logits.shape[-1]
    ]
    if cut:
        rows = torch.tensor(cut, device=device)
        kept = _keep_top(probabilities[rows], [params[row] for row in cut])
        probabilities.index_copy_(0, rows, kept)
    cumulative = probabilities.cumsum(dim=-1)
    # Scaled by the total instead of normalised: the draw stays below the last border.
    target = torch.tensor(draws, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return chosen.clamp_(max=logits.shape[-1] - 1)


def _keep_top(probabilities: Tensor, params: list[SamplingParams]) -> Tensor:
    """Zero all but the ``top_k`` most likely, and of those all but the smallest set that holds
    ``top_p`` of their probability."""
    size, device = probabilities.shape[-1], probabilities.device
    counts = [min(sampling.top_k or size, size) for sampling in params]
    top_k = torch.tensor(counts, device=device)
    top_p = torch.tensor([sampling.top_p for sampling in params], device=device)
    ordered, order = probabilities.topk(max(counts), dim=-1)  # a whole sort only where needed
    ranks = torch.arange(max(counts), device=device)
    ordered = ordered.masked_fill(ranks >= top_k[:, None], 0.0)
    before = ordered.cumsum(dim=-1) - ordered
    total = ordered.sum(dim=-1, keepdim=True)
    dropped = before >= top_p[:, None].double() * total
    dropped[:, 0] = False
    ordered = ordered.masked_fill(dropped, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, order, ordered)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
