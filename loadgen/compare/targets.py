"""What requests of each type must meet: the targets of their class, or multiples of the latencies
that they would have at rest.

At rest means: alone on a replica. One request of each type, with its mean lengths, is simulated on
every uniform shape, long after the one before; the shape with the least E2E tells the type's TTFT
and TPOT, so that no target is below what the fastest replica could do.
"""

from collections.abc import Mapping, Sequence

from loadgen.compare.metrics import tpot_of, type_key
from loadgen.compare.workload import TypeMean
from loadgen.simulator.outcome import Requests, Traffic
from loadgen.workload.records import TraceRecord
from shared.slo import DEFAULT_TARGETS, SloTarget

APART_S = 600.0  # between two lone requests
TPOT_S_WITHOUT = 1.0  # target of a type whose mean output has no second token


def class_targets(types: Sequence[TypeMean]) -> dict[str, SloTarget]:
    """Those of shared.slo, by each type's class."""
    return {type_key(t.model_id, t.label): DEFAULT_TARGETS[t.slo_class] for t in types}


def lone_requests(types: Sequence[TypeMean]) -> list[Traffic]:
    """One request of each type, each alone."""
    records: dict[str, list[TraceRecord]] = {}
    for number, kind in enumerate(types):
        record = TraceRecord(
            timestamp_s=number * APART_S,
            input_tokens=max(1, round(kind.input_tokens)),
            output_tokens=max(1, round(kind.output_tokens)),
            label=kind.label,
            slo_class=kind.slo_class,
        )
        records.setdefault(kind.model_id, []).append(record)
    return [Traffic(model_id=model_id, records=rows) for model_id, rows in records.items()]


def relative_targets(runs: Sequence[Requests], times: float) -> dict[str, SloTarget]:
    """``times`` the latencies of each type in that of ``runs`` (of lone requests, one run for each
    shape) which ended it first."""
    best: dict[str, tuple[float, float, float]] = {}
    for requests in runs:
        tpots = tpot_of(requests)
        for row in range(requests.arrived_s.size):
            if not requests.completed[row]:
                continue
            model_id = requests.models[int(requests.model[row])]
            key = type_key(model_id, requests.labels[int(requests.label[row])])
            at_rest = (float(requests.e2e_s[row]), float(requests.ttft_s[row]), float(tpots[row]))
            if key not in best or at_rest[0] < best[key][0]:
                best[key] = at_rest
    return {
        key: SloTarget(
            ttft_s=times * ttft_s,
            tpot_s=times * tpot_s if tpot_s == tpot_s else TPOT_S_WITHOUT,  # noqa: PLR0124  # NaN
        )
        for key, (_, ttft_s, tpot_s) in best.items()
    }


def model_targets(
    types: Sequence[TypeMean], targets: Mapping[str, SloTarget]
) -> dict[str, SloTarget]:
    """One target for each model, for schedulers, which plan a model as a whole: the mean of its
    types', weighted by their requests."""
    found: dict[str, SloTarget] = {}
    for model_id in dict.fromkeys(kind.model_id for kind in types):
        own = [kind for kind in types if kind.model_id == model_id]
        total = sum(kind.requests for kind in own)
        rows = [(kind.requests / total, targets[type_key(model_id, kind.label)]) for kind in own]
        found[model_id] = SloTarget(
            ttft_s=sum(share * target.ttft_s for share, target in rows),
            tpot_s=sum(share * target.tpot_s for share, target in rows),
        )
    return found
