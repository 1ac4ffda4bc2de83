"""`limner predict`: every frame of a source through the detector of the service, in batches, in order.

read and decode (a thread ahead) -> fit, run -> [threads: finish, draw, encode] -> written in order
"""

import itertools
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import local
from service.answers import Found
from service.detector import Detector, Raw, Wants
from service.errors import EngineFailed, ServiceError
from service.images import Canvas
from service.outputs import Output, OutputError, open_outputs
from service.settings import Settings
from service.sources import Frame, Source, SourceError, open_source
from service.video import VideoError
from service.wire import Options

INTERRUPTED = 130  # as shells say of a program that SIGINT ended
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """`json` is a file, COCO results unless it ends as lines do, or "-". `bundle` is a directory and goes before
    `model`."""

    source: str
    out: Path | None = None
    json: str | None = None
    model: str | None = None
    bundle: Path | None = None
    confidence: float = 0.5
    masks: bool = True
    keypoints: bool = True
    max_frames: int | None = None


@dataclass(slots=True)
class Outcome:
    num_frames: int = 0
    num_failed: int = 0
    broke_off: str | None = None
    was_stopped: bool = False


def predict(job: Job, settings: Settings, is_quiet: bool = False) -> int:
    """The exit code: 0, 1 where something could not be read or run, 2 for a job that makes no sense, 130 where Ctrl-C
    ended it; what was done by then is complete."""
    try:
        with _stoppable() as is_stopped:
            outcome, seconds = _predict(job, settings, is_stopped, is_quiet)
    except (SourceError, OutputError) as error:
        return _say(str(error), 2)
    except (VideoError, OSError) as error:
        return _say(str(error), 1)
    except ServiceError as error:
        return _say(error.detail, 1)
    rate = outcome.num_frames / seconds if seconds else 0.0
    if not is_quiet:
        _say(f"{outcome.num_frames} frames in {seconds:.1f} s, {rate:.1f} a second")
    if outcome.broke_off:
        return _say(f"{outcome.broke_off}\nThe {outcome.num_frames} frames before that are written.", 1)
    if outcome.num_failed:
        return _say(f"{outcome.num_failed} pictures could not be read", 1)
    return INTERRUPTED if outcome.was_stopped else 0


def _predict(job: Job, settings: Settings, is_stopped: Callable[[], bool], is_quiet: bool) -> tuple[Outcome, float]:
    source = open_source(job.source, settings.decode_limits)
    try:
        outputs = open_outputs(source, job.out, job.json)
        try:
            detector = local.load(settings, local.bundle_of(settings, job.model, job.bundle)).detector
            started_s = time.perf_counter()
            with _progress(source, job, is_quiet) as advance:
                outcome = _Run(job, settings, detector, outputs, advance, is_stopped).over(source)
            detector.close()
            if not outcome.num_frames:
                raise VideoError(outcome.broke_off or f"{job.source} holds no frame that can be read")
            for output in outputs:
                output.finish()
        except BaseException:
            for output in outputs:
                output.discard()
            raise
    finally:
        if source.film is not None:
            source.film.close()
    return outcome, time.perf_counter() - started_s


class _Run:
    def __init__(
        self,
        job: Job,
        settings: Settings,
        detector: Detector,
        outputs: Sequence[Output],
        advance: Callable[[], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        self._job = job
        self._settings = settings
        self._detector = detector
        self._outputs = outputs
        self._advance = advance
        self._is_stopped = is_stopped
        manifest = detector.bundle.manifest
        self._manifest = manifest
        self._wants = Wants(
            job.confidence, manifest.limits.max_detections, "rle" if job.masks else "none", job.keypoints
        )
        self._max_batch = min(settings.max_batch, manifest.limits.max_batch)
        self._outcome = Outcome()
        self._waiting: deque[tuple[Frame, Future[list[Any]] | None]] = deque()

    def over(self, source: Source) -> Outcome:
        """Frames are decoded one chunk ahead, and at most a few chunks wait to be written: memory stays bounded."""
        frames = itertools.islice(source.frames(), self._job.max_frames)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(2) as pool:
            coming = reader.submit(_chunk, frames, self._max_batch)
            while True:
                chunk, broke_off = coming.result()
                self._outcome.broke_off = broke_off
                if not chunk or self._is_stopped():
                    break
                if broke_off is None:
                    coming = reader.submit(_chunk, frames, self._max_batch)
                self._start(chunk, pool)
                self._write(keep=2 * self._max_batch)
                if broke_off is not None:
                    break
            self._outcome.was_stopped = self._is_stopped()
            self._write(keep=0)
        return self._outcome

    def _start(self, chunk: list[Frame], pool: ThreadPoolExecutor) -> None:
        read = [frame for frame in chunk if frame.image is not None]
        raws = dict(zip((frame.index for frame in read), self._raws(read), strict=True))
        for frame in chunk:
            is_read = frame.image is not None
            self._waiting.append((frame, pool.submit(self._finish, frame, raws[frame.index]) if is_read else None))

    def _raws(self, frames: list[Frame]) -> list[Raw]:
        """In the frames' order; canvases of one shape run together, as in the service."""
        canvases = [self._detector.fit(frame.image) for frame in frames if frame.image is not None]
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, canvas in enumerate(canvases):
            by_shape.setdefault(canvas.shape, []).append(index)
        raws: dict[int, Raw] = {}
        for (height, width), indices in by_shape.items():
            step = max(1, min(self._max_batch, self._settings.max_batch_pixels // (height * width)))
            for start in range(0, len(indices), step):
                batch = indices[start : start + step]
                raws.update(zip(batch, self._run([canvases[index] for index in batch]), strict=True))
        return [raws[index] for index in range(len(frames))]

    def _run(self, canvases: list[Canvas]) -> list[Raw]:
        try:
            return self._detector.run(canvases, [self._wants] * len(canvases))
        except ServiceError:
            raise
        except Exception as error:  # whatever an engine raises
            raise EngineFailed(f"the engine raised {type(error).__name__}: {error}") from error

    def _finish(self, frame: Frame, raw: Raw) -> list[Any]:
        options = Options.model_validate(
            {"confidence": self._wants.confidence, "masks": self._wants.masks, "image_id": frame.index}
        )
        started_s = time.perf_counter()
        detections = self._detector.finish(raw)
        found = Found(self._manifest, detections, options, detections.timings_ms, started_s)
        return [output.prepare(frame, found) for output in self._outputs]

    def _write(self, keep: int) -> None:
        while len(self._waiting) > keep:
            frame, future = self._waiting.popleft()
            prepared = [None] * len(self._outputs) if future is None else future.result()
            for output, each in zip(self._outputs, prepared, strict=True):
                output.write(frame, each)
            if frame.error is not None:
                self._outcome.num_failed += 1
                _say(f"{frame.name}: {frame.error.detail}")
            else:
                self._outcome.num_frames += 1
            self._advance()


def _chunk(frames: Iterator[Frame], size: int) -> tuple[list[Frame], str | None]:
    """The next frames, and why there will be no more where the source breaks off."""
    chunk: list[Frame] = []
    try:
        for frame in itertools.islice(frames, size):
            chunk.append(frame)
    except (VideoError, ServiceError) as error:
        return chunk, error.detail if isinstance(error, ServiceError) else str(error)
    return chunk, None


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks for an end, so that files are completed; the second one is as hard as ever."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return

    def stop(number: int, frame: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _progress(source: Source, job: Job, is_quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's standard error; elsewhere nothing, as logs have no use for one."""
    if is_quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    known = [number for number in (source.num_frames, job.max_frames) if number is not None]
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f} frames/s"), TimeRemainingColumn())
    started_s = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=min(known) if known else None, rate=0.0)

        def advance() -> None:
            done = bar.tasks[0].completed + 1
            bar.update(task, advance=1, rate=done / max(time.perf_counter() - started_s, 1e-9))

        yield advance


def _say(text: str, code: int = 0) -> int:
    print(text, file=sys.stderr)
    return code
