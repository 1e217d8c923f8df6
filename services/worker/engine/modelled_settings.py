"""What the modelled engine's settings must fulfil."""

from shared.errors import ConfigInvalid
from shared.mesh import ModelledEngineSettings

_BY_PROFILE = (  # what timing = "profile" takes from the profile
    "base_s", "prefill_token_s", "decode_token_s", "context_token_s", "start_s", "kv_blocks",
)  # fmt: skip


def check_settings(settings: ModelledEngineSettings) -> None:
    """Raises ConfigInvalid for the first setting that cannot work."""
    at_least = {
        "base_s": 0, "prefill_token_s": 0, "decode_token_s": 0, "context_token_s": 0, "start_s": 0,
        "block_tokens": 1, "kv_blocks": 1, "running_max": 1, "waiting_max": 0,
        "batch_tokens_max": settings.running_max,  # each running request decodes a token a step
    }  # fmt: skip
    for name, minimum in at_least.items():
        value: float = getattr(settings, name)
        if value < minimum:
            raise ConfigInvalid(
                field=f"mesh.engine.modelled.{name}", value=value, remedy=f"use {minimum} or more"
            )
    if settings.speedup <= 0:
        raise ConfigInvalid(
            field="mesh.engine.modelled.speedup", value=settings.speedup, remedy="use a factor > 0"
        )
    if not 0 <= settings.eos_probability <= 1:
        raise ConfigInvalid(
            field="mesh.engine.modelled.eos_probability",
            value=settings.eos_probability,
            remedy="use a probability from 0 to 1",
        )
    if settings.timing == "profile":
        _check_unused(settings)


def _check_unused(settings: ModelledEngineSettings) -> None:
    """A setting that would change nothing is one that somebody counts on in vain."""
    default = ModelledEngineSettings()
    for name in _BY_PROFILE:
        value: float = getattr(settings, name)
        if value != getattr(default, name):
            raise ConfigInvalid(
                field=f"mesh.engine.modelled.{name}",
                value=value,
                remedy='remove it: with timing = "profile" the profile says',
            )
