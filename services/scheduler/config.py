"""What an operator may set on the scheduler."""

from collections.abc import Collection, Mapping
from math import isfinite
from typing import Literal

import msgspec

from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.slo import DEFAULT_TARGETS, SLO_CLASSES, SloTarget

AUTO = "auto"
PolicyName = Literal[
    "static", "uniform", "dynamo", "melange", "exhaustive", "oserve-paper", "oserve"
]


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    policy: PolicyName = "static"
    plan_period_s: float = 1.0  # between looks at the workers, and between copies of a wish
    policy_period_s: float = 0.0  # between decisions of a policy; 0: its own
    solve_timeout_s: float = 30.0  # a slow policy that takes longer has its answer dropped
    target: SloTarget = DEFAULT_TARGETS["standard"]  # what replicas are planned to meet
    targets: dict[str, SloTarget] | None = None  # the same for single models, by id
    class_targets: dict[str, SloTarget] | None = None  # of other classes; else the mesh's defaults
    replicas_min: dict[str, int] | None = None  # by model id; 1 where it says nothing, 0: none idle
    survive: int = 0  # replicas that may be lost with the rest still carrying the demand: 0 or 1
    elastic: bool = False  # leave GPUs unused that the targets do not need
    gpu_prices: dict[str, float] | None = None  # per hour, by kind: what elastic plans save
    dynamo_shape: str = "auto"  # of every replica under dynamo; auto: the topology's, or default
    switch_s: float = 0.0  # what oserve takes a switch of replicas to last; 0: as the profiles say
    correction_period_s: float = 5.0  # between corrections of weights under oserve; 0: none
    watch_s: float = 60.0  # what is expected is watched for so long before oserve plans for it
    forecast_stale_s: float = 0.0  # a forecast this old counts no more; 0: three of its horizons
    keep_period_s: float = 60.0  # between two words of why the plan is kept that differ in numbers
    worker_timeout_s: float = 2.0  # silence after which a worker counts as gone
    settle_s: float = 1.0  # a worker that appears is planned onto after this long
    start_wait_s: float = 5.0  # how long a new scheduler waits for the topology's workers
    inbox_max: int = 4096

    def checked(self) -> "SchedulerConfig":
        """Self, if every value makes sense by itself; raises ConfigInvalid."""
        for field in ("plan_period_s", "worker_timeout_s", "start_wait_s", "solve_timeout_s"):
            _demand(
                field, getattr(self, field), "use a time above 0 s", ok=getattr(self, field) > 0
            )
        for field in (
            "settle_s", "policy_period_s", "correction_period_s", "forecast_stale_s",
            "keep_period_s", "switch_s", "watch_s",
        ):  # fmt: skip
            _demand(field, getattr(self, field), "use 0 s or more", ok=getattr(self, field) >= 0)
        self._check_targets()
        self._check_needs()
        if self.dynamo_shape != AUTO:
            Parallelism.parse(self.dynamo_shape)
        return self

    def checked_for(self, models: Collection[str]) -> "SchedulerConfig":
        """Self, if it is ``checked`` and speaks of no other than these ``models``."""
        self.checked()
        remedy = f"name a model of the topology: {', '.join(models)}"
        for field, ids in (("targets", self.targets), ("replicas_min", self.replicas_min)):
            for model_id in sorted((ids or {}).keys() - set(models)):
                raise ConfigInvalid(field=f"scheduler.{field}", value=model_id, remedy=remedy)
        return self

    @property
    def targets_by_class(self) -> Mapping[str, SloTarget]:
        """What requests of each SLO class should meet."""
        return {**DEFAULT_TARGETS, "standard": self.target, **(self.class_targets or {})}

    def _check_targets(self) -> None:
        models, classes = self.targets or {}, self.class_targets or {}
        for name in classes:
            known = name in SLO_CLASSES and name != "standard"
            others = ", ".join(c for c in SLO_CLASSES if c != "standard")
            _demand(
                "class_targets", name, f"use {others}; standard's is scheduler.target", ok=known
            )
        every = {"target": self.target}
        every |= {f"targets.{name}": target for name, target in models.items()}
        every |= {f"class_targets.{name}": target for name, target in classes.items()}
        for name, target in every.items():
            above = target.ttft_s > 0 and target.tpot_s > 0
            _demand(name, target, "use times above 0 s", ok=above)

    def _check_needs(self) -> None:
        for model_id, count in (self.replicas_min or {}).items():
            _demand(f"replicas_min.{model_id}", count, "use 0 or more", ok=count >= 0)
        _demand("survive", self.survive, "use 0 or 1", ok=self.survive in (0, 1))
        for kind, price in (self.gpu_prices or {}).items():
            fine = isfinite(price) and price > 0
            _demand(f"gpu_prices.{kind}", price, "use a price above 0 per hour", ok=fine)


def _demand(field: str, value: object, remedy: str, *, ok: bool) -> None:
    if not ok:
        raise ConfigInvalid(field=f"scheduler.{field}", value=value, remedy=remedy)
