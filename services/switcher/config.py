"""What an operator may set on the switcher."""

import msgspec

from shared.errors import ConfigInvalid


class SwitcherConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    drain_timeout_s: float = 30.0  # what runs longer is handed back and goes on elsewhere
    drain_grace_s: float = 2.0  # on top of it, for the answer's way
    stop_timeout_s: float = 15.0
    start_timeout_s: float = 120.0  # loading weights takes minutes for big models
    prepare_timeout_s: float = 120.0  # to make new replicas ready beside the old; late rolls back
    pause_timeout_s: float = 5.0  # to reach a step boundary; late rolls back
    take_timeout_s: float = 10.0  # to take requests and KV cache over, or for a stage; likewise
    activate_timeout_s: float = 5.0  # the plan is in force by then: late is left to repair
    retire_timeout_s: float = 15.0  # the same, for freeing the old replicas' GPUs
    stages_max: int = 16  # of weights that do not fit beside the old ones; above it reloads
    cache_tokens_min: int = 2048  # of a new replica, until the old ones have left; or as they have
    verify: bool = False  # compare checksums of whatever is copied with its source
    command_retry_s: float = 0.5  # between copies of a command that is not yet answered
    repair_retry_s_max: float = 30.0  # a replica that keeps failing is started this rarely
    publish_period_s: float = 1.0  # between copies of the plan in force
    worker_timeout_s: float = 2.0  # silence after which a worker counts as gone
    refusal_s: float = 5.0  # a plan that failed is refused this long, doubled each time
    refusal_s_max: float = 60.0
    inbox_max: int = 4096

    def checked(self) -> "SwitcherConfig":
        """Self, if every time is above zero; raises ConfigInvalid."""
        for field in self.__struct_fields__:
            value: float = getattr(self, field)
            if field != "verify" and value <= 0:
                raise ConfigInvalid(
                    field=f"switcher.{field}", value=value, remedy="use a value above 0"
                )
        if self.publish_period_s < self.command_retry_s:
            raise ConfigInvalid(
                field="switcher.publish_period_s",
                value=self.publish_period_s,
                remedy=f"use at least command_retry_s = {self.command_retry_s}",
            )
        return self
