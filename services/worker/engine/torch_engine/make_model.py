"""Writes a small checkpoint with random weights, to try the whole mesh without a download.

The folder is a real one: any Hugging Face loader reads it. Its text is gibberish, yet it varies,
stays mostly printable and ends by itself now and then.
"""

import argparse
import math
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]  # untyped

from services.worker.engine.torch_engine.byte_tokenizer import (
    BOS_TOKEN,
    END_TOKEN,
    EOS_TOKEN,
    VOCABULARY,
    tokenizer_config_json,
    tokenizer_json,
)
from services.worker.engine.torch_engine.model_config import read_model_config
from services.worker.engine.torch_engine.sharding import (
    EMBEDDING,
    OUTPUT,
    Rank,
    TensorShard,
    weight_shards,
)
from shared.errors import ConfigInvalid

_CONTEXT_TOKENS = 8192
_SIZES: dict[str, dict[str, int]] = {
    "nano": {  # 0.1 million: to try the engine itself; every shape up to tp6pp2 cuts it unevenly
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
    },
    "tiny": {  # 1.6 million parameters
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "small": {  # 30 million
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "medium": {  # 130 million, 0.5 GB: to measure how weights move
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 11,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}
# Spread of the weights relative to 1/sqrt(inputs). Trained models are far from the usual initial
# 0.02: with that, attention is uniform, each token predicts itself and output is one token.
_LAYER_GAIN = 1.5
_OUTPUT_GAIN = 2.0
_UNPRINTABLE_GAIN = 0.25
_END_GAIN = 0.8  # a text then ends after some hundred tokens


def make_model(folder: Path, size: str = "tiny", seed: int = 0, *, overwrite: bool = False) -> None:
    """Write the checkpoint; the same arguments give the same bytes. Raises ConfigInvalid for an
    unknown size, or a folder that is not empty unless ``overwrite``."""
    if size not in _SIZES:
        raise ConfigInvalid(field="size", value=size, remedy=f"use one of {', '.join(_SIZES)}")
    if folder.exists() and not folder.is_dir():
        raise ConfigInvalid(field="folder", value=str(folder), remedy="name a folder, not a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigInvalid(
            field="folder", value=str(folder), remedy="is not empty: name a new folder or overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config_json(size))
    _write_json(folder / "generation_config.json", _generation_json())
    _write_json(folder / "tokenizer.json", tokenizer_json())
    tokenizer_config = tokenizer_config_json(context_tokens=_CONTEXT_TOKENS)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    generator = np.random.default_rng(seed)
    shards = weight_shards(read_model_config(folder), Rank())
    save_file(
        {shard.name: _random_weight(shard, generator) for shard in shards},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _config_json(size: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        **_SIZES[size],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **_special_tokens(),
    }


def _generation_json() -> dict[str, object]:
    return {"do_sample": True, **_special_tokens()}


def _special_tokens() -> dict[str, object]:
    return {
        "bos_token_id": BOS_TOKEN,
        "eos_token_id": [EOS_TOKEN, END_TOKEN],
        "pad_token_id": EOS_TOKEN,
    }


def _random_weight(shard: TensorShard, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    if len(shard.full_shape) == 1:
        return np.ones(shard.full_shape, dtype=np.float32)
    weight = generator.standard_normal(shard.full_shape, dtype=np.float32)
    if shard.name == EMBEDDING:
        return weight
    weight *= (_OUTPUT_GAIN if shard.name == OUTPUT else _LAYER_GAIN) / math.sqrt(weight.shape[1])
    if shard.name == OUTPUT:
        weight *= _preferences()[:, None]
    return weight


def _preferences() -> npt.NDArray[np.float32]:
    """How far each token's logit may spread: least for those that no reader wants to see."""
    gains = np.full(VOCABULARY, _UNPRINTABLE_GAIN, dtype=np.float32)
    gains[0x20:0x7F] = 1.0
    gains[END_TOKEN] = _END_GAIN
    return gains


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def main() -> None:
    """``python -m services.worker.engine.torch_engine.make_model FOLDER``: for those that may
    not import services."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(_SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    asked = parser.parse_args()
    try:
        make_model(asked.folder, asked.size, asked.seed, overwrite=asked.overwrite)
    except (ConfigInvalid, OSError) as error:
        raise SystemExit(f"make_model: {error}") from None


if __name__ == "__main__":
    main()
