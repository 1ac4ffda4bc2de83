"""What `limner predict` reads: a video, a camera, a folder, a glob or a single picture, as frames one after another."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from service import images
from service.errors import ServiceError
from service.images import DecodeLimits, Image
from service.video import CAMERA, VideoReader

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".mpo")


class SourceError(Exception):
    """A source that names nothing to read, in words."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture: `name` is its path below what all pictures share, empty in a film; `time` is in seconds, of a film.

    `image` is None where it could not be read, for the reason `error`.
    """

    index: int
    image: Image | None
    name: str = ""
    time: Fraction | None = None
    error: ServiceError | None = None


class Source(Protocol):
    """`film` is the video or camera, None for pictures; `num_frames` is None where nobody knows."""

    film: VideoReader | None
    num_frames: int | None
    paths: list[Path]

    def frames(self) -> Iterator[Frame]: ...


class Pictures:
    film: VideoReader | None = None

    def __init__(self, paths: list[Path], limits: DecodeLimits) -> None:
        self.paths = paths
        self.num_frames: int | None = len(paths)
        self._limits = limits

    def frames(self) -> Iterator[Frame]:
        common = Path(os.path.commonpath([path.parent for path in self.paths]))
        for index, path in enumerate(self.paths):
            name = path.relative_to(common).as_posix()
            try:
                yield Frame(index, images.decode(_read(path), self._limits), name)
            except ServiceError as error:
                yield Frame(index, None, name, error=error)


class Film:
    def __init__(self, spec: str, limits: DecodeLimits) -> None:
        self.film: VideoReader | None = VideoReader(spec, limits)
        self.num_frames = self.film.num_frames
        self.paths = [Path(spec)]

    def frames(self) -> Iterator[Frame]:
        assert self.film is not None
        for index, (image, time) in enumerate(self.film.frames()):
            yield Frame(index, image, time=time)


def open_source(spec: str, limits: DecodeLimits) -> Source:
    """Raises `SourceError` or `VideoError`, which say what to do."""
    path = Path(spec)
    if spec.startswith(CAMERA):
        return Film(spec, limits)
    if path.is_dir():
        return _pictures(spec, list(path.iterdir()), limits)
    if path.is_file():
        return Pictures([path], limits) if path.suffix.lower() in SUFFIXES else Film(spec, limits)
    if glob.has_magic(spec):
        return _pictures(spec, [Path(each) for each in glob.glob(spec, recursive=True)], limits)
    raise SourceError(f"there is no {spec}: give a video, a picture, a folder, a glob in quotes, or {CAMERA}0")


def _pictures(spec: str, paths: list[Path], limits: DecodeLimits) -> Pictures:
    found = [path for path in paths if path.is_file() and path.suffix.lower() in SUFFIXES]
    if not found:
        raise SourceError(f"{spec} holds no picture: files that end in {', '.join(SUFFIXES)} are taken")
    return Pictures(sorted(found, key=_order), limits)


def _order(path: Path) -> list[tuple[int, int, str]]:
    """frame2 before frame10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise images.BrokenImage(f"the file cannot be read ({error.strerror})") from None
