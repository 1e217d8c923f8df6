"""The shape of a Llama-family decoder, read from a checkpoint's ``config.json``.

One description covers Llama, Mistral, Qwen2 and Qwen3, which differ only in biases, norms on
queries and keys, and rotary scaling. Whatever this reader does not know to be computed exactly is
an error: a model that almost fits gives wrong text without any sign of it.
"""

from pathlib import Path
from typing import Literal, cast

import msgspec

from shared.errors import ConfigInvalid
from shared.placement.sheets import ModelShape

ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
Json = dict[str, object]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding (Su et al., RoFormer, 2021) and how it is stretched."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the engine needs to know of a model, besides its weights. Which tokens end
    a text is the tokenizer's to say, so that ingress and engine cannot differ."""

    architecture: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    context_tokens: int
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str

    def shape(self, model_id: str, dtype: str) -> ModelShape:
        """The dimensions for those that place the model. ``dtype`` is what the engine computes in:
        its setting, so "auto" as well."""
        name = self.dtype if dtype == "auto" else dtype
        return ModelShape(
            model_id=model_id,
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocabulary=self.vocabulary,
            item_bytes=2 if name == "bfloat16" else 4,  # float16 is widened
            tied_embeddings=self.tied_embeddings,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=self.qk_norm,
        )


def read_model_config(folder: Path) -> ModelConfig:
    """Read ``config.json``; raises ConfigInvalid."""
    raw = read_json(folder / "config.json")
    fields = _Fields(raw)
    architecture = _architecture(raw)
    _refuse_unsupported(fields, raw)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    llama = architecture == "LlamaForCausalLM"
    bias = fields.flag("attention_bias") if architecture != "MistralForCausalLM" else False
    model = ModelConfig(
        architecture=architecture,
        vocabulary=fields.integer("vocab_size"),
        hidden=hidden,
        intermediate=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=fields.integer("head_dim", default=hidden // heads),
        norm_epsilon=fields.number("rms_norm_eps", default=1e-6),
        context_tokens=fields.integer("max_position_embeddings"),
        rope=_rope(fields, raw),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=architecture == "Qwen2ForCausalLM" or bias,
        output_bias=bias and architecture != "Qwen2ForCausalLM",
        mlp_bias=fields.flag("mlp_bias") if llama else False,
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(architecture, fields, raw),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )
    _check_shape(model)
    return model


def read_json(path: Path) -> Json:
    """The object in ``path``; raises ConfigInvalid if there is none."""
    if not path.is_file():
        raise ConfigInvalid(
            field="model path",
            value=str(path.parent),
            remedy=f"{path.name} is missing: give the folder of a Hugging Face checkpoint",
        )
    try:
        value: object = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            field=path.name, value=str(path), remedy=f"not JSON ({error}): copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigInvalid(
            field=path.name, value=str(path), remedy="must hold a JSON object: copy it again"
        )
    return cast("Json", value)


class _Fields:
    """Typed access to config.json, so that a wrong value is named and never guessed."""

    def __init__(self, raw: Json, within: str = "config.json") -> None:
        self._raw = raw
        self._within = within

    def integer(self, name: str, *, default: int | None = None) -> int:
        value = self._raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._invalid(name, "a positive integer is needed")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self._raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._invalid(name, "a positive number is needed")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._invalid(name, "true or false is needed")
        return bool(value)

    def _invalid(self, name: str, need: str) -> ConfigInvalid:
        return ConfigInvalid(
            field=f"{self._within}: {name}", value=self._raw.get(name), remedy=need
        )


def _architecture(raw: Json) -> str:
    found = raw.get("architectures")
    names = cast("list[object]", found) if isinstance(found, list) else []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise ConfigInvalid(
        field="config.json: architectures",
        value=found,
        remedy=f"the torch engine runs {', '.join(ARCHITECTURES)}; use the vllm engine for others",
    )


def _refuse_unsupported(fields: _Fields, raw: Json) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigInvalid(
            field="config.json: hidden_act",
            value=raw.get("hidden_act"),
            remedy='only "silu" is computed; use the vllm engine for this model',
        )
    if raw.get("quantization_config") is not None:
        raise ConfigInvalid(
            field="config.json: quantization_config",
            value=raw["quantization_config"],
            remedy="use the unquantised checkpoint, or the vllm engine",
        )
    if fields.number("partial_rotary_factor", default=1.0) != 1.0:
        raise ConfigInvalid(
            field="config.json: partial_rotary_factor",
            value=raw.get("partial_rotary_factor"),
            remedy="only full rotary embedding is computed; use the vllm engine for this model",
        )


def _rope(fields: _Fields, raw: Json) -> RopeConfig:
    """``rope_parameters`` (transformers 5), or ``rope_theta`` with ``rope_scaling`` (before)."""
    section = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    value = raw.get(section)
    if value is None:
        return RopeConfig(theta=fields.number("rope_theta", default=10000.0))
    if not isinstance(value, dict):
        raise ConfigInvalid(
            field=f"config.json: {section}", value=value, remedy="must be an object or null"
        )
    scaling = cast("Json", value)
    inner = _Fields(scaling, f"config.json: {section}")
    theta = inner.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if inner.number("partial_rotary_factor", default=1.0) != 1.0:
        kind = "partial"
    match kind:
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(theta=theta, kind="linear", factor=inner.number("factor"))
        case "llama3":
            return RopeConfig(
                theta=theta,
                kind="llama3",
                factor=inner.number("factor"),
                low_freq_factor=inner.number("low_freq_factor"),
                high_freq_factor=inner.number("high_freq_factor"),
                original_context_tokens=inner.integer("original_max_position_embeddings"),
            )
        case _:
            raise ConfigInvalid(
                field=f"config.json: {section}",
                value=value,
                remedy='the torch engine computes rope types "default", "linear" and "llama3"; '
                "use the vllm engine for this model",
            )


def _sliding_window(architecture: str, fields: _Fields, raw: Json) -> int | None:
    """The window within which full attention is the same as the model's own."""
    if architecture == "LlamaForCausalLM" or raw.get("sliding_window") is None:
        return None
    if architecture != "MistralForCausalLM" and not fields.flag("use_sliding_window"):
        return None
    return fields.integer("sliding_window")


def _check_shape(model: ModelConfig) -> None:
    if model.heads % model.kv_heads:
        raise ConfigInvalid(
            field="config.json: num_key_value_heads",
            value=model.kv_heads,
            remedy=f"must divide num_attention_heads ({model.heads})",
        )
    if model.head_dim % 2:
        raise ConfigInvalid(
            field="config.json: head_dim",
            value=model.head_dim,
            remedy="must be even: rotary embedding turns pairs",
        )
