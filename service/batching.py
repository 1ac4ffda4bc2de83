"""From many requests to one engine: who is admitted, what goes together, and who is told what.

    permit -> Waiting -> next_batch -> device thread -> each one's future

`next_batch` is the policy: pure, a list and a clock in, a batch out. `Batcher` is its asyncio front. Batches are
pulled, not timed: when the device frees, what waits is the batch, so a lone request never waits and load makes batches.
This module knows neither HTTP nor what a detector computes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

import structlog

from service.detector import Raw, Wants
from service.errors import DeadlineExceeded, Draining, EngineFailed, Overloaded, ServiceError
from service.images import Canvas

log = structlog.get_logger()

DRAINING = "the service is shutting down: send the request to another instance, or again soon"
SHUT_DOWN = "the service shut down before the engine was done: send the request again"
EXPIRED = "the deadline passed in the queue: send fewer requests at once, or raise LIMNER_DEADLINE_SECONDS"

CloseReason = Literal["full", "pixels", "shape", "drained"]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    max_batch: int
    max_pixels: int  # of all canvases of a batch together, padding included


T = TypeVar("T")
C = TypeVar("C", bound="Candidate")


class Candidate(Protocol):
    """What the policy needs to know of a waiting request."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def deadline_s(self) -> float: ...
    @property
    def is_abandoned(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Batch(Generic[C]):
    """`taken` run together, `expired` are answered without running, `left` wait on; who was abandoned is in none."""

    taken: list[C]
    expired: list[C]
    left: list[C]
    closed_by: CloseReason


def next_batch(waiting: Sequence[C], now_s: float, limits: BatchLimits) -> Batch[C]:
    """The oldest request and, in order of age, those of its canvas shape that fit beside it.

    The oldest is always taken, even alone above the pixel limit: nobody starves. Other shapes are passed over, not
    waited for. `closed_by` says what kept the batch from growing: "drained" means that nobody else waited.
    """
    alive = [entry for entry in waiting if not entry.is_abandoned]
    expired = [entry for entry in alive if entry.deadline_s <= now_s]
    alive = [entry for entry in alive if entry.deadline_s > now_s]
    if not alive:
        return Batch([], expired, [], "drained")
    height, width = alive[0].shape
    by_pixels = max(1, limits.max_pixels // (height * width))
    room = min(limits.max_batch, by_pixels)
    same = [entry for entry in alive if entry.shape == alive[0].shape]
    taken = same[:room]
    chosen = {id(entry) for entry in taken}
    left = [entry for entry in alive if id(entry) not in chosen]
    reason = _close_reason(len(same) - len(taken), by_pixels, limits.max_batch, bool(left))
    return Batch(taken, expired, left, reason)


def _close_reason(num_left_of_shape: int, by_pixels: int, max_batch: int, has_left: bool) -> CloseReason:
    if num_left_of_shape:
        return "pixels" if by_pixels < max_batch else "full"
    return "shape" if has_left else "drained"


class Admission:
    """Permits: taken before a body is read, given back in `finally`. Overload is refused at the door, not queued."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_held = 0
        self._is_closed = False

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        self._is_closed = True

    @contextmanager
    def permit(self) -> Iterator[None]:
        if self._is_closed:
            raise Draining(DRAINING)
        if self._num_held >= self._max_requests:
            raise Overloaded(
                f"{self._max_requests} requests are under way, no more are taken: retry after the time in Retry-After, "
                "or raise LIMNER_MAX_REQUESTS"
            )
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1


class Device:
    """The one thread on which engines run. Several models share it, so a batch is formed only when it is free."""

    def __init__(self) -> None:
        self.free = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class Observer(Protocol):
    """Told of every batch; the metrics are one."""

    def batch(self, size: int, closed_by: CloseReason) -> None: ...
    def queue_depth(self, model: str, depth: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    raw: Raw
    queue_ms: float


@dataclass(eq=False, slots=True)
class _Entry:
    canvas: Canvas
    wants: Wants
    deadline_s: float
    queued_s: float
    future: asyncio.Future[Answer] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.canvas.shape

    @property
    def is_abandoned(self) -> bool:
        return self.future.done()


Run = Callable[[Sequence[Canvas], Sequence[Wants]], list[Raw]]


class Batcher:
    """The queue of one model. `submit` answers when the batch that holds the request has run."""

    def __init__(
        self,
        model: str,
        run: Run,
        device: Device,
        limits: BatchLimits,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._run = run
        self._device = device
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._waiting: list[_Entry] = []
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._task = asyncio.create_task(self._pull(), name=f"batcher {model}")

    def submit(self, canvas: Canvas, wants: Wants, deadline_s: float) -> Awaitable[Answer]:
        """`deadline_s` is on this batcher's clock. Cancelling what is returned gives up the place in the queue."""
        if self._is_draining:
            raise Draining(DRAINING)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(canvas, wants, deadline_s, self._clock(), future))
        self._observer.queue_depth(self._model, len(self._waiting))
        self._idle.clear()
        self._arrived.set()
        return future

    async def drain(self, timeout_s: float) -> None:
        """Admits nobody, lets who waits finish, and after the timeout turns the rest away."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            _fail_all(self._waiting, Draining(SHUT_DOWN))
            self._waiting = []
            self._idle.set()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _pull(self) -> None:
        while True:
            await self._arrived.wait()
            async with self._device.free:
                await self._run_next()
            if not self._waiting:
                self._arrived.clear()
                self._idle.set()

    async def _run_next(self) -> None:
        batch = next_batch(self._waiting, self._clock(), self._limits)
        self._waiting = batch.left
        self._observer.queue_depth(self._model, len(self._waiting))
        _fail_all(batch.expired, DeadlineExceeded(EXPIRED))
        if not batch.taken:
            return
        self._observer.batch(len(batch.taken), batch.closed_by)
        started_s = self._clock()
        canvases, wants = [entry.canvas for entry in batch.taken], [entry.wants for entry in batch.taken]
        try:
            raws = await self._device.run(lambda: self._run(canvases, wants))
        except asyncio.CancelledError:
            _fail_all(batch.taken, Draining(SHUT_DOWN))
            raise
        except Exception as error:  # whatever an engine raises fails this batch and never the loop
            log.exception("engine failed", model=self._model, batch_size=len(batch.taken))
            _fail_all(batch.taken, _engine_failed(error))
            return
        for entry, raw in zip(batch.taken, raws, strict=True):
            if not entry.future.done():
                entry.future.set_result(Answer(raw, (started_s - entry.queued_s) * 1000))


def _engine_failed(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    return EngineFailed(f"the engine raised {type(error).__name__}; the log has the rest. Other requests go on")


def _fail_all(entries: Sequence[_Entry], error: ServiceError) -> None:
    for entry in entries:
        if not entry.future.done():
            entry.future.set_exception(error)
