"""What an operator sees of a mesh."""

import io
from typing import Any

from rich.console import Console

from deploy import status
from deploy.status import MeshStatus
from shared.hardware import GpuSpec
from shared.messages.plans import DeploymentPlan, PlanInForce, ReplicaSpec
from shared.messages.replicas import ReplicaReport, WorkerReport

LLAMA, QWEN = "llama-3.1-8b", "qwen2.5-32b"


def _status(models: dict[str, str], weights: dict[str, dict[str, float]]) -> MeshStatus:
    """A mesh that serves; ``models`` names each replica's."""
    report: dict[str, Any] = {"incarnation": "i", "epoch": 1, "phase": "serving"}
    specs = tuple(
        ReplicaSpec(replica_id=id_, model_id=model_id, parallelism="tp1pp1", gpus=(f"n0-{id_}",))
        for id_, model_id in models.items()
    )
    workers = tuple(
        WorkerReport(
            worker_id=spec.gpus[0],
            incarnation="i",
            node_id="n0",
            gpu=GpuSpec(gpu_id=spec.gpus[0]),
            models=tuple(models.values()),
        )
        for spec in specs
    )
    return MeshStatus(
        bus_url="nats://127.0.0.1:4222",
        url="http://127.0.0.1:8000",
        services=(),
        workers=workers,
        replicas=tuple(
            ReplicaReport(replica_id=spec.replica_id, worker_id=spec.gpus[0], **report)
            for spec in specs
        ),
        plan=PlanInForce(
            epoch=1, plan=DeploymentPlan(plan_id="p", replicas=specs, weights=weights)
        ),
    )


def _shown(seen: MeshStatus) -> list[str]:
    """Lines of the status on a terminal of 80 columns."""
    text = io.StringIO()
    console = Console(file=text, width=80, highlight=False, color_system=None)
    status._show(console, seen)  # pyright: ignore[reportPrivateUsage]
    return text.getvalue().splitlines()


def test_each_models_requests_are_shown_apart() -> None:
    """An operator could not tell which replicas serve which model, or would read a model's share
    of the plan as shares of its requests."""
    row = {"*": {"a0": 0.1, "a1": 0.3, "b0": 0.6}, "0": {"a0": 1.0}}
    lines = _shown(_status({"a0": LLAMA, "a1": LLAMA, "b0": QWEN}, row))
    assert lines[-3:] == [
        f"  requests for {LLAMA} of type *: a0 25%, a1 75%",
        f"  requests for {LLAMA} of type 0: a0 100%",
        f"  requests for {QWEN} of type *: b0 100%",
    ]
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "a column was cut short"


def test_one_model_goes_without_saying() -> None:
    """Its name in each line would hide what differs."""
    lines = _shown(_status({"a0": LLAMA, "a1": LLAMA}, {"*": {"a0": 0.5, "a1": 0.5}}))
    assert lines[-1] == "  requests of type *: a0 50%, a1 50%"
    assert not any(LLAMA in line for line in lines)
