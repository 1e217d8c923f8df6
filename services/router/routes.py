"""The plan in force as a router reads it: per model, who may serve and each type's shares."""

from dataclasses import dataclass, field
from math import isfinite

from services.router.loads import ReplicaLoad, decayed, freshness
from services.router.policies import Candidate, Memory, Options
from shared.messages.plans import DeploymentPlan, ReplicaSpec

ANY_TYPE = "*"
CERTAIN = 0.95  # a type this likely is taken for known: its row is used unmixed
NEGLIGIBLE = 0.01  # a type this unlikely is left out of the mixture


@dataclass(slots=True)
class Routes:
    """One model's part of the plan. ``rows`` hold shares in the order of ``candidates``; the row
    for ANY_TYPE always exists."""

    candidates: list[Candidate]
    rows: dict[str, list[float]]
    memory: Memory
    mixed: bool = field(init=False)  # whether types differ at all

    def __post_init__(self) -> None:
        self.mixed = len(self.rows) > 1

    def check(self) -> None:
        memory = self.memory
        assert len(memory.homes) <= memory.prefixes_max, len(memory.homes)
        assert len(memory.holders) <= memory.prefixes_max, len(memory.holders)
        for credits_ in memory.credits.values():
            assert len(credits_) == len(self.candidates), "credits of another plan"

    def row(self, request_type: int) -> list[float]:
        return self.rows.get(str(request_type)) or self.rows[ANY_TYPE]

    def shares(self, numbers: tuple[int, ...], chances: list[float]) -> list[float]:
        """The plan's shares for a request whose type is known by its chances only: the rows
        mixed by them, so that over many requests each type's row is respected."""
        if not self.mixed or not chances:
            return self.rows[ANY_TYPE]
        best = max(chances)
        if best >= CERTAIN:
            return self.row(numbers[chances.index(best)])
        mixed = [0.0] * len(self.candidates)
        for number, chance in zip(numbers, chances, strict=True):
            if chance > NEGLIGIBLE:
                row = self.row(number)
                mixed = [sum_ + chance * share for sum_, share in zip(mixed, row, strict=True)]
        return mixed


def routes_of(
    plan: DeploymentPlan, model_id: str, loads: dict[tuple[str, str], ReplicaLoad], memory: Memory
) -> Routes:
    """The routes of one model. A plan without weights for it means equal shares. A row may name
    replicas of several models, whose types have the same numbers: its part counts here as a row."""
    specs = [spec for spec in plan.replicas if spec.model_id == model_id and spec.gpus]
    candidates = [
        Candidate(
            index=index,
            replica_id=spec.replica_id,
            leader_id=leader_of(spec),
            load=loads[load_key(spec)],
        )
        for index, spec in enumerate(specs)
    ]
    rows = {
        request_type: [_share(row, spec) for spec in specs]
        for request_type, row in plan.weights.items()
    }
    rows = {
        request_type: [share / total for share in row]
        for request_type, row in rows.items()
        if (total := sum(row)) > 0.0
    }
    rows.setdefault(ANY_TYPE, [1.0 / max(1, len(specs))] * len(specs))
    memory.replan(len(candidates))
    return Routes(candidates, rows, memory)


def _share(row: dict[str, float], spec: ReplicaSpec) -> float:
    """The weight, or 0 for what is none: one NaN would poison every credit."""
    weight = row.get(spec.replica_id, 0.0)
    return weight if isfinite(weight) and weight > 0.0 else 0.0


def leader_of(spec: ReplicaSpec) -> str:
    return spec.gpus[0]


def load_key(spec: ReplicaSpec) -> tuple[str, str]:
    """Reports count only from the leader the plan names: a replica that has moved keeps its id."""
    return spec.replica_id, leader_of(spec)


def options_of(
    routes: Routes,
    shares: list[float],
    *,
    excluded: tuple[str, ...],
    now_s: float,
    stale_s: float,
    dead_s: float,
) -> Options:
    """The candidates that may serve now: serving, heard of, with room, and not excluded. Without
    any, those that stand still in a switch: they keep what comes until somebody goes on with it."""
    options = Options([], [], [])
    add_candidate, add_load = options.candidates.append, options.loads.append
    add_share = options.shares.append
    for paused in (False, True):
        for candidate, share in zip(routes.candidates, shares, strict=True):
            load = candidate.load
            if now_s >= load.recheck_s:
                load.settle()
            if not (load.keeps if paused else load.open) or candidate.replica_id in excluded:
                continue
            age_s = now_s - load.reported_s
            if age_s <= stale_s:
                pressure = load.pressure
            elif age_s <= dead_s:
                fresh = freshness(age_s, stale_s=stale_s, dead_s=dead_s)
                pressure, share = decayed(load.pressure, fresh), share * fresh  # noqa: PLW2901  # as meant
            else:
                continue
            add_candidate(candidate)
            add_load(pressure)
            add_share(share)
        if options.candidates:
            break
    return options


def why_none(routes: Routes, *, now_s: float, dead_s: float) -> tuple[bool, str]:
    """Whether replicas serve but are full (the caller should wait), and the counts in words."""
    counts: dict[str, int] = {}
    for candidate in routes.candidates:
        load = candidate.load
        if now_s - load.reported_s > dead_s:
            state = "not reporting"
        elif load.phase in ("serving", "paused"):
            state = load.phase if load.open or load.keeps else "full"
        else:
            state = load.phase
        counts[state] = counts.get(state, 0) + 1
    words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return "full" in counts, f"{len(routes.candidates)} replicas in plan: {words or 'none'}"
