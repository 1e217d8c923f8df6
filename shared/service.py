"""The shell every service shares: settings, logs, bus, discovery, signals, exit codes.

Exit codes tell a supervisor what to do: 0 ended as asked; 78 settings are wrong, restarting will
not help; 69 the broker cannot be reached; anything else is a crash, restart.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

import msgspec
import uvloop

from shared.bus import Bus, BusConfig, NatsBus
from shared.clock import Clock, SystemClock
from shared.config import Settings, load_settings
from shared.core import Core
from shared.errors import BusUnavailable, ConfigInvalid
from shared.ids import IdSource, RandomIds
from shared.mesh import MeshConfig
from shared.runtime import Runtime, Wiring
from shared.telemetry import Metrics, TelemetryConfig, Tracing, configure_logs

log = logging.getLogger("oserve.service")

EXIT_CONFIG = 78
EXIT_UNAVAILABLE = 69
SETTLED_S = 2.0  # after the start: whatever is imported late has been
C = TypeVar("C", bound=msgspec.Struct)


@dataclass(slots=True, kw_only=True)
class ServiceContext:
    """What a service is given instead of globals."""

    name: str
    instance_id: str
    bus: Bus
    clock: Clock
    ids: IdSource
    mesh: MeshConfig
    metrics: Metrics
    tracing: Tracing
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def runtime(self, core: Core, wiring: Wiring) -> Runtime:
        return Runtime(
            core,
            wiring,
            bus=self.bus,
            clock=self.clock,
            metrics=self.metrics,
            tracing=self.tracing,
        )


async def run(core: Core, wiring: Wiring, context: ServiceContext) -> None:
    """Drive ``core`` until the process is told to end: the whole of most services."""
    await context.runtime(core, wiring).run(context.stopping)


Serve = Callable[[C, ServiceContext], Awaitable[None]]


def run_service(name: str, config_type: type[C], serve: Serve[C]) -> None:
    """Entry point of ``python -m services.<name>``; ends the process with an exit code."""
    arguments = _arguments(name)
    try:
        settings = load_settings(
            file=arguments.config, environ=os.environ, sets=arguments.set or ()
        )
        config = settings.section(name, config_type)
        sections: dict[str, Any] = {
            name: config,
            "bus": settings.section("bus", BusConfig),
            "telemetry": settings.section("telemetry", TelemetryConfig),
            "mesh": settings.section("mesh", MeshConfig).checked(),
        }
    except ConfigInvalid as error:
        sys.stderr.write(f"oserve {name}: {error}\n")
        raise SystemExit(EXIT_CONFIG) from None
    if arguments.print_config:
        _print_config(settings, sections)
        return
    instance_id = arguments.instance or RandomIds().next(name)
    configure_logs(sections["telemetry"], service=name, instance_id=instance_id)
    try:
        uvloop.run(_main(name, instance_id, sections, serve))
    except (ConfigInvalid, BusUnavailable) as error:
        log.error("service.refused", extra={"error": str(error)})  # noqa: TRY400  # no stack: not a bug
        sys.stderr.write(f"oserve {name}: {error}\n")
        code = EXIT_CONFIG if isinstance(error, ConfigInvalid) else EXIT_UNAVAILABLE
        raise SystemExit(code) from None


def _arguments(name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}")
    parser.add_argument("--config", default=os.environ.get("OSERVE_CONFIG"), help="TOML file")
    parser.add_argument("--set", action="append", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--instance", default="", help="instance id (default: random)")
    parser.add_argument("--print-config", action="store_true", help="every value and its source")
    return parser.parse_args()


def _print_config(settings: Settings, sections: dict[str, msgspec.Struct]) -> None:
    for name, value in sections.items():
        for line in settings.show(name, value):
            sys.stdout.write(line + "\n")


async def _main(name: str, instance_id: str, sections: dict[str, Any], serve: Serve[Any]) -> None:
    telemetry: TelemetryConfig = sections["telemetry"]
    bus = NatsBus(sections["bus"])
    context = ServiceContext(
        name=name,
        instance_id=instance_id,
        bus=bus,
        clock=SystemClock(),
        ids=RandomIds(),
        mesh=sections["mesh"],
        metrics=Metrics(name),
        tracing=Tracing(telemetry, service=name, instance_id=instance_id),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, context.stopping.set)
    try:
        if not await _connected(bus, name=instance_id, stopping=context.stopping):
            log.info("service.ended", extra={"detail": "told to end before the broker answered"})
            return
        url = context.metrics.serve(telemetry)
        await bus.register(
            name=f"oserve-{name}",
            version=metadata.version("oserve"),
            description=f"OServe {name}",
            metadata={"instance": instance_id, "metrics": url, "pid": str(os.getpid())},
        )
        log.info("service.started", extra={"metrics": url})
        _freeze()
        loop.call_later(SETTLED_S, _freeze)
        await serve(sections[name], context)
        log.info("service.ended", extra={})
    finally:
        await bus.close()
        context.metrics.close()
        context.tracing.close()


def _freeze() -> None:
    """Modules and classes live as long as the process: a full collection that walks them all
    holds the event loop up for some 50 ms, and with it every stream. Called a second time for
    what serving imports late."""
    gc.collect()
    gc.freeze()


async def _connected(bus: NatsBus, *, name: str, stopping: asyncio.Event) -> bool:
    """Connect, unless told to end while the broker is awaited."""
    connect = asyncio.create_task(bus.connect(name=name))
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait({connect, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if connect.done():
        connect.result()
        return True
    connect.cancel()
    await asyncio.wait({connect})
    return False
