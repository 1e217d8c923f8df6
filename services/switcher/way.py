"""Which way a switch goes, and why not live where it does not. Pure."""

from services.switcher.differences import arriving, leaving
from services.switcher.takers import orphans, takeovers
from services.switcher.view import WorkerView
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec, SwitchWay
from shared.placement.sheets import check_shape


def way_to(
    origin: DeploymentPlan, target: DeploymentPlan, view: WorkerView, now_s: float
) -> tuple[SwitchWay, str]:
    """The way from ``origin`` to ``target``, and why it is not live."""
    going, coming = leaving(origin, target), arriving(origin, target)
    if not going and not coming:
        return "live", ""  # other weights at most: no worker hears of it
    why = (
        _kept_from(origin, target, going, coming)
        or _workers_keep_from(_concerned(origin, target, going, coming), view, now_s)
        or _leaves(going, view)
    )
    return ("reload", why) if why else ("live", "")


def _kept_from(
    origin: DeploymentPlan,
    target: DeploymentPlan,
    going: tuple[ReplicaSpec, ...],
    coming: tuple[ReplicaSpec, ...],
) -> str:
    """What is in the plans themselves."""
    if not origin.replicas:
        return "nothing is in force that could be taken over"
    if again := sorted({s.replica_id for s in going} & {s.replica_id for s in coming}):
        return f"{again[0]} is in both plans, with another shape or on other GPUs"
    if models := orphans(origin, target):
        return f"no replica of {models[0]} is left to take its requests over"
    return ""


def _concerned(
    origin: DeploymentPlan,
    target: DeploymentPlan,
    going: tuple[ReplicaSpec, ...],
    coming: tuple[ReplicaSpec, ...],
) -> tuple[ReplicaSpec, ...]:
    takers = [spec for takeover in takeovers(origin, target) for spec in takeover.takers]
    return tuple(dict.fromkeys((*going, *coming, *takers)))


def _workers_keep_from(specs: tuple[ReplicaSpec, ...], view: WorkerView, now_s: float) -> str:
    """What the workers cannot do: a worker that is gone does nothing either way."""
    for spec in specs:
        for worker_id in spec.gpus:
            if view.gone(worker_id, now_s) or not view.reported(worker_id):
                continue
            shape = view.shape(worker_id, spec.model_id)
            if shape is None:
                return f"{worker_id} cannot move the weights of {spec.model_id}"
            if not view.peers((worker_id,)):
                return f"other workers cannot reach {worker_id}"
            try:
                check_shape(shape, Parallelism.parse(spec.parallelism))
            except ConfigInvalid as error:
                return f"{spec.replica_id}: {error}"
    return ""


def _leaves(going: tuple[ReplicaSpec, ...], view: WorkerView) -> str:
    for spec in going:
        if view.leaving(spec.gpus[0]):
            return f"{spec.gpus[0]} is shutting down and lets its requests end"
    return ""
