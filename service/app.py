"""The HTTP application: routes, and one request's way through the service.

    permit -> body under a cap -> [thread: parse, decode, fit] -> batcher -> [thread: finish, encode] -> answer

The event loop only moves bytes and waits; what computes runs in a thread pool or on the device thread. Errors become
problem+json in one place, `Front` and the handlers beside it, and no traceback ever reaches a client.
"""

import asyncio
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, TypeVar

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors, formats, images, metrics, openapi, pages, schemas, wire
from service.answers import Found
from service.batching import Admission, Answer, Batcher, BatchLimits, Device
from service.bundle import Manifest
from service.detector import Masks, Wants
from service.engines import open_engine
from service.settings import Settings
from service.store import Model, Opener, Ready, Store

log = structlog.get_logger()
T = TypeVar("T")

QUIET_ROUTES = ("/healthz", "/readyz", "/metrics")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class _Prepared:
    model: Ready
    options: wire.Options
    form: formats.Format
    wants: Wants
    canvas: images.Canvas
    upload: bytes  # empty unless the answer shows the picture
    decode_ms: float


class Service:
    """What one running application holds. Made inside the event loop, since its locks belong to it."""

    def __init__(self, settings: Settings, opener: Opener) -> None:
        self.settings = settings
        self.store = Store(settings.bundles, opener, settings.default_model)
        self.metrics = metrics.Metrics()
        self.admission = Admission(settings.max_requests)
        self._device = Device()
        self._batchers: dict[str, Batcher] = {}
        self._pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="pool")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def start(self) -> None:
        self._loader.submit(images.known_formats)  # so that the first request does not pay for it
        self._loader.submit(self.store.load_all)

    async def stop(self) -> None:
        self.admission.close()
        timeout_s = self.settings.drain_seconds
        await asyncio.gather(*(batcher.drain(timeout_s) for batcher in self._batchers.values()))
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True)
        self._device.close()
        self.store.close()

    async def detect(self, request: Request) -> Response:
        """The answer to one POST /detect, in the form that it asks for."""
        with self.admission.permit():
            body = await _read_body(request, self.settings)
            prepared = await self._in_pool(lambda: self._prepare(request, body))
            deadline_s = time.monotonic() + self.settings.deadline_seconds
            waiting = self._batcher(prepared.model).submit(prepared.canvas, prepared.wants, deadline_s)
            answer = await _unless_gone(request, waiting)
            content = await self._in_pool(lambda: self._finish(prepared, answer))
            return Response(content, media_type=prepared.form.media_type)

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _prepare(self, request: Request, body: bytes) -> _Prepared:
        started = time.perf_counter()
        headers = request.headers
        upload = wire.parse_upload(headers.get("content-type", ""), body, request.query_params.multi_items())
        form = formats.chosen(upload.options, headers.get("accept", ""))
        model = self.store.ready(upload.options.model)
        manifest = model.detector.bundle.manifest
        wants = _wants(upload.options, manifest)
        image = images.decode(upload.image, self.settings.decode_limits)
        canvas = images.fit(image, manifest.canvas)
        shown = upload.image if form.shows_picture else b""
        decode_ms = (time.perf_counter() - started) * 1000
        return _Prepared(model, upload.options, form, wants, canvas, shown, decode_ms)

    def _batcher(self, model: Ready) -> Batcher:
        if model.name not in self._batchers:
            max_batch = min(self.settings.max_batch, model.detector.bundle.manifest.limits.max_batch)
            limits = BatchLimits(max_batch, self.settings.max_batch_pixels)
            self._batchers[model.name] = Batcher(model.name, model.detector.run, self._device, limits, self.metrics)
        return self._batchers[model.name]

    def _finish(self, prepared: _Prepared, answer: Answer) -> bytes:
        manifest = prepared.model.detector.bundle.manifest
        detections = prepared.model.detector.finish(answer.raw)
        timings_ms = {
            "decode": prepared.decode_ms,
            "queue": answer.queue_ms,
            **{stage: detections.timings_ms.get(stage, 0.0) for stage in ("detect", "masks", "keypoints")},
        }
        started = time.perf_counter()
        found = Found(manifest, detections, prepared.options, timings_ms, started, prepared.upload)
        content = prepared.form.encode(found)
        self.metrics.stages({**timings_ms, "encode": (time.perf_counter() - started) * 1000})
        self.metrics.detections(manifest.classes[label] for label in detections.labels)
        return content


def create_app(settings: Settings, opener: Opener | None = None) -> FastAPI:
    """`opener` replaces the engines, for tests and for embedding."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(settings, opener or _opener(settings))
        app.state.service = service
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="limner",
        version=_version(),
        description="One picture in; boxes, masks and keypoints in the picture's own pixels out.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from a CDN; /docs below needs no network
        redoc_url=None,
    )
    app.add_middleware(Front)
    app.add_exception_handler(errors.ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    _add_detect(app)
    _add_operations(app)
    _add_models(app)
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
        "/detect", openapi_extra=openapi.DETECT, responses=openapi.DETECT_RESPONSES, response_model=schemas.Answer
    )
    async def detect(request: Request) -> Response:
        """Boxes, masks and keypoints of one picture, in the pixels of that picture as a viewer shows it (EXIF applied).

        Coordinates are continuous: the centre of the top left pixel is at (0.5, 0.5). What was not asked for is absent
        and was not computed; a model without a head has none of its output.
        """
        return await _service(request).detect(request)


def _add_operations(app: FastAPI) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers. Says nothing of the models."""
        return {"status": "ok"}

    @app.get("/readyz", responses=openapi.problems(errors.NotReady, errors.Draining))
    async def readyz(request: Request) -> dict[str, str]:
        """All models are loaded and the default one can be asked."""
        service = _service(request)
        if service.admission.is_closed:
            raise errors.Draining("the service is shutting down")
        if service.store.is_loading:
            loading = [model.found.name for model in service.store.models if model.state == "loading"]
            raise errors.NotReady(f"still loading: {', '.join(loading)}")
        return {"status": "ready", "model": service.store.ready(None).name}

    @app.get("/metrics", response_class=Response)
    async def show_metrics(request: Request) -> Response:
        """Prometheus text."""
        return Response(_service(request).metrics.render(), headers={"content-type": metrics.CONTENT_TYPE})


def _add_models(app: FastAPI) -> None:
    @app.get("/models")
    async def models(request: Request) -> Response:
        """Every model with its state, and which one answers requests that name none."""
        store = _service(request).store
        listed = [_summary(model) for model in store.models]
        return _json({"default": store.default_name, "models": listed})

    @app.get("/models/{name}", responses=openapi.problems(errors.UnknownModel))
    async def model(request: Request, name: str) -> Response:
        """One model: classes, keypoints, canvas, accuracy, and how closely its engine agrees with the export."""
        return _json(_details(_service(request).store.named(name)))


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def front(request: Request) -> HTMLResponse:
        return HTMLResponse(pages.front_page(str(request.base_url)))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(pages.docs_page(app.openapi()))


def _json(content: Any, status: int = 200, media_type: str = "application/json") -> Response:
    return Response(orjson.dumps(content), status, media_type=media_type)


def _summary(model: Model) -> dict[str, Any]:
    summary: dict[str, Any] = {"name": model.found.name, "version": model.found.version, "state": model.state}
    if model.state != "ready" or model.detector is None:
        return {**summary, "reason": model.reason}
    bundle = model.detector.bundle
    stages = [stage for stage in ("detect", "masks", "keypoints") if stage in bundle.manifest.stages]
    return {**summary, "stages": stages, "num_classes": len(bundle.manifest.classes), "ap": bundle.manifest.ap}


def _details(model: Model) -> dict[str, Any]:
    if model.detector is None:
        return _summary(model)
    manifest, engine = model.detector.bundle.manifest, model.detector.engine
    shown = manifest.model_dump(
        mode="json",
        include={"created", "classes", "keypoints", "canvas", "limits", "thresholds", "ap", "parity", "compression"},
    )
    golden = asdict(model.agreement) if model.agreement else None
    running = {"name": engine.name, "precision": engine.precision, "reason": model.engine_reason, "golden": golden}
    return {**_summary(model), **shown, "size_bytes": model.detector.bundle.size_bytes, "engine": running}


def _wants(options: wire.Options, manifest: Manifest) -> Wants:
    most = manifest.limits.max_detections
    asked = options.max_detections if options.max_detections is not None else most
    if asked > most:
        raise errors.InvalidOption(f"max_detections = {asked}: model {manifest.name!r} gives at most {most}")
    masks: Masks = "none" if options.masks == "none" else "probability" if options.masks == "probability" else "rle"
    return Wants(
        options.confidence, asked, masks, options.keypoints, options.mask_threshold, options.mask_interpolation
    )


async def _read_body(request: Request, settings: Settings) -> bytes:
    """Streamed, so that a body over the cap is refused after the cap and not after its end."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise errors.UnsupportedType(f"content encoding {encoding!r} is not taken: send the body as it is")
    cap = settings.max_body_bytes
    too_large = f"the body exceeds {cap} bytes: send a smaller file, or raise LIMNER_MAX_BODY_BYTES"
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > cap:
        raise errors.BodyTooLarge(too_large)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > cap:
                    raise errors.BodyTooLarge(too_large)
    except TimeoutError:
        waited = f"the body was not complete after {settings.body_seconds:g} s"
        raise errors.BodyTimeout(f"{waited}: send it faster, or raise LIMNER_BODY_SECONDS") from None
    except ClientDisconnect:
        raise errors.ClientGone("the client left while sending the body") from None
    return bytes(body)


async def _unless_gone(request: Request, waiting: Awaitable[T]) -> T:
    """The result, unless the client leaves first: then its place in the queue is given up."""
    future = asyncio.ensure_future(waiting)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise errors.ClientGone("the client left before the answer")
        return future.result()
    finally:
        gone.cancel()
        future.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    content = errors.problem(error, scope["path"], scope["state"]["request_id"])
    return Response(orjson.dumps(content), error.status, headers, "application/problem+json")


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
    scope["app"].state.service.metrics.request(route, status, seconds)
    if route not in QUIET_ROUTES:
        log.info("request", method=scope["method"], route=route, status=status, ms=round(seconds * 1000, 1))
