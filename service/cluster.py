"""The same service on many machines, over Ray Serve: `serve run service.cluster:app bundles=/srv/bundles`.

    HTTP -> `Ingress`: routes, permits, decoding, encoding -> canvases -> `Replica`: queue, batches, engine, finishing

Both are the plain service. A replica is all of it but the routes; the ingress has the routes, and instead of an engine
whichever replica Ray chooses. A replica that dies takes nothing along: what it had not answered is asked of another.
Ray is imported only by `app`, in the process that deploys and in those that it starts.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from service.app import create_app
from service.batching import REBUILDING, Answer, Finish, Priority
from service.bundle import Bundle, Manifest
from service.detector import Detections, Detector, Lanes, Plan, Wants
from service.encoded import Given
from service.engines import Agreement, Precision, open_engine
from service.errors import (
    EXPIRED,
    BundleError,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineUnavailable,
    NotReady,
    ServiceError,
)
from service.images import Canvas
from service.leases import Ready
from service.loading import Loaded, discover
from service.metrics import configure_logs
from service.pipeline import Service
from service.settings import Settings, SettingsError, load_settings
from service.store import Store

log = structlog.get_logger()
T = TypeVar("T")

DETECTORS, INGRESS = "detectors", "ingress"
ALL_GONE = "the replicas that had this picture died one after the other: send the request again"
RETRY_PAUSE_S = 0.05  # doubles
NEVER_REFUSED_BY_RAY = 1000  # requests at an ingress beyond its permits: it is limner that refuses, with a 429
# Settings that would change one replica and not the others, and one that needs to know what an engine takes.
NOT_HERE = ("poll_seconds", "max_models", "admin_key", "admin_key_file", "max_wait_ms")


class Arguments(BaseModel):
    """What `serve run` and a Serve config file's `args` take. All else is a setting of `limner serve`, by its name."""

    model_config = ConfigDict(extra="allow", frozen=True)

    min_replicas: int = Field(1, ge=0, description="Detectors that always run. 0 costs the first request a start.")
    max_replicas: int = Field(4, ge=1, description="Most detectors.")
    target_ongoing_requests: float = Field(
        4, gt=0, description="Requests a detector, running and waiting, above which Ray starts another one."
    )
    cpus: int = Field(1, ge=1, description="Cores of a detector, and threads of its engine unless `threads` is given.")
    gpus: float = Field(0, ge=0, description="GPUs of a detector.")
    ingress_replicas: int = Field(1, ge=1, description="Processes that decode and encode.")
    ingress_cpus: float = Field(1, ge=0, description="Cores of one of them.")
    ingress_resources: dict[str, float] = Field({}, description="Custom resources of Ray's that hold it to machines.")
    retries: int = Field(3, ge=0, description="How often a picture is tried again whose replica died.")

    def settings(self) -> Settings:
        """Raises `SettingsError`."""
        given = self.model_extra or {}
        if unknown := sorted(set(given) - set(Settings.model_fields)):
            known = ", ".join([*type(self).model_fields, *Settings.model_fields])
            raise SettingsError(f"there is no argument {unknown[0]!r}; there are: {known}")
        settings = load_settings(**given)
        if wrong := [name for name in NOT_HERE if getattr(settings, name)]:
            raise SettingsError(f"{', '.join(wrong)}: not on a cluster: docs/cluster.md says what is there instead")
        threads = settings.threads or self.cpus  # a machine may hold several replicas: none takes all of its cores
        return settings.model_copy(update={"bundles": settings.bundles.resolve(), "threads": threads})


def app(arguments: Arguments) -> Any:
    """The Serve application. Bundles must be in the same directory on every machine, this one included."""
    serve: Any = import_module("ray.serve")
    settings = arguments.settings()
    if not discover(settings.bundles):
        raise BundleError(f"no bundle under {settings.bundles}: it must hold <name>/<version>/manifest.json")
    shutdown_s = settings.drain_seconds + 5
    detectors = serve.deployment(
        Replica,
        name=DETECTORS,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_ongoing_requests,
        },
        max_ongoing_requests=settings.max_requests,
        graceful_shutdown_timeout_s=shutdown_s,
        logging_config={"enable_access_log": False},
    )

    def build() -> FastAPI:
        configure_logs(settings.log_format)
        asked, retries = serve.get_deployment_handle(DETECTORS), arguments.retries
        deaths = import_module("ray.exceptions").RayError, import_module("ray.serve.exceptions").RayServeException
        return create_app(settings, make_service=lambda: Ingress(settings, asked, retries, deaths))

    ingress = serve.deployment(
        serve.ingress(build)(),
        name=INGRESS,
        num_replicas=arguments.ingress_replicas,
        ray_actor_options={"num_cpus": arguments.ingress_cpus, "resources": arguments.ingress_resources},
        max_ongoing_requests=settings.max_requests + NEVER_REFUSED_BY_RAY,
        graceful_shutdown_timeout_s=shutdown_s,
        logging_config={"enable_access_log": False},
    )
    return ingress.bind(detectors.bind(settings))


@dataclass(frozen=True, slots=True)
class Described:
    """One version as a replica has it."""

    manifest: Manifest
    engine: str
    precision: Precision
    reason: str
    agreement: Agreement
    plan: Plan
    max_batch: int


class Replica:
    """Every model of the directory. Errors that a request may meet are results: as exceptions Ray would wrap them."""

    async def __init__(self, settings: Settings) -> None:
        configure_logs(settings.log_format)

        def opener(bundle: Bundle):
            return open_engine(bundle, settings.engine, settings.threads, settings.precision)

        self._service = Service(settings, opener)
        self._service.start()
        await self._service.in_loader(lambda: None)  # behind the models
        failed = [model for model in self._service.store.models if model.ready is None]
        if len(failed) == len(self._service.store.models):
            reasons = "; ".join(f"{model.found}: {model.reason}" for model in failed) or "no bundle was found"
            await self._service.stop()
            raise BundleError(f"nothing to serve under {settings.bundles} on this machine: {reasons}")

    async def describe(self, name: str, version: str) -> Described | ServiceError:
        async def describe(ready: Ready) -> Described:
            loaded, detector = ready.loaded, ready.detector
            return Described(
                detector.bundle.manifest,
                detector.engine.name,
                detector.engine.precision,
                loaded.engine_reason,
                loaded.agreement,
                detector.lanes.plan,
                detector.max_batch,
            )

        return await self._with(name, version, describe)

    async def detect(
        self, name: str, version: str, canvas: Canvas, wants: Wants, left_s: float, priority: Priority
    ) -> Answer | ServiceError:
        """A finished answer. `left_s` stands for the deadline of `wants`, whose clock is that of another machine."""
        until = replace(wants, deadline_s=time.monotonic() + left_s)
        own = replace(canvas, pixels=canvas.pixels.copy())  # Ray's memory is read-only, which OpenVINO refuses

        async def detect(ready: Ready) -> Answer:
            answer = await self._service.submit(ready, own, until, priority)
            finished = await self._service.in_pool(lambda: ready.detector.finish(answer.raw))
            return replace(answer, raw=finished)

        return await self._with(name, version, detect)

    def check_health(self) -> None:
        """For Ray, which puts another replica in the place of one that stays unwell."""
        if self._service.is_broken:
            raise RuntimeError(REBUILDING)

    async def __del__(self) -> None:
        await self._service.stop()

    async def _with(self, name: str, version: str, work: Callable[[Ready], Awaitable[T]]) -> T | ServiceError:
        service = self._service
        try:
            with service.store.lease() as lease:
                try:
                    ready = lease.take(f"{name}@{version}")
                except ServiceError:  # another version came into the directory before this replica started
                    await service.in_loader(lambda: service.store.load(name, version))
                    ready = lease.take(f"{name}@{version}")
                return await work(ready)
        except ServiceError as error:
            return error


class Ingress(Service):
    """The service, but that its models run in replicas. `detectors` is a handle of Ray's."""

    def __init__(self, settings: Settings, detectors: Any, retries: int, deaths: tuple[type[Exception], ...]) -> None:
        """`deaths` is what awaiting an answer raises where its replica died or Ray could not reach any."""
        self._detectors = detectors
        self._retries = retries
        self._deaths = deaths
        super().__init__(settings, opener=_runs_elsewhere)

    async def submit(
        self, model: Ready, given: Given, wants: Wants, priority: Priority, finish: Finish | None = None
    ) -> Answer:
        """Asks another replica where one died or has no working engine. The queue's time includes the way there."""
        assert isinstance(given, Canvas), "without lanes of its own the ingress decodes"
        started_s, attempt = time.monotonic(), 0
        while True:
            left_s = wants.deadline_s - time.monotonic()
            outcome = await self._ask(model, given, wants, left_s, priority)
            if isinstance(outcome, Answer):
                assert isinstance(outcome.raw, Detections)
                passed_ms = (time.monotonic() - started_s) * 1000
                return replace(outcome, queue_ms=max(0.0, passed_ms - sum(outcome.raw.timings_ms.values())))
            if attempt == self._retries or not isinstance(outcome, ANOTHER_MAY):
                raise outcome
            attempt += 1
            log.warning("asking another replica", model=str(model.found), attempt=attempt, reason=outcome.detail)
            self.metrics.retried.labels(model.name, model.version).inc()
            await asyncio.sleep(RETRY_PAUSE_S * 2**attempt)

    async def _ask(
        self, model: Ready, canvas: Canvas, wants: Wants, left_s: float, priority: Priority
    ) -> Answer | ServiceError:
        asked = self._detectors.detect.remote(model.name, model.version, canvas, wants, left_s, priority)
        try:
            async with asyncio.timeout(left_s):
                await asked._to_object_ref()  # a replica has it, and knows the deadline: its queue, its error
            async with asyncio.timeout(max(0.0, left_s) + self.settings.engine_seconds):
                return await asked
        except TimeoutError:
            asked.cancel()
            return DeadlineExceeded(EXPIRED)
        except asyncio.CancelledError:  # the client left
            asked.cancel()
            raise
        except self._deaths as error:
            cause = getattr(error, "cause", None)
            if cause is not None and not isinstance(cause, self._deaths):
                raise  # it is alive, and has a bug
            return _Died(f"{ALL_GONE} ({type(error).__name__})")

    def _make_store(self) -> Store:
        settings = self.settings
        return _RemoteStore(self._describe, settings)

    def _describe(self, name: str, version: str) -> "Future[Described | ServiceError]":
        """For the loader thread."""

        async def ask() -> Described | ServiceError:
            try:
                return await self._detectors.describe.remote(name, version)
            except self._deaths as error:
                return _Died(type(error).__name__)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)


class _Died(EngineFailed):
    """The replica did, or its machine, or the way there."""


# What says something of one replica and nothing of the picture.
ANOTHER_MAY = (_Died, NotReady, Draining, BundleError, EngineUnavailable)


class _RemoteStore(Store):
    """What the replicas have of the directory's models. A model is loading for as long as no replica is up."""

    def __init__(self, describe: Callable[[str, str], "Future[Described | ServiceError]"], settings: Settings) -> None:
        self._describe = describe
        super().__init__(settings.bundles, _runs_elsewhere, settings.default_model, settings.store_policy)

    def _open_bundle(self, bundle: Bundle) -> Loaded:
        told = self._wait_for(bundle)
        if isinstance(told, ServiceError):
            raise told
        if told.manifest != bundle.manifest:
            raise BundleError(
                f"{bundle.name}/{bundle.version} is another one where the detectors run than where the ingress does: "
                f"{bundle.directory.parent.parent} must hold the same on every machine"
            )
        engine = _Elsewhere(told.engine, told.precision, told.max_batch)
        detector = Detector(bundle, engine, Lanes(told.plan))
        return Loaded(detector, f"{told.reason}; in replicas on Ray", told.agreement)

    def _wait_for(self, bundle: Bundle) -> Described | ServiceError:
        while not self._is_stopping:
            asked = self._describe(bundle.name, bundle.version)
            while not self._is_stopping:
                try:
                    told = asked.result(timeout=1)
                except TimeoutError:
                    continue
                if not isinstance(told, _Died):
                    return told
                time.sleep(1)
                break
            else:
                asked.cancel()
        return Draining("the service is shutting down")


@dataclass(slots=True)
class _Elsewhere:
    """Stands for an engine of a replica where the service tells what its engines are."""

    name: str
    precision: Precision
    max_batch: int

    def detect(self, images: Any, sizes: Any, *proposals: Any) -> Any:
        _runs_elsewhere()

    def masks(self, features: Any, rois: Any, labels: Any) -> Any:
        _runs_elsewhere()

    def keypoints(self, features: Any, rois: Any) -> Any:
        _runs_elsewhere()

    def close(self) -> None: ...


def _runs_elsewhere(*_: Any) -> Any:
    raise RuntimeError("models run in the replicas, not in the ingress")
