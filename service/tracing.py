"""One request among those of other services: W3C trace context, Server-Timing, and spans for OpenTelemetry.

A valid `traceparent` puts its trace id into every log line of the request and into the answer's `traceresponse`, next
to the id of what was done here. https://www.w3.org/TR/trace-context/ says what is valid; anything else is passed over,
as the specification wants, and no error. OpenTelemetry is imported only where an endpoint is set.
"""

import os
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED = 0x01
FLUSH_SECONDS = 2
UNTRACED_ROUTES = ("/healthz", "/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """`span_id` is the caller's in what it sends, and ours in what we answer."""

    trace_id: str
    span_id: str
    is_sampled: bool

    def header(self) -> str:
        """The value of `traceresponse`, which is written as `traceparent` is."""
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.is_sampled else 0:02x}"


def parse_traceparent(values: list[str]) -> TraceContext | None:
    """None unless there is exactly one, and a valid one. Later versions may append fields and are read as this one."""
    found = TRACEPARENT.fullmatch(values[0].strip(" \t")) if len(values) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def server_timing(timings_ms: Mapping[str, float]) -> str:
    """https://www.w3.org/TR/server-timing/: browsers show it beside the request."""
    return ", ".join(f"{stage};dur={passed_ms:.1f}" for stage, passed_ms in timings_ms.items())


class Span(Protocol):
    """One request's work here."""

    @property
    def context(self) -> TraceContext | None: ...
    def end(self, scope: Scope, status: int) -> None: ...


class Tracer(Protocol):
    def start(self, scope: Scope, caller: TraceContext | None) -> Span: ...
    def close(self) -> None: ...


def tracer(endpoint: str | None, version: str) -> Tracer:
    return Exporter(endpoint, version) if endpoint is not None else Passing()


class Passing:
    """Makes no spans: the caller's trace is passed on and nothing is added to it."""

    def start(self, scope: Scope, caller: TraceContext | None) -> Span:
        return PassedSpan(TraceContext(caller.trace_id, secrets.token_hex(8), False) if caller is not None else None)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class PassedSpan:
    context: TraceContext | None

    def end(self, scope: Scope, status: int) -> None:
        pass


class Exporter:
    """Spans to an OTLP/HTTP collector, in batches from a thread of its own; OTEL_* variables set the rest."""

    def __init__(self, endpoint: str, version: str, processor: Any = None) -> None:
        sdk = import_module("opentelemetry.sdk.trace")
        name = os.environ.get("OTEL_SERVICE_NAME", "limner")
        resource = import_module("opentelemetry.sdk.resources").Resource.create(
            {"service.name": name, "service.version": version}
        )
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor or _batches(f"{endpoint.rstrip('/')}/v1/traces"))
        self._tracer = self._provider.get_tracer("limner", version)
        self._api = import_module("opentelemetry.trace")
        self._propagator = import_module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()

    def start(self, scope: Scope, caller: TraceContext | None) -> Span:
        if scope["path"] in UNTRACED_ROUTES:
            return Passing().start(scope, caller)
        headers = Headers(scope=scope) if caller is not None else Headers()
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = self._propagator.extract(carrier)
        attributes = {"http.request.method": scope["method"], "url.scheme": scope["scheme"]}
        span = self._tracer.start_span(scope["method"], parent, self._api.SpanKind.SERVER, attributes)
        return ExportedSpan(span, self._api.StatusCode.ERROR)

    def close(self) -> None:
        """Sends what is left. A collector that is gone must not hold up the exit: its retries take longer than this."""
        flushing = threading.Thread(target=self._provider.shutdown, name="flush spans", daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)


def _batches(address: str) -> Any:
    exporter = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter(address)
    return import_module("opentelemetry.sdk.trace.export").BatchSpanProcessor(exporter)


class ExportedSpan:
    """Names follow OpenTelemetry's conventions for HTTP servers; stages are attributes, `limner.<stage>_ms`."""

    def __init__(self, span: Any, failed: Any) -> None:
        self._span = span
        self._failed = failed  # the code of a span that went wrong

    @property
    def context(self) -> TraceContext | None:
        found = self._span.get_span_context()
        return TraceContext(f"{found.trace_id:032x}", f"{found.span_id:016x}", bool(found.trace_flags & SAMPLED))

    def end(self, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", None)
        if route is not None:  # never the path as it came: it has no bound on its variety
            self._span.update_name(f"{scope['method']} {route}")
            self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        for stage, passed_ms in scope.get("state", {}).get("timings_ms", {}).items():
            self._span.set_attribute(f"limner.{stage}_ms", passed_ms)
        if status >= 500 or status == 0:
            self._span.set_status(self._failed)
        self._span.end()


class Traced:
    """Outermost, so that every log line within, the one of the whole request too, has the trace id."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = parse_traceparent(Headers(scope=scope).getlist("traceparent"))
        span = self._tracer.start(scope, caller)
        context = span.context
        status = 0

        async def send_with_trace(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if context is not None:
                    MutableHeaders(scope=message)["traceresponse"] = context.header()
            await send(message)

        try:
            with structlog.contextvars.bound_contextvars(**({"trace_id": context.trace_id} if context else {})):
                await self._app(scope, receive, send_with_trace)
        finally:
            span.end(scope, status)
