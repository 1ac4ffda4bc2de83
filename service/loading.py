"""From a directory to a detector that may be asked: found, read, opened, held to its golden outputs, warmed.

One version at a time; `service.store` decides which and when. Knows nothing of requests or batches.
"""

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import structlog

from service import lanes
from service.bundle import MANIFEST, Bundle
from service.detector import Detector, Wants
from service.engines import Agreement, Opened, verify_golden
from service.errors import BundleError, Draining
from service.images import Canvas, Image, fit
from service.proposals import sliding_windows

log = structlog.get_logger()

Opener = Callable[[Bundle], Opened]
Fingerprint = tuple[tuple[str, int, int], ...]

# What warming asks for: a few RoIs of each picture, however unsure, so that the heads run too.
WANTS = Wants(confidence=0, max_detections=8)
# Height to width, the likeliest first: warming may run out of time.
ASPECTS = ((3, 4), (4, 3), (1, 1), (9, 16), (16, 9))


@dataclass(frozen=True, slots=True)
class Found:
    """One version of one name on disk."""

    name: str
    version: str
    directory: Path

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Warming:
    """Batches to run before a version is asked: one picture and the most, of every likely canvas shape."""

    max_batch: int = 8
    max_pixels: int = 16_000_000
    seconds: float = 10.0
    num_lanes: int | None = None  # None: what is measured to be fastest


@dataclass(frozen=True, slots=True)
class Loaded:
    detector: Detector
    engine_reason: str
    agreement: Agreement


def find_all(directory: Path) -> list[Found]:
    """Every version, by name and then from the highest down. Dot directories are unfinished exports."""
    found = [
        Found(manifest.parent.parent.name, manifest.parent.name, manifest.parent)
        for manifest in directory.glob(f"*/*/{MANIFEST}")
    ]
    shown = [each for each in found if not each.name.startswith(".") and not each.version.startswith(".")]
    shown.sort(key=lambda each: by_version(each.version), reverse=True)
    return sorted(shown, key=lambda each: each.name)


def discover(directory: Path) -> list[Found]:
    """The highest version of each name, by name."""
    return [next(versions) for _, versions in itertools.groupby(find_all(directory), key=lambda each: each.name)]


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Numbers compare as numbers: 10 is above 9, 1.10 above 1.9."""
    parts = re.findall(r"\d+|[^\d._-]+", version)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def by_version(version: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts by `version_key`, and 1.0 and 1-0 always the same way."""
    return version_key(version), version


def fingerprint(directory: Path) -> Fingerprint:
    """Changes when a file of the bundle does; costs no reading. Empty where the directory cannot be listed."""
    try:
        return tuple(_stamps(directory))
    except OSError:  # a copy or a removal is under way; the next look sees another state
        return ()


def _stamps(directory: Path) -> Iterator[tuple[str, int, int]]:
    for path in sorted(directory.rglob("[!.]*")):
        if path.is_file():
            status = path.stat()
            yield str(path.relative_to(directory)), status.st_size, status.st_mtime_ns


def read(found: Found) -> Bundle:
    """The bundle, every file of it checked; raises `BundleError`."""
    bundle = Bundle.read(found.directory)
    if (bundle.name, bundle.version) != (found.name, found.version):
        raise BundleError(
            f"{found.directory} holds {bundle.name}/{bundle.version}: name the directories as the manifest says"
        )
    assert bundle.size_bytes  # asked once while the files are there: later they may be gone
    return bundle


def open_bundle(bundle: Bundle, opener: Opener, warming: Warming, is_stopped: Callable[[], bool]) -> Loaded:
    """An engine that agrees with the golden outputs and has seen the likely shapes. One that fails is closed."""
    opened = opener(bundle)
    detector = Detector(bundle, opened.engine)
    try:
        agreement = verify_golden(opened.engine, bundle)
        most = min(warming.max_batch, detector.max_batch)
        usual = likely_canvases(bundle)[0]
        planned = lanes.planned(opened, bundle, usual, warming.num_lanes, most, warming.seconds / 2)
        detector.use(opened.engine, planned)
        _warm(detector, warming, is_stopped)
    except BaseException:
        detector.close()
        raise
    return Loaded(detector, opened.reason, agreement)


def open_within(
    seconds: float, bundle: Bundle, opener: Opener, warming: Warming, is_stopped: Callable[[], bool]
) -> Loaded:
    """`open_bundle` on a thread of its own, which is left behind where it takes longer: a thread that hangs in a driver
    cannot be ended. If it comes to an end all the same, its engine is closed.
    """
    outcome: Future[Loaded] = Future()

    def work() -> None:
        try:
            loaded = open_bundle(bundle, opener, warming, lambda: is_stopped() or outcome.cancelled())
        except BaseException as error:
            _settle(partial(outcome.set_exception, error))
            return
        if not _settle(partial(outcome.set_result, loaded)):
            loaded.detector.close()

    threading.Thread(target=work, name=f"load {bundle.name}@{bundle.version}", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if not outcome.cancel():  # it ended in this very moment, or the error is its own
            return outcome.result()
    raise BundleError(
        f"it was not loaded within {seconds:g} s and is left behind: look why the engine hangs, or, if loading does "
        "take that long here, raise LIMNER_LOAD_SECONDS; then load it again"
    )


def _settle(tell: Callable[[], None]) -> bool:
    """False where nobody waits for the outcome any more."""
    try:
        tell()
    except InvalidStateError:
        return False
    return True


def _warm(detector: Detector, warming: Warming, is_stopped: Callable[[], bool]) -> None:
    """Some engines compile at the first run of a shape: better here than in somebody's request."""
    end_s = time.monotonic() + warming.seconds
    for canvas, size in _batches(detector, warming):
        if is_stopped():
            raise Draining("the service is shutting down")
        if time.monotonic() >= end_s:
            if warming.seconds:
                told = f"{size} x {canvas.shape[0]} x {canvas.shape[1]}"
                log.warning("warming stopped early: raise LIMNER_WARM_SECONDS", model=detector.bundle.name, at=told)
            return
        detector.run([canvas] * size, [WANTS] * size)
        for _ in detector.lanes.each:  # one after the other they take turns
            detector.answer_beside([canvas] * size, [WANTS] * size)


def likely_canvases(bundle: Bundle) -> list[Canvas]:
    """Of each likely shape one, with something on it that the model finds; the likeliest first."""
    golden = bundle.golden()
    height, width = golden["sizes"][0]
    picture = golden["images"][0, :height, :width]
    rule = bundle.manifest.canvas
    fitted = (_fitted(_tiled(picture, rows, columns, rule.short_side), bundle) for rows, columns in ASPECTS)
    shapes = {canvas.shape: canvas for canvas in reversed(list(fitted))}
    return list(reversed(shapes.values()))


def _fitted(picture: Image, bundle: Bundle) -> Canvas:
    """Where the model takes proposals, with as many as a request may have, and no search for them."""
    canvas = fit(picture, bundle.manifest.canvas)
    if bundle.manifest.proposals is None:
        return canvas
    windows = sliding_windows(*canvas.size)
    return replace(canvas, proposals=np.resize(windows, (bundle.manifest.proposals.max_proposals, 4)))


def _takes(detector: Detector, canvas: Canvas) -> bool:
    """An engine of fixed shapes need not have one for every picture that may come."""
    fixed = getattr(detector.engine, "canvases", None)
    return fixed is None or any(canvas.shape[0] <= height and canvas.shape[1] <= width for height, width in fixed)


def _batches(detector: Detector, warming: Warming) -> Iterator[tuple[Canvas, int]]:
    """Canvas and batch size: every shape alone, then every shape in full batches."""
    canvases = [canvas for canvas in likely_canvases(detector.bundle) if _takes(detector, canvas)]
    most = min(warming.max_batch, detector.lanes.plan.max_batch, detector.max_batch)
    yield from ((canvas, 1) for canvas in canvases)
    for canvas in canvases:
        size = min(most, warming.max_pixels // (canvas.shape[0] * canvas.shape[1]))
        if size > 1:
            yield canvas, size


def _tiled(picture: Image, rows: int, columns: int, short_side: int) -> Image:
    """The golden picture, repeated or cut to this aspect: in it the model finds something."""
    height, width = (round(short_side * part / min(rows, columns)) for part in (rows, columns))
    return picture[np.arange(height) % picture.shape[0]][:, np.arange(width) % picture.shape[1]]
