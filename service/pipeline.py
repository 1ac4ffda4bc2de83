"""One running service, and a request's way through it.

    permit -> body under a cap -> [thread: parse, decode, fit] -> batcher -> [thread: finish, encode] -> answer

Several pictures in one request go this way each for itself, under a permit each, once the request is parsed. The event
loop only moves bytes and waits; what computes runs in a thread pool or on the device thread. Changes of threads are
spared where they can be: `_opened` reads a plain header on the loop, and the thread that ran a picture alone in its
batch goes on to the answer.
The routes are `service.app`'s and `service.inference_protocol`'s.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import structlog
from fastapi import Request, Response

from service import access, blocks, errors, fetch, formats, images, lanes, metrics, pictures, proposals, tracing, wire
from service.admission import Admission
from service.answers import Found
from service.batching import REBUILDING, Answer, Batcher, Finish, Priority, Run
from service.connection import read_body, unless_gone
from service.detector import Wants
from service.device import Device
from service.encoded import Encoded, Given
from service.engines import verify_golden
from service.leases import Lease, Ready
from service.pictures import Asked, Picture
from service.policy import BatchLimits
from service.settings import Settings
from service.store import Opener, Store

log = structlog.get_logger()
T = TypeVar("T")
Told = Callable[[errors.ServiceError], dict[str, str | int]]
Read = tuple[wire.Upload, formats.Format, Asked, float]  # and the milliseconds that reading took
Opened = tuple[wire.Upload, formats.Format, Asked, Picture[bytes] | None]

SMALL_BYTES = 2**18  # of a body; the worst header that fits takes 40 ms to read, an honest one 0.1


class Service:
    """What one running application holds. Made inside the event loop, since its locks belong to it."""

    def __init__(self, settings: Settings, opener: Opener) -> None:
        self.settings = settings
        self._loop = asyncio.get_running_loop()
        self._opener = opener
        self.store = self._make_store()
        self.metrics = metrics.Metrics()
        self.admission = Admission(settings.max_requests, settings.max_wait_ms / 1000)
        self.metrics.permits(self.admission, settings.max_requests)
        self.metrics.readiness(self.is_ready)
        self.fetcher = fetch.from_settings(settings)
        self.admin_keys = access.Keys(access.read_keys(settings.admin_key, settings.admin_key_file))
        self._device = Device()
        self._batchers: dict[Ready, Batcher] = {}
        self._drains: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="pool")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def _make_store(self) -> Store:
        settings = self.settings
        return Store(settings.bundles, self._opener, settings.default_model, settings.store_policy, self._on_end)

    def start(self) -> None:
        self._loader.submit(images.known_formats)  # so that the first request does not pay for it
        self._loader.submit(self.store.load_all)
        if self.settings.poll_seconds:
            self._poller = self._loop.create_task(self._poll(self.settings.poll_seconds))

    async def stop(self) -> None:
        self.admission.close()
        timeout_s = self.settings.drain_seconds
        await asyncio.gather(*(batcher.drain(timeout_s) for batcher in self._batchers.values()))
        await asyncio.gather(*self._drains)
        if self._poller is not None:
            self._poller.cancel()
        self.store.stop_loading()
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True)
        self._device.close()
        self.store.close()

    def ready_default(self) -> str:
        """Name of the default model, once requests may come."""
        if self.admission.is_closed:
            raise errors.Draining("the service is shutting down")
        if self.store.is_loading:
            loading = [model.found.name for model in self.store.models if model.state == "loading"]
            raise errors.NotReady(f"still loading: {', '.join(loading)}")
        if self.is_broken:
            raise errors.NotReady(REBUILDING)
        model = self.store.named(None)
        if not self.store.can_load(model):  # what made room for another comes back when it is asked
            self.store.ready(None)
        return model.found.name

    @property
    def is_broken(self) -> bool:
        """Some engine is known to be, and is being rebuilt."""
        return any(batcher.is_broken for batcher in self._batchers.values())

    def is_ready(self) -> bool:
        try:
            return bool(self.ready_default())
        except errors.ServiceError:
            return False

    async def detect(self, request: Request, told: Told) -> Response:
        """The answer to one POST /detect, in the form that it asks for. `told` makes the problem of one of several
        pictures."""
        with self.admission.enter(), self.store.lease() as lease:
            body = await read_body(request, self.settings)
            upload, form, asked, alone = await self._opened(request, body, lease)
            if alone is None:
                content = await self._detect_several(request, upload, form, asked, told)
                return Response(content, media_type=form.media_type)
            content = await unless_gone(request, self._run(alone))
            headers = {"Server-Timing": tracing.server_timing(alone.timings_ms)}
            return Response(content, media_type=form.media_type, headers=headers)

    async def detect_frame(
        self, image: bytes, options: wire.Options, watching: Callable[[metrics.ModelMetrics], None]
    ) -> bytes:
        """The JSON answer to one picture of a stream, admitted and queued like a request; `watching` is told of what
        counts for its model."""
        with self.admission.enter(), self.store.lease() as lease:

            def prepare() -> Picture[bytes]:
                watching(self.watch(lease.take(options.model)))
                return self._prepare(self.asked(lease, options.model, options), formats.FORMATS["json"], image)

            return await self._run(await self.in_pool_with_model(None, lease, prepare))

    async def run_pictures(
        self, request: Request, prepare: Sequence[Callable[[], Picture[T]]]
    ) -> list[T | errors.ServiceError]:
        """For each picture of a request, in order, what its `encode` made or why it failed.

        The caller holds the request's permit; those of the further pictures are taken before anything is decoded.
        """
        with pictures.further_permits(len(prepare), self.admission, self.settings):
            running = pictures.results_of([self._prepare_and_run(each) for each in prepare])
            return await unless_gone(request, running)

    def asked(self, lease: Lease, model: str | None, options: wire.Options) -> Asked:
        return Asked.of(lease.take(model), options, self.settings.deadline_seconds - lease.waited_s)

    def prepare(
        self, asked: Asked, decode: Callable[[], images.Image], encode: Callable[[Found], T], upload: bytes = b""
    ) -> Picture[T]:
        """For the thread pool."""
        started = time.perf_counter()
        image = decode()
        timings_ms = {"decode": _ms_since(started)}
        started = time.perf_counter()
        given = asked.options.proposals
        boxes = None if given is None else np.array(given, np.float32)
        if boxes is not None:
            proposals.check_given(boxes, image)
        canvas = asked.model.detector.fit(image, boxes, asked.options.max_proposals)
        timings_ms["fit"] = _ms_since(started)
        return Picture(asked, canvas, encode, timings_ms, upload)

    def watch(self, model: Ready) -> metrics.ModelMetrics:
        """What counts for this version on its engine."""
        engine = model.detector.engine
        return self.metrics.of(model.name, model.version, engine.name, engine.precision)

    async def in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def in_pool_with_model(self, request: Request | None, lease: Lease, work: Callable[[], T]) -> T:
        """Loads the model first where it is known and not loaded, within the request's deadline.

        Without a `request` the caller cancels this when its client leaves."""
        while True:
            try:
                return await self.in_pool(work)
            except errors.NotReady as missing:
                if missing.to_load is None:
                    raise
                started = time.monotonic()
                await self._load_asked(request, missing.to_load, self.settings.deadline_seconds - lease.waited_s)
                lease.waited_s += time.monotonic() - started

    async def in_loader(self, work: Callable[[], T]) -> T:
        """One at a time, and behind what is being loaded."""
        if self.admission.is_closed:
            raise errors.Draining("the service is shutting down")
        return await asyncio.get_running_loop().run_in_executor(self._loader, work)

    async def _load_asked(self, request: Request | None, model: str, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                loading = self.in_loader(lambda: self.store.load_asked(model, wait_s))
                await (loading if request is None else unless_gone(request, loading))
        except TimeoutError:
            told = f"model {model!r} was not loaded within {self.settings.deadline_seconds:g} s"
            raise errors.NotReady(f"{told}: ask again, or raise LIMNER_DEADLINE_SECONDS") from None

    async def _poll(self, seconds: float) -> None:
        while not self.admission.is_closed:
            await asyncio.sleep(seconds)
            try:
                await self.in_loader(self.store.refresh)
            except Exception:  # a directory that cannot be read now can perhaps be read next time
                log.exception("looking for bundles failed", directory=str(self.settings.bundles))

    async def _parser(self, request: Request, body: bytes) -> Callable[[], wire.Upload]:
        """What gives the upload, for the thread pool; where that names a URL, its picture was fetched."""
        parse = partial(self._parse, request, body)
        if self.fetcher is None:
            return parse
        upload = await self.in_pool(parse)
        if upload.options.url is not None:
            started = time.perf_counter()
            fetched = await unless_gone(request, self.fetcher.fetch(upload.options.url))
            upload = replace(upload, images=(fetched,))
            request.state.timings_ms = {"fetch": _ms_since(started)}
        return lambda: upload

    def _parse(self, request: Request, body: bytes) -> wire.Upload:
        query = request.query_params.multi_items()
        upload = wire.parse_upload(request.headers.get("content-type", ""), body, query)
        if upload.options.url is not None and self.fetcher is None:
            raise errors.UrlRefused(fetch.OFF)
        return upload

    async def _opened(self, request: Request, body: bytes, lease: Lease) -> Opened:
        """What takes no longer than a change of threads would is read right here."""
        parse = await self._parser(request, body)
        if wire.is_bare(request.headers.get("content-type", "")) and self._is_quick(body):
            with suppress(errors.NotReady):
                read = self._read(request, parse, lease)
                opened = self._prepared(request, read, self._undecoded)
                if opened[-1] is not None:
                    return opened
                return await self.in_pool(lambda: self._prepared(request, read, self._prepare))
        return await self.in_pool_with_model(
            request, lease, lambda: self._prepared(request, self._read(request, parse, lease), self._prepare)
        )

    def _is_quick(self, body: bytes) -> bool:
        """A plain JPEG's header, or a small one's of who is alone in the house."""
        is_small = len(body) <= SMALL_BYTES and body.startswith(images.JPEG_SIGNATURE)
        return (is_small and self.admission.num_held == 1) or blocks.size_of_plain(body) is not None

    def _read(self, request: Request, parse: Callable[[], wire.Upload], lease: Lease) -> Read:
        started = time.perf_counter()
        upload = parse()
        form = formats.chosen(upload.options, request.headers.get("accept", ""))
        request.state.watch = self.watch(lease.take(upload.options.model))
        asked = self.asked(lease, upload.options.model, upload.options)
        return upload, form, asked, _ms_since(started)

    def _prepared(
        self,
        request: Request,
        read: Read,
        prepare: Callable[[Asked, formats.Format, bytes], Picture[bytes] | None],
    ) -> Opened:
        """The request, and its picture if it holds one that can be prepared."""
        upload, form, asked, parsed_ms = read
        alone = prepare(asked, form, upload.image) if len(upload.images) == 1 else None
        if alone is None:
            return upload, form, asked, None
        timings_ms = {**getattr(request.state, "timings_ms", {}), **alone.timings_ms}
        timings_ms["decode"] += parsed_ms
        request.state.timings_ms = timings_ms
        return upload, form, asked, replace(alone, timings_ms=timings_ms)

    def _prepare(self, asked: Asked, form: formats.Format, image: bytes) -> Picture[bytes]:
        if (undecoded := self._undecoded(asked, form, image)) is not None:
            return undecoded
        limits, upload = self.settings.decode_limits, image if form.shows_picture else b""
        return self.prepare(asked, lambda: images.decode(image, limits), form.encode, upload)

    def _undecoded(self, asked: Asked, form: formats.Format, image: bytes) -> Picture[bytes] | None:
        """Where it is decoded beside the engine and its header tells all that is asked here."""
        if not asked.model.detector.decodes_beside:
            return None
        started = time.perf_counter()
        given = Encoded.of(image, self.settings.decode_limits, asked.model.detector.bundle.manifest.canvas)
        if given is None:
            return None
        timings_ms = {"decode": _ms_since(started), "fit": 0.0}
        return Picture(asked, given, form.encode, timings_ms, image if form.shows_picture else b"")

    async def _detect_several(
        self, request: Request, upload: wire.Upload, form: formats.Format, asked: Asked, told: Told
    ) -> bytes:
        join = formats.joiner(form)
        pictures.check_several(asked.options, len(upload.images))
        each = [replace(asked, options=formats.options_of(asked.options, index)) for index in range(len(upload.images))]
        prepare = [partial(self._prepare, own, form, image) for own, image in zip(each, upload.images, strict=True)]
        results = await self.run_pictures(request, prepare)
        manifest = asked.model.detector.bundle.manifest
        return await self.in_pool(lambda: join(manifest, results, told))

    async def _prepare_and_run(self, prepare: Callable[[], Picture[T]]) -> T:
        return await self._run(await self.in_pool(prepare))

    async def _run(self, picture: Picture[T]) -> T:
        asked, finish = picture.asked, partial(self._finish, picture)
        answer = await self.submit(asked.model, picture.given, asked.wants, asked.options.priority, finish)
        finished = self.in_pool(partial(finish, answer)) if answer.finished is None else answer.finished
        content, labels = await finished
        self._loop.call_soon(self._count, picture, labels)  # a lone answer is sent before it, in this turn
        return content

    def submit(
        self, model: Ready, given: Given, wants: Wants, priority: Priority, finish: Finish | None = None
    ) -> Awaitable[Answer]:
        """Through the queue and the engine; `service.cluster` does this on another machine."""
        return self._batcher(model).submit(given, wants, wants.deadline_s, priority, finish)

    def _batcher(self, model: Ready) -> Batcher:
        if model not in self._batchers:
            settings = self.settings
            plan = model.detector.lanes.plan
            max_batch = min(settings.max_batch, model.detector.max_batch, plan.max_batch)
            limits = BatchLimits(
                max_batch,
                settings.max_batch_pixels,
                settings.batch_padding,
                settings.linger_ms / 1000,
                settings.engine_seconds * (2 if plan.processes else 1),  # one runs, and one waits over there
                plan.num_lanes,
                ahead=plan.processes,
            )
            rebuild, watch = partial(self._rebuild, model), self.watch(model)
            run = watch.watched(model.run)
            self._batchers[model] = Batcher(
                model.name,
                run,
                self._device,
                limits,
                watch,
                rebuild=rebuild,
                pace=self.admission.pace,
            )
        return self._batchers[model]

    def _rebuild(self, model: Ready, may_keep: bool) -> Run:
        """On the device thread. The broken engine is left to the garbage collector: closing it could hang, too."""
        detector = model.detector
        if not may_keep:
            opened, lost = self._opener(detector.bundle), detector.lanes
            detector.use(opened.engine, lanes.again(opened, detector.bundle, lost.plan))
            if lost.plan.processes:  # one of them may be what hangs, and a process can be ended
                lost.close()
        verify_golden(detector.engine, detector.bundle)
        watch = self.watch(model)
        if not may_keep:
            watch.rebuilt()
            log.info("engine rebuilt", model=model.name, version=model.version)
        return watch.watched(model.run)

    def _on_end(self, model: Ready) -> None:
        self._loop.call_soon_threadsafe(self._drop_batcher, model)

    def _drop_batcher(self, model: Ready) -> None:
        if (batcher := self._batchers.pop(model, None)) is not None:
            task = self._loop.create_task(batcher.drain(self.settings.drain_seconds))
            self._drains.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._drains.discard)

    def _finish(self, picture: Picture[T], answer: Answer) -> tuple[T, Sequence[int]]:
        """The picture's answer, and the labels in it."""
        detector = picture.asked.model.detector
        manifest, detections = detector.bundle.manifest, detector.finish(answer.raw)
        passed_ms = picture.timings_ms
        ran_ms = metrics.ran(detections)
        for stage in ("decode", "fit"):  # here, or where it ran
            passed_ms[stage] += ran_ms.pop(stage, 0.0)
        queue_ms = answer.queue_ms + ran_ms.pop("queue", 0.0)
        timings_ms = {
            "decode": passed_ms["decode"] + passed_ms["fit"],
            "queue": queue_ms,
            **{stage: detections.timings_ms.get(stage, 0.0) for stage in ("detect", "masks", "keypoints")},
        }
        started = time.perf_counter()
        found = Found(manifest, detections, picture.asked.options, timings_ms, started, picture.upload)
        content = picture.encode(found)
        passed_ms.update(queue=queue_ms, **ran_ms, encode=_ms_since(started))
        return content, detections.labels.tolist()

    def _count(self, picture: Picture[Any], labels: Sequence[int]) -> None:
        model = picture.asked.model
        classes, watch = model.detector.bundle.manifest.classes, self.watch(model)
        watch.stages(picture.timings_ms)
        watch.detections(classes[label] for label in labels)


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
