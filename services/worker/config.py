"""What an operator may set on a worker."""

import msgspec

from shared.errors import ConfigInvalid


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``worker_id`` is the id of the GPU that this worker owns, as the topology names it."""

    worker_id: str
    report_s: float = 0.1  # between measurements of a replica's load; reported if it changed
    report_keepalive_s: float = 0.5  # at most this between reports, changed or not
    worker_report_s: float = 0.5  # between reports of the worker itself
    heartbeat_s: float = 0.5  # at most this between signs of life to an ingress that waits
    drain_timeout_s: float = 30.0  # on SIGTERM: what runs longer is handed back
    step_stall_s: float = 5.0  # an engine step that takes longer counts as stuck
    ack_delay_s: float = 0.02  # acknowledgements wait at most this for chunks to travel with
    inbox_max: int = 8192
    settled_max: int = 16384  # ended attempts remembered, so that a late submit is not run again
    moved_max: int = 16384  # attempts remembered that went on elsewhere, so that aborts follow
    replicas_max: int = 4
    pause_patience_s: float = 10.0  # a replica that is paused longer sends no heartbeats
    ahead_s: float = 0.1  # between copies of KV cache ahead of a pause
    take_timeout_s: float = 5.0  # for the old leaders to stand still and answer
    peer_host: str = "127.0.0.1"  # where other workers reach this one for bulk data
    peer_port: int = 0  # 0: any

    def checked(self) -> "WorkerConfig":
        """Self, if the periods fit together; raises ConfigInvalid."""
        for field in (
            "report_s", "report_keepalive_s", "worker_report_s", "heartbeat_s", "step_stall_s",
            "pause_patience_s", "ahead_s", "take_timeout_s",
        ):  # fmt: skip
            value: float = getattr(self, field)
            if value <= 0:
                raise ConfigInvalid(field=field, value=value, remedy="use a time above 0 s")
        if self.report_s > self.heartbeat_s:
            raise ConfigInvalid(
                field="report_s",
                value=self.report_s,
                remedy=f"heartbeats ride on reports: use at most heartbeat_s = {self.heartbeat_s}",
            )
        if self.report_s > self.report_keepalive_s:
            raise ConfigInvalid(
                field="report_keepalive_s",
                value=self.report_keepalive_s,
                remedy=f"loads are measured every report_s = {self.report_s}: use that or more",
            )
        return self
