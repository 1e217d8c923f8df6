"""The policies of a comparison, by name: what each configures in the production cores, and where
what is said of it comes from.

A name may end in ``@oracle``, ``@last`` or ``@ours``: the forecast that its scheduler is given.
"ours" is the production forecaster; "last" its last-value predictor alone; "oracle" the arrivals
that the trace will really bring.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from services.forecaster.config import ForecasterConfig
from services.profiler.config import ProfilerConfig
from services.router.config import RouterConfig
from services.scheduler.config import SchedulerConfig
from services.switcher.config import SwitcherConfig
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism

Migration = Literal["none", "llumnix"]
ForecastName = Literal["ours", "last", "oracle"]
Begin = Literal["topology", "shape", "default", "best", "best-p99", "planned"]
"""Which replicas stand when the trace begins: the topology's; one shape on all GPUs; the smallest
that leaves room for the KV cache; the best static deployment in hindsight, by goodput or by P99;
those that the policy itself plans for what arrives in the warm-up, which is not counted (the
default ones where nothing does)."""

FORECASTS: tuple[ForecastName, ...] = get_args(ForecastName)
STATIC = "static-"
RELOAD_S = 50.0
FAST_SWITCH_S = 10.0
PAPER_PERIOD_S = 60.0
_FAST_S = SwitcherConfig().drain_timeout_s + FAST_SWITCH_S
"""What a switch takes at most where a replica starts in FAST_SWITCH_S: running requests may end
first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """``shape``: of all replicas, where it begins with "shape". ``start_s``: how long a new
    replica takes; None: as the cost model says, weights from disk. ``known`` and ``inferred``: what
    is known of the competitor, and what we had to assume."""

    name: str
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    switcher: SwitcherConfig = field(default_factory=SwitcherConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    forecaster: ForecasterConfig = field(default_factory=ForecasterConfig)
    begin: Begin = "topology"
    shape: str = ""
    start_s: float | None = None
    live: bool = False  # new replicas take over weights, requests and KV cache of the old ones
    migration: Migration = "none"
    forecast: ForecastName = "ours"  # where its name does not say
    known: str = ""
    inferred: str = ""

    @property
    def switches(self) -> bool:
        """Whether it may change the plan at all."""
        return self.scheduler.policy != "static"


_LEAST_LOAD = RouterConfig(policy="least_load")
_LIVE = (
    "New replicas take weights, requests and KV cache over from old ones at the speed of the links "
    "of the cost model, after as long as it says that an engine starts; all of the KV cache while "
    "requests wait, none ahead of it."
)
_TEN = (
    "A new replica takes 10 s to start, the published bound that oserve-paper and uniform-fast are "
    "given too, and the scheduler knows it: the same switches for all, so that only plans differ."
)
_BEGINS = (
    "It begins with what it plans itself for the arrivals of the warm-up, which an operator has as "
    "a trace of the past; static-best knows the whole trace."
)

POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            name="static",
            known="The topology's own replicas, for the whole trace.",
            inferred="Requests go as the plan's equal weights say, corrected by load.",
        ),
        Policy(
            name="static-best",
            router=_LEAST_LOAD,
            begin="best",
            known="The best single uniform deployment for the whole trace: OServe's baseline "
            "vLLM(static).",
            inferred="Best in hindsight, by goodput summed over the seeds (ties: by P99 of E2E), "
            "which no operator could have known beforehand; requests go to the less loaded of two "
            "replicas. With several models: the best static split of the GPUs among those that the "
            "fluid model ranks first.",
        ),
        Policy(
            name="static-best-p99",
            router=_LEAST_LOAD,
            begin="best-p99",
            known="The best single uniform deployment for the whole trace, as static-best.",
            inferred="Best in hindsight by the P99 of E2E, ties by goodput.",
        ),
        Policy(
            name="static-default",
            router=_LEAST_LOAD,
            begin="default",
            known="What is usually deployed: the least tensor parallelism that fits, and as many "
            "replicas as there are GPUs for.",
            inferred="It fits if 30 % of the GPUs' memory is left for the KV cache. With several "
            "models, GPUs are split by the models' shares of the offered tokens.",
        ),
        Policy(
            name="uniform-reload",
            scheduler=SchedulerConfig(policy="uniform"),
            router=_LEAST_LOAD,
            begin="planned",
            start_s=RELOAD_S,
            known="OServe's baseline vLLM(reload): a uniform deployment chosen anew as the mix "
            "changes; reloading a 70B model takes more than 50 s.",
            inferred="50 s for every model and shape; how often its authors chose anew is not "
            f"published. {_BEGINS}",
        ),
        Policy(
            name="uniform-fast",
            scheduler=SchedulerConfig(policy="uniform"),
            router=_LEAST_LOAD,
            begin="planned",
            start_s=FAST_SWITCH_S,
            known="One account of vLLM(reload) lets it switch as fast as OServe does: below 10 s.",
            inferred=f"10 s, the published bound. {_BEGINS}",
        ),
        Policy(
            name="llumnix",
            router=RouterConfig(policy="free_kv"),
            begin="best",
            migration="llumnix",
            known="Dispatch to the most free KV per request; live migration of the shortest "
            "running request from replicas with less than 3 free blocks per request to the "
            "freest, one at a time each, with a pause of 20 to 30 ms (OSDI 2024, and defaults of "
            "its released code).",
            inferred="Uniform replicas of the shape that is best in hindsight, which is kind to "
            "it; a look every 0.5 s instead of 0.05 s; its auto-scaling is off, since the GPUs "
            "are given.",
        ),
        Policy(
            name="dynamo",
            scheduler=SchedulerConfig(policy="dynamo"),
            router=RouterConfig(policy="kv_cost"),
            begin="best",
            known="Uniform replicas, whose number follows the forecast load over the profiled "
            "throughput every 180 s, and observed latency every 5 s; requests go where prompt "
            "blocks to compute plus blocks held are fewest (its planner's and router's "
            "documentation).",
            inferred="The shape that is best in hindsight, as if its profiler had found it; "
            "prefill and decode together; cached prefixes by what was sent where, not by engines' "
            "events. Its own start-up time is the cost model's.",
        ),
        Policy(
            name="oserve-paper",
            scheduler=SchedulerConfig(policy="oserve-paper"),
            profiler=ProfilerConfig(window_s=PAPER_PERIOD_S),
            forecaster=ForecasterConfig(horizon_windows=1),
            begin="planned",
            start_s=FAST_SWITCH_S,
            forecast="oracle",
            known="Each minute: rates of about 4 types forecast by LSTMs (5 % RRMSE reported); "
            "shapes by a flow-guided search that ends after 20 iterations without gain; shares by "
            "max flow; a switch whenever the best deployment differs, in less than 10 s "
            "(arXiv 2602.12151, by readers' notes of it: the paper's body was not read).",
            inferred="Arrivals are foreseen exactly unless its name says otherwise, in place of "
            "the LSTMs; a replica takes 10 s to start, the published bound, while what it "
            "replaces is stopped; requests that run go on elsewhere by recomputing their prompt "
            "where theirs copies long KV; its search takes the time that our code of it takes. "
            f"{_BEGINS}",
        ),
        Policy(
            name="exhaustive",
            scheduler=SchedulerConfig(policy="exhaustive"),
            profiler=ProfilerConfig(window_s=PAPER_PERIOD_S),
            forecaster=ForecasterConfig(horizon_windows=1),
            begin="planned",
            start_s=FAST_SWITCH_S,
            forecast="oracle",
            known="Every deployment in turn, and the best dispatch of each: what OServe's paper "
            "compares its search with (about 50 s at 16 GPUs).",
            inferred="Each minute, with the forecasts and the switches that oserve-paper is given. "
            f"{_BEGINS}",
        ),
        Policy(
            name="melange",
            scheduler=SchedulerConfig(policy="melange"),
            begin="planned",
            start_s=FAST_SWITCH_S,
            known="Melange: an integer program gives slices of the load to the cheapest set of "
            "GPUs that carries it (arXiv 2404.14527).",
            inferred="Its kinds of GPU are our shapes, its buckets our types; solved each minute "
            f"with replicas that take 10 s to start; GPUs that it leaves idle. {_BEGINS}",
        ),
        *(
            Policy(
                name=name,
                scheduler=SchedulerConfig(
                    policy="oserve", elastic=elastic, switch_s=_FAST_S if start_s else 0.0
                ),
                begin="planned",
                start_s=start_s,
                live=start_s is None,
                known="What this project's scheduler, router and switcher do today" + more,
                inferred=f"{starts} {_BEGINS}",
            )
            for name, elastic, start_s, more, starts in (
                ("oserve", False, None, ".", _LIVE),
                ("oserve-fast", False, FAST_SWITCH_S, ".", _TEN),
                ("oserve-elastic", True, None, ", leaving GPUs unused that targets allow.", _LIVE),
            )
        ),
    )
}


def names() -> tuple[str, ...]:
    """All names, ``static-<shape>`` standing for every uniform shape."""
    return (f"{STATIC}<shape>", *POLICIES)


def policy_named(name: str) -> Policy:
    """The policy of that name, its forecast as the suffix says; raises ConfigInvalid."""
    base, at, forecast = name.partition("@")
    policy = POLICIES.get(base) or _static_shape(base)
    if policy is None:
        raise ConfigInvalid(
            field="policy", value=name, remedy=f"use one of: {', '.join(names())}; "
            "a suffix such as @oracle chooses the forecast",
        )  # fmt: skip
    if not at:
        return policy
    for known in FORECASTS:
        if forecast == known:
            return replace(policy, name=name, forecast=known)
    raise ConfigInvalid(
        field="policy", value=name, remedy=f"end it in @{', @'.join(FORECASTS)} or in no @"
    )


def _static_shape(name: str) -> Policy | None:
    if not name.startswith(STATIC):
        return None
    try:
        shape = Parallelism.parse(name.removeprefix(STATIC))
    except ConfigInvalid:
        return None
    return Policy(
        name=name,
        router=_LEAST_LOAD,
        begin="shape",
        shape=str(shape),
        known=f"Replicas of {shape} on all GPUs, for the whole trace.",
        inferred="Requests go to the less loaded of two replicas.",
    )
