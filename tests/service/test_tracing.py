"""Trace context, Server-Timing, and spans where OpenTelemetry is installed."""

import json
import re
import socket
import sys
import time

import pytest
import structlog

from service import settings, tracing
from service.settings import SettingsError, load_settings
from service.tracing import TraceContext, parse_traceparent, server_timing
from tests.service.toy import encoded, picture

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"


def detect(client, **headers):
    return client.post("/detect", content=encoded(picture()), headers=headers)


@pytest.mark.parametrize(
    ("header", "is_sampled"),
    [
        (VALID, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-fe", False),  # flags that nobody has defined yet
        (f"  {VALID}\t", True),
        (f"cc-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
    ],
)
def test_valid_trace_parents(header, is_sampled):
    assert parse_traceparent([header]) == TraceContext(TRACE, SPAN, is_sampled)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        [VALID, VALID],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"00-{TRACE}-{SPAN}-01-"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"cc-{TRACE}-{SPAN}-01.what"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [VALID.upper()],
        [f"00-{TRACE[:-1]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"0-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01\n"],
        [VALID.replace("4", "\u0664")],
        ["x" * 10_000],
    ],
)
def test_invalid_trace_parents_are_passed_over(values):
    assert parse_traceparent(values) is None


def test_the_trace_is_logged_and_answered(client):
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        answer = detect(client, traceparent=VALID)
    told = re.fullmatch(rf"00-{TRACE}-([0-9a-f]{{16}})-00", answer.headers["traceresponse"])
    assert told
    assert told[1] not in (SPAN, "0" * 16)
    lines = [line for line in logs if line["event"] == "request"]
    assert [line["trace_id"] for line in lines] == [TRACE]
    assert lines[0]["request_id"] == answer.headers["x-request-id"]


def test_no_trace_without_a_valid_one(client):
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        for headers in ({}, {"traceparent": "nonsense"}):
            answer = detect(client, **headers)
            assert answer.status_code == 200
            assert "traceresponse" not in answer.headers
    assert not any("trace_id" in line for line in logs)


def test_errors_have_the_trace_too(client):
    assert TRACE in client.get("/nothing", headers={"traceparent": VALID}).headers["traceresponse"]


def test_server_timing_names_the_stages_that_ran(client):
    header = detect(client).headers["server-timing"]
    found = dict(re.fullmatch(r"([a-z]+);dur=(\d+\.\d)", part).groups() for part in header.split(", "))
    assert list(found) == ["decode", "fit", "queue", "detect", "masks", "keypoints", "encode"]
    assert float(found["decode"]) > 0
    without = client.post("/detect?masks=none&keypoints=false", content=encoded(picture())).headers["server-timing"]
    assert "masks" not in without


def test_server_timing_agrees_with_the_answer(client):
    answer = detect(client)
    header = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    told = answer.json()["timings_ms"]
    assert float(header["decode"]) + float(header["fit"]) == pytest.approx(told["decode"], abs=0.2)
    assert float(header["detect"]) == pytest.approx(told["detect"], abs=0.2)


def test_server_timing_text():
    assert server_timing({"decode": 6.14, "queue": 0.0}) == "decode;dur=6.1, queue;dur=0.0"


def test_without_an_endpoint_opentelemetry_is_not_imported(client):
    assert isinstance(tracing.tracer(None, "1"), tracing.Passing)
    assert "service.tracing" in sys.modules
    assert not any(name.startswith("opentelemetry.sdk") for name in vars(tracing))


def test_a_missing_package_stops_the_start_in_words(monkeypatch):
    monkeypatch.setattr(settings, "_is_installed", lambda module: False)
    with pytest.raises(SettingsError) as caught:
        load_settings(otel_endpoint="http://collector:4318")
    assert 'pip install -e ".[otel]"' in str(caught.value)
    for wrong in ("collector:4318", "http://", "grpc://collector"):
        with pytest.raises(SettingsError) as caught:
            load_settings(otel_endpoint=wrong)
        assert "it must be a URL such as http://collector:4318" in str(caught.value)


def test_installed_is_known_without_importing():
    assert settings._is_installed("json.decoder")
    assert not settings._is_installed("json.nothing")
    assert not settings._is_installed("nothing.at.all")


@pytest.fixture
def exported(monkeypatch):
    """Finished spans, of an application that sends them to memory instead of to a collector."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_batches", lambda address: export.SimpleSpanProcessor(memory))
    return memory


def test_a_span_for_each_request(serve, exported, engine):
    with serve(otel_endpoint="http://collector:4318") as client:
        answer = detect(client, traceparent=VALID, tracestate="vendor=1")
        client.get("/healthz")
        client.get("/nothing/like/this")
        engine.fail = True
        detect(client)
        spans = exported.get_finished_spans()
    assert [span.name for span in spans] == ["POST /detect", "GET", "POST /detect"]
    first, unknown, failed = spans
    assert f"{first.context.trace_id:032x}" == TRACE
    assert f"{first.parent.span_id:016x}" == SPAN
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{first.context.span_id:016x}-01"
    assert dict(first.context.trace_state) == {"vendor": "1"}
    assert first.attributes["http.route"] == "/detect"
    assert first.attributes["http.response.status_code"] == 200
    assert first.attributes["limner.detect_ms"] >= 0
    assert first.resource.attributes["service.name"] == "limner"
    assert "nothing" not in json.dumps(dict(unknown.attributes))
    assert failed.status.status_code.name == "ERROR"
    assert first.status.status_code.name == "UNSET"


def test_a_collector_that_is_gone_does_not_hold_up_the_exit(serve, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and not listening: connections are refused
        with serve(otel_endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}") as client:
            assert detect(client).status_code == 200
            left = time.monotonic()
    assert time.monotonic() - left < 2


def test_the_real_exporter_posts_to_the_collector(serve):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    posted = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            posted.append((self.path, self.headers["content-type"], len(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=server.serve_forever, daemon=True).start()
    with serve(otel_endpoint=f"http://127.0.0.1:{server.server_port}/") as client:
        detect(client)
    server.shutdown()
    server.server_close()
    assert [(path, kind) for path, kind, _ in posted] == [("/v1/traces", "application/x-protobuf")]
