"""What is kept of an ended request: metrics, one log line, one RequestCompleted."""

import logging

from services.ingress.completed import completed
from services.ingress.gateway import Gateway
from services.ingress.journey import Journey
from services.ingress.openai_errors import ApiError
from shared.messages.requests import RequestCompleted
from shared.service import ServiceContext
from shared.slo import DEFAULT_TARGETS, meets

log = logging.getLogger("oserve.request")


class Recorder:
    def __init__(self, context: ServiceContext, gateway: Gateway) -> None:
        self._clock, self._gateway = context.clock, gateway
        metrics = context.metrics
        by = ["model", "slo_class"]
        self._requests = metrics.counter("requests", "Ended requests", [*by, "outcome"])
        self._refused = metrics.counter("requests_refused", "Answers with an error", ["code"])
        self._ttft = metrics.histogram("time_to_first_token_seconds", "Arrival to first token", by)
        self._tpot = metrics.histogram(
            "time_per_output_token_seconds",
            "Mean time per output token after the first",
            by,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0),
        )
        self._e2e = metrics.histogram("request_duration_seconds", "Arrival to last token", by)
        self._overhead = metrics.histogram(
            "overhead_seconds",
            "Arrival to the submission that a replica took",
            buckets=(0.0005, 0.001, 0.002, 0.003, 0.006, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        )
        self._tokens = metrics.counter("tokens", "Tokens of ended requests", ["model", "direction"])
        self._good = metrics.counter(
            "requests_within_slo", "Completed requests that met TTFT and TPOT", by
        )

    def refused(self, path: str, error: ApiError) -> None:
        """An error answer; what had become a request is also counted by ``ended``."""
        self._refused.labels(error.code or error.type).inc()
        log.info(
            "request.refused",
            extra={"path": path[:100], "status": error.status, "code": error.code},
        )

    def ended(self, journey: Journey) -> None:
        """Once per journey, after its last token, its failure or its client's departure."""
        now_s = self._clock.now_s()
        record = completed(journey, now_s)
        of = (journey.model_id, journey.slo_class)
        self._requests.labels(*of, record.outcome).inc()
        self._tokens.labels(journey.model_id, "input").inc(record.input_tokens)
        self._tokens.labels(journey.model_id, "output").inc(record.output_tokens)
        if record.ttft_s is not None:
            self._ttft.labels(*of).observe(record.ttft_s)
        if record.tpot_s is not None:
            self._tpot.labels(*of).observe(record.tpot_s)
        if journey.accepted_s is not None:
            self._overhead.observe(record.overhead_s)
        if record.outcome == "completed":
            self._e2e.labels(*of).observe(record.e2e_s)
            target = DEFAULT_TARGETS[journey.slo_class]
            if meets(target, ttft_s=record.ttft_s, tpot_s=record.tpot_s):
                self._good.labels(*of).inc()
        self._gateway.completed(record)
        log.info("request.ended", extra=_line(record) | {"handovers": journey.handovers})


def _line(record: RequestCompleted) -> dict[str, object]:
    """The canonical log line: milliseconds, since people read it."""
    return {
        "request_id": record.request_id,
        "outcome": record.outcome,
        "model_id": record.model_id,
        "slo_class": record.slo_class,
        "tenant": record.tenant,
        "replica_id": record.replica_id,
        "epoch": record.epoch,
        "attempts": record.attempts,
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "ttft_ms": None if record.ttft_s is None else round(record.ttft_s * 1e3, 2),
        "e2e_ms": round(record.e2e_s * 1e3, 2),
        "overhead_ms": round(record.overhead_s * 1e3, 2),
    }
