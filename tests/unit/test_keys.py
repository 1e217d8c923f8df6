"""API keys: who may ask, and how often."""

from pathlib import Path

import pytest

from services.ingress.keys import Identity, KeyRing, TokenBucket, new_key
from services.ingress.openai_errors import ApiError
from shared.errors import ConfigInvalid

KEY, HASH = new_key()


def _ring(folder: Path, text: str) -> KeyRing:
    file = folder / "keys.toml"
    file.write_text(text, encoding="utf-8")
    return KeyRing.load(str(file))


def _entry(**fields: object) -> str:
    values = {"id": "k1", "sha256": HASH, "tenant": "t1"} | fields
    lines = [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
        for name, value in values.items()
    ]
    return "\n".join(["[[keys]]", *lines, ""])


def test_a_key_names_its_owner(tmp_path: Path) -> None:
    """Limits and priorities hang on this."""
    ring = _ring(tmp_path, _entry(slo_class="interactive"))
    identity = ring.authenticate(f"Bearer {KEY}")
    assert (identity.key_id, identity.tenant, identity.slo_class) == ("k1", "t1", "interactive")
    assert ring.authenticate(f"bearer  {KEY} ") is identity
    assert not ring.open


@pytest.mark.parametrize(
    "header",
    [None, "", KEY, "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \udcff"],
)
def test_anyone_else_is_401(tmp_path: Path, header: str | None) -> None:
    """A wrong or missing key must never be let in, nor break the server."""
    with pytest.raises(ApiError) as caught:
        _ring(tmp_path, _entry()).authenticate(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert KEY not in caught.value.message


def test_without_a_file_everyone_may_ask() -> None:
    """A first start must work with any client, which always sends some key."""
    ring = KeyRing.load("")
    assert ring.open
    assert ring.authenticate(None) is ring.authenticate("Bearer anything")
    ring.authenticate(None).admit(tokens=10**9, now_s=0.0)


def test_keys_are_random_and_long() -> None:
    """A plain hash in the file is safe only while keys cannot be guessed."""
    keys = {new_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key.removeprefix("sk-oserve-")) == 43 for key in keys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys = 5", "keys"),
        ("", "keys"),
        ("[[keys]]\n[[", "not TOML"),
        (_entry(id="a.b"), r"keys\[0\].id"),
        (_entry(tenant="a b"), r"keys\[0\].tenant"),
        (_entry(sha256="xyz"), "64 hex digits"),
        (_entry(sha256=HASH.upper() + "A"), "64 hex digits"),
        (_entry(slo_class="fast"), r"keys\[0\].slo_class|keys\[...\].slo_class"),
        (_entry(colour="red"), "unknown field `colour`"),
        (_entry(requests_per_s=0), "requests_per_s"),
        (_entry(burst=5), "needs requests_per_s"),
        (_entry(tokens_per_minute=-1), "tokens_per_minute"),
        (_entry() + _entry(sha256="0" * 64), "another key has it"),
        (_entry() + _entry(id="k2"), "another key has it"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    """A keys file that is half understood lets the wrong people in, or none."""
    with pytest.raises(ConfigInvalid, match=said):
        _ring(tmp_path, text)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """A typing error in the path must not open the server to everyone."""
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        KeyRing.load(str(tmp_path / "nowhere.toml"))


def test_requests_beyond_the_rate_are_429(tmp_path: Path) -> None:
    """One tenant's loop must not take the replicas from all the others."""
    identity = _ring(tmp_path, _entry(requests_per_s=2.0, burst=3)).authenticate(f"Bearer {KEY}")
    for _ in range(3):
        identity.admit(tokens=1, now_s=100.0)
    with pytest.raises(ApiError, match="requests per second") as caught:
        identity.admit(tokens=1, now_s=100.0)
    assert caught.value.status == 429
    assert caught.value.retry_after_s == pytest.approx(0.5)
    identity.admit(tokens=1, now_s=100.5)


def test_tokens_beyond_the_rate_are_429_and_cost_no_request(tmp_path: Path) -> None:
    """A refused request must not count against the other limit too."""
    text = _entry(requests_per_s=1.0, burst=2, tokens_per_minute=600)
    identity = _ring(tmp_path, text).authenticate(f"Bearer {KEY}")
    identity.admit(tokens=600, now_s=0.0)
    for _ in range(5):
        with pytest.raises(ApiError, match="tokens per minute") as caught:
            identity.admit(tokens=100, now_s=0.0)
        assert caught.value.retry_after_s == pytest.approx(10.0)
    identity.admit(tokens=100, now_s=10.0)


def test_a_request_larger_than_the_burst_waits_for_a_full_bucket() -> None:
    """It would never be served otherwise; and it must be paid for afterwards."""
    bucket = TokenBucket(rate_per_s=10, burst_max=100)
    assert bucket.wait_s(500, 0.0) == 0
    bucket.take(500)
    assert bucket.wait_s(1, 0.0) == pytest.approx(40.1)


def test_a_clock_that_steps_back_gives_nothing() -> None:
    """Time that runs backwards must neither fill the bucket nor break it."""
    bucket = TokenBucket(rate_per_s=1, burst_max=1)
    assert bucket.wait_s(1, 10.0) == 0
    bucket.take(1)
    assert bucket.wait_s(1, 5.0) == pytest.approx(1.0)


def test_no_limits_admit_everything() -> None:
    """A key without limits is not limited."""
    for _ in range(1000):
        Identity(key_id="x").admit(tokens=10**6, now_s=0.0)
