"""What an operator may set on the scheduler."""

from typing import Literal

import msgspec

from shared.errors import ConfigInvalid


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    policy: Literal["static"] = "static"
    plan_period_s: float = 1.0  # between decisions, and between copies of a wish
    worker_timeout_s: float = 2.0  # silence after which a worker counts as gone
    settle_s: float = 1.0  # a worker that appears is planned onto after this long
    start_wait_s: float = 5.0  # how long a new scheduler waits for the topology's workers
    inbox_max: int = 4096

    def checked(self) -> "SchedulerConfig":
        """Self, if every time is above zero; raises ConfigInvalid."""
        for field in ("plan_period_s", "worker_timeout_s", "start_wait_s"):
            value: float = getattr(self, field)
            if value <= 0:
                raise ConfigInvalid(
                    field=f"scheduler.{field}", value=value, remedy="use a time above 0 s"
                )
        if self.settle_s < 0:
            raise ConfigInvalid(
                field="scheduler.settle_s", value=self.settle_s, remedy="use 0 s or more"
            )
        return self
