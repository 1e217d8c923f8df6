"""Logs, metrics and traces of one process.

Logs are JSON lines on stdout, the event's constant name first, ids as fields. Metrics are
Prometheus's, on a port of the process's own. Traces follow W3C trace context in message headers
and leave by OTLP when an endpoint is configured; without one nothing is measured or sent.
"""

import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal
from wsgiref.simple_server import WSGIServer

import msgspec
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client import generate_latest as _generate_latest

from shared.errors import ConfigInvalid

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
EXPORT_TIMEOUT_S = 2.0  # retries included; also what a dead collector costs a service that ends
LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip


class TelemetryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    metrics_enabled: bool = True
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = (
        0  # 0: any free port; `oserve status` tells which
    )
    otlp_endpoint: str = ""  # e.g. http://127.0.0.1:4318; empty: no traces
    trace_ratio: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 1.0  # share of requests traced


def log_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` as a log call's ``extra``, which may not reuse the names of a record's own."""
    return {f"{k}_" if k in _STANDARD else k: v for k, v in fields.items()}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, service, then the record's extra fields."""

    def __init__(self, service: str, instance_id: str) -> None:
        super().__init__()
        self._service, self._instance_id = service, instance_id

    def format(self, record: logging.LogRecord) -> str:
        fixed: dict[str, Any] = {
            "time_s": round(record.created, 6),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "service": self._service,
            "instance": self._instance_id,
        }
        own = ((k, v) for k, v in vars(record).items() if k not in _STANDARD)
        extra = {f"{k}_" if k in fixed else k: v for k, v in own}
        if record.exc_info:
            extra["exception"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(fixed | extra, enc_hook=repr).decode()
        except (TypeError, ValueError, OverflowError):  # a field that JSON cannot hold
            return msgspec.json.encode(fixed | {k: ascii(v) for k, v in extra.items()}).decode()


def configure_logs(config: TelemetryConfig, *, service: str, instance_id: str) -> None:
    """Send every logger of the process to stdout as JSON lines."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(service, instance_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.log_level)
    for noisy in ("nats", "aiohttp.access", "opentelemetry"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Metrics:
    """The process's registry. Label values must come from small closed sets."""

    def __init__(self, service: str) -> None:
        disable_created_metrics()  # a gauge beside each counter, which nobody reads
        self.registry = CollectorRegistry()
        self._service = service
        self._server: tuple[WSGIServer, threading.Thread] | None = None

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"oserve_{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"oserve_{name}", text, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Histogram:
        return Histogram(f"oserve_{name}", text, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        return _generate_latest(self.registry)

    def serve(self, config: TelemetryConfig) -> str:
        """Open the metrics port; its URL, or "" when disabled. Raises ConfigInvalid."""
        if not config.metrics_enabled:
            return ""
        try:
            self._server = start_http_server(
                config.metrics_port, addr=config.metrics_host, registry=self.registry
            )
        except OSError as error:
            raise ConfigInvalid(
                field="telemetry.metrics_port",
                value=f"{config.metrics_host}:{config.metrics_port}",
                remedy=f"cannot listen there ({error.strerror or error}); 0 takes any free port",
            ) from None
        return f"http://{config.metrics_host}:{self._server[0].server_port}/metrics"

    def close(self) -> None:
        if self._server is not None:
            self._server[0].shutdown()
            self._server[0].server_close()
            self._server[1].join()
            self._server = None


class Tracing:
    """Spans with W3C context in headers; free of cost when no endpoint is configured."""

    def __init__(self, config: TelemetryConfig, *, service: str, instance_id: str) -> None:
        self.enabled = bool(config.otlp_endpoint)
        self._provider: TracerProvider | None = None
        if not self.enabled:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,  # imports requests and protobuf: only when used
        )

        self._provider = TracerProvider(
            resource=Resource.create(
                {"service.name": f"oserve-{service}", "service.instance.id": instance_id}
            ),
            sampler=ParentBased(TraceIdRatioBased(config.trace_ratio)),
        )
        endpoint = config.otlp_endpoint.rstrip("/") + "/v1/traces"
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("oserve")

    def span(
        self, name: str, headers: Mapping[str, str] | None = None, **attributes: str | float
    ) -> AbstractContextManager[Any]:
        """A span around the ``with`` block, child of the context in ``headers`` if there is one."""
        if not self.enabled:
            return nullcontext()
        parent = propagate.extract(dict(headers)) if headers else None
        return self._tracer.start_as_current_span(name, context=parent, attributes=attributes)

    def start(self, name: str, headers: Mapping[str, str] | None = None) -> trace.Span | None:
        """A span that outlives a ``with`` block; the caller ends it."""
        if not self.enabled:
            return None
        parent = propagate.extract(dict(headers)) if headers else None
        return self._tracer.start_span(name, context=parent)

    def headers(self, span: trace.Span | None = None) -> dict[str, str] | None:
        """Headers that carry ``span``, or the current one; None when there is nothing to carry."""
        if not self.enabled:
            return None
        carrier: dict[str, str] = {}
        context = trace.set_span_in_context(span) if span is not None else None
        propagate.inject(carrier, context=context)
        return carrier or None

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()
