"""What an operator may set on the scheduler."""

from typing import Literal

import msgspec

from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.slo import DEFAULT_TARGETS, SloTarget

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
    replicas_min: dict[str, int] | None = None  # by model id; 1 where it says nothing, 0: none idle
    survive: int = 0  # replicas that may be lost with the rest still carrying the demand: 0 or 1
    elastic: bool = False  # leave GPUs unused that the targets do not need
    gpu_prices: dict[str, float] | None = None  # per hour, by kind: what elastic plans save
    dynamo_shape: str = "auto"  # of every replica under dynamo; auto: the topology's, or default
    worker_timeout_s: float = 2.0  # silence after which a worker counts as gone
    settle_s: float = 1.0  # a worker that appears is planned onto after this long
    start_wait_s: float = 5.0  # how long a new scheduler waits for the topology's workers
    inbox_max: int = 4096

    def checked(self) -> "SchedulerConfig":
        """Self, if every time is above zero and every shape can be read; raises ConfigInvalid."""
        for field in ("plan_period_s", "worker_timeout_s", "start_wait_s", "solve_timeout_s"):
            value: float = getattr(self, field)
            if value <= 0:
                raise ConfigInvalid(
                    field=f"scheduler.{field}", value=value, remedy="use a time above 0 s"
                )
        for field in ("settle_s", "policy_period_s"):
            value = getattr(self, field)
            if value < 0:
                raise ConfigInvalid(
                    field=f"scheduler.{field}", value=value, remedy="use 0 s or more"
                )
        for name, target in {"target": self.target, **(self.targets or {})}.items():
            if not (target.ttft_s > 0 and target.tpot_s > 0):
                raise ConfigInvalid(
                    field=f"scheduler.targets.{name}" if name != "target" else "scheduler.target",
                    value=target,
                    remedy="use times above 0 s",
                )
        if self.dynamo_shape != AUTO:
            Parallelism.parse(self.dynamo_shape)
        return self
