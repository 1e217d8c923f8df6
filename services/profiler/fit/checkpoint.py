"""A local model's dimensions, from its config.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from shared.cost.profile import ModelFacts
from shared.errors import ConfigInvalid

GATED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
OPT = "OPTForCausalLM"
UNUSED_POSITIONS = 2  # that OPT's table starts with
CONFIG_BYTES_MAX = 1 << 20


def read_model(folder: Path) -> tuple[ModelFacts, Sequence[str]]:
    """Dimensions, and what of the model its profile will not know. Raises ConfigInvalid that names
    file and field."""
    path = folder / "config.json"
    config = _Config(path, _load(path))
    names = config.architectures()
    if OPT in names:
        facts = _opt(config)
    elif any(name in GATED for name in names):
        facts = _gated(config)
    else:
        remedy = f"is none of {', '.join((*GATED, OPT))}: only these dense decoders can be fitted"
        raise config.invalid("architectures", names, remedy)
    return facts, config.notes()


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            remedy = f"more than {CONFIG_BYTES_MAX} bytes: no model's config"
            raise ConfigInvalid(field="--model", value=str(path), remedy=remedy)
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        remedy = f"cannot be read as a model's config.json: {error}"
        raise ConfigInvalid(field="--model", value=str(path), remedy=remedy) from None


class _Config:
    """The fields of one file; each question names what is wrong with its answer."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self._path, self._fields = path, fields

    def invalid(self, field: str, value: object, remedy: str) -> ConfigInvalid:
        return ConfigInvalid(field=f"{self._path}: {field}", value=value, remedy=remedy)

    def architectures(self) -> list[str]:
        found: object = self._fields.get("architectures")
        names = (
            [str(name) for name in cast("list[object]", found)] if isinstance(found, list) else []
        )
        if not names:
            remedy = 'name one, such as ["LlamaForCausalLM"]'
            raise self.invalid("architectures", cast("object", found), remedy)
        return names

    def count(self, field: str, default: int | None = None) -> int:
        value = self._fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.invalid(field, value, "must be a whole number of at least 1")
        return value

    def flag(self, field: str, *, default: bool) -> bool:
        value = self._fields.get(field, default)
        if not isinstance(value, bool):
            raise self.invalid(field, value, "must be true or false")
        return value

    def weight_bytes(self) -> int:
        """1 for checkpoints in fp8, 2 for those that are not quantised."""
        found = self._fields.get("quantization_config")
        if found is None:
            return 2
        if not isinstance(found, dict):
            raise self.invalid("quantization_config", found, "must be an object")
        table = cast("dict[str, object]", found)
        marks = {str(table.get(name, "")).lower() for name in ("quant_method", "quant_algo")}
        if "fp8" in marks or table.get("format") == "float-quantized":
            return 1
        remedy = "only fp8 was measured; other quantisations cannot be fitted"
        raise self.invalid("quantization_config", table, remedy)

    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, their size."""
        heads = self.count("num_attention_heads")
        kv_heads = self.count("num_key_value_heads", heads)
        hidden = self.count("hidden_size")
        if self._fields.get("head_dim") is None and hidden % heads:
            remedy = f"must divide hidden_size ({hidden}), or head_dim must be given"
            raise self.invalid("num_attention_heads", heads, remedy)
        given = self._fields.get("head_dim")
        size = hidden // heads if given is None else self.count("head_dim")
        if heads % kv_heads:
            remedy = f"must divide num_attention_heads ({heads})"
            raise self.invalid("num_key_value_heads", kv_heads, remedy)
        return heads, kv_heads, size

    def notes(self) -> Sequence[str]:
        window = self._fields.get("sliding_window")
        if isinstance(window, int) and self._fields.get("use_sliding_window", True):
            words = f"sliding_window = {window}: contexts beyond are predicted as if attended to"
            return (words,)
        return ()


def _gated(config: _Config) -> ModelFacts:
    heads, kv_heads, size = config.heads()
    return ModelFacts(
        layers=config.count("num_hidden_layers"),
        hidden=config.count("hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        ffn=config.count("intermediate_size"),
        vocab=config.count("vocab_size"),
        tied=config.flag("tie_word_embeddings", default=False),
        weight_bytes=config.weight_bytes(),
    )


def _opt(config: _Config) -> ModelFacts:
    heads, kv_heads, size = config.heads()
    hidden = config.count("hidden_size")
    projected = config.count("word_embed_proj_dim", hidden)
    if projected != hidden:
        remedy = f"must be hidden_size ({hidden}): projected embeddings cannot be fitted"
        raise config.invalid("word_embed_proj_dim", projected, remedy)
    return ModelFacts(
        layers=config.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        ffn=config.count("ffn_dim"),
        vocab=config.count("vocab_size"),
        gated=False,
        tied=config.flag("tie_word_embeddings", default=True),
        weight_bytes=config.weight_bytes(),
        positions=config.count("max_position_embeddings") + UNUSED_POSITIONS,
    )
