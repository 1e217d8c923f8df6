"""The golden files: what each message looks like on the wire, and bytes of each.

``messages.json`` holds the JSON schema of every message; ``corpus.json`` encoded examples. Both
are written by ``python -m tests.schemas.update`` and reviewed like code: they are our promise to
processes of another version.
"""

import base64
import json
from pathlib import Path
from typing import Any, cast

import msgspec

from shared.messages.base import encode
from tests.support.messages import example, message_types

FOLDER = Path(__file__).parent
SCHEMAS, CORPUS = FOLDER / "messages.json", FOLDER / "corpus.json"
UPDATE = "python -m tests.schemas.update"
Schemas = dict[str, dict[str, Any]]


def current_schemas() -> Schemas:
    """Today's code: one schema per struct, nested ones included. Descriptions may change freely."""
    _, components = msgspec.json.schema_components(message_types(), ref_template="#/{name}")
    return {name: _bare(components[name]) for name in sorted(components)}


def _bare(schema: Any) -> Any:  # JSON of any shape
    if isinstance(schema, dict):
        items = cast("dict[str, Any]", schema).items()
        return {k: _bare(v) for k, v in items if not (k == "description" and isinstance(v, str))}
    if isinstance(schema, list | tuple):
        return [_bare(part) for part in cast("list[Any]", schema)]
    return schema


def current_corpus() -> dict[str, str]:
    """Every message twice, by ``Type.variant``: required fields only, and all fields set."""
    corpus: dict[str, str] = {}
    for kind in message_types():
        for variant, full in (("least", False), ("full", True)):
            payload = encode(example(kind, full=full))
            corpus[f"{kind.__name__}.{variant}"] = base64.b64encode(payload).decode()
    return corpus


def golden(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))


def write(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False)
    path.write_text(text + "\n", encoding="utf-8")


def broken_promises(old: Schemas, new: Schemas) -> list[str]:
    """What a process of the ``old`` version could no longer understand, or say."""
    problems: list[str] = []
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            problems.append(f"{name}: removed or renamed")
        elif "prefixItems" in before or "prefixItems" in after:
            problems += _broken_array(name, before, after)
        else:
            problems += _broken_object(name, before, after)
    return problems


def _broken_array(name: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    was, now = before.get("prefixItems", []), after.get("prefixItems", [])
    problems = [
        f"{name}[{i}]: removed, moved or retyped"
        for i, item in enumerate(was)
        if i >= len(now) or not _accepts(item, now[i])
    ]
    if after.get("minItems", 0) > before.get("minItems", 0):
        problems.append(f"{name}: a new field is required; give it a default")
    return problems


def _broken_object(name: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    was, now = before.get("properties", {}), after.get("properties", {})
    problems: list[str] = []
    for field, kind in was.items():
        if field not in now:
            problems.append(f"{name}.{field}: removed or renamed")
        elif not _accepts(kind, now[field]):
            problems.append(f"{name}.{field}: retyped from {kind} to {now[field]}")
    required = set(after.get("required", [])) - set(before.get("required", []))
    problems += [f"{name}.{field}: required now; give it a default" for field in sorted(required)]
    if "enum" in before and not _accepts(before, after):
        problems.append(f"{name}: lost one of its values")
    return problems


def _accepts(was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether whatever fitted ``was`` still fits ``now``: equal, or a choice that only grew."""
    was, now = ({k: v for k, v in kind.items() if k != "default"} for kind in (was, now))
    if was == now:
        return True
    if set(was) == set(now) == {"enum"}:
        return all(value in now["enum"] for value in was["enum"])
    return (
        "anyOf" in was
        and "anyOf" in now
        and all(any(_accepts(part, other) for other in now["anyOf"]) for part in was["anyOf"])
    )
