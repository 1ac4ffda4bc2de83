"""A lane in a process of its own: an engine with its part of the threads, and an interpreter shared with nobody.

    Worker -- pictures, wants --> main: Detector.answer, finish -- Detections --> Worker

Python runs in one thread of a process at a time, so lanes that are threads hold each other up wherever they are not in
the engine. Pictures, encoded where they came as JPEG, and finished detections are pickled through a socket. A worker
ends when the other end of its socket does, whatever it is at: nothing is left of it when the service ends, however that
ends.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

import structlog

from service.bundle import Bundle
from service.detector import Detections, Detector, LaneLost, Raw, Wants
from service.encoded import Given
from service.engines import EngineChoice, Precision, open_engine, verify_golden
from service.errors import EXPIRED, DeadlineExceeded, ServiceError
from service.images import known_formats

log = structlog.get_logger()

RESTART_PAUSE_S = 1.0  # after a start that failed; doubles up to a minute


class WorkerError(Exception):
    """What the engine raised over there, with its traceback."""


class Worker:
    """The service's end, a `Lane`. Started when it is made; `wait` until it may be asked."""

    def __init__(self, bundle: Bundle, engine: str, precision: Precision, threads: int) -> None:
        self._opens = (bundle, engine, precision, threads)
        self._lock = threading.Lock()  # nothing is started after `close`
        self._closed = threading.Event()
        self._line: Connection | None = None  # while it may be asked
        self._sending = threading.Lock()
        self._turn = threading.Lock()  # to read: held until the last that was sent has its answer
        self._starting, self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> None:
        """Raises `LaneLost` or `WorkerError` where it cannot be asked: it has not opened the bundle."""
        _told(self._starting)
        self._line = self._starting

    def answer(self, given: Sequence[Given], wants: Sequence[Wants]) -> list[Detections | ServiceError]:
        """Raises `LaneLost` where the process is gone or not yet back: it is started again meanwhile.

        Threads may ask at once: what comes while a batch runs waits over there, and answers come in order.
        """
        line = self._line
        if line is None:
            raise LaneLost("the worker is being started again")
        turn = threading.Lock()
        turn.acquire()
        try:
            with self._sending:
                line.send((given, wants))
                before, self._turn = self._turn, turn
            before.acquire()
            return _told(line)
        except (LaneLost, OSError) as error:
            self._restart(line)
            raise LaneLost(f"worker {self.pid} is gone") from error
        finally:
            turn.release()

    def close(self) -> None:
        """Ends the process at once, whatever it is at: who waits for it gets `LaneLost`."""
        with self._lock:
            self._closed.set()
            self._line = None
            self._end()

    def _start(self) -> tuple[Connection, "subprocess.Popen[bytes]"]:
        ours, theirs = Pipe()
        # -P: what is imported there is what is imported here, and nothing of the directory that we happen to be in.
        command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2
            )
        with suppress(OSError):  # it is gone already: whoever waits for it is told
            ours.send(self._opens)
        return ours, process

    def _end(self) -> None:
        # The socket is left to whoever still reads from it: closed here, its number could be another's by then.
        self._process.kill()
        self._process.wait()

    def _restart(self, lost: Connection) -> None:
        with self._lock:
            if self._closed.is_set() or self._line is not lost:
                return
            self._line = None
        log.error("worker lost", model=self._opens[0].name, pid=self.pid)
        threading.Thread(target=self._start_until_well, name="restart worker", daemon=True).start()

    def _start_until_well(self) -> None:
        pause_s = RESTART_PAUSE_S
        while True:
            try:
                with self._lock:
                    if self._closed.is_set():
                        return
                    self._end()
                    self._starting, self._process = self._start()
                return self.wait()
            except (LaneLost, WorkerError, OSError) as error:
                log.error("worker did not start", model=self._opens[0].name, reason=str(error))
            if self._closed.wait(pause_s):
                return
            pause_s = min(2 * pause_s, 60.0)


def _told(line: Connection) -> Any:
    try:
        told = line.recv()
    except (EOFError, OSError):
        raise LaneLost("the worker ended") from None
    if isinstance(told, WorkerError):
        raise told
    return told


def main() -> None:
    """The worker's end: the first thing that comes says what to open, the rest are batches."""
    # Both reach a whole terminal or container at once, and the service still drains: it says when this is over.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line, came = Connection(int(sys.argv[1])), queue.SimpleQueue[Any]()
    threading.Thread(target=_receive, args=(line, came), daemon=True).start()
    _, opens = came.get()
    opened = _tried(_opened, *opens)
    line.send(opened if isinstance(opened, WorkerError) else None)
    while isinstance(opened, Detector):
        came_s, batch = came.get()
        line.send(_tried(_answers, opened, came_s, *batch))


def _receive(line: Connection, came: "queue.SimpleQueue[Any]") -> None:
    """On a thread of its own, so that the end of the socket ends a process that computes, or hangs."""
    while True:
        try:
            given = line.recv()
            came.put((time.monotonic(), given))
        except (EOFError, OSError):
            os._exit(0)


def _opened(bundle: Bundle, engine: EngineChoice, precision: Precision, threads: int) -> Detector:
    known_formats()  # so that the first picture does not pay for it
    opened = open_engine(bundle, engine, threads, precision)
    verify_golden(opened.engine, bundle)
    return Detector(bundle, opened.engine)


def _answers(
    detector: Detector, came_s: float, given: Sequence[Given], wants: Sequence[Wants]
) -> list[Detections | ServiceError]:
    """A batch may have waited here: who is too late by now is told so and not computed."""
    now_s = time.monotonic()  # one clock for all processes
    alive = [(each, want) for each, want in zip(given, wants, strict=True) if want.deadline_s > now_s]
    answers = iter(detector.answer([each for each, _ in alive], [want for _, want in alive]))
    told = [next(answers) if want.deadline_s > now_s else DeadlineExceeded(EXPIRED) for want in wants]
    return [each if isinstance(each, ServiceError) else _finished(detector, each, now_s - came_s) for each in told]


def _finished(detector: Detector, raw: Raw, waited_s: float) -> Detections:
    found = detector.finish(raw)
    return replace(found, timings_ms={"queue": waited_s * 1000, **found.timings_ms})


def _tried(work: Callable[..., Any], *given: Any) -> Any:
    """Any error becomes one that is sure to survive the way."""
    try:
        return work(*given)
    except Exception:
        return WorkerError(traceback.format_exc())
