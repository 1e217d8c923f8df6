"""The control plane's processes of a simulated mesh, and how long they wait for what there."""

from collections.abc import Callable, Mapping

from loadgen.simulator.jobs import slow_job
from loadgen.simulator.process import Job, NodeSpec, Port
from loadgen.simulator.workshop import SMALL_SHAPE
from services.ingress.config import IngressConfig
from services.router import core as router
from services.router.config import RouterConfig
from services.scheduler import core as scheduler
from services.scheduler.config import SchedulerConfig
from services.switcher import core as switcher
from services.switcher.config import SwitcherConfig
from services.switcher.events import PLAN_TRANSFER
from services.switcher.planning import plan as plan_transfer
from shared.core import Core
from shared.mesh import MeshConfig
from shared.messages.requests import FailureCode
from shared.models import ModelSpec

MODEL = ModelSpec(model_id=SMALL_SHAPE.model_id)
PLANNING_S = 0.05
SWITCHER = SwitcherConfig(
    drain_timeout_s=1.5,
    drain_grace_s=0.5,
    stop_timeout_s=3.0,
    start_timeout_s=4.0,
    prepare_timeout_s=4.0,
    pause_timeout_s=2.0,
    take_timeout_s=3.0,
    activate_timeout_s=2.0,
    retire_timeout_s=3.0,
    refusal_s=1.0,
    refusal_s_max=4.0,
    repair_retry_s_max=4.0,
    cache_tokens_min=16,
)
SCHEDULER = SchedulerConfig(start_wait_s=3.0)
PATIENT = IngressConfig(first_route_s=600.0)
IMPATIENT = IngressConfig(first_route_s=2.0, request_s=8.0)
IMPATIENT_FAILURES: tuple[FailureCode, ...] = ("no_replica", "deadline")


def router_node(name: str) -> NodeSpec:
    config = RouterConfig(epoch_reset_s=5.0)

    def make(_number: int, _port: Port) -> tuple[Core, Mapping[str, Job]]:
        return router.Router(config, models=(MODEL.model_id,), instance_id=name), {}

    return NodeSpec(name=name, make=make, inputs=router.INPUTS, queries=router.QUERIES)


def scheduler_node(topology: Callable[[], MeshConfig]) -> NodeSpec:
    """``topology`` is read anew at each start: an operator may have edited it."""
    return NodeSpec(
        name="scheduler",
        make=lambda _n, _p: (scheduler.Scheduler(SCHEDULER, topology()), {}),
        inputs=scheduler.INPUTS,
        queries=scheduler.QUERIES,
    )


def switcher_node() -> NodeSpec:
    def make(_number: int, port: Port) -> tuple[Core, Mapping[str, Job]]:
        job = slow_job(plan_transfer, port, took_s=PLANNING_S)
        return switcher.Switcher(SWITCHER), {PLAN_TRANSFER: job}

    return NodeSpec(name="switcher", make=make, inputs=switcher.INPUTS)
