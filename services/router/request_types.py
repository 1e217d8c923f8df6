"""Which type is a request, before its output length is known?

A posterior over the profiler's types. Within a type ln(1 + tokens) is taken as normal around the
centroid. The input length is seen; of the output length it is known that the client allows up to
``output_tokens_max``, so a type counts by the share of its outputs that would fit. The prior is
the tenant's own history where there is one, else everybody's: a Dirichlet prior with
``PRIOR_STRENGTH`` requests' worth of everybody's shares.
"""

from dataclasses import dataclass
from math import erf, exp, log1p, sqrt

from shared.messages.demand import DemandReport, ModelTypes
from shared.messages.requests import RequestCompleted, RouteRequest

PRIOR_STRENGTH = 10.0
HISTORY_DECAY = 0.98  # a tenant is remembered by about its last fifty requests
SHARE_RATE = 0.3  # weight of the newest window in everybody's shares
SHARE_MIN = 1e-3  # no type is ever impossible


@dataclass(frozen=True, slots=True)
class TypeModel:
    """Types of one model: numbers, centres in ln(1 + tokens), and everybody's shares."""

    numbers: tuple[int, ...]
    inputs_ln: tuple[float, ...]
    outputs_ln: tuple[float, ...]
    shares: tuple[float, ...]


def from_report(report: DemandReport, former: TypeModel | None) -> TypeModel | None:
    """The types as this window shows them; shares move slowly, centres at once."""
    if not report.types:
        return former
    numbers = tuple(t.request_type for t in report.types)
    seen = sum(t.requests for t in report.types)
    known = dict(zip(former.numbers, former.shares, strict=True)) if former else {}
    shares: list[float] = []
    for demand in report.types:
        old = known.get(demand.request_type, 1.0 / len(numbers))
        new = demand.requests / seen if seen else old
        rate = SHARE_RATE if former else 1.0
        shares.append(max(SHARE_MIN, old + rate * (new - old)))
    return TypeModel(
        numbers=numbers,
        inputs_ln=tuple(log1p(max(0.0, t.input_tokens_centroid)) for t in report.types),
        outputs_ln=tuple(log1p(max(0.0, t.output_tokens_centroid)) for t in report.types),
        shares=tuple(share / sum(shares) for share in shares),
    )


def from_state(state: ModelTypes) -> TypeModel | None:
    """The types as the profiler stored them: what a router starts with."""
    if not state.types:
        return None
    weights = [max(SHARE_MIN, t.weight) for t in state.types]
    return TypeModel(
        numbers=tuple(t.request_type for t in state.types),
        inputs_ln=tuple(t.input_ln for t in state.types),
        outputs_ln=tuple(t.output_ln for t in state.types),
        shares=tuple(weight / sum(weights) for weight in weights),
    )


def posterior(
    types: TypeModel,
    *,
    input_tokens: int,
    output_tokens_max: int,
    prior: tuple[float, ...],
    spread_ln: float,
) -> list[float]:
    """P(type | what the request shows), in the order of ``types.numbers``."""
    input_ln, limit_ln = log1p(max(0, input_tokens)), log1p(max(0, output_tokens_max))
    logs = [-0.5 * ((input_ln - centre) / spread_ln) ** 2 for centre in types.inputs_ln]
    best = max(logs)  # subtracted, so that a request far from every type still gets an answer
    scale = spread_ln * sqrt(2.0)
    scores = [
        share * exp(value - best) * max(1e-6, 0.5 * (1.0 + erf((limit_ln - output) / scale)))
        for share, value, output in zip(prior, logs, types.outputs_ln, strict=True)
    ]
    total = sum(scores)
    return [score / total for score in scores]


def nearest(types: TypeModel, *, input_tokens: int, output_tokens: int) -> int:
    """Position of the type whose centre is nearest to a request that has ended."""
    x, y = log1p(max(0, input_tokens)), log1p(max(0, output_tokens))
    distances = [
        (x - cx) ** 2 + (y - cy) ** 2
        for cx, cy in zip(types.inputs_ln, types.outputs_ln, strict=True)
    ]
    return distances.index(min(distances))


class TenantHistory:
    """Types of each tenant's last requests; the least recently seen tenant is forgotten first."""

    def __init__(self, *, tenants_max: int) -> None:
        self._tenants_max = tenants_max
        self._counts: dict[tuple[str, str], dict[int, float]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, *, model_id: str, tenant: str, request_type: int) -> None:
        key = (model_id, tenant)
        counts = self._counts.pop(key, {})
        counts = {number: count * HISTORY_DECAY for number, count in counts.items()}
        counts[request_type] = counts.get(request_type, 0.0) + 1.0
        self._counts[key] = counts
        if len(self._counts) > self._tenants_max:
            del self._counts[next(iter(self._counts))]

    def prior(self, types: TypeModel, *, model_id: str, tenant: str) -> tuple[float, ...]:
        counts = self._counts.get((model_id, tenant))
        if counts is None:
            return types.shares
        total = PRIOR_STRENGTH + sum(counts.get(number, 0.0) for number in types.numbers)
        return tuple(
            (PRIOR_STRENGTH * share + counts.get(number, 0.0)) / total
            for number, share in zip(types.numbers, types.shares, strict=True)
        )


class TypeBook:
    """What the router knows of request types: each model's, and the tenants' habits."""

    def __init__(self, *, tenants_max: int, spread_ln: float) -> None:
        self._models: dict[str, TypeModel] = {}
        self._tenants = TenantHistory(tenants_max=tenants_max)
        self._spread_ln = spread_ln

    @property
    def tenants(self) -> int:
        return len(self._tenants)

    @property
    def models(self) -> frozenset[str]:
        return frozenset(self._models)

    def restore(self, state: ModelTypes) -> None:
        """Take the stored types, unless a report was faster."""
        types = from_state(state)
        if types is not None:
            self._models.setdefault(state.model_id, types)

    def learn(self, report: DemandReport) -> None:
        types = from_report(report, self._models.get(report.model_id))
        if types is not None:
            self._models[report.model_id] = types

    def learn_completed(self, done: RequestCompleted) -> None:
        """Count an ended request for its tenant. Without tenants everybody's shares say it all."""
        types = self._models.get(done.model_id)
        if types is None or not done.tenant or done.outcome != "completed":
            return
        position = nearest(types, input_tokens=done.input_tokens, output_tokens=done.output_tokens)
        self._tenants.add(
            model_id=done.model_id, tenant=done.tenant, request_type=types.numbers[position]
        )

    def chances(self, request: RouteRequest) -> tuple[tuple[int, ...], list[float]]:
        """Type numbers and the request's chances of each; both empty while none are known."""
        types = self._models.get(request.model_id)
        if types is None:
            return (), []
        return types.numbers, posterior(
            types,
            input_tokens=request.input_tokens,
            output_tokens_max=request.output_tokens_max,
            prior=self._tenants.prior(types, model_id=request.model_id, tenant=request.tenant),
            spread_ln=self._spread_ln,
        )
