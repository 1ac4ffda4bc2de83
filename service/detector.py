"""One model's stages: canvases in, detections in image pixels out.

`run` belongs on the device thread and works on the canvas; `finish` belongs in a thread pool and is the ONE place where
the canvas becomes the image. Knows nothing of HTTP or queues. N RoIs, J joints, n detections of one image.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from service import bicubic, keypoints, masks, proposals
from service.bundle import Bundle
from service.encoded import Given, Opened, opened
from service.engines import Detected, Engine
from service.errors import ServiceError
from service.images import Canvas, Image, fit
from service.merging import merged

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Masks = Literal["rle", "probability", "none"]
Head = Literal["masks", "keypoints"]
HEADS: tuple[Head, ...] = ("masks", "keypoints")
Interpolation = Literal["bilinear", "bicubic"]

PASTE: dict[Interpolation, Callable[..., list[masks.Rle]]] = {"bilinear": masks.rle, "bicubic": bicubic.rle}


@dataclass(frozen=True, slots=True)
class Wants:
    """What one request asks for. Below the bundle's score floor there is nothing, whatever `confidence` says.

    Masks come pasted into the image (`rle`) or as the head gave them (`probability`). A `mask_threshold` of None is the
    bundle's. With `allow_partial` a head is left out where the time until `deadline_s` (monotonic) does not allow it.
    """

    confidence: float = 0.5
    max_detections: int = 100
    masks: Masks = "rle"
    keypoints: bool = True
    mask_threshold: float | None = None
    mask_interpolation: Interpolation = "bilinear"
    deadline_s: float = math.inf
    allow_partial: bool = False


@dataclass(frozen=True, slots=True)
class Raw:
    """One image's detections as the engine gave them, on the canvas. A head that did not run left None; `partial` names
    those that were wanted and had no time.
    """

    size: tuple[int, int]
    image_size: tuple[int, int]
    boxes_canvas: Floats
    scores: Floats
    labels: Integers
    probabilities: Floats | None
    heatmaps: Floats | None
    timings_ms: dict[str, float] = field(default_factory=dict)
    wants: Wants = field(default_factory=Wants)
    partial: tuple[Head, ...] = ()


@dataclass(frozen=True, slots=True)
class Detections:
    """One image: boxes (n, 4) xyxy, keypoints (n, J, 3) x, y, score, all in image pixels; masks are COCO RLE.

    `probabilities` (n, M, M), which fill the boxes, are there instead of masks where a request wants those.
    """

    height: int
    width: int
    boxes: Floats
    scores: Floats
    labels: Integers
    masks: list[masks.Rle] | None
    keypoints: Floats | None
    timings_ms: dict[str, float] = field(default_factory=dict)
    probabilities: Floats | None = None
    partial: tuple[Head, ...] = ()


Ran = Raw | Detections  # a lane that is a process of its own has finished what it gives


class LaneLost(Exception):
    """The lane cannot be asked at the moment; its batch has to run elsewhere."""


class Lane(Protocol):
    """What runs batches beside others, each with its part of the machine: a `Detector` is one."""

    def answer(self, given: Sequence[Given], wants: Sequence[Wants]) -> Sequence[Ran | ServiceError]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """`num_lanes` batches at once of at most `max_batch` pictures; `rates`, pictures/s of what was tried, by words."""

    num_lanes: int
    max_batch: int
    rates: dict[str, float]
    processes: bool = False  # whether each lane is one


@dataclass(frozen=True, slots=True)
class Lanes:
    """`each` is empty where the whole engine is the only lane."""

    plan: Plan
    each: Sequence[Lane] = ()

    def close(self) -> None:
        for lane in self.each:
            lane.close()


class Detector:
    """`engine` has the whole device. `lanes`, if there are any, run as many batches at once (see `service.lanes`)."""

    def __init__(self, bundle: Bundle, engine: Engine, lanes: Lanes | None = None) -> None:
        self.bundle = bundle
        self._roi_ms: dict[Head, float] = {}  # what a RoI of each head took lately
        self.propose = proposals.propose  # evaluation puts a cache here
        self._choosing = threading.Lock()
        self.use(engine, lanes)

    def use(self, engine: Engine, lanes: Lanes | None = None) -> None:
        """From now on; what runs goes on with what it has."""
        self.engine = engine
        self.lanes = lanes or Lanes(Plan(1, self.max_batch, {}))
        self._asked = dict.fromkeys(self.lanes.each, 0)  # batches that each has; who was asked last is the last
        self._turn = threading.Lock()  # to use the engine, which lanes that were lost fall back to

    def close(self) -> None:
        self.engine.close()
        self.lanes.close()

    @property
    def max_batch(self) -> int:
        """Most pictures of one `run`."""
        limit = self.bundle.manifest.limits.max_batch
        return min(limit, getattr(self.engine, "max_batch", limit))

    @property
    def decodes_beside(self) -> bool:
        """Whether lanes have interpreters of their own to decode in. A search for proposals has options of the
        request's, so it is not left to them."""
        return bool(self.lanes.each) and self.lanes.plan.processes and not self.bundle.takes_proposals

    def fit(self, image: Image, given: Floats | None = None, max_proposals: int | None = None) -> Canvas:
        """The picture on the model's canvas; where the model takes proposals, with those `given` (R, 4) in image
        pixels, or else with at most so many that are searched for here."""
        canvas = fit(image, self.bundle.manifest.canvas)
        rule = self.bundle.manifest.proposals
        if rule is None:
            return canvas
        boxes = self.propose(image, rule, max_proposals) if given is None else given
        return replace(canvas, proposals=proposals.onto_canvas(boxes, canvas))

    def answer_beside(self, given: Sequence[Given], wants: Sequence[Wants]) -> Sequence[Ran | ServiceError]:
        """As `answer`, in the lane with the fewest batches. One whose lane is lost runs on the whole engine."""
        asked = self._asked
        if not asked:
            return self.answer(given, wants)
        with self._choosing:
            lane = min(asked, key=asked.__getitem__)
            asked[lane] = asked.pop(lane) + 1
        try:
            return lane.answer(given, wants)
        except LaneLost:
            return self.answer(given, wants)
        finally:
            with self._choosing:
                asked[lane] -= 1

    def answer(self, given: Sequence[Given], wants: Sequence[Wants]) -> list[Raw | ServiceError]:
        """As `run`, of pictures some of which may not be decoded yet; of one that cannot be, the error."""
        tried = [opened(each, self.fit) for each in given]
        well = [(each, want) for each, want in zip(tried, wants, strict=True) if isinstance(each, Opened)]
        raws = iter(self.run([each.canvas for each, _ in well], [want for _, want in well]) if well else ())
        return [_timed_raw(each, next(raws)) if isinstance(each, Opened) else each for each in tried]

    def run(self, canvases: Sequence[Canvas], wants: Sequence[Wants]) -> list[Raw]:
        """One batch on the whole engine; smaller canvases are padded to the largest. Each head runs once, on exactly
        the RoIs that somebody wants.
        """
        with self._turn:
            return self._run(self.engine, canvases, wants)

    def _run(self, engine: Engine, canvases: Sequence[Canvas], wants: Sequence[Wants]) -> list[Raw]:
        assert len(canvases) == len(wants) > 0, f"{len(canvases)} canvases, {len(wants)} wants"
        images = _stacked(canvases)
        sizes = np.array([canvas.size for canvas in canvases], dtype=np.int64)
        timings_ms: dict[str, float] = {}
        with _timed(timings_ms, "detect"):
            boxes = [proposals.stacked(list(canvases))] if self.bundle.takes_proposals else []
            detected = engine.detect(images, sizes, *boxes)
            if (nearness := self.bundle.manifest.thresholds.merge) is not None:
                detected = merged(detected, nearness)
        kept = [_num_kept(detected, index, want) for index, want in enumerate(wants)]
        parts: dict[Head, list[Floats | None]] = {}
        for head in HEADS:
            run = self._masks if head == "masks" else self._heatmaps
            wanted = [self._wants(head, want) for want in wants]
            has_time = self._has_time(head, kept, wanted, wants)
            with _timed(timings_ms, head):
                parts[head] = run(engine, detected, kept, [a and b for a, b in zip(wanted, has_time, strict=True)])
            num_rois = sum(len(rows) for rows in parts[head] if rows is not None)
            if num_rois:
                passed_ms = timings_ms[head] / num_rois
                self._roi_ms[head] = 0.8 * self._roi_ms.get(head, passed_ms) + 0.2 * passed_ms
        return [
            Raw(
                size=canvas.size,
                image_size=canvas.image_size,
                boxes_canvas=detected.boxes[index, : kept[index]],
                scores=detected.scores[index, : kept[index]],
                labels=detected.labels[index, : kept[index]],
                probabilities=parts["masks"][index],
                heatmaps=parts["keypoints"][index],
                timings_ms=timings_ms,
                wants=wants[index],
                partial=tuple(head for head in HEADS if self._wants(head, wants[index]) and parts[head][index] is None),
            )
            for index, canvas in enumerate(canvases)
        ]

    def finish(self, raw: Ran) -> Detections:
        """Canvas -> image, and masks and keypoints out of what the heads gave. What is finished stays as it is."""
        if isinstance(raw, Detections):
            return raw
        timings_ms = dict(raw.timings_ms)
        height, width = raw.image_size
        scale = np.array([width / raw.size[1], height / raw.size[0]], dtype=np.float32)
        boxes = raw.boxes_canvas * np.tile(scale, 2)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float32))
        probabilities = raw.probabilities if raw.wants.masks == "probability" else None
        rle = points = None
        with _timed(timings_ms, "masks"):
            if raw.probabilities is not None and probabilities is None:
                rle = self._rle(raw.probabilities, boxes, height, width, raw.wants)
        with _timed(timings_ms, "keypoints"):
            if raw.heatmaps is not None:
                points = _points(raw.heatmaps, raw.boxes_canvas, scale)
        return Detections(
            height, width, boxes, raw.scores, raw.labels, rle, points, timings_ms, probabilities, raw.partial
        )

    def detect_image(self, image: Image, wants: Wants | None = None) -> Detections:
        return self.detect_images([image], wants)[0]

    def detect_images(self, images: Sequence[Image], wants: Wants | None = None) -> list[Detections]:
        """The served path without a server, for evaluation: batches of same-shaped canvases, answers in order."""
        wants = wants or Wants()
        canvases = [self.fit(image) for image in images]
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, canvas in enumerate(canvases):
            by_shape.setdefault(canvas.shape, []).append(index)
        answers: dict[int, Detections] = {}
        step = self.max_batch
        for indices in by_shape.values():
            for start in range(0, len(indices), step):
                batch = indices[start : start + step]
                raws = self.run([canvases[index] for index in batch], [wants] * len(batch))
                answers.update(zip(batch, map(self.finish, raws), strict=True))
        return [answers[index] for index in range(len(images))]

    def _rle(self, probabilities: Floats, boxes: Floats, height: int, width: int, wants: Wants) -> list[masks.Rle]:
        if not len(boxes):
            return []
        threshold = self.bundle.manifest.thresholds.mask if wants.mask_threshold is None else wants.mask_threshold
        return PASTE[wants.mask_interpolation](probabilities, boxes, height, width, threshold)

    def _wants(self, head: Head, want: Wants) -> bool:
        if head == "masks":
            return self.bundle.has_masks and want.masks != "none"
        return self.bundle.has_keypoints and want.keypoints

    def _has_time(self, head: Head, kept: list[int], wanted: list[bool], wants: Sequence[Wants]) -> list[bool]:
        """Who can wait for this head, if all that want it are in it."""
        num_rois = sum(num for num, asked in zip(kept, wanted, strict=True) if asked)
        done_s = time.monotonic() + num_rois * self._roi_ms.get(head, 0.0) / 1000
        return [not want.allow_partial or done_s <= want.deadline_s for want in wants]

    def _masks(self, engine: Engine, detected: Detected, kept: list[int], wanted: list[bool]) -> list[Floats | None]:
        def head(rois: Floats, labels: Integers) -> Floats:
            return engine.masks(detected.features, rois, labels)

        return _run_head(head, detected, kept, wanted, empty=(0, self.bundle.mask_side, self.bundle.mask_side))

    def _heatmaps(self, engine: Engine, detected: Detected, kept: list[int], wanted: list[bool]) -> list[Floats | None]:
        described = self.bundle.manifest.keypoints

        def head(rois: Floats, labels: Integers) -> Floats:
            return engine.keypoints(detected.features, rois)

        return _run_head(head, detected, kept, wanted, empty=(0, len(described.names) if described else 0, 56, 56))


def _timed_raw(opened: Opened, raw: Raw) -> Raw:
    return replace(raw, timings_ms={**opened.timings_ms, **raw.timings_ms}) if opened.timings_ms else raw


def _stacked(canvases: Sequence[Canvas]) -> npt.NDArray[np.uint8]:
    height, width = (max(canvas.shape[axis] for canvas in canvases) for axis in (0, 1))
    if len(canvases) == 1:
        return canvases[0].pixels[None]
    if all(canvas.shape == (height, width) for canvas in canvases):
        return np.stack([canvas.pixels for canvas in canvases])
    images = np.zeros((len(canvases), height, width, 3), np.uint8)
    for image, canvas in zip(images, canvases, strict=True):
        image[: canvas.shape[0], : canvas.shape[1]] = canvas.pixels
    return images


def _points(heatmaps: Floats, boxes_canvas: Floats, scale: Floats) -> Floats:
    if not len(heatmaps):
        return np.zeros((0, heatmaps.shape[1], 3), dtype=np.float32)
    points = keypoints.decode(heatmaps, boxes_canvas)
    points[..., :2] *= scale
    return points


def _num_kept(detected: Detected, index: int, want: Wants) -> int:
    """Scores descend, so what an image keeps is always a prefix."""
    scores = detected.scores[index, : int(detected.count[index])]
    return min(int((scores >= want.confidence).sum()), want.max_detections)


def _run_head(
    head: Callable[[Floats, Integers], Floats],
    detected: Detected,
    kept: list[int],
    wanted: list[bool],
    empty: tuple[int, ...],
) -> list[Floats | None]:
    """Per image the head's rows for its kept detections; None where the image did not want this head."""
    counts = [num if asked else 0 for num, asked in zip(kept, wanted, strict=True)]
    rows = np.zeros(empty, dtype=np.float32)
    if sum(counts):
        rois = np.zeros((sum(counts), 5), dtype=np.float32)
        rois[:, 0] = np.repeat(np.arange(len(counts)), counts)
        rois[:, 1:] = np.concatenate([detected.boxes[index, :num] for index, num in enumerate(counts)])
        labels = np.concatenate([detected.labels[index, :num] for index, num in enumerate(counts)])
        rows = head(rois, labels)
    parts = np.split(rows, np.cumsum(counts)[:-1])
    return [part if asked else None for part, asked in zip(parts, wanted, strict=True)]


@contextmanager
def _timed(timings_ms: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the block's milliseconds to `timings_ms[stage]`."""
    start = time.perf_counter()
    yield
    timings_ms[stage] = timings_ms.get(stage, 0.0) + (time.perf_counter() - start) * 1000
