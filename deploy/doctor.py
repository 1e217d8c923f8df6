"""``oserve doctor``: looks for what usually keeps a mesh from running, and names the remedy."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from deploy import health_broker, health_machine, health_model, health_profile
from deploy.config import Topology, load_topology
from deploy.finding import Finding, failed, ok
from deploy.state import is_locked, read_mesh_file
from shared.errors import ConfigInvalid

_COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}
Check = Callable[[Topology], Sequence[Finding]]

CHECKS: tuple[Check, ...] = (
    health_machine.check_port,
    health_machine.check_data_dir,
    health_machine.check_disk,
    health_machine.check_open_files,
    health_machine.check_clock,
    health_broker.check_binary,
    health_model.check_extras,
    health_model.check_devices,
    health_model.check_models,
    health_model.check_wishes,
    health_profile.check_profiled,
    health_model.check_memory,
)


def run_doctor(topology: Path, overrides: Sequence[str]) -> int:
    """Print every finding; 1 if any failed."""
    console = Console(highlight=False)
    findings = diagnose(topology, overrides)
    for finding in findings:
        console.print(f"[{_COLOURS[finding.level]}]{finding.level:<4}[/]", end=" ")
        console.print(f"{finding.subject}: {finding.text}", markup=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"     -> {finding.remedy}", markup=False, soft_wrap=True)
    return 1 if any(finding.level == "FAIL" for finding in findings) else 0


def diagnose(file: Path, overrides: Sequence[str] = ()) -> list[Finding]:
    """All findings for a topology; only the settings' when those are wrong."""
    try:
        topology = load_topology(file, overrides)
        findings = [ok("settings", f"{file} is understood")]
        for check in CHECKS:
            findings += check(topology)
    except ConfigInvalid as error:
        return [failed("settings", f"{error.field} = {error.value!r}", error.remedy)]
    return findings + asyncio.run(health_broker.check_broker(topology, _running_bus(topology)))


def _running_bus(topology: Topology) -> str:
    """The broker of the mesh that runs in the topology's data folder; "" if none does."""
    mesh = read_mesh_file(topology.data_dir) if is_locked(topology.data_dir) else None
    return mesh.bus_url if mesh is not None else ""
