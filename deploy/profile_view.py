"""What a cost profile predicts, gathered once for table, picture and JSON."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from shared.cost.estimate import Estimate, estimate
from shared.cost.library import gpu_facts, known, load_profile
from shared.cost.limits import DEFAULT_LIMITS
from shared.cost.links import reload_s
from shared.cost.memory import fits, kv_capacity_tokens, weight_bytes
from shared.cost.model import CostModel
from shared.cost.profile import ErrorBar
from shared.cost.step import PS_PER_S
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

CONTEXTS = (512, 2048, 8192, 32768)
PROMPTS = (128, 512, 2048, 8192, 32768)
STAGES_LISTED = (1, 2, 4)


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``show`` tells; times in seconds. ``steps_s[i][j]``: a step in which ``batches[i]``
    requests decode that hold ``contexts[j]`` tokens each, None where the KV cache lacks the room;
    ``prompts_s[j]``: TTFT of ``prompts[j]`` tokens on an idle replica."""

    gpu: str
    model: str
    shape: str
    nodes: int
    stages: tuple[int, ...]
    kv_tokens: int
    weight_bytes: tuple[int, ...]  # on the fullest GPU of each stage
    memory_bytes: int
    start_s: float
    reload_s: float
    price_per_hour: float
    error: ErrorBar
    source: str
    input_tokens: int
    output_tokens: int
    estimates: tuple[Estimate, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps_s: tuple[tuple[float | None, ...], ...]
    prompts: tuple[int, ...]
    prompts_s: tuple[float | None, ...]


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """KV capacity in tokens of the shapes of one model on one GPU that fit."""

    gpu: str
    model: str
    kv_tokens: dict[str, int]


def look(
    cost: CostModel, batches: Sequence[int], *, input_tokens: int, output_tokens: int
) -> Shown:
    """Everything that ``show`` tells of a replica."""
    profile = cost.profile

    def step_s(batch: int, context: int) -> float | None:
        if batch * context > cost.kv_tokens:
            return None
        return cost.step.step_ps(batch, batch * context) / PS_PER_S

    def of(batch: int, input_tokens: int, output_tokens: int) -> Estimate:
        return estimate(cost, batch=batch, input_tokens=input_tokens, output_tokens=output_tokens)

    return Shown(
        gpu=profile.gpu,
        model=profile.model,
        shape=str(cost.shape),
        nodes=cost.nodes,
        stages=cost.stages,
        kv_tokens=cost.kv_tokens,
        weight_bytes=weight_bytes(profile.model_facts, cost.shape, cost.stages),
        memory_bytes=cost.gpu.memory_bytes,
        start_s=cost.start_s,
        reload_s=reload_s(profile, cost.gpu, cost.shape, nodes=cost.nodes, stages=cost.stages),
        price_per_hour=cost.gpu.price_per_hour * cost.shape.gpus,
        error=profile.error,
        source=profile.source,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        estimates=tuple(of(batch, input_tokens, output_tokens) for batch in batches),
        batches=tuple(batches),
        contexts=CONTEXTS,
        steps_s=tuple(tuple(step_s(batch, each) for each in CONTEXTS) for batch in batches),
        prompts=PROMPTS,
        prompts_s=tuple(
            of(1, prompt, 1).ttft_s if prompt < cost.kv_tokens else None for prompt in PROMPTS
        ),
    )


def capacities(*, gpu: str = "", model: str = "", folders: Sequence[Path] = ()) -> list[Listed]:
    """The profiles whose names are as given (empty: any), each with the shapes that fit."""
    wanted = [
        (kind, name)
        for kind, name in known(folders)
        if gpu.lower() in ("", kind) and model.lower() in ("", name)
    ]
    if not wanted:
        what = " and ".join(name for name in (gpu, model) if name) or "any"
        raise ConfigInvalid(
            field="profile", value=what, remedy="there is none; `oserve profile list` shows all"
        )
    return [_listed(kind, name, folders) for kind, name in wanted]


def _listed(kind: str, name: str, folders: Sequence[Path]) -> Listed:
    profile, facts = load_profile(kind, name, folders), gpu_facts(kind, folders)
    shapes = [Parallelism(times.tp, pp) for pp in STAGES_LISTED for times in profile.times]
    return Listed(
        gpu=kind,
        model=name,
        kv_tokens={
            str(shape): kv_capacity_tokens(profile, facts, shape)
            for shape in shapes
            if fits(profile, facts, shape, tokens_min=DEFAULT_LIMITS.block_tokens)
        },
    )
