"""What `limner predict` writes: drawn videos or pictures, COCO results, or a line of JSON for each frame.

`prepare` may run in any thread; `write` is called once a frame, in order. Files are written aside: `finish` completes
them and gives them their names, `discard` leaves nothing behind.
"""

import os
import sys
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from service import answers
from service.answers import Found
from service.draw import draw, encode
from service.errors import problem
from service.sources import Frame, Source
from service.video import CODECS, VideoWriter

STDOUT = "-"
LINES = (".ndjson", ".jsonl")
KEPT = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


class OutputError(Exception):
    """A place that cannot be written to, in words."""


class Output(Protocol):
    def prepare(self, frame: Frame, found: Found) -> Any: ...
    def write(self, frame: Frame, prepared: Any) -> None:
        """`prepared` is None for a frame that could not be read."""

    def finish(self) -> None: ...
    def discard(self) -> None: ...


def _drawn(frame: Frame, found: Found) -> np.ndarray:
    assert frame.image is not None
    return draw(frame.image, found.detections, found.manifest.classes, found.manifest.keypoints)


class DrawnFilm:
    def __init__(self, path: Path, source: Source) -> None:
        assert source.film is not None
        self._writer = VideoWriter(path, source.film.rate, source.film.time_base)
        self.prepare = _drawn

    def write(self, frame: Frame, prepared: Any) -> None:
        self._writer.write(prepared, frame.time)

    def finish(self) -> None:
        self._writer.finish()

    def discard(self) -> None:
        self._writer.discard()


class DrawnFiles:
    """A picture for each frame, named as its source or by its number; each is complete once it has its name."""

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self._folder = folder
        self._file = file

    def prepare(self, frame: Frame, found: Found) -> tuple[Path, bytes]:
        name = self._file or frame.name or f"{frame.index + 1:06d}.jpg"
        name = name if Path(name).suffix.lower() in KEPT else name + ".jpg"
        kind = "PNG" if KEPT[Path(name).suffix.lower()] == "PNG" else "JPEG"
        return self._folder / name, encode(_drawn(frame, found), kind)

    def write(self, frame: Frame, prepared: Any) -> None:
        if prepared is not None:
            path, data = prepared
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = _aside(path)
            aside.write_bytes(data)
            aside.replace(path)

    def finish(self) -> None: ...
    def discard(self) -> None: ...


class _Text:
    """A file of JSON, or the standard output, whose lines are there at once."""

    def __init__(self, target: str) -> None:
        self._path = None if target == STDOUT else Path(target)
        self._aside = None if self._path is None else _aside(self._path)
        self._stream: BinaryIO = sys.stdout.buffer if self._aside is None else self._aside.open("wb")

    def _put(self, data: bytes) -> None:
        self._stream.write(data)
        if self._path is None:
            self._stream.flush()

    def finish(self) -> None:
        if self._path is not None and self._aside is not None:
            self._stream.close()
            self._aside.replace(self._path)

    def discard(self) -> None:
        if self._aside is not None:
            self._stream.close()
            self._aside.unlink(missing_ok=True)


class Lines(_Text):
    """An object a line: image_id, the file or the frame and its time, then what POST /detect answers."""

    def prepare(self, frame: Frame, found: Found) -> bytes:
        return answers.dumps(_told(frame))[:-1] + b"," + answers.to_json(found)[1:] + b"\n"

    def write(self, frame: Frame, prepared: Any) -> None:
        if prepared is None:
            assert frame.error is not None
            error = {"error": problem(frame.error, frame.name, "")}
            del error["error"]["request_id"]
            prepared = answers.dumps({**_told(frame), **error}) + b"\n"
        self._put(prepared)


class CocoResults(_Text):
    """One list; the image_id is the frame's number, or the picture's place in order, from 0."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._num_rows = 0
        self._put(b"[")

    def prepare(self, frame: Frame, found: Found) -> bytes:
        return answers.to_coco(found)[1:-1]

    def write(self, frame: Frame, prepared: Any) -> None:
        if prepared:
            self._put((b",\n" if self._num_rows else b"\n") + prepared)
            self._num_rows += 1

    def finish(self) -> None:
        self._put(b"\n]\n")
        super().finish()


def open_outputs(source: Source, out: Path | None, json: str | None) -> list[Output]:
    """Raises `OutputError`, before anything is computed, where they cannot be written."""
    if out is None and json is None:
        raise OutputError("say what to write: --out for drawn pictures or a video, --json for COCO results or NDJSON")
    outputs: list[Output] = []
    try:
        if out is not None:
            outputs.append(_open_drawn(source, out))
        if json is not None:
            is_lines = json == STDOUT or Path(json).suffix.lower() in LINES
            outputs.append(Lines(json) if is_lines else CocoResults(json))
    except OSError as error:
        for output in outputs:
            output.discard()
        raise OutputError(f"{error.filename or json or out} cannot be written ({error.strerror})") from None
    return outputs


def _open_drawn(source: Source, out: Path) -> Output:
    sources = {path.resolve() for path in source.paths}
    if out.resolve() in sources or any(path.parent == out.resolve() for path in sources) and source.film is None:
        raise OutputError(f"--out {out} would replace what is read: name another place")
    suffix = out.suffix.lower()
    if suffix in CODECS and not out.is_dir():
        if source.film is None:
            raise OutputError(f"--out {out} is a video, and pictures have no frame rate: give a folder")
        _parent(out)
        return DrawnFilm(out, source)
    if suffix in KEPT and source.film is None and len(source.paths) == 1:
        _parent(out)
        return DrawnFiles(out.parent, out.name)
    if suffix and not out.is_dir():
        raise OutputError(
            f"--out {out} is neither a folder nor a file for this: a video ends in {', '.join(CODECS)}, one picture in "
            f"{', '.join(KEPT)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    return DrawnFiles(out)


def _parent(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {path.absolute().parent}: make it first")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _told(frame: Frame) -> dict[str, Any]:
    if frame.name:
        return {"image_id": frame.index, "file": frame.name}
    time_s = None if frame.time is None else round(float(frame.time), 6)
    return {"image_id": frame.index, "time_s": time_s}
