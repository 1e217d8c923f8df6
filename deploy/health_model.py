"""Checks of model and engine: packages, devices, files, memory."""

import importlib.util
from pathlib import Path

import msgspec

from deploy.config import Topology
from deploy.finding import Finding, failed, ok, warned
from shared.config import Settings
from shared.models import ModelSpec

_TOKENIZER = "tokenizer.json"
_MEMORY_SHARE_MAX = 0.9  # of what is free, for weights and KV cache
_PROCESS_BYTES = 300 << 20  # torch and Python, of each worker


class _TorchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of the torch engine's settings those that matter here, with its defaults."""

    device: str = "cpu"
    kv_memory_bytes: int = 512 << 20


def _torch_settings(topology: Topology) -> _TorchSettings:
    name = "mesh.engine.torch"
    return Settings({name: topology.mesh.engine.torch}, {}).section(name, _TorchSettings)


def check_extras(topology: Topology) -> list[Finding]:
    findings: list[Finding] = []
    if topology.mesh.engine.kind == "torch":
        missing = [name for name in ("torch", "safetensors") if not _installed(name)]
        if missing:
            text = f"the torch engine needs {' and '.join(missing)}"
            remedy = "pip install 'oserve[torch]', or use mesh.engine.kind = \"modelled\""
            findings.append(failed("extras", text, remedy))
        else:
            findings.append(ok("extras", "torch is installed"))
    if not _installed("matplotlib"):
        remedy = "pip install 'oserve[report]'"
        findings.append(warned("extras", "no matplotlib: replays draw no picture", remedy))
    return findings


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_devices(topology: Topology) -> list[Finding]:
    """The topology's GPUs must exist, if the engine wants real ones."""
    if topology.mesh.engine.kind != "torch":
        return []
    if not _torch_settings(topology).device.startswith("cuda"):
        return []
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    wanted = len(topology.mesh.gpus())
    if present >= wanted:
        return [ok("GPUs", f"{present} NVIDIA devices for {wanted} workers")]
    remedy = "correct mesh.nodes, check nvidia-smi and the container's GPU access, or device = cpu"
    return [failed("GPUs", f"{present} NVIDIA devices for {wanted} workers", remedy)]


def check_models(topology: Topology) -> list[Finding]:
    """Each checkpoint folder must be there and whole."""
    models = [model for model in topology.mesh.models if model.path]
    return [finding for model in models for finding in _check_model(topology, model)]


def _check_model(topology: Topology, model: ModelSpec) -> list[Finding]:
    folder = Path(model.path)
    if not (folder / "config.json").exists():
        if topology.up.make_model:
            return [ok("model", f"{folder} will be made by the first `oserve up`")]
        remedy = f"correct the path of model {model.model_id}, or try `oserve make-model DIR`"
        return [failed("model", f"{folder} holds no config.json", remedy)]
    problems = [text for text in (_unreadable(folder), _without_weights(folder)) if text]
    if problems:
        remedy = "copy the whole checkpoint: config.json, *.safetensors, tokenizer.json"
        return [failed("model", f"{folder}: {text}", remedy) for text in problems]
    return [ok("model", f"{folder}: {weight_bytes(folder) / 2**20:.1f} MiB of weights")]


def check_wishes(topology: Topology) -> list[Finding]:
    """A model without a replica is listed to clients, and answers none of them."""
    mesh = topology.mesh
    wished = {mesh.model_of(wish.model_id).model_id for wish in mesh.replicas}
    remedy = "add [[mesh.replicas]] with its model_id, unless the scheduler's policy adds replicas"
    return [
        warned("replicas", f"no [[mesh.replicas]] serves model {model_id}", remedy)
        for model_id in mesh.model_ids
        if model_id not in wished
    ]


def _unreadable(folder: Path) -> str:
    for name in ("config.json", _TOKENIZER):
        try:
            msgspec.json.decode((folder / name).read_bytes())
        except OSError as error:
            return f"{name}: {error.strerror}"
        except msgspec.DecodeError as error:
            return f"{name} is not JSON: {error}"
    return ""


def _without_weights(folder: Path) -> str:
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        return "no *.safetensors file"
    empty = [path.name for path in weights if path.stat().st_size == 0]
    return f"{empty[0]} is empty" if empty else ""


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_memory(topology: Topology) -> list[Finding]:
    """Every replica on this machine loads its own copy beside its own KV cache."""
    mesh = topology.mesh
    free = free_memory_bytes()
    if mesh.engine.kind != "torch" or free is None:
        return []
    settings = _torch_settings(topology)
    if settings.device != "cpu":
        return []
    beside = settings.kv_memory_bytes + _PROCESS_BYTES
    weights = {model.model_id: weight_bytes(Path(model.path)) for model in mesh.models}
    copies = [mesh.model_of(wish.model_id).model_id for wish in mesh.replicas]
    needed = sum(weights[model_id] + beside for model_id in copies)
    text = f"{needed / 2**30:.1f} GiB for {len(copies)} replicas, {free / 2**30:.1f} GiB free"
    if needed <= _MEMORY_SHARE_MAX * free:
        return [ok("memory", text)]
    remedy = "use fewer replicas, a smaller mesh.engine.torch.kv_memory_bytes, or a smaller model"
    return [failed("memory", text, remedy)]


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still get: the machine's free memory, or less in a container."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return free
    return min(free, max(0, limit - used))
