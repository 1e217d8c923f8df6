"""Plan files: deployment plans as TOML that a person can read and edit.

    [[replicas]]
    id = "big"
    model = "llama-2-70b"
    shape = "tp4"
    gpus = ["n0-g0", "n0-g1", "n0-g2", "n0-g3"]

    [weights."*"]
    big = 1.0

Replicas and weights come back as they went out, to the last bit, and with them the plan's id, which
is a digest of both. The reason does not: whoever edits a plan has one of his own. Shapes are read
as the scheduler writes them (``tp4`` is ``tp4pp1``), so that a replica in force is recognised.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from loadgen.planning.toml_file import invalid, read_toml, write_text
from services.scheduler.plan_id import make_plan
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.ids import checked_id
from shared.messages.plans import DeploymentPlan, ReplicaSpec

SUM_ERROR_MAX = 1e-9  # of a row of weights, as the scheduler's own check has it
LINE_LENGTH = 100
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ABOUT = (
    "`oserve adopt FILE` puts this plan into force; edit it as you like. GPUs are in the order of",
    "ranks: those of a tensor-parallel group are neighbours, on one node. A table of weights says",
    "what share of the requests of a type each replica gets, and sums to 1, whatever the models;",
    '"*" holds for types without a table. Without any, the replicas of a model get equal shares.',
)


class _Replica(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    model: str
    shape: str
    gpus: tuple[str, ...]


class _PlanFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    replicas: tuple[_Replica, ...]
    weights: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict[str, dict[str, Any]])


def write_plan(plan: DeploymentPlan, path: Path, *, comments: Iterable[str] = ()) -> None:
    """Write ``plan`` to ``path``, over what is there, ``comments`` on top. Raises ConfigInvalid
    where it cannot be written."""
    write_text(path, dump_plan(plan, comments=comments))


def dump_plan(plan: DeploymentPlan, *, comments: Iterable[str] = ()) -> str:
    """The text of the file: equal plans and comments give equal text."""
    out = [_comment(line) for text in comments for line in (text.splitlines() or [""])]
    out += ["#"] if out and out[-1] != "#" else []
    out += [_comment(line) for line in _ABOUT]
    for spec in sorted(plan.replicas, key=lambda spec: spec.replica_id):
        out += [
            "",
            "[[replicas]]",
            f"id = {_quoted(spec.replica_id)}",
            f"model = {_quoted(spec.model_id)}",
            f"shape = {_quoted(str(Parallelism.parse(spec.parallelism)).removesuffix('pp1'))}",
            *_gpus(spec.gpus),
        ]
    for name, row in sorted(plan.weights.items()):
        out += ["", f"[weights.{_key(name)}]"]
        out += [f"{_key(replica_id)} = {share!r}" for replica_id, share in sorted(row.items())]
    return "\n".join(out) + "\n"


def read_plan(path: Path) -> DeploymentPlan:
    """The plan in ``path``. Raises ConfigInvalid, with file, line and remedy, for what cannot be
    read, unknown keys, ids or GPUs used twice, GPUs that are more or fewer than the shape's, and
    weights that name unknown replicas or do not sum to 1. Whether a mesh has these models and GPUs
    is for its scheduler to say."""
    file = read_toml(path, _PlanFile)
    if not file.replicas:
        raise invalid(path, "replicas", (), "name at least one under [[replicas]]")
    replicas = _replicas(path, file.replicas)
    known = {spec.replica_id for spec in replicas}
    rows = {name: _row(path, name, row, known) for name, row in file.weights.items()}
    return make_plan(replicas, rows, reason=f"read from {path.name}")


def _replicas(path: Path, entries: Iterable[_Replica]) -> tuple[ReplicaSpec, ...]:
    owners: dict[str, str] = {}
    seen: set[str] = set()
    found: list[ReplicaSpec] = []
    for index, entry in enumerate(entries):
        at = f"replicas[{index}]"
        if entry.id in seen:
            raise invalid(path, f"{at}.id", entry.id, "give each replica its own id")
        seen.add(entry.id)
        try:
            checked_id(f"{at}.id", entry.id)
            shape = Parallelism.parse(entry.shape)
        except ConfigInvalid as error:
            field = f"{at}.shape" if error.field == "parallelism" else error.field
            raise invalid(path, field, error.value, error.remedy) from None
        if not entry.model:
            raise invalid(path, f"{at}.model", entry.model, "name the model that it serves")
        if len(entry.gpus) != shape.gpus:
            remedy = f"{entry.shape} needs {shape.gpus} GPUs, these are {len(entry.gpus)}"
            raise invalid(path, f"{at}.gpus", list(entry.gpus), remedy)
        twice = [gpu for gpu, count in Counter(entry.gpus).items() if count > 1]
        taken = twice or [gpu for gpu in entry.gpus if gpu in owners]
        if taken:
            owner = entry.id if twice else owners[taken[0]]
            remedy = f"{taken[0]} already belongs to {owner}: a GPU serves one replica, once"
            raise invalid(path, f"{at}.gpus", list(entry.gpus), remedy)
        owners |= dict.fromkeys(entry.gpus, entry.id)
        found.append(
            ReplicaSpec(
                replica_id=entry.id,
                model_id=entry.model,
                parallelism=str(shape),
                gpus=entry.gpus,
            )
        )
    return tuple(found)


def _row(path: Path, name: str, row: Mapping[str, Any], known: Collection[str]) -> dict[str, float]:
    at = f"weights.{name}"
    for replica_id, share in row.items():
        if replica_id not in known:
            remedy = f"no such replica under [[replicas]]; there are: {', '.join(sorted(known))}"
            raise invalid(path, f"{at}.{replica_id}", share, remedy)
        # A bool is an int to Python, and no share.
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
            raise invalid(path, f"{at}.{replica_id}", share, "use a share from 0 to 1")
    total = sum(row.values())
    if total <= 0.0:
        remedy = "nobody gets requests of this type: remove the table, or give shares above 0"
        raise invalid(path, at, row, remedy)
    if abs(total - 1.0) > SUM_ERROR_MAX:
        raise invalid(path, at, row, _remedy(row, total))
    return {replica_id: float(share) for replica_id, share in row.items()}


def _remedy(row: Mapping[str, float], total: float) -> str:
    largest = max(row, key=lambda replica_id: row[replica_id])
    rest = 1.0 - sum(share for replica_id, share in row.items() if replica_id != largest)
    remedy = f"the shares sum to {total:.10g}, not to 1: "
    if rest > 0.0:
        return f"{remedy}write {largest} = {rest:.10g}, or divide each by {total:.10g}"
    return f"{remedy}divide each by {total:.10g}"


def _gpus(gpus: Iterable[str]) -> list[str]:
    """On one line if it holds them, else a stage or so a line."""
    names = [_quoted(gpu) for gpu in gpus]
    line = f"gpus = [{', '.join(names)}]"
    if len(line) <= LINE_LENGTH:
        return [line]
    rows: list[str] = []
    for name in names:
        if not rows or len(rows[-1]) + len(name) + 2 > LINE_LENGTH:
            rows.append(" ")
        rows[-1] += f" {name},"
    return ["gpus = [", *rows, "]"]


def _comment(line: str) -> str:
    """TOML allows no control characters in comments."""
    text = "".join(char if char.isprintable() else " " for char in line)
    return f"# {text}".rstrip()


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
