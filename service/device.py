"""The threads on which engines run, and who may use how much of the machine.

A batch takes a *share* of the device: all of it, or one lane of an engine that was split (`service.lanes`).
Models share one device, so a batch is formed only once there is room for it. Knows nothing of batches or models.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")

WHOLE = 2**20  # a share is a number of these parts: whole numbers, since sums have to come out

Outcome = tuple[Any, BaseException | None]


@dataclass(eq=False, slots=True)
class _Job:
    """Where there is `finished`, it is what `then` makes of the result, which is `ran` before it is told."""

    work: Callable[[], Any]
    result: asyncio.Future[Any]
    then: Callable[[Any], Any] = lambda result: result
    finished: asyncio.Future[Any] | None = None
    ran: Outcome | None = None


_Jobs = queue.SimpleQueue[_Job | None]


class Claim:
    """A share that is held. Release it once, in `finally`."""

    def __init__(self, device: "Device", share: int) -> None:
        self._device = device
        self.share = share

    def widen(self) -> bool:
        """Takes the whole device where nobody else has any of it or waits for some; says whether it has it now."""
        if self._device.taken == self.share and not self._device.num_waiting:
            self._device.taken = self.share = WHOLE
        return self.share == WHOLE

    def release(self) -> None:
        self._device.give_back(self.share)
        self.share = 0


class Device:
    """Shares are given in the order in which they were asked for, so that a large one is not overtaken for ever.

    Threads are daemons, for one that hangs in a driver can only be left behind: cancelling `run` does that.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[Claim]]] = deque()
        self._idle: list[_Jobs] = []
        self._going_on: set[_Job] = set()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_going_on(self) -> int:
        """Threads that have done their work and go on to something else."""
        return sum(job.ran is not None for job in self._going_on)

    async def claim(self, share: int) -> Claim:
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._waiting.append((share, future))
        for job in self._going_on:
            if job.ran is not None:
                _settle(job.result, *job.ran)
        self._grant()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # it was granted in the same moment
                future.result().release()
            raise
        finally:
            self._grant()

    def give_back(self, share: int) -> None:
        self.taken -= share
        self._grant()

    async def run(self, work: Callable[[], T]) -> T:
        """On a thread that nobody else uses meanwhile; the same one again and again where one is enough."""
        return await self._start(_Job(work, asyncio.get_running_loop().create_future()))

    async def run_then(self, work: Callable[[], T], then: Callable[[T], U]) -> tuple[T, Awaitable[U]]:
        """As `run`. What `then` makes of the result comes later, from the same thread: a change of threads less.

        Unless somebody waits for the device both are told together, so that the loop does not wake up beside `then`."""
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[U] = loop.create_future()
        job = _Job(work, loop.create_future(), then, finished)
        self._going_on.add(job)
        finished.add_done_callback(lambda _: self._going_on.discard(job))
        return await self._start(job), finished

    async def _start(self, job: _Job) -> Any:
        jobs = self._idle.pop() if self._idle else self._start_thread()
        jobs.put(job)
        last = job.finished or job.result
        last.add_done_callback(lambda _: jobs.put(None) if last.cancelled() else self._idle.append(jobs))
        try:
            return await job.result
        except asyncio.CancelledError:
            if job.ran is not None:  # too late: it is about to be told
                return job.ran[0]
            last.cancel()
            raise
        except BaseException:  # nothing comes after it
            last.cancel()
            raise

    def close(self) -> None:
        for jobs in self._idle:
            jobs.put(None)
        self._idle.clear()

    def _grant(self) -> None:
        while self._waiting:
            share, future = self._waiting[0]
            if not future.done():
                if self.taken + share > WHOLE:
                    return
                self.taken += share
                future.set_result(Claim(self, share))
            self._waiting.popleft()

    def _start_thread(self) -> _Jobs:
        jobs: _Jobs = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(jobs,), name="device", daemon=True).start()
        return jobs

    def _work(self, jobs: _Jobs) -> None:
        while (job := jobs.get()) is not None:
            ran = _tried(job.work)
            if job.finished is None or ran[1] is not None:
                _tell((job.result, ran))
            else:
                job.ran = ran
                if self.num_waiting:  # who comes later finds that it has run
                    _tell((job.result, ran))
                _tell((job.result, ran), (job.finished, _tried(partial(job.then, ran[0]))))
            del job, ran  # nothing of a batch stays alive while the thread waits


def _tried(work: Callable[[], Any]) -> Outcome:
    try:
        return work(), None
    except BaseException as raised:
        return None, raised


def _tell(*told: tuple[asyncio.Future[Any], Outcome]) -> None:
    loop = told[0][0].get_loop()
    if not loop.is_closed():  # else nobody waits any more: the service ended first
        loop.call_soon_threadsafe(_settle_all, told)


def _settle_all(told: Sequence[tuple[asyncio.Future[Any], Outcome]]) -> None:
    for future, outcome in told:
        _settle(future, *outcome)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
