"""A client in one file, to use or to copy: it needs httpx and numpy, and nothing else of this repository.

    with Client("http://127.0.0.1:8000") as client:
        for detection in client.detect("photo.jpg", confidence=0.7).detections:
            print(detection.label, detection.score, detection.box)

`Client` and `AsyncClient` are the same but for `await`: what is sent, when it is sent again and how an answer is read
is written once, and each only does the sending and the waiting.

    LimnerError
    ├── Problem        the service answered, and said no
    └── Unreachable    no answer came
"""

import base64
import io
import os
import random
import struct
import time
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
import httpx
import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

# A path; an encoded file; a PIL picture; or pixels, uint8, RGB (H, W, 3) or grey (H, W).
Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | npt.NDArray[np.uint8] | Any
Option = str | float | int | bool | None | Sequence[Sequence[float]]

# The results have one form, whatever an answer can look like.
FIXED = ("format", "box_format", "keypoint_format", "image_id", "url")
RETRIED = (429, 503)


class LimnerError(Exception):
    """Root of what a client raises about an answer."""


class Problem(LimnerError):
    """The service's own words (RFC 9457): `detail` says what was found and what to do."""

    def __init__(self, status: int, title: str, detail: str, code: str = "", request_id: str = "") -> None:
        super().__init__(f"{title} ({status}): {detail}" if detail else f"{title} ({status})")
        self.status = status
        self.title = title
        self.detail = detail
        self.code = code  # as the table in docs/http.md has them; empty where another program answered
        self.request_id = request_id


class Unreachable(LimnerError):
    """The service could not be reached, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Mask:
    """As it was answered; `pixels` makes an array of it. `size` is (height, width) of the picture."""

    answered: Mapping[str, Any] = field(repr=False)
    size: tuple[int, int]

    @property
    def format(self) -> str:
        return self.answered["format"]

    def pixels(self, threshold: float = 0.5) -> Bools:
        """(H, W) bool, true on the object. Only masks=probability reads `threshold`."""
        if self.format == "probability":
            return _from_probability(self.answered, *self.size, threshold)
        return DECODERS[self.format](self.answered, *self.size)


@dataclass(frozen=True, slots=True)
class Detection:
    """`box` is x1, y1, x2, y2 and `keypoints` (J, 3) x, y, score: continuous, in pixels of the picture as a viewer
    shows it. What was not asked for, or what the model does not have, is None.
    """

    label: str
    class_id: int
    score: float
    box: tuple[float, float, float, float]
    mask: Mask | None = None
    keypoints: Floats | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found on one picture, the best first. `partial` names what allow_partial left out."""

    model: str
    version: str
    width: int
    height: int
    detections: tuple[Detection, ...]
    timings_ms: Mapping[str, float]
    partial: tuple[str, ...] = ()


class _Exchange:
    """What both clients share. A step is a request to send, which is answered with its outcome, or seconds to wait."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        max_wait_s: float = 60.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._base = {
            "base_url": url,
            "timeout": timeout_s,
            "headers": {**(headers or {}), **({"x-api-key": api_key} if api_key else {})},
        }
        self._max_retries = max_retries
        self._max_wait_s = max_wait_s

    def _steps(self, request: httpx.Request) -> "_Steps":
        """Asks again while that may help: a detection changes nothing, so it may be asked twice."""
        left_s = self._max_wait_s
        for attempt in range(self._max_retries + 1):
            outcome = yield request
            pause_s = _pause_s(outcome, attempt)
            if pause_s is None or pause_s > left_s or attempt == self._max_retries:
                return _checked(outcome, request)
            left_s -= pause_s
            yield pause_s
        raise AssertionError("max_retries must not be negative")


_Outcome = httpx.Response | httpx.TransportError
_Steps = Generator[httpx.Request | float, Any, httpx.Response]


class Client(_Exchange):
    """`timeout_s` is for each attempt. A request is sent again after 429, 503 and lost connections, at most
    `max_retries` times, after the time that the service names, and never when the waits would exceed `max_wait_s`.
    """

    def __init__(self, *args: Any, transport: httpx.BaseTransport | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._http = httpx.Client(**self._base, transport=transport)

    def detect(self, picture: Picture, **options: Option) -> Answer:
        """One picture; the options are those of POST /detect."""
        return _answer(self._send(_single(self._http, encoded(picture), options)).json())

    def detect_several(self, pictures: Sequence[Picture], **options: Option) -> list[Answer | Problem]:
        """In one request, in order; a picture that fails has its `Problem` in its place."""
        return _answers(self._send(_several(self._http, [encoded(each) for each in pictures], options)).json())

    def draw(self, picture: Picture, kind: Literal["jpeg", "png"] = "jpeg", **options: Option) -> bytes:
        """The picture with its detections drawn on it, as a file of that kind."""
        return self._send(_single(self._http, encoded(picture), options, kind)).content

    def _send(self, request: httpx.Request) -> httpx.Response:
        steps, outcome = self._steps(request), None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            if not isinstance(step, httpx.Request):
                time.sleep(step)
                outcome = None
                continue
            try:
                outcome = self._http.send(step)
            except httpx.TransportError as error:
                outcome = error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class AsyncClient(_Exchange):
    """As `Client`, for asyncio and trio. Files are read and pixels encoded in a thread."""

    def __init__(self, *args: Any, transport: httpx.AsyncBaseTransport | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._http = httpx.AsyncClient(**self._base, transport=transport)

    async def detect(self, picture: Picture, **options: Option) -> Answer:
        image = await anyio.to_thread.run_sync(encoded, picture)
        return _answer((await self._send(_single(self._http, image, options))).json())

    async def detect_several(self, pictures: Sequence[Picture], **options: Option) -> list[Answer | Problem]:
        images = await anyio.to_thread.run_sync(lambda: [encoded(each) for each in pictures])
        return _answers((await self._send(_several(self._http, images, options))).json())

    async def draw(self, picture: Picture, kind: Literal["jpeg", "png"] = "jpeg", **options: Option) -> bytes:
        image = await anyio.to_thread.run_sync(encoded, picture)
        return (await self._send(_single(self._http, image, options, kind))).content

    async def _send(self, request: httpx.Request) -> httpx.Response:
        steps, outcome = self._steps(request), None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            if not isinstance(step, httpx.Request):
                await anyio.sleep(step)
                outcome = None
                continue
            try:
                outcome = await self._http.send(step)
            except httpx.TransportError as error:
                outcome = error

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()


def _single(
    http: httpx.Client | httpx.AsyncClient, image: bytes, options: Mapping[str, Option], form: str = "json"
) -> httpx.Request:
    given: dict[str, Any] = dict(options)
    boxes, headers = given.pop("proposals", None), {"content-type": "application/octet-stream"}
    if boxes is None:
        return http.build_request("POST", "/detect", params=_query(given, form), content=image, headers=headers)
    fields = {"proposals": str([list(map(float, row)) for row in boxes])}  # JSON; in an address there is no room for it
    return http.build_request("POST", "/detect", params=_query(given, form), data=fields, files={"image": image})


def _several(
    http: httpx.Client | httpx.AsyncClient, images: Sequence[bytes], options: Mapping[str, Option]
) -> httpx.Request:
    if not images:
        raise ValueError("no picture is given")
    files = [("image", (f"{index}", image, "application/octet-stream")) for index, image in enumerate(images)]
    return http.build_request("POST", "/detect", params=_query(options, "json"), files=files)


def _query(options: Mapping[str, Option], form: str) -> dict[str, str]:
    if fixed := [name for name in FIXED if name in options]:
        raise ValueError(f"{', '.join(fixed)}: the client reads answers in one form, leave this out")
    given = {name: value for name, value in options.items() if value is not None}
    shown = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()}
    return {**shown, "format": form}


def _pause_s(outcome: _Outcome, attempt: int) -> float | None:
    """How long to wait before the next attempt; None where another would not help."""
    growing_s = 0.25 * 2**attempt * random.uniform(0.75, 1.25)  # so that many clients do not come back at once
    if isinstance(outcome, httpx.TransportError):
        # What takes longer than the timeout would take longer again, and the engine would do it twice.
        return None if isinstance(outcome, httpx.ReadTimeout | httpx.UnsupportedProtocol) else growing_s
    if outcome.status_code not in RETRIED:
        return None
    named = _retry_after_s(outcome.headers.get("retry-after", ""))
    if named is None and _is_problem(outcome):
        return None  # the service names a time wherever trying again may help
    return growing_s if named is None else named


def _retry_after_s(header: str) -> float | None:
    """Seconds or a date, RFC 9110 section 10.2.3."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def _checked(outcome: _Outcome, request: httpx.Request) -> httpx.Response:
    if isinstance(outcome, httpx.TransportError):
        told = str(outcome) or type(outcome).__name__
        raise Unreachable(f"no answer from {request.url.copy_with(query=None)}: {told}") from outcome
    if outcome.status_code == 200:
        return outcome
    if _is_problem(outcome):
        raise _problem(outcome.json())
    start = outcome.text[:200].strip()  # a proxy's page, most likely
    raise Problem(outcome.status_code, outcome.reason_phrase or "HTTP error", start)


def _is_problem(response: httpx.Response) -> bool:
    return response.headers.get("content-type", "").startswith("application/problem+json")


def _problem(told: Mapping[str, Any]) -> Problem:
    code = told["type"].rpartition(":")[2]
    return Problem(told["status"], told["title"], told.get("detail", ""), code, told.get("request_id", ""))


def _answers(document: Mapping[str, Any]) -> list[Answer | Problem]:
    results = document.get("results", [document])  # a form with one picture is answered like a lone one
    return [_problem(each["error"]) if "error" in each else _answer(each) for each in results]


def _answer(document: Mapping[str, Any]) -> Answer:
    model, image = document["model"], document["image"]
    size = (image["height"], image["width"])
    return Answer(
        model["name"],
        model["version"],
        image["width"],
        image["height"],
        tuple(_detection(row, size) for row in document["detections"]),
        document["timings_ms"],
        tuple(document.get("partial", ())),
    )


def _detection(row: Mapping[str, Any], size: tuple[int, int]) -> Detection:
    mask = Mask(row["mask"], size) if "mask" in row else None
    points = np.array(row["keypoints"], np.float32).reshape(-1, 3) if "keypoints" in row else None
    x1, y1, x2, y2 = row["box"]
    return Detection(row["label"], row["class_id"], row["score"], (x1, y1, x2, y2), mask, points)


def encoded(picture: Picture) -> bytes:
    """A picture as the bytes of a file. Pixels become a PNG, so that nothing is lost."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    if isinstance(picture, np.ndarray):
        return _png(picture)
    if hasattr(picture, "save"):  # PIL's, which need not be installed
        stream = io.BytesIO()
        picture.save(stream, "PNG", compress_level=1)
        return stream.getvalue()
    raise TypeError(f"a picture is a path, bytes, a PIL picture or a numpy array, not {type(picture).__name__}")


def _png(pixels: npt.NDArray[Any]) -> bytes:
    is_colour = pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.dtype != np.uint8 or not (is_colour or pixels.ndim == 2) or not pixels.size:
        raise ValueError(f"pixels must be uint8, (H, W, 3) or (H, W), not {pixels.dtype} {pixels.shape}")
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)  # each begins with its filter, 0 for none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if is_colour else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    parts = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
             for name, data in chunks]  # fmt: skip
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts])


def _from_rle(mask: Mapping[str, Any], height: int, width: int) -> Bools:
    """COCO's run lengths: columns one after another, background first, from the third on less the one before last."""
    runs: list[int] = []
    value = shift = 0
    for code in mask["counts"].encode():
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign, carried on
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _from_polygon(mask: Mapping[str, Any], height: int, width: int) -> Bools:
    """Even-odd, by the centres of pixels: each edge flips everything right of it in the rows that it crosses."""
    rings = [np.array(ring, np.float64).reshape(-1, 2) for ring in (*mask["polygons"], *mask["holes"])]
    flips = np.zeros((height, width + 1), np.int64)
    if rings:
        (x1, y1), (x2, y2) = np.concatenate(rings).T, np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]).T
        first, stop = (np.ceil(edge - 0.5).astype(int) for edge in (np.minimum(y1, y2), np.maximum(y1, y2)))
        edge = np.repeat(np.arange(len(first)), stop - first)
        row = np.arange(len(edge)) - (np.cumsum(stop - first) - stop + first)[edge] + first[edge]
        x1, y1, x2, y2 = x1[edge], y1[edge], x2[edge], y2[edge]
        column = np.ceil(x1 + (row + 0.5 - y1) / (y2 - y1) * (x2 - x1) - 0.5).astype(int)
        np.add.at(flips, (row, column), 1)
    return np.cumsum(flips, axis=1)[:, :width] % 2 == 1


def _from_png(mask: Mapping[str, Any], height: int, width: int) -> Bools:
    """The service's PNGs have one bit a pixel, one chunk of pixels from byte 41 on, and no filter."""
    data = base64.b64decode(mask["data"])
    (length,) = struct.unpack(">I", data[33:37])
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(mask["size"][0], -1)
    if rows[:, 0].any():
        raise ValueError("the mask's PNG is filtered: read it with a picture library")
    return _placed(mask, rows[:, 1:], height, width)


def _from_bitmap(mask: Mapping[str, Any], height: int, width: int) -> Bools:
    packed = np.frombuffer(base64.b64decode(mask["data"]), np.uint8).reshape(mask["size"][0], -1)
    return _placed(mask, packed, height, width)


def _placed(mask: Mapping[str, Any], packed: npt.NDArray[np.uint8], height: int, width: int) -> Bools:
    (x, y), (rows, columns) = mask["offset"], mask["size"]
    full = np.zeros((height, width), np.bool_)
    full[y : y + rows, x : x + columns] = np.unpackbits(packed, axis=1, count=columns)
    return full


def _from_probability(mask: Mapping[str, Any], height: int, width: int, threshold: float) -> Bools:
    """Bilinear over the box, zeros around it, by the centres of pixels."""
    x1, y1, x2, y2 = mask["box"]
    rows, columns = mask["size"]
    values = np.frombuffer(base64.b64decode(mask["data"]), np.uint8).reshape(rows, columns) / 255
    if x2 <= x1 or y2 <= y1:
        return np.zeros((height, width), np.bool_)

    def places(length: int, low: float, high: float, cells: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        at = ((np.arange(length) + 0.5 - low) * cells / (high - low) + 0.5).clip(0, cells + 0.999999)
        return at.astype(int), at % 1

    (j, right), (i, below) = places(width, x1, x2, columns), places(height, y1, y2, rows)
    ringed = np.pad(values, 1)
    lines = ringed[:, j] * (1 - right) + ringed[:, j + 1] * right
    below = below[:, None]
    return lines[i] * (1 - below) + lines[i + 1] * below >= threshold


DECODERS: dict[str, Callable[[Mapping[str, Any], int, int], Bools]] = {
    "rle": _from_rle,
    "polygon": _from_polygon,
    "png": _from_png,
    "bitmap": _from_bitmap,
}
