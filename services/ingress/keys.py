"""API keys: who asks, in which SLO class, how often.

A keys file names each key by the SHA-256 of its text, so that reading the file gives nobody
access. A plain hash is right here: keys are 256 random bits from ``new_key``, which no search can
guess, so the slow salted hashes made for passwords would only cost time on each request.

    [[keys]]
    id = "team-search"
    sha256 = "<64 hex digits>"
    tenant = "search"
    slo_class = "interactive"     # interactive, standard (default) or batch
    requests_per_s = 50.0         # no limit when left out
    burst = 100                   # requests at once; default: one second's worth
    tokens_per_minute = 2000000   # prompt + requested output; no limit when left out
"""

import hashlib
import math
import re
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from services.ingress.openai_errors import invalid_api_key, rate_limit_exceeded
from shared.errors import ConfigInvalid
from shared.ids import checked_id
from shared.slo import SloClass

KEYS_MAX = 100_000
_PREFIX = "sk-oserve-"
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_PATH = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)


class KeySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the keys file."""

    id: str
    sha256: str
    tenant: str
    slo_class: SloClass = "standard"
    requests_per_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    burst: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    tokens_per_minute: Annotated[int, Meta(ge=1, le=10**12)] | None = None


class _KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[list[KeySpec], Meta(min_length=1, max_length=KEYS_MAX)]


class TokenBucket:
    """Allows ``rate_per_s`` on average and ``burst_max`` at once. Pure: the time is an argument.

    Two numbers of state, whatever arrives; the bucket is filled by arithmetic, not by a timer.
    """

    __slots__ = ("_burst_max", "_level", "_rate_per_s", "_updated_s")

    def __init__(self, *, rate_per_s: float, burst_max: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst_max = burst_max
        self._level = burst_max
        self._updated_s: float | None = None

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until ``amount`` would be allowed; 0 is now. Takes nothing.

        What exceeds the burst is allowed from a full bucket, or it never would be.
        """
        if self._updated_s is not None:
            elapsed_s = max(0.0, now_s - self._updated_s)
            self._level = min(self._burst_max, self._level + elapsed_s * self._rate_per_s)
        self._updated_s = now_s
        missing = min(amount, self._burst_max) - self._level
        # A millionth of a request is rounding: without this, who waits as told may be refused.
        return 0.0 if missing <= _ROUNDING * self._burst_max else missing / self._rate_per_s

    def take(self, amount: float) -> None:
        """To be called when ``wait_s`` said 0. The level goes below zero for an amount beyond the
        burst, and the next caller waits for it."""
        self._level -= amount


_ROUNDING = 1e-6


@dataclass(slots=True, kw_only=True)
class Identity:
    """Who asks. ``key_id`` is empty when the ingress is open to everyone."""

    key_id: str = ""
    tenant: str = ""
    slo_class: SloClass = "standard"
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None

    def admit(self, *, tokens: int, now_s: float) -> None:
        """Count one request of ``tokens`` (prompt + output asked for) against the key's limits;
        raises ApiError 429 and counts nothing if one of them is reached."""
        waits_s = (
            self.requests.wait_s(1, now_s) if self.requests else 0.0,
            self.tokens.wait_s(tokens, now_s) if self.tokens else 0.0,
        )
        if max(waits_s) > 0:
            noun = "requests per second" if waits_s[0] >= waits_s[1] else "tokens per minute"
            message = f"Key {self.key_id!r} has reached its limit of {noun}: retry later."
            raise rate_limit_exceeded(message, retry_after_s=max(waits_s))
        if self.requests:
            self.requests.take(1)
        if self.tokens:
            self.tokens.take(tokens)


class KeyRing:
    """Finds who a request comes from. Without keys it is open: anyone may ask, as one tenant."""

    def __init__(self, keys: tuple[KeySpec, ...] = ()) -> None:
        self._identities = {bytes.fromhex(key.sha256): _identity(key) for key in keys}
        self._anyone = Identity()

    @property
    def open(self) -> bool:
        return not self._identities

    @classmethod
    def load(cls, path: str) -> "KeyRing":
        """From a keys file, or open if ``path`` is empty; raises ConfigInvalid."""
        return cls(_load_keys(path)) if path else cls()

    def authenticate(self, authorization: str | None) -> Identity:
        """By the Authorization header; raises ApiError 401.

        The digest is looked up, not the key: what timing tells of a lookup is about a digest that
        a caller cannot steer, so it tells nothing of the keys.
        """
        if self.open:
            return self._anyone
        if not authorization:
            raise invalid_api_key("No API key given: send it as 'Authorization: Bearer KEY'.")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise invalid_api_key("The Authorization header must read 'Bearer KEY'.")
        identity = self._identities.get(_digest(key.strip()))
        if identity is None:
            raise invalid_api_key("Incorrect API key provided: check it, or ask for a new one.")
        return identity


def new_key() -> tuple[str, str]:
    """A new key for a client, and its hash for the keys file. The key is shown once, here."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, _digest(key).hex()


def _digest(key: str) -> bytes:
    # A header may hold any byte, which aiohttp gives as a lone surrogate.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _identity(key: KeySpec) -> Identity:
    requests = tokens = None
    if key.requests_per_s is not None:
        burst_max = key.burst or max(1, math.ceil(key.requests_per_s))
        requests = TokenBucket(rate_per_s=key.requests_per_s, burst_max=burst_max)
    if key.tokens_per_minute is not None:
        tokens = TokenBucket(rate_per_s=key.tokens_per_minute / 60, burst_max=key.tokens_per_minute)
    return Identity(
        key_id=key.id,
        tenant=key.tenant,
        slo_class=key.slo_class,
        requests=requests,
        tokens=tokens,
    )


def _load_keys(path: str) -> tuple[KeySpec, ...]:
    try:
        content: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(
            field="keys_file", value=path, remedy=f"cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigInvalid(field="keys_file", value=path, remedy=f"not TOML: {error}") from error
    try:
        keys = msgspec.convert(content, _KeysFile).keys
    except msgspec.ValidationError as error:
        match = _PATH.search(str(error))
        field = f"{path}: {match[1]}" if match and match[1] else path
        text = str(error)[: match.start()] if match else str(error)
        remedy = f"{text}; write [[keys]] with {', '.join(KeySpec.__struct_fields__)}"
        raise ConfigInvalid(field="keys_file", value=field, remedy=remedy) from error
    _check_keys(path, keys)
    return tuple(keys)


def _check_keys(path: str, keys: list[KeySpec]) -> None:
    ids: set[str] = set()
    hashes: set[str] = set()
    for index, key in enumerate(keys):
        where = f"{path}: keys[{index}]"
        checked_id(f"{where}.id", key.id)
        checked_id(f"{where}.tenant", key.tenant)
        if not _SHA256.match(key.sha256):
            remedy = "must be 64 hex digits in lower case, as `oserve keys new` prints them"
            raise ConfigInvalid(field=f"{where}.sha256", value=key.sha256, remedy=remedy)
        if key.burst is not None and key.requests_per_s is None:
            remedy = "it needs requests_per_s"
            raise ConfigInvalid(field=f"{where}.burst", value=key.burst, remedy=remedy)
        if key.id in ids:
            raise ConfigInvalid(field=f"{where}.id", value=key.id, remedy="another key has it")
        if key.sha256 in hashes:
            remedy = "another key has it: make a key for each"
            raise ConfigInvalid(field=f"{where}.sha256", value=key.sha256, remedy=remedy)
        ids.add(key.id)
        hashes.add(key.sha256)
