"""The shell of every service, run in this process: settings, exit codes, signals."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from shared.errors import ConfigInvalid
from shared.service import EXIT_CONFIG, EXIT_UNAVAILABLE, ServiceContext, run_service
from shared.telemetry import TelemetryConfig
from tests.support.broker import Broker, free_port


class RouterLike(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    policy: str = "plan"
    inbox_max: int = 10


async def _never(_config: RouterLike, _context: ServiceContext) -> None:
    raise AssertionError("must not be served")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OSERVE_"):
            monkeypatch.delenv(name)


def _arguments(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["services.router", *arguments])


def test_print_config_shows_every_value_and_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nobody could tell which of four sources a running service believes."""
    file = tmp_path / "t.toml"
    file.write_text("[router]\npolicy = 'least_load'\n[bus]\nurl = 'nats://b:1'\n")
    monkeypatch.setenv("OSERVE_MESH__NAME", "m1")
    _arguments(monkeypatch, "--config", str(file), "--set", "router.inbox_max=5", "--print-config")
    run_service("router", RouterLike, _never)
    lines = capsys.readouterr().out.splitlines()
    assert f'router.policy = "least_load"  # {file}' in lines
    assert "router.inbox_max = 5  # --set" in lines
    assert f'bus.url = "nats://b:1"  # {file}' in lines
    assert 'mesh.name = "m1"  # OSERVE_MESH__NAME' in lines
    assert 'telemetry.log_level = "INFO"  # default' in lines


def test_wrong_settings_end_with_78_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A supervisor would restart for ever what only an operator can mend."""
    _arguments(monkeypatch, "--set", "router.polcy=plan")
    with pytest.raises(SystemExit) as caught:
        run_service("router", RouterLike, _never)
    assert caught.value.code == EXIT_CONFIG
    assert "oserve router: router.polcy = 'plan': unknown key" in capsys.readouterr().err


def test_the_topology_is_checked_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A contradictory topology would be found by the service that suffers from it."""
    _arguments(monkeypatch, "--set", "mesh.engine.kind=torch")
    with pytest.raises(SystemExit) as caught:
        run_service("router", RouterLike, _never)
    assert caught.value.code == EXIT_CONFIG
    assert "mesh.model.path" in capsys.readouterr().err


@pytest.fixture
def _quiet_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_as_it_is(_config: TelemetryConfig, *, service: str, instance_id: str) -> None:
        assert (service, bool(instance_id)) == ("router", True)

    monkeypatch.setattr("shared.service.configure_logs", keep_as_it_is)


@pytest.mark.usefixtures("_quiet_logs")
def test_without_a_broker_it_ends_with_69(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A supervisor could not tell a missing broker from a crash."""
    port = free_port()
    _arguments(
        monkeypatch, "--set", f"bus.url=nats://127.0.0.1:{port}",
        "--set", "bus.connect_timeout_s=0.1",
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        run_service("router", RouterLike, _never)
    assert caught.value.code == EXIT_UNAVAILABLE
    assert f"no broker at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.usefixtures("_quiet_logs")
def test_told_to_end_while_it_waits_for_a_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C would be ignored until the broker comes, or the time for it is over."""
    _arguments(monkeypatch, "--set", f"bus.url=nats://127.0.0.1:{free_port()}")

    async def interrupt(_url: str, *, timeout_s: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(timeout_s)

    monkeypatch.setattr("shared.bus.wait_for_broker", interrupt)
    run_service("router", RouterLike, _never)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.nats
@pytest.mark.usefixtures("_quiet_logs")
def test_serves_until_told_to_end(
    monkeypatch: pytest.MonkeyPatch, nats_server: Broker, refused: bool
) -> None:
    """A service would not end on SIGTERM, or hide from its supervisor why it cannot run."""
    _arguments(monkeypatch, "--set", f"bus.url={nats_server.url}", "--instance", "router-7")
    seen: list[tuple[str, str, int]] = []

    async def serve(config: RouterLike, context: ServiceContext) -> None:
        seen.append((context.name, context.instance_id, config.inbox_max))
        assert context.bus.connected
        if refused:
            raise ConfigInvalid(field="router.policy", value="x", remedy="known: plan")
        os.kill(os.getpid(), signal.SIGTERM)
        await context.stopping.wait()

    if refused:
        with pytest.raises(SystemExit) as caught:
            run_service("router", RouterLike, serve)
        assert caught.value.code == EXIT_CONFIG
    else:
        run_service("router", RouterLike, serve)
    assert seen == [("router", "router-7", 10)]
