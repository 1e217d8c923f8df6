"""Where profiles are found: extra folders first, then those shipped beside this file.

A folder holds ``<gpu>/gpu.toml`` and ``<gpu>/<model>.toml``. Names are lower-case. What was read is
kept for as long as the process lives: a profile edited later is seen by the next one.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from shared.cost.files import ProfileInvalid, read_gpu, read_profile
from shared.cost.profile import GpuFacts, Profile
from shared.errors import ConfigInvalid

SHIPPED = Path(__file__).with_name("profiles")
GPU_FILE = "gpu.toml"
FILES_KEPT_MAX = 512
_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")

Folders = Sequence[Path | str]


def load_profile(gpu: str, model: str, folders: Folders = ()) -> Profile:
    """The profile of ``model`` on ``gpu``. Raises ConfigInvalid, with near names, for one that
    there is none of, and ProfileInvalid for a bad file."""
    kind, name = gpu.lower(), model.lower()
    for folder in _places(folders):
        path = folder / kind / f"{name}.toml"
        if _NAME.fullmatch(name) and path.name != GPU_FILE and path.is_file():
            return _profile_of(path)
    models = sorted({m for g, m in known(folders) if g == kind})
    if not models:
        gpu_facts(kind, folders)  # the GPU itself is unknown, and its own error says so
    raise _unknown("model", name, models, what=f"profiles on {kind}", places=_places(folders))


def gpu_facts(gpu: str, folders: Folders = ()) -> GpuFacts:
    """The facts of ``gpu``; errors as ``load_profile``."""
    kind = gpu.lower()
    for folder in _places(folders):
        path = folder / kind / GPU_FILE
        if _NAME.fullmatch(kind) and path.is_file():
            return _gpu_of(path)
    raise _unknown("gpu", kind, known_gpus(folders), what="GPUs", places=_places(folders))


def known(folders: Folders = ()) -> tuple[tuple[str, str], ...]:
    """All (gpu, model) that have a profile, sorted."""
    found = {(path.parent.name, path.stem) for path in _files(folders) if path.name != GPU_FILE}
    return tuple(sorted(found))


def known_gpus(folders: Folders = ()) -> tuple[str, ...]:
    """All GPUs whose facts are known, sorted."""
    return tuple(sorted({path.parent.name for path in _files(folders) if path.name == GPU_FILE}))


def _files(folders: Folders) -> Iterator[Path]:
    for folder in _places(folders):
        yield from folder.glob("*/*.toml")


def _places(folders: Folders) -> tuple[Path, ...]:
    for folder in folders:
        if not Path(folder).is_dir():
            remedy = "no such folder: name one that holds <gpu>/<model>.toml"
            raise ConfigInvalid(field="profiles", value=str(folder), remedy=remedy)
    return (*(Path(folder) for folder in folders), SHIPPED)


@lru_cache(maxsize=FILES_KEPT_MAX)
def _profile_of(path: Path) -> Profile:
    profile = read_profile(path)
    for field, value, should in (
        ("gpu", profile.gpu, path.parent.name),
        ("model", profile.model, path.stem),
    ):
        if value != should:
            raise _misplaced(path, field, value, should)
    return profile


@lru_cache(maxsize=FILES_KEPT_MAX)
def _gpu_of(path: Path) -> GpuFacts:
    facts = read_gpu(path)
    if facts.gpu != path.parent.name:
        raise _misplaced(path, "gpu", facts.gpu, path.parent.name)
    return facts


def _misplaced(path: Path, field: str, value: str, should: str) -> ProfileInvalid:
    lines = path.read_text(encoding="utf-8").splitlines()
    line = next((n for n, text in enumerate(lines, 1) if text.lstrip().startswith(field)), 0)
    remedy = f'the file is where "{should}" belongs: rename one of them'
    return ProfileInvalid(file=str(path), line=line, field=field, value=value, remedy=remedy)


def _unknown(
    field: str, name: str, names: Sequence[str], *, what: str, places: Sequence[Path]
) -> ConfigInvalid:
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    remedy = f"no such {field}"
    if near:
        remedy += f"; did you mean {' or '.join(near)}?"
    listed = ", ".join(names) or f"none in {', '.join(map(str, places))}"
    return ConfigInvalid(field=field, value=name, remedy=f"{remedy}; {what}: {listed}")
