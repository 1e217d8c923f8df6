"""Rotary position embedding: the cached cosines and sines, and their application.

Su et al., RoFormer, 2021, with the half-split pairing of the published checkpoints. "linear" is
position interpolation (Chen et al., 2023); "llama3" stretches only the long wavelengths, as
Llama 3.1 was trained.
"""

import math

import torch
from torch import Tensor

from services.worker.engine.torch_engine.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(inverse, rope)
    return inverse


def rotary_table(
    rope: RopeConfig, *, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, each of shape [positions, head_dim].

    The first half of the sines is negated, so that applying them needs only a roll of the halves.
    """
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float32), inverse_frequencies(rope, head_dim)
    )
    cosines, sines = angles.cos(), angles.sin()
    return (
        torch.cat((cosines, cosines), dim=-1).to(device=device, dtype=dtype),
        torch.cat((-sines, sines), dim=-1).to(device=device, dtype=dtype),
    )


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn ``heads`` [tokens, heads, head_dim] by the tables' rows [tokens, 1, head_dim]."""
    return heads * cosines + heads.roll(heads.shape[-1] // 2, dims=-1) * sines


def _llama3(inverse: Tensor, rope: RopeConfig) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend those between."""
    turns = rope.original_context_tokens * inverse / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return inverse * keep + (inverse / rope.factor) * (1.0 - keep)
