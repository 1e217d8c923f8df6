"""Policy ``dynamo``: alike replicas, as many as NVIDIA Dynamo's planner would run.

Known of it, from its documentation (design-docs/planner-design, planner-guide, configuration
reference; November 2026): two loops. Loop A, every 180 s, takes averages over all requests (rate,
input and output length, TTFT and ITL), corrects its profile by observed / expected, forecasts the
three averages, and asks for ceil(load / throughput interpolated at the SLA) replicas. Loop B, every
5 s, looks at each engine and moves by one replica, up only when all engines break the SLA, down
only when all are well under it. With both, A is the floor of B. One deployment per planner;
averages hide what the types differ in; GPUs that no replica needs are left idle.

Inferred here: replicas do prefill and decode together, so the larger of the two needs counts. The
correction of ITL divides the TPOT target, that of TTFT scales the prefill load where it is below 1
(its older planner's rules), both kept within ``CORRECTION``. "Well under" is 80 % of the SLA. An
engine's TTFT is estimated as the prompts that wait at their mean length over the prefill rate. B
holds still until the replicas last asked for are in force. The forecast is this project's, or
whatever the forecaster is set to. GPUs that several planners want are handed out in turn.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf

from services.scheduler.config import AUTO, SchedulerConfig
from services.scheduler.policies.costs import Mix, mix_of, served, shapes, speed
from services.scheduler.policies.filling import Pool, Room, fill
from services.scheduler.policies.interface import ModelDemand, Planned, Problem
from services.scheduler.policies.placing import brief, standing_shapes
from services.scheduler.policies.starting import changes, default_shape, place_by_kind
from services.scheduler.policies.weights import equal, planned
from shared.cost.model import CostModel
from shared.hardware import Parallelism
from shared.messages.replicas import ReplicaReport

PERIOD_A_S = 180.0
PERIOD_B_S = 5.0
WELL_UNDER = 0.8
CORRECTION = (0.1, 10.0)
REPLICAS_MAX = 4096


@dataclass(slots=True)
class _Planner:
    """One model's: its shape and kind of GPU are fixed with its first plan, as they are in its
    deployment file."""

    kind: str
    shape: Parallelism
    floor: int = 1
    count: int = 1
    why: str = ""


class Dynamo:
    period_s = PERIOD_B_S
    slow = False

    def __init__(self, *, shape: str = AUTO, period_s: float = PERIOD_A_S) -> None:
        """``shape`` of every replica; auto: as the topology's first replica of the model, else
        the default. ``period_s``: of loop A."""
        self._shape = None if shape == AUTO else Parallelism.parse(shape)
        self._period_a_s = period_s
        self._a_s: float | None = None
        self._planners: dict[str, _Planner] = {}

    @classmethod
    def of(cls, config: SchedulerConfig) -> "Dynamo":
        return cls(shape=config.dynamo_shape, period_s=config.policy_period_s or PERIOD_A_S)

    def plan(self, problem: Problem) -> Planned:
        a_is_due = self._a_s is None or problem.now_s - self._a_s >= self._period_a_s
        notes: list[str] = []
        for demand in problem.models:
            planner, model = self._planner(problem, demand)
            if planner is None or model is None:
                notes.append(
                    f"{demand.model_id}: its shape fits no GPU on offer, or has no profile"
                )
                continue
            if a_is_due:
                _loop_a(planner, model, problem, demand)
            elif _realised(planner, demand.model_id, problem):
                _loop_b(planner, model, problem, demand)
            planner.count = max(planner.count, planner.floor)
        if a_is_due:
            self._a_s = problem.now_s
        return self._placed(problem, notes)

    def _planner(
        self, problem: Problem, demand: ModelDemand
    ) -> tuple[_Planner | None, CostModel | None]:
        model_id = demand.model_id
        planner = self._planners.get(model_id)
        if planner is None:
            chosen = self._first_shape(problem, model_id)
            if chosen is None:
                return None, None
            planner = self._planners[model_id] = _Planner(*chosen)
            standing = standing_shapes(problem.in_force)[model_id, planner.shape]
            planner.count = max(1, standing)
        found = shapes(planner.kind, problem.profiles[model_id], problem.offers)
        return planner, found.get(planner.shape)

    def _first_shape(self, problem: Problem, model_id: str) -> tuple[str, Parallelism] | None:
        first = problem.models[0].model_id
        wished = [
            Parallelism.parse(wish.parallelism)
            for wish in problem.wishes
            if (wish.model_id or first) == model_id
        ]
        shape = self._shape or (wished[0] if wished else None)
        if shape is None:
            return default_shape(problem, model_id)
        kinds = Counter(offer.kind for offer in problem.offers if offer.serves(model_id))
        for kind, _ in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
            if shape in shapes(kind, problem.profiles[model_id], problem.offers):
                return kind, shape
        return None

    def _placed(self, problem: Problem, notes: list[str]) -> Planned:
        planners = self._planners

        def need(model_id: str, counts: Mapping[Pool, int]) -> float:
            """The share of its replicas that the model still lacks."""
            planner = planners[model_id]
            return 1.0 - counts.get((planner.kind, model_id), 0) / planner.count

        counts = fill(
            Room(problem.offers),
            shapes={model_id: planner.shape for model_id, planner in planners.items()},
            kinds={model_id: (planner.kind,) for model_id, planner in planners.items()},
            need=need,
        )
        placement = place_by_kind(
            counts, {model_id: planner.shape for model_id, planner in planners.items()}, problem
        )
        words: list[str] = []
        for model_id, planner in planners.items():
            count = counts.get((planner.kind, model_id), 0)
            short = "" if count == planner.count else f" of {planner.count}"
            words.append(f"{model_id} {count}{short} x {brief(planner.shape)}, {planner.why}")
            planner.count = max(1, count)  # what there is no GPU for is no replica to count on
        words.append(changes(problem.in_force, placement))
        reason = f"dynamo: {'; '.join([*words, *notes])}"
        return planned(placement.replicas, equal(placement.replicas), reason=reason)


def _loop_a(planner: _Planner, model: CostModel, problem: Problem, demand: ModelDemand) -> None:
    """``floor`` from the forecast averages."""
    mix = mix_of(demand)
    target = problem.targets[demand.model_id]
    ttft_by, itl_by = _corrections(model, problem, demand)
    tighter = type(target)(ttft_s=target.ttft_s, tpot_s=target.tpot_s / itl_by)
    rate = served(
        model, (mix.input_tokens, mix.output_tokens), tighter, problem.limits
    ).requests_per_s
    prefill = served(model, (mix.input_tokens, 1.0), target, problem.limits).requests_per_s
    needs = (_ratio(mix.arrivals_rps, rate), _ratio(mix.arrivals_rps * min(1.0, ttft_by), prefill))
    planner.floor = max(1, ceil(min(max(needs), REPLICAS_MAX)))
    planner.why = (
        f"at least {planner.floor} for {mix.arrivals_rps:.2f} requests/s of {mix.input_tokens:.0f} "
        f"in, {mix.output_tokens:.0f} out at {rate:.2f} each (TTFT x {ttft_by:.2f}, ITL x "
        f"{itl_by:.2f} of what is expected)"
    )


def _loop_b(planner: _Planner, model: CostModel, problem: Problem, demand: ModelDemand) -> None:
    """One replica more when all break a target, one less when all are well under both."""
    ids = {s.replica_id for s in problem.in_force.replicas if s.model_id == demand.model_id}
    loads = [load for load in problem.loads if load.replica_id in ids and load.phase == "serving"]
    if not loads or len(loads) < len(ids):
        return  # an engine that is silent is neither broken nor idle
    mix, target = mix_of(demand), problem.targets[demand.model_id]
    prefill = served(model, (mix.input_tokens, 1.0), target, problem.limits).requests_per_s
    strains = [
        max(load.step_s / target.tpot_s, _ttft_s(load, prefill) / target.ttft_s) for load in loads
    ]
    base = planner.why.partition("; last")[0]
    if min(strains) > 1.0:
        planner.count = min(planner.count + 1, REPLICAS_MAX)
        planner.why = f"{base}; last 1 more: all engines at {min(strains):.2f} of the SLA or above"
    elif max(strains) < WELL_UNDER and planner.count > planner.floor:
        planner.count -= 1
        planner.why = f"{base}; last 1 less: all engines at {max(strains):.2f} of the SLA or below"


def _ttft_s(load: ReplicaReport, prefill_rps: float) -> float:
    return load.step_s + _ratio(load.waiting, prefill_rps)


def _realised(planner: _Planner, model_id: str, problem: Problem) -> bool:
    return standing_shapes(problem.in_force)[model_id, planner.shape] == planner.count


def _corrections(model: CostModel, problem: Problem, demand: ModelDemand) -> tuple[float, float]:
    """Observed / expected of TTFT and ITL in the newest window; 1 where nothing was observed, or
    nothing can be expected of replicas that are overrun."""
    report = next((r for r in problem.observed if r.model_id == demand.model_id), None)
    seen = [kind for kind in report.types if kind.requests > 0] if report else []
    requests = sum(kind.requests for kind in seen)
    ids = [s for s in problem.in_force.replicas if s.model_id == demand.model_id]
    if not requests or not ids:
        return 1.0, 1.0
    mean = Mix(
        sum(kind.arrivals_rps for kind in seen),
        sum(kind.requests * kind.input_tokens_mean for kind in seen) / requests,
        sum(kind.requests * kind.output_tokens_mean for kind in seen) / requests,
    )
    lengths = (mean.input_tokens, mean.output_tokens)
    expected = speed(model, lengths, mean.arrivals_rps / len(ids), problem.limits)
    ttft_s = _mean([(kind.requests, kind.ttft_s_mean) for kind in seen])
    itl_s = _mean([(kind.requests, kind.tpot_s_mean) for kind in seen])
    return _bounded(ttft_s, expected.ttft_s), _bounded(itl_s, expected.tpot_s)


def _mean(values: list[tuple[int, float | None]]) -> float | None:
    known = [(count, value) for count, value in values if value is not None]
    total = sum(count for count, _ in known)
    return sum(count * value for count, value in known) / total if total else None


def _bounded(observed: float | None, expected: float) -> float:
    """Not a number compares as false, and counts as nothing observed."""
    if observed is None or not 0.0 < expected < inf:
        return 1.0
    low, high = CORRECTION
    ratio = observed / expected
    return min(max(ratio, low), high) if ratio >= 0.0 else 1.0


def _ratio(load: float, rate: float) -> float:
    if load <= 0.0:
        return 0.0
    return load / rate if rate > 0.0 else inf
