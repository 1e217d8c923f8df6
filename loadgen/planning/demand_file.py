"""Demand files: what is expected, written down by a person, as TOML.

horizon_s = 3600              # for how long; an hour if left out

[[demand]]
model = "llama-2-70b"         # may be left out where there is only one
type = "chat"                 # a name, or the number that a running mesh gave it
arrivals_rps = 6.0
arrivals_rps_p10 = 4.0        # between these two it falls four times in five; may be left out
arrivals_rps_p90 = 9.0
input_tokens = 400            # means
output_tokens = 250
classes = { interactive = 0.8, batch = 0.2 }     # shares by SLO class; else all of --class
"""

from math import isclose, isfinite
from pathlib import Path

import msgspec

from loadgen.planning.demand import HORIZON_S, Expected
from loadgen.planning.toml_file import invalid, read_toml
from services.scheduler.demands import RATE_MAX, RATE_MIN, TOKENS_MAX, TYPES_MAX
from services.scheduler.policies.interface import ModelDemand
from shared.messages.demand import TypeForecast
from shared.slo import SLO_CLASSES, SloClass

SHARES_ERROR_MAX = 1e-6  # of classes: what people round to
USUAL: SloClass = "standard"


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: int | str
    arrivals_rps: float
    input_tokens: float
    output_tokens: float
    model: str = ""
    arrivals_rps_p10: float | None = None
    arrivals_rps_p90: float | None = None
    classes: dict[str, float] = msgspec.field(default_factory=dict[str, float])


class _DemandFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    demand: tuple[_Entry, ...]
    horizon_s: float = HORIZON_S


def models_named(path: Path) -> tuple[str, ...]:
    """The models of the file in its order, "" for entries that name none. Raises ConfigInvalid."""
    return tuple(dict.fromkeys(entry.model for entry in _read(path).demand))


def read_demand(path: Path, *, model_id: str, slo_class: SloClass = USUAL) -> Expected:
    """What the file says; ``model_id`` is meant where an entry names none, ``slo_class`` where it
    says nothing of classes. Raises ConfigInvalid that names file, line and field."""
    file = _read(path)
    horizon_s = file.horizon_s
    if not 0.0 < horizon_s <= RATE_MAX:
        raise invalid(path, "horizon_s", horizon_s, f"use more than 0 s, up to {RATE_MAX:g} s")
    entries: dict[str, list[tuple[int, _Entry]]] = {}
    for index, entry in enumerate(file.demand):
        _check(path, f"demand[{index}]", entry)
        entries.setdefault(entry.model or model_id, []).append((index, entry))
    names: dict[tuple[str, str], str] = {}
    models: list[ModelDemand] = []
    for model, own in entries.items():
        numbers = _numbers(path, own)
        types = tuple(
            _forecast(entry, number, slo_class)
            for (_, entry), number in zip(own, numbers, strict=True)
        )
        names |= {
            (model, str(number)): str(entry.type)
            for (_, entry), number in zip(own, numbers, strict=True)
        }
        models.append(ModelDemand(model_id=model, types=types, horizon_s=horizon_s))
    return Expected(models=tuple(models), names=names, source=str(path))


def _read(path: Path) -> _DemandFile:
    file = read_toml(path, _DemandFile)
    if not file.demand:
        raise invalid(path, "demand", [], "name at least one type under [[demand]]")
    return file


def _check(path: Path, at: str, entry: _Entry) -> None:
    rate = entry.arrivals_rps
    for field in ("arrivals_rps", "arrivals_rps_p90"):
        value: float | None = getattr(entry, field)
        if value is not None and not RATE_MIN <= value <= RATE_MAX:
            remedy = f"use {RATE_MIN:g} to {RATE_MAX:g} requests/s; leave out what never comes"
            raise invalid(path, f"{at}.{field}", value, remedy)
    low, high = entry.arrivals_rps_p10, entry.arrivals_rps_p90
    if low is not None and not 0.0 <= low <= rate:
        raise invalid(path, f"{at}.arrivals_rps_p10", low, f"use 0 to arrivals_rps, {rate:g}")
    if high is not None and high < rate:
        raise invalid(path, f"{at}.arrivals_rps_p90", high, f"use arrivals_rps, {rate:g}, or more")
    if not 0.0 < entry.input_tokens <= TOKENS_MAX:
        remedy = f"use more than 0 tokens, up to {TOKENS_MAX:g}"
        raise invalid(path, f"{at}.input_tokens", entry.input_tokens, remedy)
    if not 0.0 <= entry.output_tokens <= TOKENS_MAX:
        remedy = f"use 0 to {TOKENS_MAX:g} tokens"
        raise invalid(path, f"{at}.output_tokens", entry.output_tokens, remedy)
    _check_classes(path, f"{at}.classes", entry.classes)


def _check_classes(path: Path, at: str, classes: dict[str, float]) -> None:
    for name, share in classes.items():
        if name not in SLO_CLASSES:
            raise invalid(path, at, classes, f"{name} is none of {', '.join(SLO_CLASSES)}")
        if not (isfinite(share) and 0.0 <= share <= 1.0):
            raise invalid(path, at, classes, f"use a share from 0 to 1 for {name}")
    total = sum(classes.values())
    if classes and not isclose(total, 1.0, abs_tol=SHARES_ERROR_MAX):
        remedy = f"the shares sum to {total:.6g}, not to 1: name the rest, or divide each by that"
        raise invalid(path, at, classes, remedy)


def _numbers(path: Path, entries: list[tuple[int, _Entry]]) -> list[int]:
    """Each type's number: its own, or the lowest that none has. Raises ConfigInvalid."""
    seen: set[int | str] = set()
    for index, entry in entries:
        at, kind = f"demand[{index}].type", entry.type
        if kind in seen:
            raise invalid(path, at, kind, "give each type of a model a name of its own")
        if isinstance(kind, int) and not 0 <= kind < TYPES_MAX:
            raise invalid(path, at, kind, f"use a name, or a number from 0 to {TYPES_MAX - 1}")
        if isinstance(kind, str) and not (kind.strip() and kind.isprintable()):
            raise invalid(path, at, kind, "use a name that can be printed")
        seen.add(kind)
    if len(entries) > TYPES_MAX:
        raise invalid(path, "demand", len(entries), f"use at most {TYPES_MAX} types of a model")
    free = iter(number for number in range(2 * TYPES_MAX) if number not in seen)
    return [entry.type if isinstance(entry.type, int) else next(free) for _, entry in entries]


def _forecast(entry: _Entry, number: int, slo_class: SloClass) -> TypeForecast:
    classes = {name: share for name, share in sorted(entry.classes.items()) if share > 0.0}
    if not classes and slo_class != USUAL:
        classes = {slo_class: 1.0}
    return TypeForecast(
        request_type=number,
        arrivals_rps=entry.arrivals_rps,
        input_tokens_mean=entry.input_tokens,
        output_tokens_mean=entry.output_tokens,
        method="file",
        arrivals_rps_p10=entry.arrivals_rps_p10,
        arrivals_rps_p90=entry.arrivals_rps_p90,
        class_shares=classes,
    )
