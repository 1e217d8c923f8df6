"""Why a plan is what it is: the inputs, figures and alternatives of one decision.

The scheduler sends it with each plan that it proposes or keeps, ``oserve plan`` prints it, and
``oserve why`` reads it back from the journal and puts what was seen beside what was predicted. All
times are in seconds, all rates in requests/s; a figure that was not worked out is None.
"""

import msgspec

ALTERNATIVES_MAX = 8
DETAILS_MAX = 512  # replicas or types that a decision tells of one by one


class TypeOutlook(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One type of one model as it was planned for: what is expected, between which quantiles, and
    how its requests should fare. ``goodput_share``: of its requests that meet both targets."""

    model_id: str
    request_type: str
    arrivals_rps: float
    arrivals_rps_p10: float
    arrivals_rps_p90: float
    input_tokens: float
    output_tokens: float
    ttft_s_mean: float | None = None
    ttft_s_p50: float | None = None
    ttft_s_p99: float | None = None
    tpot_s_mean: float | None = None
    tpot_s_p50: float | None = None
    tpot_s_p99: float | None = None
    e2e_s_p99: float | None = None
    goodput_share: float | None = None


class ReplicaOutlook(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One replica of the plan. ``arrivals_rps``: by type, what it is sent; ``utilisation``: the
    share of its time that this takes, above 1 when it is too much; ``rates_rps``: by type, what it
    could serve of that type alone."""

    replica_id: str
    model_id: str
    parallelism: str
    gpus: tuple[str, ...]
    utilisation: float
    arrivals_rps: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    rates_rps: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    ttft_s_p50: float | None = None
    ttft_s_p99: float | None = None
    tpot_s_p50: float | None = None
    tpot_s_p99: float | None = None


class PlanOutlook(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A plan in one line. ``plan``: its replicas, such as ``2 x tp4, 4 x tp2``; ``headroom``: how
    many times the demand it could carry; ``lateness``: predicted tails over targets, the mean over
    requests; ``why``: chosen, or what it lost by."""

    plan: str
    gpus: int
    headroom: float
    lateness: float
    goodput_share: float | None = None
    e2e_s_p99: float | None = None
    price_per_hour: float | None = None
    why: str = ""


class SwitchOutlook(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What going from the replicas in force to others costs, and whether that pays. ``gain`` and
    ``cost`` are in seconds of lateness (lateness times seconds); ``served_share``: of the demand,
    by the replicas that serve while it lasts; ``step``: which part of a longer way this is.
    ``pause_s``: of ``seconds``, in which what goes stands still; None: it is not switched live."""

    seconds: float
    served_share: float
    bytes_moved: float
    busiest_link_s: float
    requests_paused: float
    gain: float
    cost: float
    payback_s: float | None = None  # after which the gain exceeds the cost; None: never
    horizon_s: float = 0.0  # for how long the forecast is trusted
    moves: bool = False
    step: str = ""
    why: str = ""
    pause_s: float | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``goal``: "headroom", "served" or "thrift", what ``objective`` and ``bound`` are in the terms
    of; ``gap``: relative, between the two. ``missing``: what cannot be served, and what it would
    take. ``bottleneck`` and ``advice`` are sentences."""

    policy: str
    goal: str = ""
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    optimal: bool = False
    solve_s: float = 0.0
    horizon_s: float = 0.0
    types: tuple[TypeOutlook, ...] = ()
    replicas: tuple[ReplicaOutlook, ...] = ()
    chosen: PlanOutlook | None = None
    in_force: PlanOutlook | None = None
    alternatives: tuple[PlanOutlook, ...] = ()
    switch: SwitchOutlook | None = None
    bottleneck: str = ""
    advice: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
