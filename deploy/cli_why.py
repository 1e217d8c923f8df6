"""``oserve why``, ``adopt``, ``switch``, ``release``: why a mesh is as it is, and a word in it."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli_options import AsJson, SomeBus, SomeDataDir, SomeTopology

why_app = typer.Typer(
    help="Why a running mesh is as it is, from its journal.", no_args_is_help=True
)


@why_app.command("plan")
def why_plan(
    topology: SomeTopology = None,
    data_dir: SomeDataDir = None,
    bus_url: SomeBus = "",
    out: Annotated[
        Path | None, typer.Option(help="Write the plan in force here, to edit and adopt.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Why the plan in force was chosen, and predicted against actual."""
    from deploy.why import WhichMesh, run_why_plan  # noqa: PLC0415

    which = WhichMesh(topology=topology, data_dir=data_dir, bus_url=bus_url)
    raise typer.Exit(run_why_plan(which, as_json=as_json, out=out))


@why_app.command("not-switching")
def why_not_switching(
    topology: SomeTopology = None,
    data_dir: SomeDataDir = None,
    bus_url: SomeBus = "",
    as_json: AsJson = False,
) -> None:
    """Why nothing moves, and what would have to change."""
    from deploy.why import WhichMesh, run_why_not_switching  # noqa: PLC0415

    which = WhichMesh(topology=topology, data_dir=data_dir, bus_url=bus_url)
    raise typer.Exit(run_why_not_switching(which, as_json=as_json))


@why_app.command("replica")
def why_replica(
    replica_id: Annotated[str, typer.Argument(help="As `oserve status` names it.")],
    topology: SomeTopology = None,
    data_dir: SomeDataDir = None,
    bus_url: SomeBus = "",
    as_json: AsJson = False,
) -> None:
    """Why a replica has its shape and share, its load, and what befell it."""
    from deploy.why import WhichMesh, run_why_replica  # noqa: PLC0415

    which = WhichMesh(topology=topology, data_dir=data_dir, bus_url=bus_url)
    raise typer.Exit(run_why_replica(which, replica_id, as_json=as_json))


def adopt(
    file: Annotated[Path, typer.Argument(help="A plan file, as `oserve why plan --out` writes.")],
    topology: SomeTopology = None,
    data_dir: SomeDataDir = None,
    bus_url: SomeBus = "",
    wait_s: Annotated[
        float, typer.Option("--wait", help="Seconds until it must be in force; 0: do not wait.")
    ] = 300.0,
) -> None:
    """Put a plan into force and keep to it until `oserve release`."""
    from deploy.adopt import run_adopt  # noqa: PLC0415
    from deploy.why import WhichMesh  # noqa: PLC0415

    which = WhichMesh(topology=topology, data_dir=data_dir, bus_url=bus_url)
    raise typer.Exit(run_adopt(file, which, wait_s=wait_s))


def switch(  # noqa: PLR0913, PLR0917  # its options
    to: Annotated[
        str, typer.Option(help='Shapes, such as "tp2*1" or "tp2pp1*1,tp1*2", or a plan file.')
    ],
    model: Annotated[
        str, typer.Option(help="Whose replicas; the others' stay. [default: the only one]")
    ] = "",
    topology: SomeTopology = None,
    data_dir: SomeDataDir = None,
    bus_url: SomeBus = "",
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds until it must have ended; else exit 124.")
    ] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Change the shapes of replicas while they serve, and say what that took."""
    from deploy.switch import run_switch  # noqa: PLC0415
    from deploy.why import WhichMesh  # noqa: PLC0415

    which = WhichMesh(topology=topology, data_dir=data_dir, bus_url=bus_url)
    code = run_switch(to, which, model_id=model, timeout_s=timeout_s, as_json=as_json)
    raise typer.Exit(code)


def release(
    topology: SomeTopology = None, data_dir: SomeDataDir = None, bus_url: SomeBus = ""
) -> None:
    """Let the scheduler plan again after `oserve adopt` or `oserve switch`."""
    from deploy.adopt import run_release  # noqa: PLC0415
    from deploy.why import WhichMesh  # noqa: PLC0415

    raise typer.Exit(run_release(WhichMesh(topology=topology, data_dir=data_dir, bus_url=bus_url)))
