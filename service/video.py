"""Videos and cameras through PyAV: upright frames with their times in, frames with their times out.

PyAV is the extra `video` and is imported here alone, when it is needed. Sound is not carried over.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from service.images import DecodeLimits, Image, check_size

if TYPE_CHECKING:
    import av.video

# By the container's suffix, the best first. libx264 makes what every browser plays.
CODECS = {".webm": ("libvpx-vp9",), **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".avi"), ("libx264", "mpeg4"))}
QUALITY = {"libx264": {"crf": "20", "preset": "veryfast"}, "libvpx-vp9": {"crf": "31", "b": "0"}, "mpeg4": {"q": "3"}}
CAMERA = "camera:"
BT709 = 1
NEEDS = 'videos and cameras need PyAV: pip install -e ".[video]"'


class VideoError(Exception):
    """A video that cannot be read or written, in words."""


class VideoReader:
    """`rate` is frames a second, `num_frames` what the container says or implies, None where it says nothing."""

    def __init__(self, source: str, limits: DecodeLimits | None = None) -> None:
        self._av = _av()
        self._source = source
        self._limits = limits or DecodeLimits()
        try:
            self._container = _camera(source) if source.startswith(CAMERA) else self._av.open(source)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{source} cannot be opened as a video ({_words(error)})") from None
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(f"{source} holds no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.time_base = Fraction(self._stream.time_base or 1 / self.rate)
        self.num_frames = self._stream.frames or self._implied_frames()

    def frames(self) -> Iterator[tuple[Image, Fraction | None]]:
        """Each frame, RGB (H, W, 3), as a player shows it, and its time in seconds. Raises `VideoError` where it
        breaks off."""
        try:
            for frame in self._container.decode(self._stream):
                check_size((frame.width, frame.height), self._limits)
                time = None if frame.pts is None else frame.pts * Fraction(frame.time_base or self.time_base)
                yield _upright(frame), time
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self._source} cannot be decoded ({_words(error)}): is it complete?") from None

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _implied_frames(self) -> int | None:
        duration_us = self._container.duration
        return round(duration_us * self.rate / 1_000_000) if duration_us and duration_us > 0 else None


class VideoWriter:
    """Written aside; `finish` completes the file and gives it its name, `discard` leaves nothing. All frames are of the
    first one's size.
    """

    def __init__(self, path: Path, rate: Fraction, time_base: Fraction) -> None:
        self._av = _av()
        self._path = path
        self._aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._rate = rate
        self._codec = self._choose(path)
        # MPEG-4 part 2 has 16 bits for the clock.
        self._time_base = 1 / rate if self._codec == "mpeg4" else time_base
        self._tick = max(1, round(1 / rate / self._time_base))
        self._last: int | None = None
        self._first_s: Fraction | None = None
        self._stream: Any = None
        self._container: Any = None

    def write(self, image: Image, time: Fraction | None) -> None:
        if self._stream is None:
            self._stream = self._open(image.shape[0], image.shape[1])
        if image.shape[:2] != (self._stream.height, self._stream.width):
            raise VideoError(
                f"a frame has {image.shape[1]}x{image.shape[0]} pixels, those before it "
                f"{self._stream.width}x{self._stream.height}: write pictures instead, with --out FOLDER"
            )
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace="ITU709")
        frame.pts, frame.time_base = self._place(time), self._time_base
        self._mux(frame)

    def finish(self) -> None:
        if self._container is None:
            raise VideoError(f"{self._path}: there is no frame to write")
        self._mux(None)
        self._container.close()
        self._aside.replace(self._path)

    def discard(self) -> None:
        if self._container is not None:
            self._container.close()
        self._aside.unlink(missing_ok=True)

    def _choose(self, path: Path) -> str:
        if path.suffix.lower() not in CODECS:
            raise VideoError(f"{path} does not end as a video does: give one of {', '.join(CODECS)}, or a folder")
        names = CODECS[path.suffix.lower()]
        for name in names:
            if name in self._av.codecs_available:
                return name
        raise VideoError(f"this PyAV cannot write {path.suffix}: it has none of {', '.join(names)}")

    def _open(self, height: int, width: int) -> Any:
        try:
            self._container = self._av.open(str(self._aside), "w")
        except (self._av.FFmpegError, OSError) as error:
            raise VideoError(f"{self._path} cannot be written ({_words(error)})") from None
        stream = self._container.add_stream(self._codec, rate=self._rate, options=QUALITY[self._codec])
        stream.width, stream.height = width, height
        # Colour at half size needs even sides; the picture's own size comes first.
        is_even = not (width % 2 or height % 2) or self._codec == "mpeg4"
        stream.pix_fmt = "yuv420p" if is_even else "yuv444p"
        stream.codec_context.time_base = self._time_base
        stream.codec_context.colorspace = BT709
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        return stream

    def _place(self, time: Fraction | None) -> int:
        """Later than the frame before it, whatever the source says."""
        if time is not None and self._first_s is None:
            self._first_s = time
        if time is None or self._first_s is None:
            place = 0 if self._last is None else self._last + self._tick
        else:
            place = round((time - self._first_s) / self._time_base)
        self._last = place if self._last is None else max(place, self._last + 1)
        return self._last

    def _mux(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self._path} cannot be written ({_words(error)})") from None


def _av() -> Any:
    if importlib.util.find_spec("av") is None:
        raise VideoError(NEEDS)
    import av
    from av import logging

    logging.set_level(logging.PANIC)  # what is wrong is told by our own errors
    return av


def _camera(source: str) -> Any:
    """`camera:0`, or behind the colon what the system calls it."""
    name = source.removeprefix(CAMERA)
    device, kind = {
        "linux": (f"/dev/video{name}" if name.isdigit() else name, "v4l2"),
        "darwin": (name, "avfoundation"),
        "win32": (f"video={name}", "dshow"),
    }[sys.platform]
    return _av().open(device, format=kind)


def _upright(frame: "av.video.VideoFrame") -> Image:
    """The container's rotation is counter-clockwise, in degrees, as numpy's is in quarters."""
    quarters = round(frame.rotation / 90) % 4
    pixels = cast(Image, frame.to_ndarray(format="rgb24"))
    return np.ascontiguousarray(np.rot90(pixels, quarters))


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
