"""The cost model of measured profiles, as planners ask it."""

from services.scheduler.policies.costs import known, served
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.hardware import Parallelism
from shared.slo import SloTarget


class CostRates:
    """Rates and latencies from ``shared/cost``. What is asked twice is worked out once there."""

    def fits(self, kind: str, name: str, shape: Parallelism, node_gpus: int) -> bool:
        return known(kind, name, shape, node_gpus) is not None

    def requests_per_s(  # noqa: PLR0913  # what a rate depends on
        self,
        kind: str,
        name: str,
        shape: Parallelism,
        node_gpus: int,
        lengths: tuple[float, float],
        target: SloTarget,
        limits: EngineLimits,
    ) -> float:
        return served(self.model(kind, name, shape, node_gpus), lengths, target, limits
        ).requests_per_s

    def model(self, kind: str, name: str, shape: Parallelism, node_gpus: int) -> CostModel:
        model = known(kind, name, shape, node_gpus)
        assert model is not None, f"{name} at {shape} on {kind} was to be left out"
        return model
