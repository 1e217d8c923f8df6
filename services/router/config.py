"""The router's knobs."""

from typing import Literal

import msgspec

from shared.errors import ConfigInvalid

PolicyName = Literal["plan", "least_load", "round_robin", "prefix_affinity", "free_kv", "kv_cost"]


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    policy: PolicyName = "plan"
    report_stale_s: float = 1.0  # an older report starts to lose its authority
    report_dead_s: float = 3.0  # with an older one the replica gets nothing
    decision_lag_s: float = 0.05  # a decision younger than this is in no report yet
    decision_settle_s: float = 0.3  # no newer report: the last one shows all before it
    load_gain: float = 4.0  # how fast a loaded replica loses its share of the plan
    length_spread_ln: float = 0.7  # spread of ln(tokens) within one request type
    start_hold_s: float = 0.6  # for the plan and the reports; idle replicas report each 0.5 s
    epoch_reset_s: float = 10.0  # a lower epoch is believed when ours is silent this long
    no_replica_retry_s: float = 0.5
    overloaded_retry_s: float = 1.0
    prefix_load_slack: float = 0.25  # how much busier than the least busy a prefix's home may be
    replicas_max: int = 1024  # replicas remembered in all; those of the plan always are
    decisions_max: int = 4096  # own decisions remembered per replica between reports
    tenants_max: int = 4096
    prefixes_max: int = 65536
    parked_max: int = 4096  # questions held at start
    inbox_max: int = 8192

    def checked(self) -> "RouterConfig":
        """Self, if every value makes sense; raises ConfigInvalid."""
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field == "policy":
                continue
            least = 1 if field.endswith("_max") else 0
            if value < least:
                raise ConfigInvalid(
                    field=f"router.{field}", value=value, remedy=f"use {least} or more"
                )
        if self.length_spread_ln == 0:
            raise ConfigInvalid(
                field="router.length_spread_ln", value=0, remedy="use more than 0, such as 0.7"
            )
        if self.report_dead_s <= self.report_stale_s:
            raise ConfigInvalid(
                field="router.report_dead_s",
                value=self.report_dead_s,
                remedy=f"make it larger than report_stale_s ({self.report_stale_s})",
            )
        return self
