"""New API keys. The ingress's keys file holds only their SHA-256."""

import hashlib
import secrets
from dataclasses import dataclass

from shared.errors import ConfigInvalid
from shared.ids import checked_id
from shared.slo import SLO_CLASSES

_PREFIX = "sk-oserve-"
_RANDOM_BYTES = 32


@dataclass(frozen=True, slots=True)
class NewKey:
    """``text`` is shown once and stored nowhere; ``entry`` goes into the keys file."""

    text: str
    entry: str


def new_key(
    *,
    tenant: str,
    slo_class: str,
    key_id: str = "",
    requests_per_s: float | None = None,
    tokens_per_minute: int | None = None,
) -> NewKey:
    """256 random bits, and their entry for the file that ``ingress.keys_file`` names."""
    if slo_class not in SLO_CLASSES:
        raise ConfigInvalid(
            field="slo_class", value=slo_class, remedy=f"use one of {', '.join(SLO_CLASSES)}"
        )
    text = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    name = checked_id("id", key_id or f"{checked_id('tenant', tenant)}-{secrets.token_hex(3)}")
    entry = "\n".join(
        (
            "[[keys]]",
            f'id = "{name}"',
            f'sha256 = "{hashlib.sha256(text.encode()).hexdigest()}"',
            f'tenant = "{tenant}"',
            f'slo_class = "{slo_class}"',
            _limit("requests_per_s", requests_per_s, example=50.0),
            _limit("tokens_per_minute", tokens_per_minute, example=2_000_000),
        )
    )
    return NewKey(text, entry)


def _limit(name: str, value: float | None, *, example: float) -> str:
    """Without a limit, a comment shows how to set one later."""
    return f"# {name} = {example}" if value is None else f"{name} = {value}"
