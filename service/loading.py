"""From a directory to a detector that may be asked: found, read, opened, held to its golden outputs, warmed.

One version at a time; `service.store` decides which and when. Knows nothing of requests or batches.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from service.bundle import MANIFEST, Bundle
from service.detector import Detector, Wants
from service.engines import Agreement, Opened, verify_golden
from service.errors import BundleError, Draining
from service.images import Canvas, Image, fit

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
    try:
        agreement = verify_golden(opened.engine, bundle)
        detector = Detector(bundle, opened.engine)
        _warm(detector, warming, is_stopped)
    except BaseException:
        opened.engine.close()
        raise
    return Loaded(detector, opened.reason, agreement)


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


def _batches(detector: Detector, warming: Warming) -> Iterator[tuple[Canvas, int]]:
    """Canvas and batch size: every shape alone, then every shape in full batches."""
    bundle = detector.bundle
    golden = bundle.golden()
    height, width = golden["sizes"][0]
    picture = golden["images"][0, :height, :width]
    rule = bundle.manifest.canvas
    fitted = (fit(_tiled(picture, rows, columns, rule.short_side), rule) for rows, columns in ASPECTS)
    shapes = {canvas.shape: canvas for canvas in reversed(list(fitted))}
    canvases = list(reversed(shapes.values()))
    yield from ((canvas, 1) for canvas in canvases)
    most = min(warming.max_batch, detector.max_batch)
    for canvas in canvases:
        size = min(most, warming.max_pixels // (canvas.shape[0] * canvas.shape[1]))
        if size > 1:
            yield canvas, size


def _tiled(picture: Image, rows: int, columns: int, short_side: int) -> Image:
    """The golden picture, repeated or cut to this aspect: in it the model finds something."""
    height, width = (round(short_side * part / min(rows, columns)) for part in (rows, columns))
    return picture[np.arange(height) % picture.shape[0]][:, np.arange(width) % picture.shape[1]]
