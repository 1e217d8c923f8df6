"""Incidents as an operator writes them: ``crash:n0-g3@600+60``, ``slow:n1-g0@30+120*50``."""

import re
from typing import cast

from loadgen.simulator.faults import Incident, IncidentKind
from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig

KINDS: tuple[IncidentKind, ...] = ("crash", "stall", "partition", "slow")
SERVICES = ("router", "profiler", "forecaster", "scheduler", "switcher")
SLOW_FACTOR = 10.0
DURATION_S_MIN = 0.001
_INCIDENT = re.compile(r"(\w+):([^@]+)@([0-9.]+)\+([0-9.]+)(?:\*([0-9.]+))?")


def parse_incident(text: str, mesh: MeshConfig) -> Incident:
    """``KIND:NODE@START+SECONDS``, for ``slow`` with ``*FACTOR``; raises ConfigInvalid. A GPU that
    crashes for longer than the run lasts is lost."""
    match = _INCIDENT.fullmatch(text)
    if match is None or match[1] not in KINDS:
        raise ConfigInvalid(
            field="incident",
            value=text,
            remedy=f"write KIND:NODE@START+SECONDS with KIND one of {', '.join(KINDS)}, such as "
            "crash:n0-g3@600+60",
        )
    if match[5] and match[1] != "slow":
        raise ConfigInvalid(
            field="incident", value=text, remedy=f"only slow has a factor: leave out *{match[5]}"
        )
    gpus = [gpu.gpu_id for gpu in mesh.gpus()]
    if match[2] not in (*gpus, *SERVICES):
        raise ConfigInvalid(
            field="incident",
            value=text,
            remedy=f"{match[2]} is none of the GPUs {', '.join(gpus)} nor one of the services "
            f"{', '.join(SERVICES)}",
        )
    return Incident(
        kind=cast("IncidentKind", match[1]),
        node=match[2],
        at_s=_number(match[3], text),
        for_s=_number(match[4], text, least=DURATION_S_MIN),
        factor=_number(match[5], text, least=1.0) if match[5] else SLOW_FACTOR,
    )


def _number(digits: str, text: str, *, least: float = 0.0) -> float:
    try:
        value = float(digits)
    except ValueError:
        raise ConfigInvalid(field="incident", value=text, remedy=f"{digits} is no number") from None
    if value < least:
        raise ConfigInvalid(
            field="incident", value=text, remedy=f"use {least:g} or more in place of {digits}"
        )
    return value
