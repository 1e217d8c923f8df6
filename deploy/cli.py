"""The ``oserve`` command. Each command imports what it needs, so that help is instant."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli_options import (
    AsJson,
    Overrides,
    SomeBus,
    SomeDataDir,
    SomeTopology,
    TopologyOption,
)
from deploy.cli_why import adopt, release, switch, why_app
from shared.errors import BusUnavailable, ConfigInvalid, OServeError

EXIT_CONFIG, EXIT_UNAVAILABLE, EXIT_FAILED = 78, 69, 1
DEFAULT_TOPOLOGY = Path(__file__).with_name("topologies") / "laptop.toml"

app = typer.Typer(
    name="oserve",
    help="Serve large language models on unlike replicas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
keys_app = typer.Typer(help="API keys for the ingress.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
profile_app = typer.Typer(help="How fast models run on GPUs, in shapes.", no_args_is_help=True)
app.add_typer(profile_app, name="profile")
app.add_typer(why_app, name="why")

PASS_THROUGH: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # --help is the command's own
}


@app.command()
def up(
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    port: Annotated[
        int | None, typer.Option(help="HTTP port; 0 for any free one. [default: the file's]")
    ] = None,
    override: Overrides = None,
    log_dir: Annotated[Path | None, typer.Option(help="[default: <data dir>/logs]")] = None,
) -> None:
    """Run the whole mesh on this machine until Ctrl-C."""
    from deploy.up import run_up  # noqa: PLC0415

    raise typer.Exit(run_up(topology, overrides=override or (), port=port, log_dir=log_dir))


@app.command()
def status(
    topology: SomeTopology = None,
    data_dir: SomeDataDir = None,
    bus_url: SomeBus = "",
    as_json: AsJson = False,
) -> None:
    """Show services, GPUs, replicas, load, and the plan in force."""
    from deploy.status import run_status  # noqa: PLC0415

    code = run_status(topology=topology, data_dir=data_dir, bus_url=bus_url, as_json=as_json)
    raise typer.Exit(code)


app.command()(adopt)
app.command()(switch)
app.command()(release)


@app.command()
def doctor(
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    override: Overrides = None,
) -> None:
    """Check what usually goes wrong, and say what to do."""
    from deploy.doctor import run_doctor  # noqa: PLC0415

    raise typer.Exit(run_doctor(topology, override or ()))


@app.command(context_settings=PASS_THROUGH)
def replay(context: typer.Context) -> None:
    """Send a trace to a mesh, and report what it felt like."""
    from loadgen.replay import replay as command  # noqa: PLC0415

    _run_tool(command, context, "oserve replay")


@app.command(context_settings=PASS_THROUGH)
def simulate(context: typer.Context) -> None:
    """Run a trace through a simulated mesh: what would happen, without a GPU."""
    from loadgen.simulator.cli import simulate as command  # noqa: PLC0415

    _run_tool(command, context, "oserve simulate")


@app.command(context_settings=PASS_THROUGH)
def compare(context: typer.Context) -> None:
    """Compare policies on the same trace in simulated meshes."""
    from loadgen.compare.cli import compare as command  # noqa: PLC0415

    _run_tool(command, context, "oserve compare")


@app.command(context_settings=PASS_THROUGH)
def plan(context: typer.Context) -> None:
    """Plan replicas and routing for a demand, and say why: no mesh, no GPU."""
    from loadgen.planning.cli import plan as command  # noqa: PLC0415

    _run_tool(command, context, "oserve plan")


ProfileFolders = Annotated[
    list[Path] | None,
    typer.Option("--profiles", help="Look for <gpu>/<model>.toml here first; repeatable."),
]


@profile_app.command("show")
def show_profile(  # noqa: PLR0913, PLR0917  # its options
    gpu: Annotated[str, typer.Option(help="As `oserve profile list` names it.")],
    model: Annotated[str, typer.Option(help="Likewise.")],
    shape: Annotated[str, typer.Option(help="tp4, tp2pp2, ...")] = "tp1",
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="[default: 1,2,4,...,256]")] = "",
    input_tokens: Annotated[int, typer.Option("--input", help="Tokens of prompt.")] = 1000,
    output_tokens: Annotated[int, typer.Option("--output", help="Tokens of output.")] = 200,
    nodes: Annotated[
        int | None, typer.Option(help="Nodes it spans. [default: as few as hold its GPUs]", min=1)
    ] = None,
    stages: Annotated[
        str, typer.Option(metavar="N,N,...", help="Layers of each stage. [default: even]")
    ] = "",
    profiles: ProfileFolders = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it: FILE.png or FILE.svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict TTFT, ITL, throughput and KV capacity of a model on a GPU in a shape."""
    from deploy.profile import run_show  # noqa: PLC0415

    code = run_show(
        gpu=gpu,
        model=model,
        shape=shape,
        batch=batch,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        nodes=nodes,
        stages=stages,
        folders=profiles or (),
        picture=picture,
        as_json=as_json,
    )
    raise typer.Exit(code)


@profile_app.command("list")
def list_profiles(
    gpu: Annotated[str, typer.Option(help="Only this one.")] = "",
    model: Annotated[str, typer.Option(help="Only this one.")] = "",
    profiles: ProfileFolders = None,
    as_json: AsJson = False,
) -> None:
    """List GPUs and models with a profile, and the KV capacity of the shapes that fit."""
    from deploy.profile import run_list  # noqa: PLC0415

    code = run_list(gpu=gpu, model=model, folders=profiles or (), as_json=as_json)
    raise typer.Exit(code)


@profile_app.command(context_settings=PASS_THROUGH)
def measure(
    context: typer.Context,
    python: Annotated[str, typer.Option(help="Interpreter that has the engine.")] = "",
) -> None:
    """Sweep a real engine on this machine, and write its cost profile."""
    from deploy.measure import run_measure  # noqa: PLC0415

    raise typer.Exit(run_measure(context.args, python=python))


@app.command()
def fit(
    model: Annotated[
        Path | None, typer.Option(help="Folder with a config.json. [default: all shipped models]")
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="Repeatable. [default: all]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of profiles to write to.")] = Path("profiles"),
    tables: Annotated[Path | None, typer.Option(help="Measured operator tables.")] = None,
    name: Annotated[str, typer.Option(help="Of the profile. [default: the folder's]")] = "",
) -> None:
    """Make the cost profiles of a model from measured operator tables, without a GPU."""
    from deploy.fit import fit as run  # noqa: PLC0415

    raise typer.Exit(run(model=model, gpus=gpu or (), out=out, tables=tables, name=name))


@profile_app.command("validate")
def validate_profiles(
    tables: Annotated[Path | None, typer.Option(help="Measured tables.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the shipped profiles with measurements that they were not fitted to."""
    from deploy.fit import validate  # noqa: PLC0415

    raise typer.Exit(validate(tables=tables, as_json=as_json))


@app.command("make-model")
def make_model(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    size: Annotated[str, typer.Option(help="tiny or small.")] = "tiny",
) -> None:
    """Write a small checkpoint with random weights."""
    import asyncio  # noqa: PLC0415

    from deploy.model import make_model as make  # noqa: PLC0415

    asyncio.run(make(folder, size))
    typer.echo(f"{folder}: a {size} model; serve it with mesh.model.path = {str(folder)!r}")


@keys_app.command("new")
def new_key(
    tenant: Annotated[str, typer.Option(help="Whom the key is for.")],
    slo_class: Annotated[
        str, typer.Option("--class", help="interactive, standard or batch.")
    ] = "standard",
    key_id: Annotated[str, typer.Option("--id", help="Name in logs. [default: made up]")] = "",
    requests_per_s: Annotated[
        float | None, typer.Option(help="Rate limit. [default: none]", min=0.001)
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Prompt and output asked for. [default: no limit]", min=1)
    ] = None,
) -> None:
    """Make an API key: the key on stderr, its keys file entry on stdout."""
    from deploy.keys import new_key as make  # noqa: PLC0415

    key = make(
        tenant=tenant,
        slo_class=slo_class,
        key_id=key_id,
        requests_per_s=requests_per_s,
        tokens_per_minute=tokens_per_minute,
    )
    typer.echo(f"{key.text}   (shown only now: give it to the client)", err=True)
    typer.echo(key.entry)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(metadata.version("oserve"))


def _run_tool(command: Callable[..., None], context: typer.Context, name: str) -> None:
    tool = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    tool.command()(command)
    tool(args=context.args, prog_name=name)


def main() -> None:
    """Entry point: errors that name their remedy need no stack."""
    try:
        app()
    except OServeError as error:
        typer.echo(f"oserve: {error}", err=True)
        sys.exit(_exit_code(error))


def _exit_code(error: OServeError) -> int:
    if isinstance(error, ConfigInvalid):
        return EXIT_CONFIG
    return EXIT_UNAVAILABLE if isinstance(error, BusUnavailable) else EXIT_FAILED


if __name__ == "__main__":
    main()
