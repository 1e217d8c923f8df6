"""At which pace the cores of a simulated mesh repeat themselves.

With incidents every setting is production's. Without, nobody dies, so that nobody need prove to be
alive: heartbeats, repeated plans and reports that say nothing new come every ``HUSH_S``, and
whoever waits for them is as much more patient. What is decided, and when, stays the same.
"""

from dataclasses import dataclass

import msgspec

from loadgen.simulator.outcome import SimulationSpec
from services.forecaster.config import ForecasterConfig
from services.ingress.config import IngressConfig
from services.profiler.config import ProfilerConfig
from services.router.config import RouterConfig
from services.scheduler.config import SchedulerConfig
from services.switcher.config import SwitcherConfig
from services.worker.config import WorkerConfig

HUSH_S = 30.0
PATIENT_S = 4 * HUSH_S
HUSHED_SWEEP_S = 5.0  # while no request waits to be routed again
OPEN_MAX = 1_000_000  # a trace's backlog is measured, not refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Paces:
    """The settings of every core. ``pulse_s``: how long a worker whose engines stand still may go
    without measuring them; None: it measures at each of its periods."""

    ingress: IngressConfig
    router: RouterConfig
    profiler: ProfilerConfig
    forecaster: ForecasterConfig
    scheduler: SchedulerConfig
    switcher: SwitcherConfig
    worker: WorkerConfig
    pulse_s: float | None


def paces(spec: SimulationSpec) -> Paces:
    """The settings for a run; a request may wait as long as it takes."""
    policy = spec.policy
    ingress = IngressConfig(
        first_route_s=IngressConfig().request_s, open_requests_max=OPEN_MAX, completed_s=1.0
    )
    method = "last_value" if spec.forecast == "last" else policy.forecaster.method
    forecaster = msgspec.structs.replace(policy.forecaster, method=method)
    if spec.incidents:
        return Paces(
            ingress=ingress,
            router=policy.router,
            profiler=policy.profiler,
            forecaster=forecaster,
            scheduler=policy.scheduler,
            switcher=policy.switcher,
            worker=WorkerConfig(worker_id=""),
            pulse_s=None,
        )
    replace = msgspec.structs.replace
    static = policy.scheduler.policy == "static"
    period_s = 10.0 if static else policy.scheduler.plan_period_s
    return Paces(
        ingress=replace(
            ingress, stall_s=PATIENT_S, probe_s=ingress.request_s, sweep_s=HUSHED_SWEEP_S
        ),
        router=replace(policy.router, report_stale_s=PATIENT_S, report_dead_s=2 * PATIENT_S),
        profiler=policy.profiler,
        forecaster=forecaster,
        scheduler=replace(policy.scheduler, worker_timeout_s=PATIENT_S, plan_period_s=period_s),
        switcher=replace(
            policy.switcher,
            command_retry_s=HUSH_S,
            publish_period_s=HUSH_S,
            worker_timeout_s=PATIENT_S,
        ),
        worker=WorkerConfig(
            worker_id="", worker_report_s=HUSH_S, heartbeat_s=HUSH_S, report_keepalive_s=HUSH_S
        ),
        # Whoever routes by free KV has to hear of it while it fills, not when a request ends.
        pulse_s=None if policy.router.policy == "free_kv" else HUSH_S,
    )
