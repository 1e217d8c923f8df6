"""The workers as the scheduler knows them by their reports, and the GPUs it may plan onto."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import msgspec

from services.scheduler.config import SchedulerConfig
from services.scheduler.policies.interface import GpuOffer
from shared.cost.limits import EngineLimits
from shared.mesh import EngineSpec, MeshConfig
from shared.messages.replicas import WorkerReport

FAILED_S, FAILED_S_MAX = 10.0, 320.0
"""How long a GPU on which a replica broke is not planned onto, doubled each time. One that keeps
breaking replicas would otherwise be given one again and again."""
FORGIVEN_S = 900.0  # after so long without a failure the next one counts as the first


@dataclass(slots=True)
class _Worker:
    report: WorkerReport
    seen_s: float
    appeared_s: float
    failures: int = 0
    failed_s: float = float("-inf")

    def trusted(self, now_s: float) -> bool:
        wait_s = min(FAILED_S_MAX, FAILED_S * 2.0 ** min(self.failures - 1, 16))
        return self.failures == 0 or now_s - self.failed_s > wait_s


class Fleet:
    """A worker is gone after ``worker_timeout_s`` of silence, and planned onto once it has been
    there for ``settle_s``: one that flickers would move replicas at each appearance. After a
    replica broke on it, it is planned around for a while."""

    def __init__(self, config: SchedulerConfig, mesh: MeshConfig) -> None:
        self._config = config
        self._models = {model.model_id for model in mesh.models}
        self._expected = {gpu.gpu_id for gpu in mesh.gpus()}
        self._workers: dict[str, _Worker] = {}
        self.kinds = {gpu.gpu_id: gpu.kind for gpu in mesh.gpus()}

    def hear(self, report: WorkerReport, now_s: float) -> bool:
        """Take a report in; whether its worker has begun to leave."""
        worker = self._workers.get(report.worker_id)
        if worker is None or self._gone(worker, now_s):
            self._workers[report.worker_id] = _Worker(report, now_s, now_s)
            return False
        was_leaving, worker.report, worker.seen_s = worker.report.leaving, report, now_s
        if was_leaving and not report.leaving:
            worker.appeared_s = now_s
        return report.leaving and not was_leaving

    def failed(self, worker_id: str, now_s: float) -> bool:
        """A replica in force broke there; False if that is known already."""
        worker = self._workers.get(worker_id)
        if worker is None or not worker.trusted(now_s):
            return False
        forgiven = now_s - worker.failed_s > FORGIVEN_S
        worker.failures = 1 if forgiven else worker.failures + 1
        worker.failed_s = now_s
        return True

    @property
    def complete(self) -> bool:
        """Whether every worker of the topology has reported."""
        return self._expected <= self._workers.keys()

    def settle(self) -> None:
        """Count whoever is there as settled: the wait at the start was long enough."""
        for worker in self._workers.values():
            worker.appeared_s = float("-inf")

    def absent(self, offered: Iterable[str]) -> list[str]:
        """The topology's workers that are not on offer."""
        return sorted(self._expected.difference(offered))

    def offers(self, now_s: float, *, in_use: Collection[str]) -> tuple[GpuOffer, ...]:
        """GPUs that may be planned onto, by id. Those ``in_use`` need not settle."""
        offers: list[GpuOffer] = []
        for worker_id, worker in sorted(self._workers.items()):
            report = worker.report
            if self._gone(worker, now_s):
                if worker_id not in self._expected:
                    del self._workers[worker_id]  # of no topology we know: forget it
                continue
            settled = worker.seen_s - worker.appeared_s >= self._config.settle_s
            models = self._models.intersection(report.models)
            there = worker.trusted(now_s) and not report.leaving
            if there and models and (settled or worker_id in in_use):
                self.kinds[worker_id] = report.gpu.kind
                offers.append(
                    GpuOffer(
                        gpu_id=worker_id,
                        node_id=report.node_id,
                        kind=report.gpu.kind,
                        models=() if models == self._models else tuple(sorted(models)),
                        movable=_movable(report),
                        cache_bytes=sum(held.cache_bytes for held in report.replicas),
                    )
                )
        return tuple(offers)

    def _gone(self, worker: _Worker, now_s: float) -> bool:
        return now_s - worker.seen_s > self._config.worker_timeout_s


def _movable(report: WorkerReport) -> tuple[str, ...]:
    return tuple(shape.model_id for shape in report.shapes) if report.peer else ()


def engine_limits(engine: EngineSpec) -> EngineLimits:
    """Bounds of the topology's engine, as far as it sets them; else vLLM's."""
    if engine.kind == "modelled":
        set_: dict[str, object] = msgspec.structs.asdict(engine.modelled)
    else:
        set_ = engine.torch
    limits = EngineLimits()
    known = {name: set_.get(name) for name in limits.__struct_fields__}
    return msgspec.structs.replace(
        limits,
        **{name: value for name, value in known.items() if isinstance(value, int) and value > 0},
    )
