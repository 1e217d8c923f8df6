"""The rate limit, against any pattern of arrivals."""

from hypothesis import given
from hypothesis import strategies as st

from services.ingress.keys import TokenBucket

ARRIVALS = st.lists(st.tuples(st.floats(0, 3), st.floats(0.01, 8)), min_size=1, max_size=50)


@given(rate=st.floats(0.1, 100), burst=st.floats(1, 50), arrivals=ARRIVALS)
def test_no_more_than_rate_and_burst_get_through(
    rate: float, burst: float, arrivals: list[tuple[float, float]]
) -> None:
    """A limit that some pattern of arrivals gets around is no limit."""
    bucket = TokenBucket(rate_per_s=rate, burst_max=burst)
    now_s, allowed = 1000.0, 0.0
    for gap_s, amount in arrivals:
        now_s += gap_s
        if bucket.wait_s(amount, now_s) == 0:
            bucket.take(amount)
            allowed += amount
    elapsed_s = now_s - 1000.0
    assert allowed <= (rate * elapsed_s + burst) * 1.001 + max(amount for _, amount in arrivals)


@given(rate=st.floats(0.1, 1000), burst=st.floats(1, 50), arrivals=ARRIVALS)
def test_who_waits_as_told_gets_through(
    rate: float, burst: float, arrivals: list[tuple[float, float]]
) -> None:
    """A Retry-After that is too short makes clients knock twice."""
    bucket = TokenBucket(rate_per_s=rate, burst_max=burst)
    now_s = 1000.0
    for gap_s, amount in arrivals:
        now_s += gap_s
        now_s += bucket.wait_s(amount, now_s)
        assert bucket.wait_s(amount, now_s) == 0
        bucket.take(amount)
