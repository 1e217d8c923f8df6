"""``oserve profile show`` and ``list``: what the cost model says of a model on a GPU in a shape."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from deploy.profile_picture import draw_profile
from deploy.profile_table import capacities_table, profile_tables
from deploy.profile_view import capacities, look
from loadgen.picture import check_picture
from shared.cost.library import gpu_facts
from shared.cost.model import cost_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS_MAX = 10_000_000
BATCH_MAX = 100_000


def run_show(  # noqa: PLR0913  # the command's options
    *,
    gpu: str,
    model: str,
    shape: str,
    batch: str,
    input_tokens: int,
    output_tokens: int,
    nodes: int | None,
    stages: str,
    folders: Sequence[Path],
    picture: Path | None,
    as_json: bool,
) -> int:
    """Print the figures; returns the exit code. Raises ConfigInvalid."""
    if picture is not None:
        check_picture(picture)
    parallelism = Parallelism.parse(shape)
    cost = cost_model(
        gpu,
        model,
        parallelism,
        nodes=nodes or -(-parallelism.gpus // gpu_facts(gpu, folders).gpus_per_node),
        stages=_numbers("stages", stages, at_most=TOKENS_MAX),
        folders=folders,
    )
    for field, tokens in (("input", input_tokens), ("output", output_tokens)):
        if not 1 <= tokens <= TOKENS_MAX:
            raise ConfigInvalid(field=field, value=tokens, remedy=f"use 1 to {TOKENS_MAX} tokens")
    batches = _numbers("batch", batch, at_most=BATCH_MAX) or BATCHES
    shown = look(cost, batches, input_tokens=input_tokens, output_tokens=output_tokens)
    console = Console()
    if as_json:
        text = msgspec.json.encode(shown).decode()
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(profile_tables(shown))
    if picture is not None:
        draw_profile(shown, picture)
        if not as_json:
            console.print(f"Picture: {picture}", markup=False, highlight=False)
    return 0


def run_list(*, gpu: str, model: str, folders: Sequence[Path], as_json: bool) -> int:
    """Print every profile's capacities; returns the exit code. Raises ConfigInvalid."""
    rows = capacities(gpu=gpu, model=model, folders=folders)
    console = Console()
    if as_json:
        text = msgspec.json.encode(rows).decode()
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(capacities_table(rows))
    return 0


def _numbers(field: str, text: str, *, at_most: int) -> tuple[int, ...]:
    """``1,8,32``; empty: none."""
    if not text.strip():
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= at_most for part in parts):
        remedy = f"give whole numbers from 1 to {at_most}, as in 1,8,32"
        raise ConfigInvalid(field=field, value=text, remedy=remedy)
    return tuple(int(part) for part in parts)
