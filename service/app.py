"""The HTTP application: routes, and what is around every request.

Errors become problem+json in one place, `Front` and the handlers beside it, or under /v2 what that protocol wants, and
no traceback ever reaches a client. A request's way through the service is `service.pipeline`'s.
"""

import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import catalogue, errors, inference_protocol, metrics, openapi, pages, schemas, security, tracing
from service.engines import open_engine
from service.pipeline import Service
from service.settings import Settings
from service.store import Opener

log = structlog.get_logger()

QUIET_ROUTES = ("/healthz", "/readyz", "/metrics", "/", "/web/{name}", *inference_protocol.PROBES)
INFERENCE_ROUTES = ("/detect", *inference_protocol.INFER_ROUTES)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def create_app(settings: Settings, opener: Opener | None = None) -> FastAPI:
    """`opener` replaces the engines, for tests and for embedding."""

    tracer = tracing.tracer(settings.otel_endpoint, _version())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(settings, opener or _opener(settings))
        app.state.service = service
        service.start()
        yield
        await service.stop()
        tracer.close()

    app = FastAPI(
        title="limner",
        version=_version(),
        description="One picture in; boxes, masks and keypoints in the picture's own pixels out.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from a CDN; /docs below needs no network
        redoc_url=None,
    )
    security.protect(app, settings, _problem)
    app.add_middleware(Front)
    app.add_middleware(security.AnswerHeaders)
    app.add_middleware(tracing.Traced, tracer=tracer)
    app.add_exception_handler(errors.ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    _add_detect(app)
    app.include_router(inference_protocol.router)
    _add_operations(app)
    app.include_router(catalogue.router)
    _add_pages(app)
    return app


def _opener(settings: Settings) -> Opener:
    return lambda bundle: open_engine(bundle, settings.engine, settings.threads, settings.precision)


def _version() -> str:
    try:
        return installed_version("limner")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+checkout"


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
        return await _service(request).detect(request, partial(_told, request.scope))


def _add_operations(app: FastAPI) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers. Says nothing of the models."""
        return {"status": "ok"}

    @app.get("/readyz", responses=openapi.problems(errors.NotReady, errors.Draining))
    async def readyz(request: Request) -> dict[str, str]:
        """All models are loaded and the default one can be asked."""
        return {"status": "ready", "model": _service(request).ready_default()}

    @app.get("/metrics", response_class=Response)
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
