"""The problem that a policy is given, from all that the core knows."""

from services.scheduler.config import SchedulerConfig
from services.scheduler.demands import Demands
from services.scheduler.fleet import Fleet, engine_limits
from services.scheduler.policies.interface import Needs, Problem
from services.scheduler.standing import Standing
from shared.mesh import MeshConfig


class Framing:
    def __init__(self, config: SchedulerConfig, mesh: MeshConfig) -> None:
        self._config, self._mesh = config, mesh
        self._limits = engine_limits(mesh.engine)
        self._needs = Needs(
            replicas_min=dict(config.replicas_min or {}),
            survive=config.survive,
            elastic=config.elastic,
            gpu_prices=dict(config.gpu_prices or {}),
        )

    def problem(self, fleet: Fleet, demands: Demands, standing: Standing, now_s: float) -> Problem:
        """What is in force is told as it was decided: a policy would take a correction back."""
        in_use = {gpu for spec in standing.replicas for gpu in spec.gpus}
        models, config = self._mesh.models, self._config
        targets = config.targets or {}
        return Problem(
            now_s=now_s,
            epoch=standing.epoch,
            models=demands.models(now_s),
            offers=fleet.offers(now_s, in_use=in_use),
            in_force=standing.as_decided(),
            wishes=self._mesh.replicas,
            kinds=dict(fleet.kinds),
            profiles={model.model_id: model.profile_name for model in models},
            targets={m.model_id: targets.get(m.model_id, config.target) for m in models},
            limits=self._limits,
            class_targets=config.targets_by_class,
            history=demands.history,
            needs=self._needs,
            dwell_s=standing.dwell_s(now_s),
            time_limit_s=config.solve_timeout_s,
            observed=demands.windows,
            loads=demands.loads,
        )
