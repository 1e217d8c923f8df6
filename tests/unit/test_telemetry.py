"""Logs, metrics and traces as an operator's tools see them."""

import io
import json
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest

from shared.errors import ConfigInvalid
from shared.telemetry import JsonFormatter, Metrics, TelemetryConfig, Tracing, configure_logs
from tests.support.otlp import collector


def _line(extra: dict[str, Any], **record: Any) -> dict[str, Any]:
    formatter = JsonFormatter("router", "router-1")
    made = logging.makeLogRecord(
        {"msg": "replica.drained", "levelname": "INFO", "created": 12.3456789, **record} | extra
    )
    text = formatter.format(made)
    assert "\n" not in text
    return cast("dict[str, Any]", json.loads(text))


def test_a_log_line_is_one_json_object() -> None:
    """Log collectors could not parse our lines, or not find the ids in them."""
    assert _line({"replica_id": "r0", "epoch": 3}) == {
        "time_s": 12.345679,
        "level": "info",
        "event": "replica.drained",
        "service": "router",
        "instance": "router-1",
        "replica_id": "r0",
        "epoch": 3,
    }


def test_fields_named_as_the_fixed_ones_keep_both() -> None:
    """A field called ``service`` would change who seems to have written the line."""
    line = _line({"service": "other", "event": "x"})
    assert (line["service"], line["service_"]) == ("router", "other")
    assert (line["event"], line["event_"]) == ("replica.drained", "x")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Path("/a"), "PosixPath('/a')"),
        ("line\nbreak", "line\nbreak"),
        (float("nan"), None),
        (1 << 80, 1 << 80),
        ({(1, 2): "x"}, {"(1, 2)": "x"}),
        ("\udc80", "'\\udc80'"),
    ],
)
def test_any_field_value_makes_a_line(value: object, shown: object) -> None:
    """A field that JSON cannot hold would lose the line, when it matters most."""
    assert _line({"field": value})["field"] == shown


def test_an_exception_is_part_of_its_line() -> None:
    """A stack trace would be torn into lines that belong to nothing."""
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("broken")
    line = _line({}, exc_info=(ValueError, caught.value, caught.tb))
    assert "ValueError: invalid literal" in line["exception"]
    assert "test_telemetry.py" in line["exception"]


@pytest.fixture
def _root_logger() -> Generator[None]:
    """configure_logs changes the process's root logger: put it back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_root_logger")
def test_every_logger_goes_to_stdout_at_the_level_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's warnings would bypass the JSON lines, or debug noise fill the log."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    configure_logs(TelemetryConfig(log_level="WARNING"), service="s", instance_id="s-1")
    logging.getLogger("oserve.x").warning("seen", extra={"n": 1})
    logging.getLogger("some.library").error("library %s", "text")
    logging.getLogger("oserve.x").info("too.quiet")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [
        ("warning", "seen"),
        ("error", "library text"),
    ]


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # our own http URL
        return cast("bytes", answer.read()).decode()


def test_metrics_are_served_over_http() -> None:
    """Prometheus would find nothing to scrape."""
    metrics = Metrics("router")
    metrics.counter("routed", "Requests routed", ["policy"]).labels("plan").inc(3)
    metrics.gauge("replicas", "Replicas known").set(2)
    metrics.histogram("ttft_s", "Time to first token").observe(0.02)
    url = metrics.serve(TelemetryConfig())
    try:
        text = _get(url)
    finally:
        metrics.close()
    assert 'oserve_routed_total{policy="plan"} 3.0' in text
    assert "oserve_replicas 2.0" in text
    assert 'oserve_ttft_s_bucket{le="0.025"} 1.0' in text
    assert 'oserve_ttft_s_bucket{le="0.01"} 0.0' in text
    assert text.encode() == metrics.render()


def test_metrics_close_frees_the_port_and_is_idempotent() -> None:
    """A service restarted in place would find its own port taken."""
    metrics = Metrics("router")
    url = metrics.serve(TelemetryConfig())
    metrics.close()
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        _get(url)


def test_metrics_can_be_switched_off() -> None:
    """An operator could not keep a service from listening."""
    metrics = Metrics("router")
    assert metrics.serve(TelemetryConfig(metrics_enabled=False)) == ""
    metrics.close()


def test_a_taken_metrics_port_names_the_setting() -> None:
    """A taken port would end in a stack trace, and the supervisor restart for ever."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigInvalid, match="cannot listen there") as caught:
            Metrics("router").serve(TelemetryConfig(metrics_port=port))
    assert caught.value.field == "telemetry.metrics_port"
    assert caught.value.value == f"127.0.0.1:{port}"


def test_two_services_in_one_process_have_their_own_metrics() -> None:
    """In-process tests of the mesh could not start two services."""
    first, second = Metrics("a"), Metrics("b")
    first.counter("steps", "Steps").inc()
    second.counter("steps", "Steps")
    assert b"oserve_steps_total 1.0" in first.render()
    assert b"oserve_steps_total 0.0" in second.render()


def test_spans_leave_by_otlp() -> None:
    """A configured collector would see nothing, or spans without a service."""
    with collector() as collected:
        config = TelemetryConfig(otlp_endpoint=collected.endpoint + "/")
        tracing = Tracing(config, service="ingress", instance_id="ingress-1")
        with tracing.span("outer", tenant="t1", tokens=5):
            headers = tracing.headers()
        assert headers is not None
        inner = tracing.start("inner", headers)
        assert inner is not None
        onward = tracing.headers(inner)
        inner.end()
        tracing.close()
    assert set(collected.paths) == {"/v1/traces"}
    assert collected.resources[0]["service.name"] == "oserve-ingress"
    assert collected.resources[0]["service.instance.id"] == "ingress-1"
    outer, inner = collected.named("outer"), collected.named("inner")
    assert inner.parent_span_id == outer.span_id
    assert {a.key for a in outer.attributes} == {"tenant", "tokens"}
    assert onward is not None
    assert onward["traceparent"].startswith(f"00-{inner.trace_id.hex()}-{inner.span_id.hex()}-0")


def test_a_callers_decision_not_to_trace_is_kept() -> None:
    """Requests that the ingress did not sample would be traced in part by everyone behind it."""
    with collector() as collected:
        config = TelemetryConfig(otlp_endpoint=collected.endpoint)
        tracing = Tracing(config, service="router", instance_id="router-1")
        unsampled = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-00"}
        with tracing.span("route", unsampled):
            pass
        tracing.close()
    assert collected.spans == []


def test_garbage_in_trace_headers_starts_a_new_trace() -> None:
    """A client could crash the ingress with a malformed traceparent."""
    with collector() as collected:
        config = TelemetryConfig(otlp_endpoint=collected.endpoint)
        tracing = Tracing(config, service="ingress", instance_id="ingress-1")
        with tracing.span("request", {"traceparent": "00-xyz", "tracestate": "=;,="}):
            pass
        tracing.close()
    assert collected.named("request").parent_span_id == b""


def test_without_endpoint_nothing_is_measured() -> None:
    """Every request would pay for traces that nobody collects."""
    tracing = Tracing(TelemetryConfig(), service="s", instance_id="s-1")
    assert not tracing.enabled
    with tracing.span("x", {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}) as span:
        assert span is None
        assert tracing.headers() is None
    assert tracing.start("x") is None
    tracing.close()
