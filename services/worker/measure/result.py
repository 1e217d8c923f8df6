"""From a sweep to the two files of a profile: the model's step times, and the machine's facts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.worker.measure.assess import Judged, error_bar, judge, split
from services.worker.measure.fit import fit
from services.worker.measure.sweep import Scenario, Sweep
from services.worker.measure.target import Target
from shared.cost.files import write_gpu, write_profile
from shared.cost.library import GPU_FILE
from shared.cost.memory import kv_bytes_per_token, weight_bytes
from shared.cost.profile import FORMAT, ErrorBar, GpuFacts, Link, Overheads, Profile
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the two files go; both are checked before anything is measured."""

    folder: Path
    gpu: str
    model: str

    @property
    def profile(self) -> Path:
        return self.folder / self.gpu / f"{self.model}.toml"

    @property
    def facts(self) -> Path:
        return self.folder / self.gpu / GPU_FILE

    def check(self, *, overwrite: bool) -> None:
        """Raises ConfigInvalid for names that no profile can have, and for files that are there."""
        for option, name in (("--gpu-name", self.gpu), ("--model-name", self.model)):
            if not _NAME.fullmatch(name) or f"{name}.toml" == GPU_FILE:
                raise ConfigInvalid(
                    field=option,
                    value=name,
                    remedy='use lower-case letters, digits, "-", "_" and ".", and not "gpu"',
                )
        for path in (self.profile, self.facts):
            if path.exists() and not overwrite:
                raise ConfigInvalid(
                    field="--out",
                    value=str(path),
                    remedy="is there already: give --overwrite to replace both files, or another "
                    "--gpu-name (the facts of a kind of GPU hold the KV memory of one model)",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Links as measured, and what cannot be: the price, US dollars per hour."""

    memory: Link
    socket: Link
    disk: Link
    gpus_per_node: int
    price_per_hour: float


def gpu_facts(target: Target, machine: Machine, name: str) -> GpuFacts:
    """The memory is that of the weights and of the KV blocks that the engine has, all of it usable,
    so that the cost model finds as many blocks as there are."""
    facts = target.facts
    kv_bytes = target.kv_tokens * kv_bytes_per_token(facts, 1, facts.layers)
    return GpuFacts(
        gpu=name,
        memory_bytes=sum(weight_bytes(facts, Parallelism())) + kv_bytes,
        usable=1.0,
        reserved_bytes=0,
        gpus_per_node=machine.gpus_per_node,
        price_per_hour=machine.price_per_hour,
        local=machine.memory,
        peer=machine.memory,
        host=machine.memory,
        network=machine.socket,
        disk=machine.disk,
        engine_start_s=round(target.start_s, 3),
        source="oserve profile measure; local, peer and host are copies in memory, network a local "
        "socket, memory_bytes weights and the engine's KV blocks, engine_start_s with imports and "
        "weights from the page cache",
    )


def measured_profile(
    target: Target, found: Sweep, scenarios: Sequence[Scenario], gpu: GpuFacts, model: str
) -> tuple[Profile, list[Judged]]:
    """The profile fitted to the sweep, and every row with what it predicts; raises SweepFailed for
    too few rows."""
    fitted, held_out = split(found.rows, scenarios)
    nothing_yet = ErrorBar(step_median=0.0, step_p90=0.0, ttft_p90=0.0, itl_p90=0.0)
    profile = Profile(
        format=FORMAT,
        gpu=gpu.gpu,
        model=model,
        model_facts=target.facts,
        times=(fit(fitted, target.facts.layers),),
        overheads=Overheads(step_us=0.0, request_us=0.0),
        error=nothing_yet,
        source=f"oserve profile measure of {target.name}; {found.quantile:g} quantiles of "
        f"{found.rounds} interleaved rounds in {found.seconds:.0f} s, waits for a CPU taken off; "
        f"steps of at most {target.batch_tokens_max} tokens",
    )
    judged = judge(profile, gpu, fitted, held_out)
    return msgspec.structs.replace(profile, error=error_bar(judged, scenarios)), judged


def write(destination: Destination, profile: Profile, gpu: GpuFacts) -> None:
    """The profile last, so that where it is, its GPU's facts are."""
    write_gpu(destination.facts, gpu)
    write_profile(destination.profile, profile)
