"""The cost model of measured profiles, as planners ask it."""

from services.scheduler.policies.capacity import ReplicaKind
from services.scheduler.policies.costs import known, served
from shared.cost.limits import EngineLimits
from shared.cost.model import CostModel
from shared.slo import SloTarget


class CostRates:
    """Rates and cost models from ``shared/cost``. What is asked twice is worked out once there."""

    def fits(self, kind: ReplicaKind) -> bool:
        return _known(kind) is not None

    def requests_per_s(
        self,
        kind: ReplicaKind,
        lengths: tuple[float, float],
        target: SloTarget,
        limits: EngineLimits,
    ) -> float:
        return served(self.model(kind), lengths, target, limits).requests_per_s

    def model(self, kind: ReplicaKind) -> CostModel:
        model = _known(kind)
        assert model is not None, f"{kind} does not fit, and was to be left out"
        return model


def _known(kind: ReplicaKind) -> CostModel | None:
    return known(kind.gpu, kind.profile, kind.shape, kind.node_gpus)
