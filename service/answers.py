"""This service's own answers, JSON and a line for each detection, and COCO's results, all from `Found`.

Coordinates are written to 1/100 pixel and scores to 1/10000: finer is below the network's own noise.
"""

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from service import crops
from service.bundle import Manifest
from service.detector import Detections
from service.errors import ServiceError, none_failed
from service.keypoints import VISIBLE
from service.masks import Rle
from service.polygons import outlines
from service.wire import BoxFormat, KeypointFormat, MaskFormat, Options

Row = dict[str, Any]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Found:
    """What an answer is written from. `upload` holds the encoded picture where the format shows it.

    `started_s` is when the writing of the answer began, on the clock of time.perf_counter.
    """

    manifest: Manifest
    detections: Detections
    options: Options
    timings_ms: Mapping[str, float]
    started_s: float
    upload: bytes = b""


def dumps(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def to_json(found: Found) -> bytes:
    rows = orjson.Fragment(dumps(_rows(found)))
    return dumps({**_who(found), "detections": rows, "timings_ms": _timings(found)})


def to_ndjson(found: Found) -> bytes:
    rows = [dumps(row) for row in _rows(found)]
    head = {**_who(found), "num_detections": len(rows), "timings_ms": _timings(found)}
    return b"\n".join([dumps(head), *rows, b""])


def to_coco(found: Found) -> bytes:
    """https://cocodataset.org/#format-results. COCO's categories count from 1, its keypoints are pixel indices."""
    detections = found.detections
    labels, scores, boxes = detections.labels.tolist(), rounded_scores(detections), rounded_boxes(detections, "xywh")
    rows: list[Row] = [
        {"image_id": found.options.image_id, "category_id": label + 1, "bbox": box, "score": score}
        for label, score, box in zip(labels, scores, boxes, strict=True)
    ]
    if detections.masks is not None:
        _extend(rows, "segmentation", detections.masks)
    if detections.keypoints is not None:
        _extend(rows, "keypoints", _flat(detections.keypoints - np.array([0.5, 0.5, 0], np.float32)))
    return dumps(rows)


Results = Sequence[bytes | ServiceError]
Tell = Callable[[ServiceError], Mapping[str, Any]]


def join_json(manifest: Manifest, results: Results, tell: Tell) -> bytes:
    """Several pictures' answers as `to_json` wrote them, in order; `tell` makes a problem of an error."""
    rows = [{"error": tell(each)} if isinstance(each, ServiceError) else orjson.Fragment(each) for each in results]
    return dumps({"model": _model(manifest), "results": rows})


def join_ndjson(manifest: Manifest, results: Results, tell: Tell) -> bytes:
    lines = [dumps({"error": tell(each)}) + b"\n" if isinstance(each, ServiceError) else each for each in results]
    return b"".join(lines)


def join_coco(manifest: Manifest, results: Results, tell: Tell) -> bytes:
    """One list. It has no place for an error, and a picture left out would read as one without detections."""
    return b"[" + b",".join(rows[1:-1] for rows in none_failed(results) if rows != b"[]") + b"]"


def rounded_scores(detections: Detections) -> list[float]:
    return detections.scores.astype(np.float64).round(4).tolist()


def rounded_boxes(detections: Detections, box_format: BoxFormat) -> list[list[float]]:
    return boxes_as(detections, box_format).round(2).tolist()


def boxes_as(detections: Detections, box_format: BoxFormat) -> npt.NDArray[np.float64]:
    low, high = np.split(detections.boxes.astype(np.float64), 2, axis=1)
    parts = {"xyxy": (low, high), "xywh": (low, high - low), "cxcywh": ((low + high) / 2, high - low)}
    return np.concatenate(parts[box_format], axis=1)


def _who(found: Found) -> Row:
    manifest, detections = found.manifest, found.detections
    who: Row = {
        "model": _model(manifest),
        "image": {"width": detections.width, "height": detections.height},
    }
    return {**who, "partial": list(detections.partial)} if detections.partial else who


def _model(manifest: Manifest) -> Row:
    return {"name": manifest.name, "version": manifest.version}


def _timings(found: Found) -> dict[str, float]:
    passed_ms = {**found.timings_ms, "encode": (time.perf_counter() - found.started_s) * 1000}
    return {stage: round(passed, 3) for stage, passed in passed_ms.items()}


def _rows(found: Found) -> list[Row]:
    detections, options, classes = found.detections, found.options, found.manifest.classes
    labels = detections.labels.tolist()
    scores, boxes = rounded_scores(detections), rounded_boxes(detections, options.box_format)
    rows: list[Row] = [
        {"label": classes[label], "class_id": label, "score": score, "box": box}
        for label, score, box in zip(labels, scores, boxes, strict=True)
    ]
    if detections.masks is not None or detections.probabilities is not None:
        _extend(rows, "mask", MASKS[options.masks](detections, options))
    if detections.keypoints is not None:
        _extend(rows, "keypoints", KEYPOINTS[options.keypoint_format](detections.keypoints))
    return rows


def _extend(rows: list[Row], name: str, values: list[Any]) -> None:
    for row, value in zip(rows, values, strict=True):
        row[name] = value


def _points(points: Floats) -> list[list[list[float]]]:
    points = points.astype(np.float64)
    return np.concatenate([points[..., :2].round(2), points[..., 2:].round(4)], axis=-1).tolist()


def _flat(points: Floats) -> list[list[float]]:
    """COCO's x, y, v of each joint. All joints are labelled, so v is 1 or 2."""
    places, visible = points[..., :2].astype(np.float64).round(2).tolist(), (points[..., 2] >= VISIBLE).tolist()
    return [
        [value for (x, y), is_seen in zip(*person, strict=True) for value in (x, y, 1 + is_seen)]
        for person in zip(places, visible, strict=True)
    ]


KEYPOINTS: dict[KeypointFormat, Callable[[Floats], list[Any]]] = {"xys": _points, "coco": _flat}


def _masks(detections: Detections) -> list[Rle]:
    assert detections.masks is not None, "the format needs pasted masks, the detector gave none"
    return detections.masks


def _rle(detections: Detections, options: Options) -> list[Row]:
    return [{"format": "rle", **mask} for mask in _masks(detections)]


def _polygon(detections: Detections, options: Options) -> list[Row]:
    rows: list[Row] = []
    for rings in outlines(_masks(detections), options.polygon_tolerance):
        polygons, holes = ([ring.ravel() for ring in part] for part in rings)
        rows.append({"format": "polygon", "polygons": polygons, "holes": holes})
    return rows


def _cropped(name: str, encode: Callable[[crops.Bools], bytes], mask: Rle) -> Row:
    x, y, pixels = crops.crop(mask)
    return {"format": name, "offset": [x, y], "size": list(pixels.shape), "data": _base64(encode(pixels))}


def _png(detections: Detections, options: Options) -> list[Row]:
    return [_cropped("png", crops.png, mask) for mask in _masks(detections)]


def _bitmap(detections: Detections, options: Options) -> list[Row]:
    return [_cropped("bitmap", crops.bitmap, mask) for mask in _masks(detections)]


def _probability(detections: Detections, options: Options) -> list[Row]:
    assert detections.probabilities is not None, "the detector gave no probabilities"
    levels = np.rint(np.fmin(np.fmax(detections.probabilities, 0), 1) * 255).astype(np.uint8)
    boxes = detections.boxes.astype(np.float64).round(3).tolist()
    return [
        {"format": "probability", "box": box, "size": list(level.shape), "data": _base64(level.tobytes())}
        for level, box in zip(levels, boxes, strict=True)
    ]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


MASKS: dict[MaskFormat, Callable[[Detections, Options], list[Row]]] = {
    "rle": _rle,
    "polygon": _polygon,
    "png": _png,
    "bitmap": _bitmap,
    "probability": _probability,
}
