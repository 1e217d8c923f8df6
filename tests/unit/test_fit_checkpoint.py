"""Dimensions of local models, and errors that name file and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.profiler.fit.checkpoint import read_model
from services.profiler.fit.models import LLAMA_8B, LLAMA_70B, OPT_66B
from shared.errors import ConfigInvalid

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "ffn_dim": 36864,
    "hidden_size": 9216,
    "max_position_embeddings": 2048,
    "num_attention_heads": 72,
    "num_hidden_layers": 64,
    "vocab_size": 50272,
    "word_embed_proj_dim": 9216,
}


def folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_llama(tmp_path: Path) -> None:
    """A local copy would be another model than the one shipped."""
    assert read_model(folder(tmp_path, LLAMA)) == (LLAMA_8B, ())


def test_opt_ties_its_head_and_has_positions(tmp_path: Path) -> None:
    """Its config says neither."""
    assert read_model(folder(tmp_path, OPT)) == (OPT_66B, ())


def test_heads_may_have_a_size_of_their_own(tmp_path: Path) -> None:
    """Qwen3's heads are larger than hidden / heads."""
    config = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 256}
    assert read_model(folder(tmp_path, config))[0].head_dim == 256


def test_every_head_its_own_keys_unless_told(tmp_path: Path) -> None:
    """Llama-30B has no num_key_value_heads."""
    config = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert read_model(folder(tmp_path, config))[0].kv_heads == 32


@pytest.mark.parametrize(
    "table",
    [
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ],
)
def test_eight_bit_weights(tmp_path: Path, table: dict[str, str]) -> None:
    """Weights would take twice their memory."""
    config = {**LLAMA, "quantization_config": table}
    assert read_model(folder(tmp_path, config))[0].weight_bytes == 1


def test_a_window_is_told_of(tmp_path: Path) -> None:
    """What the profile does not know would be left to its user to find out."""
    facts, notes = read_model(folder(tmp_path, {**LLAMA, "sliding_window": 4096}))
    assert facts == LLAMA_8B
    assert len(notes) == 1
    assert "sliding_window = 4096" in notes[0]
    off = {**LLAMA, "sliding_window": 4096, "use_sliding_window": False}
    assert read_model(folder(tmp_path, off))[1] == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures.*LlamaForCausalLM"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_attention_heads": 24}, "num_attention_heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"quantization_config": "fp8"}, "quantization_config"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """A user would have to guess which of forty fields is meant."""
    with pytest.raises(ConfigInvalid, match=rf"config\.json: {words}"):
        read_model(folder(tmp_path, {**LLAMA, **change}))


def test_projected_embeddings_are_refused(tmp_path: Path) -> None:
    """OPT-350M's embeddings are narrower than its layers."""
    with pytest.raises(ConfigInvalid, match="word_embed_proj_dim"):
        read_model(folder(tmp_path, {**OPT, "word_embed_proj_dim": 512}))


def test_no_config_at_all(tmp_path: Path) -> None:
    """A stack trace would be all there is."""
    with pytest.raises(ConfigInvalid, match="cannot be read as a model's config"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigInvalid, match="cannot be read as a model's config"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(" " * (1 << 21))
    with pytest.raises(ConfigInvalid, match="no model's config"):
        read_model(tmp_path)


def test_seventy_billion_of_llama_are_what_they_are_called() -> None:
    """A dimension mistyped would be another model's: 70.55e9 weights in layers and vocabulary."""
    facts = LLAMA_70B
    layer = facts.hidden * (2 * 8192 + 2 * 1024 + 3 * facts.ffn)
    assert facts.layers * layer + 2 * facts.vocab * facts.hidden == pytest.approx(70.55e9, rel=1e-3)
