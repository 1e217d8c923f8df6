"""``python -m services.worker.measure --engine torch --model FOLDER --out FOLDER``."""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from services.worker.measure.assess import table
from services.worker.measure.machine import disk_link, memory_link, socket_link
from services.worker.measure.result import (
    Destination,
    Machine,
    gpu_facts,
    measured_profile,
    write,
)
from services.worker.measure.scenarios import scenarios
from services.worker.measure.sweep import sweep
from services.worker.measure.target import OPENERS, WEIGHT_FILES, check_asked, open_target
from shared.cost.profile import Link
from shared.errors import ConfigInvalid, OServeError

SECONDS_MIN = 1.0
EXIT_CONFIG, EXIT_FAILED = 78, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status; errors that name their remedy go to stderr without a stack."""
    try:
        measure(_parser().parse_args(arguments))
    except OServeError as error:
        print(f"oserve profile measure: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ConfigInvalid) else EXIT_FAILED
    return 0


def measure(asked: argparse.Namespace) -> None:
    folder: Path = asked.model
    destination = Destination(asked.out, asked.gpu_name, asked.model_name or _name_of(folder))
    destination.check(overwrite=asked.overwrite)
    if asked.seconds < SECONDS_MIN:
        raise ConfigInvalid(
            field="--seconds", value=asked.seconds, remedy=f"use {SECONDS_MIN:g} or more"
        )
    if not 0 <= asked.quantile <= 1:
        raise ConfigInvalid(
            field="--quantile", value=asked.quantile, remedy="use a number from 0 to 1"
        )
    settings = _pairs(asked.set or [])
    check_asked(asked.engine, folder)
    machine = Machine(
        memory=_said("copy in memory", memory_link()),
        socket=_said("local socket", socket_link()),
        disk=_said("checkpoint from disk", disk_link(sorted(folder.glob(WEIGHT_FILES)))),
        gpus_per_node=asked.gpus_per_node,
        price_per_hour=asked.price_per_hour,
    )
    target = open_target(asked.engine, folder, settings)
    _say(f"{target.name}: started in {target.start_s:.1f} s, {target.kv_blocks} KV blocks")
    gc.collect()
    gc.freeze()  # as services do: collections must not fall into some steps and not into others
    try:
        chosen = scenarios(target)
        _say(f"{len(chosen)} scenarios, about {asked.seconds:g} s")
        found = sweep(target, chosen, seconds=asked.seconds, quantile=asked.quantile, say=_say)
    finally:
        target.engine.close()
    gpu = gpu_facts(target, machine, destination.gpu)
    profile, judged = measured_profile(target, found, chosen, gpu, destination.model)
    print(table(judged))
    print(f"\nheld out: {profile.error.basis}")
    write(destination, profile, gpu)
    print(f"written: {destination.profile} and {destination.facts}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oserve profile measure",
        description="Sweep an engine on this machine, and write its cost profile.",
        epilog="`oserve profile measure --python INTERPRETER` runs it in another environment, such "
        "as one that has vLLM.",
    )
    parser.add_argument("--engine", required=True, help=f"one of {', '.join(OPENERS)}")
    parser.add_argument("--model", required=True, type=Path, help="folder of a checkpoint")
    parser.add_argument("--out", type=Path, default=Path(".oserve/profiles"), help="folder")
    parser.add_argument("--gpu-name", default="cpu", help="kind of GPU, as topologies name it")
    parser.add_argument("--model-name", default="", help="[default: the checkpoint folder's name]")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the sweep")
    parser.add_argument(
        "--quantile", type=float, default=0.5, help="of a step's times; lower on a busy machine"
    )
    parser.add_argument("--set", action="append", metavar="SETTING=VALUE", help="of the engine")
    parser.add_argument("--gpus-per-node", type=int, default=1)
    parser.add_argument("--price-per-hour", type=float, default=0.0, help="US dollars")
    parser.add_argument("--overwrite", action="store_true")
    return parser


def _name_of(folder: Path) -> str:
    return folder.resolve().name.lower()


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigInvalid(field="--set", value=text, remedy="write SETTING=VALUE")
        pairs[name] = value
    return pairs


def _said(what: str, link: Link) -> Link:
    _say(f"{what}: {link.bytes_per_s / 1e9:.2f} GB/s, {link.latency_s * 1e6:.1f} us")
    return link


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
