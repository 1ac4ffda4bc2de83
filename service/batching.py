"""From many requests to one engine: who runs when, and who is told what.

    Waiting -> policy.next_batch -> device thread -> each one's future

`Batcher` is the asyncio front of `service.policy`. Batches are pulled, not timed: when the device frees, what waits is
the batch, so a lone request never waits and load makes batches.
An engine of several lanes runs as many batches at once; a request that is alone gets the whole device.
This module knows neither HTTP nor what a detector computes.
"""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import structlog

from service.admission import DRAINING, Pace
from service.detector import Ran, Wants
from service.device import WHOLE, Claim, Device
from service.encoded import Given
from service.errors import (
    EXPIRED,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineOutOfMemory,
    EngineStuck,
    NotReady,
    ServiceError,
)
from service.policy import BatchLimits, CloseReason, next_batch

log = structlog.get_logger()

SHUT_DOWN = "the service shut down before the engine was done: send the request again"
REBUILDING = "the engine broke and is being rebuilt: send the request again soon"

Priority = Literal["high", "normal"]
HEAD_START_S = 1.0  # by which a request of high priority overtakes: it is bounded, hence nobody starves
# As many as the pool has threads: what is slow to finish, a drawn picture, takes turns in either.
MOST_FINISHING = max(2, os.cpu_count() or 1)
REBUILD_PAUSE_S = 1.0  # after an engine could not be rebuilt; doubles up to a minute


class Observer(Protocol):
    """Told of every batch; the metrics are one."""

    def batch(self, size: int, closed_by: CloseReason) -> None: ...
    def queue_depth(self, model: str, depth: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """`finished` is there where the request's `finish` is called already."""

    raw: Ran
    queue_ms: float
    finished: Awaitable[Any] | None = None


Finish = Callable[[Answer], Any]


@dataclass(eq=False, slots=True)
class _Entry:
    given: Given
    wants: Wants
    deadline_s: float
    queued_s: float
    rank_s: float
    finish: Finish | None
    future: asyncio.Future[Answer] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.given.shape

    @property
    def is_abandoned(self) -> bool:
        return self.future.done()


# The last that it is given: whether with the whole device. A picture may be answered with its own error.
Run = Callable[[Sequence[Given], Sequence[Wants], bool], Sequence[Ran | ServiceError]]
Rebuild = Callable[[bool], Run]


class Batcher:
    """The queue of one model. `submit` answers when the batch that holds the request has run.

    A batch that fails is tried again picture by picture, so one poisonous picture fails alone. If every picture fails,
    `rebuild(True)` is asked, on the device thread, whether the engine is well all the same; if it raises, or the engine
    hangs, `rebuild(False)` makes a new one. Both return what to run from now on. Meanwhile others wait; while the
    engine is known to be broken, `is_broken`, newcomers are turned away.

    The lanes' batches run at once, each with its share of the device; one that is alone runs with all of it.
    """

    def __init__(
        self,
        model: str,
        run: Run,
        device: Device,
        limits: BatchLimits,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        rebuild: Rebuild | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._model = model
        self._run = run
        self._device = device
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._rebuild = rebuild
        self._share = WHOLE // (limits.num_lanes * (1 + limits.ahead))
        self._pace = pace or Pace()
        self.is_broken = False
        self._waiting: list[_Entry] = []
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._well = asyncio.Event()  # cleared while the engine is being looked at or rebuilt
        self._well.set()
        self._running: dict[asyncio.Task[None], int] = {}  # and how many pictures each has
        self._is_draining = False
        self._task = asyncio.create_task(self._pull(), name=f"batcher {model}")

    def submit(
        self,
        given: Given,
        wants: Wants,
        deadline_s: float,
        priority: Priority = "normal",
        finish: Finish | None = None,
    ) -> Awaitable[Answer]:
        """`deadline_s` is on this batcher's clock. Cancelling what is returned gives up the place in the queue.

        `finish` is what the caller will do with the answer: for a picture that is alone in its batch it is done at
        once, on the thread that ran it, unless many are at that already."""
        if self._is_draining:
            raise Draining(DRAINING)
        if self.is_broken:
            raise NotReady(REBUILDING)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        now_s = self._clock()
        rank_s = now_s - (HEAD_START_S if priority == "high" else 0.0)
        entry = _Entry(given, wants, deadline_s, now_s, rank_s, finish, future)
        self._waiting.append(entry)
        if deadline_s - now_s < math.inf:
            # Told at its time, however long the batch takes that runs meanwhile; what runs itself is let finish.
            timer = asyncio.get_running_loop().call_later(deadline_s - now_s, self._expire, entry)
            future.add_done_callback(lambda _: timer.cancel())
        self._observer.queue_depth(self._model, len(self._waiting))
        self._idle.clear()
        self._arrived.set()
        return future

    def _expire(self, entry: _Entry) -> None:
        if entry in self._waiting:
            self._waiting.remove(entry)
            _fail_all([entry], DeadlineExceeded(EXPIRED))
            self._observer.queue_depth(self._model, len(self._waiting))

    async def drain(self, timeout_s: float) -> None:
        """Admits nobody, lets who waits finish, and after the timeout turns the rest away."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._refuse_all(Draining(SHUT_DOWN))
            self._idle.set()
        tasks = [self._task, *self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pull(self) -> None:
        while True:
            await self._arrived.wait()
            await self._linger()
            await self._well.wait()
            claim = await self._device.claim(self._share)
            taken = self._form() if self._well.is_set() else []
            if taken:
                is_wide = not self._waiting and claim.widen()
                task = asyncio.create_task(self._run_batch(taken, claim, is_wide or self._share == WHOLE))
                self._running[task] = len(taken)
                task.add_done_callback(self._end)
            else:
                claim.release()
            if not self._waiting or not taken:
                self._arrived.clear()
            self._note_idle()

    def _end(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if self._waiting:
            self._arrived.set()
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._waiting and not self._running:
            self._idle.set()

    async def _linger(self) -> None:
        """Until the batch is full, or the oldest has waited long enough."""
        limits = self._limits
        while limits.linger_s and self._waiting and not self._is_draining:
            left_s = min(entry.queued_s for entry in self._waiting) + limits.linger_s - self._clock()
            batch = next_batch(self._waiting, self._clock(), limits)
            is_full = len(batch.taken) == limits.max_batch or batch.closed_by in ("full", "pixels")
            if left_s <= 0 or is_full or batch.expired:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                self._arrived.set()
                return

    def _form(self) -> list[_Entry]:
        is_early = len(self._running) >= self._limits.num_lanes
        beside = sum(self._running.values())
        batch = next_batch(self._waiting, self._clock(), self._limits, beside, is_early)
        self._waiting = batch.left
        self._observer.queue_depth(self._model, len(self._waiting))
        _fail_all(batch.expired, DeadlineExceeded(EXPIRED))
        if batch.taken:
            self._observer.batch(len(batch.taken), batch.closed_by)
        return batch.taken

    async def _run_batch(self, taken: list[_Entry], claim: Claim, is_wide: bool) -> None:
        broken, started_s = self._run, self._clock()
        try:
            failed = await self._attempt(taken, started_s, is_wide)
            if failed == len(taken):
                await self._repair(broken, may_keep=True)
        except EngineStuck as error:
            _fail_all(taken, error)
            await self._repair(broken, may_keep=False)
        except asyncio.CancelledError:
            _fail_all(taken, Draining(SHUT_DOWN))
            raise
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._running.pop(task)  # before anybody is let in: a lane is free
            claim.release()

    async def _attempt(self, entries: list[_Entry], started_s: float, is_wide: bool) -> int:
        """Runs them, in smaller batches where they fail together; returns how many failed alone."""
        entries = [entry for entry in entries if not entry.is_abandoned]
        if not entries:
            return 0
        try:
            answers = await self._execute(entries, started_s, is_wide)
        except EngineStuck:
            raise
        except Exception as error:  # whatever an engine raises fails this batch and never the loop
            return await self._attempt_parts(entries, started_s, is_wide, error)
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, ServiceError):
                _fail_all([entry], answer)
            elif not entry.future.done():
                entry.future.set_result(answer)
        return 0

    async def _attempt_parts(self, entries: list[_Entry], started_s: float, is_wide: bool, error: Exception) -> int:
        log.error("engine failed", model=self._model, batch_size=len(entries), exc_info=error)
        if len(entries) == 1:
            _fail_all(entries, _engine_failed(error))
            return 1
        size = 1
        if isinstance(error, EngineOutOfMemory):
            size = len(entries) // 2
            self._limits = replace(self._limits, max_batch=min(self._limits.max_batch, size))
            log.warning("batches are smaller from now on", model=self._model, max_batch=self._limits.max_batch)
        failed = 0
        for start in range(0, len(entries), size):
            failed += await self._attempt(entries[start : start + size], started_s, is_wide)
        return failed

    async def _execute(self, entries: list[_Entry], started_s: float, is_wide: bool) -> Sequence[Answer | ServiceError]:
        given, wants, run = [entry.given for entry in entries], [entry.wants for entry in entries], self._run
        began_s = ended_s = self._clock()

        def work() -> list[Answer | ServiceError]:
            nonlocal ended_s
            raws = run(given, wants, is_wide)
            ended_s = self._clock()
            return [_answer(entry, raw, started_s) for entry, raw in zip(entries, raws, strict=True)]

        may_finish = len(entries) == 1 and self._device.num_going_on < MOST_FINISHING
        finish = entries[0].finish if may_finish else None
        try:
            async with asyncio.timeout(self._limits.engine_s):
                if finish is None:
                    answers = await self._device.run(work)
                else:
                    [answer], finished = await self._device.run_then(work, partial(_finished, finish))
                    answers = [answer if isinstance(answer, ServiceError) else replace(answer, finished=finished)]
        except TimeoutError:
            log.error("engine hangs", model=self._model, seconds=self._limits.engine_s)
            raise EngineStuck(
                f"the engine did not answer within {self._limits.engine_s:g} s and is being rebuilt; if pictures do "
                "take that long here, raise LIMNER_ENGINE_SECONDS"
            ) from None
        self._pace.ran(len(entries), 1.0 if is_wide else self._share / WHOLE, ended_s - began_s)
        return answers

    async def _repair(self, broken: Run, may_keep: bool) -> None:
        """Keeps its share of the device meanwhile. Batches of other lanes that failed with the same engine come here,
        too, and need nothing more."""
        if self._rebuild is None or self._run is not broken or not self._well.is_set():
            return
        self._well.clear()
        try:
            await self._rebuild_until_well(self._rebuild, may_keep)
        finally:
            self._well.set()

    async def _rebuild_until_well(self, rebuild: Rebuild, may_keep: bool) -> None:
        pause_s = REBUILD_PAUSE_S
        self.is_broken = not may_keep
        while True:
            try:
                self._run = await self._device.run(partial(rebuild, may_keep))
                self.is_broken = False
                return
            except Exception as error:  # said aloud, and tried again: an operator may free what it needs
                log.error("engine not well", model=self._model, was_rebuilt=not may_keep, exc_info=error)
            self.is_broken = True
            if not may_keep:
                self._refuse_all(NotReady(REBUILDING))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 60.0)
            may_keep = False

    def _refuse_all(self, error: ServiceError) -> None:
        _fail_all(self._waiting, error)
        self._waiting = []
        self._observer.queue_depth(self._model, 0)


def _answer(entry: _Entry, raw: Ran | ServiceError, started_s: float) -> Answer | ServiceError:
    return raw if isinstance(raw, ServiceError) else Answer(raw, (started_s - entry.queued_s) * 1000)


def _finished(finish: Finish, answers: Sequence[Answer | ServiceError]) -> Any:
    [answer] = answers
    return None if isinstance(answer, ServiceError) else finish(answer)


def _engine_failed(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    return EngineFailed(f"the engine raised {type(error).__name__}; the log has the rest. Other requests go on")


def _fail_all(entries: Sequence[_Entry], error: ServiceError) -> None:
    for entry in entries:
        if not entry.future.done():
            entry.future.set_exception(error)
