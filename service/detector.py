"""One model's stages: canvases in, detections in image pixels out.

`run` belongs on the device thread and works on the canvas; `finish` belongs in a thread pool and is the ONE place where
the canvas becomes the image. Knows nothing of HTTP or queues. N RoIs, J joints, n detections of one image.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from service import bicubic, keypoints, masks
from service.bundle import Bundle
from service.engines import Detected, Engine
from service.images import Canvas, Image, fit

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Masks = Literal["rle", "probability", "none"]
Interpolation = Literal["bilinear", "bicubic"]

PASTE: dict[Interpolation, Callable[..., list[masks.Rle]]] = {"bilinear": masks.rle, "bicubic": bicubic.rle}


@dataclass(frozen=True, slots=True)
class Wants:
    """What one request asks for. Below the bundle's score floor there is nothing, whatever `confidence` says.

    Masks come pasted into the image (`rle`) or as the head gave them (`probability`). A `mask_threshold` of None is the
    bundle's.
    """

    confidence: float = 0.5
    max_detections: int = 100
    masks: Masks = "rle"
    keypoints: bool = True
    mask_threshold: float | None = None
    mask_interpolation: Interpolation = "bilinear"


@dataclass(frozen=True, slots=True)
class Raw:
    """One image's detections as the engine gave them, on the canvas. A head that did not run left None."""

    size: tuple[int, int]
    image_size: tuple[int, int]
    boxes_canvas: Floats
    scores: Floats
    labels: Integers
    probabilities: Floats | None
    heatmaps: Floats | None
    timings_ms: dict[str, float] = field(default_factory=dict)
    wants: Wants = field(default_factory=Wants)


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


class Detector:
    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine

    def run(self, canvases: Sequence[Canvas], wants: Sequence[Wants]) -> list[Raw]:
        """One batch of canvases of one shape. Each head runs once, on exactly the RoIs that somebody wants."""
        assert len(canvases) == len(wants) > 0, f"{len(canvases)} canvases, {len(wants)} wants"
        images = np.stack([canvas.pixels for canvas in canvases])
        sizes = np.array([canvas.size for canvas in canvases], dtype=np.int64)
        timings_ms: dict[str, float] = {}
        with _timed(timings_ms, "detect"):
            detected = self.engine.detect(images, sizes)
        kept = [_num_kept(detected, index, want) for index, want in enumerate(wants)]
        with _timed(timings_ms, "masks"):
            probabilities = self._masks(detected, kept, wants)
        with _timed(timings_ms, "keypoints"):
            heatmaps = self._heatmaps(detected, kept, wants)
        return [
            Raw(
                size=canvas.size,
                image_size=canvas.image_size,
                boxes_canvas=detected.boxes[index, : kept[index]],
                scores=detected.scores[index, : kept[index]],
                labels=detected.labels[index, : kept[index]],
                probabilities=probabilities[index],
                heatmaps=heatmaps[index],
                timings_ms=timings_ms,
                wants=wants[index],
            )
            for index, canvas in enumerate(canvases)
        ]

    def finish(self, raw: Raw) -> Detections:
        """Canvas -> image, and masks and keypoints out of what the heads gave."""
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
        return Detections(height, width, boxes, raw.scores, raw.labels, rle, points, timings_ms, probabilities)

    def detect_image(self, image: Image, wants: Wants | None = None) -> Detections:
        return self.detect_images([image], wants)[0]

    def detect_images(self, images: Sequence[Image], wants: Wants | None = None) -> list[Detections]:
        """The served path without a server, for evaluation: batches of same-shaped canvases, answers in order."""
        wants = wants or Wants()
        canvases = [fit(image, self.bundle.manifest.canvas) for image in images]
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, canvas in enumerate(canvases):
            by_shape.setdefault(canvas.shape, []).append(index)
        answers: dict[int, Detections] = {}
        step = self.bundle.manifest.limits.max_batch
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

    def _masks(self, detected: Detected, kept: list[int], wants: Sequence[Wants]) -> list[Floats | None]:
        wanted = [self.bundle.has_masks and want.masks != "none" for want in wants]

        def head(rois: Floats, labels: Integers) -> Floats:
            return self.engine.masks(detected.features, rois, labels)

        return _run_head(head, detected, kept, wanted, empty=(0, 28, 28))

    def _heatmaps(self, detected: Detected, kept: list[int], wants: Sequence[Wants]) -> list[Floats | None]:
        described = self.bundle.manifest.keypoints
        wanted = [described is not None and want.keypoints for want in wants]

        def head(rois: Floats, labels: Integers) -> Floats:
            return self.engine.keypoints(detected.features, rois)

        return _run_head(head, detected, kept, wanted, empty=(0, len(described.names) if described else 0, 56, 56))


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
