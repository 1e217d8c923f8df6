"""``python -m services.profiler fit`` and ``validate``."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from services.profiler.fit.build import (
    FP8_BYTES,
    Fitted,
    Tables,
    engine_overheads,
    fit_all,
    fit_profile,
)
from services.profiler.fit.checkpoint import read_model
from services.profiler.fit.csv_source import CsvSource
from services.profiler.fit.error_bars import with_error_bars
from services.profiler.fit.gpus import A100, H100, KINDS, GpuKind
from services.profiler.fit.installed_source import InstalledSource
from services.profiler.fit.validation.compared import Accuracy
from services.profiler.fit.validation.report import (
    engine_accuracy,
    missing,
    operator_accuracy,
    table,
)
from shared.cost.files import write_gpu, write_profile
from shared.cost.library import GPU_FILE, gpu_facts, known, load_profile
from shared.cost.profile import ModelFacts, Profile
from shared.errors import ConfigInvalid, OServeError

COMMANDS = ("fit", "validate")
EXIT_CONFIG, EXIT_FAILED = 78, 1
JUDGES = (A100, H100)
"""GPUs on which engines were measured: every error bar has something of them."""
TABLES_HELP = "folder of measured tables [default: those of the extra `profile`]"


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """What ``validate --json`` prints."""

    rows: list[Accuracy]
    missing: list[str]


def run(arguments: Sequence[str]) -> int:
    """Exit status; errors go to stderr."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "validate":
            _validate(options)
        elif options.model is None:
            _fit_shipped(options)
        else:
            _fit_model(options)
    except OServeError as error:
        sys.stderr.write(f"oserve: {error}\n")
        return EXIT_CONFIG if isinstance(error, ConfigInvalid) else EXIT_FAILED
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m services.profiler", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="make cost profiles", allow_abbrev=False)
    fit.add_argument("--tables", type=Path, help=TABLES_HELP)
    fit.add_argument("--out", type=Path, default=Path("profiles"), help="folder of profiles")
    fit.add_argument(
        "--gpu", action="append", choices=sorted(KINDS), help="repeatable; default all"
    )
    fit.add_argument("--model", type=Path, help="folder with a config.json; default: all shipped")
    fit.add_argument("--name", help="of its profile; default: that of the folder")
    validate = commands.add_parser("validate", help="how far off they are", allow_abbrev=False)
    validate.add_argument("--tables", type=Path, help=TABLES_HELP)
    validate.add_argument("--json", action="store_true")
    return parser


def _tables(options: Namespace) -> Tables:
    folder: Path | None = options.tables
    return Tables(InstalledSource() if folder is None else CsvSource(folder), folder)


def _kinds(options: Namespace) -> list[GpuKind]:
    return [KINDS[name] for name in options.gpu or sorted(KINDS)]


def _fit_shipped(options: Namespace) -> None:
    """All of the wanted GPUs; overheads and bars need others beside them."""
    tables, kinds = _tables(options), _kinds(options)
    fitted = fit_all(tables, {*kinds, *JUDGES})
    wanted = {key for key in fitted.profiles if KINDS[key[0]] in kinds}
    for kind in kinds:
        write_gpu(options.out / kind.name / GPU_FILE, fitted.gpus[kind.name])
    _write(options.out, with_error_bars(tables, fitted, wanted))


def _fit_model(options: Namespace) -> None:
    """Profiles of one local model; the GPU's facts where the folder would lack them."""
    facts, notes = read_model(options.model)
    name = (options.name or options.model.resolve().name).lower()
    for note in notes:
        sys.stderr.write(f"oserve: {options.model}: {note}\n")
    kinds = _able(_kinds(options), facts, options)
    tables = _tables(options)
    fitted = fit_all(tables, {*kinds, *JUDGES})
    overheads = engine_overheads(tables)
    own = {(kind.name, name): fit_profile(tables, kind, name, facts, overheads) for kind in kinds}
    both = Fitted({**fitted.profiles, **own}, fitted.gpus)
    for kind in kinds:
        place = options.out / kind.name / GPU_FILE
        if not place.is_file():
            write_gpu(place, fitted.gpus[kind.name])
    _write(options.out, with_error_bars(tables, both, own.keys()))


def _able(kinds: Sequence[GpuKind], facts: ModelFacts, options: Namespace) -> list[GpuKind]:
    """Those that compute at the model's precision; one that was asked for by name must."""
    able = [kind for kind in kinds if kind.fp8 or facts.weight_bytes != FP8_BYTES]
    for kind in kinds:
        if kind not in able:
            remedy = f"{options.model} has 8-bit weights, and {kind.name} does not compute in fp8"
            if options.gpu:
                raise ConfigInvalid(field="--gpu", value=kind.name, remedy=remedy)
            sys.stderr.write(f"oserve: {kind.name} is left out: {remedy}\n")
    return able


def _write(out: Path, profiles: Iterable[Profile]) -> None:
    for profile in profiles:
        path = out / profile.gpu / f"{profile.model}.toml"
        write_profile(path, profile)
        bar = profile.error
        tps = ", ".join(f"tp{times.tp}" for times in profile.times)
        print(  # noqa: T201  # a command
            f"{path}: {tps}; steps held out: median {bar.step_median:.1%}, p90 {bar.step_p90:.1%}; "
            f"ITL p90 {bar.itl_p90:.1%}, TTFT p90 {bar.ttft_p90:.1%}; "
            f"overheads {profile.overheads.step_us:g} us a step, "
            f"{profile.overheads.request_us:g} us a request"
        )


def shipped() -> Fitted:
    """The profiles beside ``shared/cost``, of the GPUs that fits know."""
    pairs = [(gpu, model) for gpu, model in known() if gpu in KINDS]
    return Fitted(
        {pair: load_profile(*pair) for pair in pairs},
        {gpu: gpu_facts(gpu) for gpu in sorted({gpu for gpu, _ in pairs})},
    )


def _validate(options: Namespace) -> None:
    tables, judged = _tables(options), shipped()
    rows = [*operator_accuracy(tables, judged), *engine_accuracy(tables, judged)]
    left_out = missing(tables)
    if options.json:
        found = Validation(rows=rows, missing=list(left_out))
        print(msgspec.json.format(msgspec.json.encode(found)).decode())  # noqa: T201
        return
    print(table(rows))  # noqa: T201
    for words in left_out:
        print(f"not compared: {words}")  # noqa: T201
