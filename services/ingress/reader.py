"""Reads bus messages from whoever sent them: what is none must not cost the next one."""

import logging
from typing import TypeVar

import msgspec

from shared.bus import Delivery
from shared.clock import Clock
from shared.messages.base import DataMessage, Message, decode
from shared.telemetry import Metrics

log = logging.getLogger("oserve.ingress")

WARNING_GAP_S = 1.0  # all are counted, few are logged
M = TypeVar("M", bound=Message | DataMessage)


class Reader:
    def __init__(self, clock: Clock, metrics: Metrics) -> None:
        self._clock = clock
        self._warned_s = -WARNING_GAP_S
        self._undecodable = metrics.counter(
            "ingress_undecodable", "Messages nobody could read", ["message"]
        )

    def read(self, delivery: Delivery, as_type: type[M]) -> M | None:
        try:
            return decode(delivery.payload, as_type)
        except msgspec.DecodeError as error:
            self._undecodable.labels(as_type.__name__).inc()
            now_s = self._clock.now_s()
            if now_s - self._warned_s >= WARNING_GAP_S:
                self._warned_s = now_s
                fields = {"subject": delivery.subject, "error": str(error)}
                log.warning("message.undecodable", extra=fields)
            return None
