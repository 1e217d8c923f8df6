"""``oserve why``: asks a running mesh and its journal why it is as it is."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console, RenderableType

from deploy.journal import Journal, read_mesh
from deploy.status import find_mesh
from deploy.why_answers import KeptAnswer, PlanAnswer, ReplicaAnswer
from deploy.why_kept import why_not_switching
from deploy.why_plan import why_plan
from deploy.why_replica import why_replica
from deploy.why_view import kept_view, plan_view, replica_view
from loadgen.planning.plan_file import write_plan
from shared.errors import BusUnavailable, ConfigInvalid
from shared.messages.plans import PlanInForce

A = TypeVar("A", PlanAnswer, KeptAnswer, ReplicaAnswer)


class WhichMesh(msgspec.Struct, frozen=True, kw_only=True):
    """How an operator names a mesh; see ``deploy.status.find_mesh``."""

    topology: Path | None = None
    data_dir: Path | None = None
    bus_url: str = ""


def run_why_plan(which: WhichMesh, *, as_json: bool, out: Path | None) -> int:
    """Print why the plan in force is in force, and write it to ``out`` as a plan file; the exit
    code. Raises ConfigInvalid."""

    def answer(journal: Journal, in_force: PlanInForce) -> PlanAnswer:
        found = why_plan(journal, in_force)
        if out is not None:
            if not in_force.plan.replicas:
                raise ConfigInvalid(
                    field="--out", value=str(out), remedy="the plan in force has no replicas yet"
                )
            write_plan(
                in_force.plan,
                out,
                comments=(
                    f"{found.plan_id}, in force as epoch {found.epoch}: {found.plan}",
                    f"why: {found.reason}",
                ),
            )
            Console(stderr=True).print(f"wrote {out}", markup=False, highlight=False)
        return found

    return _run(which, "plan", answer, plan_view, as_json=as_json)


def run_why_not_switching(which: WhichMesh, *, as_json: bool) -> int:
    """Print why nothing moves; the exit code. Raises ConfigInvalid."""
    return _run(which, "not-switching", why_not_switching, kept_view, as_json=as_json)


def run_why_replica(which: WhichMesh, replica_id: str, *, as_json: bool) -> int:
    """Print why a replica is what it is; the exit code. Raises ConfigInvalid."""
    return _run(
        which,
        "replica",
        lambda journal, in_force: why_replica(journal, in_force, replica_id),
        replica_view,
        as_json=as_json,
        replica_id=replica_id,
    )


def _run(
    which: WhichMesh,
    question: str,
    answer: Callable[[Journal, PlanInForce], A],
    view: Callable[[A], RenderableType],
    *,
    as_json: bool,
    replica_id: str = "",
) -> int:
    console = Console(highlight=False)
    errors = Console(stderr=True, highlight=False)
    try:
        bus, url = find_mesh(
            topology=which.topology, data_dir=which.data_dir, bus_url=which.bus_url
        )
        journal = asyncio.run(read_mesh(bus, url=url, replica_id=replica_id))
    except BusUnavailable as error:
        errors.print(f"oserve why {question}: {error}", markup=False)
        return 1
    in_force = journal.status.plan
    if in_force is None:
        cause = journal.status.missing()
        errors.print(f"oserve why {question}: {cause}; see `oserve status`", markup=False)
        return 1
    found = answer(journal, in_force)
    if as_json:
        console.print(msgspec.json.encode(found).decode(), markup=False, soft_wrap=True)
    else:
        console.print(view(found))
    return 0
