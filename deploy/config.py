"""What ``oserve up`` reads from a topology file: its own section, and what it must know of others.

A service's own section is checked by the service, which ends with code 78 when it is wrong; the
supervisor then stops the mesh and shows why.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shared.bus import BusConfig
from shared.config import SECTIONS, Settings, load_settings
from shared.errors import ConfigInvalid
from shared.ids import checked_id
from shared.mesh import MeshConfig
from shared.toml_place import located

HTTP_PORT = 8000
STATE_DIR = Path(".oserve")


class UpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``[up]`` section: how one machine runs the mesh. Times in seconds."""

    routers: int = 2
    ingresses: int = 1  # the first on http_port, each further one on the next port
    http_host: str = ""  # empty: ingress.host, or 127.0.0.1
    http_port: int | None = None  # None: ingress.port, or 8000; 0: any free port
    data_dir: str = ""  # empty: .oserve/<mesh name>
    broker_port: int = 0  # of the embedded broker; 0: any free port
    make_model: str = ""  # size of the checkpoint to make at a model's path that is absent
    restart_backoff_s: float = 0.1  # before the first restart; doubled each time
    restart_backoff_s_max: float = 5.0
    restart_stable_s: float = 10.0  # a process that ran this long starts the backoff anew
    broker_timeout_s: float = 10.0  # how long the broker may take to answer
    ready_timeout_s: float = 120.0  # from the services' start to the first /ready
    stop_timeout_s: float = 75.0  # for each stage of the drain; what runs longer is killed
    log_bytes_max: int = 16 << 20  # of one log file; then it is rotated
    log_files_max: int = 3  # rotated files kept of each process

    def checked(self) -> "UpConfig":
        """Self, if every value makes sense; raises ConfigInvalid."""
        for field in ("routers", "ingresses", "log_bytes_max", "log_files_max"):
            _require(self, field, least=1)
        for field in ("broker_timeout_s", "ready_timeout_s", "stop_timeout_s", "restart_backoff_s"):
            _require(self, field, least=0.01)
        for field, port in (("http_port", self.http_port), ("broker_port", self.broker_port)):
            if port is not None and not 0 <= port < 1 << 16:
                raise ConfigInvalid(
                    field=f"up.{field}", value=port, remedy="use 0 (any free port) to 65535"
                )
        return self


def _require(config: UpConfig, field: str, *, least: float) -> None:
    value: float = getattr(config, field)
    if value < least:
        raise ConfigInvalid(field=f"up.{field}", value=value, remedy=f"use {least} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A topology file, read and checked as far as the supervisor needs it."""

    file: Path
    overrides: tuple[str, ...]
    up: UpConfig
    mesh: MeshConfig
    bus: BusConfig
    broker_embedded: bool  # nobody named a broker, so the mesh brings its own
    http_host: str
    http_port: int
    metrics_port: int  # of the first process, the others count up from it; 0: any free ones
    keys_file: str  # empty: open to whoever reaches the port

    @property
    def data_dir(self) -> Path:
        return Path(self.up.data_dir) if self.up.data_dir else STATE_DIR / self.mesh.name


def load_topology(file: Path, overrides: Sequence[str] = ()) -> Topology:
    """Read ``file`` with the environment and ``overrides`` on top; raises ConfigInvalid."""
    settings = load_settings(file=str(file), environ=os.environ, sets=overrides)
    changed = [path for path, source in settings.sources.items() if source != str(file)]
    with located(file, sections=SECTIONS, but=changed):
        return _topology(file, overrides, settings)


def _topology(file: Path, overrides: Sequence[str], settings: Settings) -> Topology:
    up = settings.section("up", UpConfig).checked()
    mesh = settings.section("mesh", MeshConfig).checked()
    checked_id("mesh.name", mesh.name)
    if not mesh.nodes:
        raise ConfigInvalid(
            field="mesh.nodes", value=(), remedy="name at least one node with one GPU"
        )
    return Topology(
        file=file,
        overrides=tuple(overrides),
        up=up,
        mesh=mesh,
        bus=settings.section("bus", BusConfig),
        broker_embedded="bus.url" not in settings.sources,
        http_host=up.http_host or str(_ingress(settings).get("host", "127.0.0.1")),
        http_port=_http_port(settings, up),
        metrics_port=_port(settings, "telemetry", "metrics_port", default=0),
        keys_file=str(_ingress(settings).get("keys_file", "")),
    )


def _http_port(settings: Settings, up: UpConfig) -> int:
    if up.http_port is not None:
        return up.http_port
    return _port(settings, "ingress", "port", default=HTTP_PORT)


def _port(settings: Settings, section: str, key: str, *, default: int) -> int:
    value = settings.values.get(section, {}).get(key, default)
    try:
        return msgspec.convert(value, int, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigInvalid(field=f"{section}.{key}", value=value, remedy=str(error)) from None


def _ingress(settings: Settings) -> dict[str, Any]:
    return settings.values.get("ingress", {})
