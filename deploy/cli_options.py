"""Options that several commands of ``oserve`` share."""

from pathlib import Path
from typing import Annotated

import typer

TopologyOption = Annotated[
    Path,
    typer.Option(
        *("--topology", "-t"),
        help="The mesh: model, nodes, replicas (TOML).",
        show_default="deploy/topologies/laptop.toml",
    ),
]
SomeTopology = Annotated[
    Path | None, typer.Option("--topology", "-t", help="Look for the mesh of this file.")
]
SomeDataDir = Annotated[Path | None, typer.Option(help="The mesh of this data folder.")]
SomeBus = Annotated[str, typer.Option(help="The mesh on this broker.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
]
