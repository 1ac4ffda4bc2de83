"""The HTTP application: routes, and what is around every request.

Errors become problem+json in one place, `Front` and the handlers beside it, or under /v2 what that protocol wants, and
no traceback ever reaches a client. A request's way through the service is `service.pipeline`'s.
"""

import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from service import catalogue, errors, inference_protocol, metrics, openapi, pages, schemas, security, stream, tracing
from service.engines import open_engine
from service.machine import limner_version
from service.pipeline import Service
from service.settings import Settings
from service.store import Opener

log = structlog.get_logger()

QUIET_ROUTES = ("/healthz", "/readyz", "/metrics", "/", "/web/{name}", *inference_protocol.PROBES)
INFERENCE_ROUTES = ("/detect", *inference_protocol.INFER_ROUTES)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def create_app(
    settings: Settings, opener: Opener | None = None, make_service: Callable[[], Service] | None = None
) -> FastAPI:
    """`opener` replaces the engines, for tests and for embedding; `make_service` all that is behind the routes."""

    tracer = tracing.tracer(settings.otel_endpoint, limner_version())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = make_service() if make_service else Service(settings, opener or _opener(settings))
        app.state.service = service
        app.state.streams = stream.Streams()
        service.start()
        yield
        service.admission.close()
        await app.state.streams.drain(settings.drain_seconds)
        await service.stop()
        tracer.close()

    app = FastAPI(
        title="limner",
        version=limner_version(),
        description="One picture in; boxes, masks and keypoints in the picture's own pixels out.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from a CDN; /docs below needs no network
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be an answer that no client of a POST follows by itself
    )
    app.add_middleware(Shortcut)
    security.protect(app, settings, _problem)
    app.add_middleware(Front)
    app.add_middleware(security.AnswerHeaders)
    app.add_middleware(tracing.Traced, tracer=tracer)
    app.add_exception_handler(errors.ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    _add_detect(app)
    _add_stream(app)
    app.include_router(inference_protocol.router)
    _add_operations(app)
    app.include_router(catalogue.router)
    _add_pages(app)
    openapi.correct(app, open_paths=security.HEALTH_ROUTES)
    return app


def _opener(settings: Settings) -> Opener:
    return lambda bundle: open_engine(bundle, settings.engine, settings.threads, settings.precision)


def _service(request: Request) -> Service:
    return request.app.state.service


def _add_detect(app: FastAPI) -> None:
    @app.post(
        "/detect",
        openapi_extra=openapi.DETECT,
        responses=openapi.DETECT_RESPONSES,
        response_model=schemas.Answer | schemas.Answers,
    )
    async def detect(request: Request) -> Response:
        """Boxes, masks and keypoints of a picture, in the pixels of that picture as a viewer shows it (EXIF applied).

        Coordinates are continuous: the centre of the top left pixel is at (0.5, 0.5). What was not asked for is absent
        and was not computed; a model without a head has none of its output.

        A form with several pictures is answered for all of them, in order, in JSON, NDJSON or COCO results. One that
        fails has its problem in its place, and the others are served.
        """
        return await _detect(request)


async def _detect(request: Request) -> Response:
    return await _service(request).detect(request, partial(_told, request.scope))


class Shortcut:
    """Innermost of all: POST /detect without a search for its route and the machinery of path operations, which cost
    more than all of ours. What the router would have done with it is the same."""

    ROUTE = SimpleNamespace(path="/detect")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != self.ROUTE.path:
            await self._app(scope, receive, send)
            return
        scope["route"] = self.ROUTE
        try:
            response = await _detect(Request(scope, receive, send))
        except errors.ServiceError as error:
            response = _problem(error, scope)
        await response(scope, receive, send)


def _add_stream(app: FastAPI) -> None:
    @app.websocket(stream.ROUTE)
    async def frames(socket: WebSocket) -> None:
        told = partial(_told, socket.scope)
        try:
            await stream.serve(socket, app.state.service, app.state.streams, told)
        except errors.ServiceError as error:
            await socket.send_denial_response(_problem(error, socket.scope))


def _add_operations(app: FastAPI) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers. Says nothing of the models."""
        return {"status": "ok"}

    @app.get("/readyz", responses=openapi.problems(errors.UnknownModel, errors.NotReady, errors.Draining))
    async def readyz(request: Request) -> dict[str, str]:
        """All models are loaded and the default one can be asked."""
        return {"status": "ready", "model": _service(request).ready_default()}

    @app.get("/metrics", response_class=PlainTextResponse, responses=openapi.problems(errors.UnknownRoute))
    async def show_metrics(request: Request) -> Response:
        """Prometheus text."""
        return Response(_service(request).metrics.render(), headers={"content-type": metrics.CONTENT_TYPE})


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def front(request: Request) -> Response:
        return pages.page(request.headers)

    @app.get("/web/{name}", include_in_schema=False)
    async def web(request: Request, name: str) -> Response:
        return pages.part(name, request.headers)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(pages.docs_page(app.openapi()), headers={"content-security-policy": pages.DOCS_POLICY})


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    return _problem(error, request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return _problem(errors.UnknownRoute(f"there is nothing at {path}; /docs lists the routes"), request.scope)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        detail = f"{path} does not take {method}; it takes {allowed}"
        return _problem(errors.WrongMethod(detail), request.scope, {"Allow": allowed})
    return _problem(errors.MalformedRequest(str(error.detail)), request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    return _problem(errors.InvalidOption(str(error)), request.scope)


def _problem(error: errors.ServiceError, scope: Scope, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.challenge is not None:
        headers["WWW-Authenticate"] = error.challenge
    if inference_protocol.owns(scope["path"]):
        return Response(orjson.dumps({"error": error.detail}), error.status, headers, "application/json")
    return Response(orjson.dumps(_told(scope, error)), error.status, headers, "application/problem+json")


def _told(scope: Scope, error: errors.ServiceError) -> dict[str, str | int]:
    return errors.problem(error, scope["path"], scope["state"]["request_id"])


class Front:
    """Around every request: an id, a duration, a log line, and a 500 for what nobody expected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scope.setdefault("state", {})["request_id"] = _request_id(scope)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:  # the last net: whatever it was, it is logged here and told to nobody
                log.exception("unexpected error", path=scope["path"])
                if not status:
                    error = errors.InternalError("an unexpected error; the service's log has it under this request_id")
                    await _problem(error, scope)(scope, receive, send_with_id)
            finally:
                _observe(scope, status, time.perf_counter() - started)


def _request_id(scope: Scope) -> str:
    """The caller's, where it is harmless in a log and a header."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _observe(scope: Scope, status: int, seconds: float) -> None:
    # Only known routes become labels: a scanner's paths must not fill the metrics.
    route = getattr(scope.get("route"), "path", "unmatched")
    counted = scope["app"].state.service.metrics
    counted.request(route, status, seconds)
    if route in INFERENCE_ROUTES:
        counted.inference(status, seconds, scope["state"].get("watch"))
    if route not in QUIET_ROUTES:
        log.info("request", method=scope["method"], route=route, status=status, ms=round(seconds * 1000, 1))
