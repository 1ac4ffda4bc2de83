"""The threads on which engines run, and who may use how much of the machine.

A batch takes a *share* of the device: all of it, or one lane of an engine that was split (`service.lanes`).
Models share one device, so a batch is formed only once there is room for it. Knows nothing of batches or models.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

T = TypeVar("T")

WHOLE = Fraction(1)
_Jobs = queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None]


class Claim:
    """A share that is held. Release it once, in `finally`."""

    def __init__(self, device: "Device", share: Fraction) -> None:
        self._device = device
        self.share = share

    def widen(self) -> bool:
        """Takes the whole device where nobody else has any of it or waits for some; says whether it has it now."""
        if self._device.taken == self.share and not self._device.num_waiting:
            self._device.taken = self.share = WHOLE
        return self.share == WHOLE

    def release(self) -> None:
        self._device.give_back(self.share)
        self.share = Fraction(0)


class Device:
    """Shares are given in the order in which they were asked for, so that a large one is not overtaken for ever.

    Threads are daemons, for one that hangs in a driver can only be left behind: cancelling `run` does that.
    """

    def __init__(self) -> None:
        self.taken = Fraction(0)
        self._waiting: deque[tuple[Fraction, asyncio.Future[Claim]]] = deque()
        self._idle: list[_Jobs] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def claim(self, share: Fraction) -> Claim:
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._waiting.append((share, future))
        self._grant()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # it was granted in the same moment
                future.result().release()
            raise
        finally:
            self._grant()

    def give_back(self, share: Fraction) -> None:
        self.taken -= share
        self._grant()

    async def run(self, work: Callable[[], T]) -> T:
        """On a thread that nobody else uses meanwhile; the same one again and again where one is enough."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        jobs = self._idle.pop() if self._idle else _start_thread()
        jobs.put((work, future))
        try:
            return await future
        finally:
            if future.cancelled():  # it runs on, perhaps for ever
                jobs.put(None)
            else:
                self._idle.append(jobs)

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


def _start_thread() -> _Jobs:
    jobs: _Jobs = queue.SimpleQueue()
    threading.Thread(target=_work, args=(jobs,), name="device", daemon=True).start()
    return jobs


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        work, future = job
        try:
            result, error = work(), None
        except BaseException as raised:
            result, error = None, raised
        loop = future.get_loop()
        if not loop.is_closed():  # else nobody waits any more: the service ended first
            loop.call_soon_threadsafe(_settle, future, result, error)
        del job, work, future, result, error  # nothing of a batch stays alive while the thread waits


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
