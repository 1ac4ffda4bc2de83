"""Answers in the words of annotation tools and of Roboflow's clients, so that they read this service as their own.

Frames are theirs: Roboflow's outlines go through pixels, as OpenCV's do; Label Studio counts in percent; CVAT's mask
window names its last pixel, not the one past it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.answers import Found, Row, dumps, rounded_boxes, rounded_scores
from service.crops import crop
from service.keypoints import VISIBLE
from service.masks import Rle
from service.polygons import Outline, simplify, to_pixel_centres, trace
from service.wire import BoxFormat

Ints = NDArray[np.signedinteger[Any]]


def to_roboflow(found: Found) -> bytes:
    """roboflow/inference's answer, read by supervision's `from_inference`.

    `points` is one ring, all that format has room for: the largest part. `rle` is the whole mask, for clients that know
    it; masks=polygon leaves it out.
    """
    detections, classes = found.detections, found.manifest.classes
    names = found.manifest.keypoints.names if found.manifest.keypoints else []
    predictions: list[Row] = []
    contours = None if detections.masks is None else _contours(detections.masks, found.options.polygon_tolerance)
    for index, (label, (x, y, width, height), score) in enumerate(_listed(found, "cxcywh")):
        row: Row = {"x": x, "y": y, "width": width, "height": height, "confidence": score}
        row |= {"class": classes[label], "class_id": label}
        if detections.masks is not None and contours is not None:
            row["points"] = [{"x": x, "y": y} for x, y in contours[index].tolist()]
            if found.options.masks != "polygon":
                row["rle"] = detections.masks[index]
        if detections.keypoints is not None:
            row["keypoints"] = [
                {"x": round(x, 2), "y": round(y, 2), "confidence": round(sure, 4), "class_id": joint, "class": name}
                for joint, (name, (x, y, sure)) in enumerate(
                    zip(names, detections.keypoints[index].tolist(), strict=True)
                )
            ]
        predictions.append(row)
    passed_s = sum(found.timings_ms.values()) / 1000
    size = {"width": detections.width, "height": detections.height}
    return dumps({"time": round(passed_s, 6), "image": size, "predictions": predictions})


def to_labelstudio(found: Found) -> bytes:
    """The `predictions` of a Label Studio task: one, with regions for the controls box, mask and keypoints."""
    manifest, scores = found.manifest, rounded_scores(found.detections)
    prediction = {
        "model_version": f"{manifest.name} {manifest.version}",
        "score": round(sum(scores) / len(scores), 4) if scores else 0.0,
        "result": list(_regions(found)),
    }
    return dumps({"predictions": [prediction]})


def to_cvat(found: Found) -> bytes:
    """What CVAT expects of a Nuclio detector: a mask for each detection, or a rectangle without one, and a skeleton.

    A skeleton is another kind of label to CVAT, hence another name: <class>_skeleton. CVAT passes over labels that the
    function does not declare.
    """
    detections, classes = found.detections, found.manifest.classes
    shapes: list[Row] = []
    outlines = None if detections.masks is None else trace(detections.masks)
    for index, (label, box, score) in enumerate(_listed(found, "xyxy")):
        shape: Row = {"confidence": str(score), "label": classes[label], "type": "rectangle", "points": box}
        if detections.masks is not None and outlines is not None and outlines[index].polygons:
            ring = simplify([_largest(outlines[index])], found.options.polygon_tolerance)[0]
            shape |= {"type": "mask", "points": ring.ravel(), "mask": _cvat_mask(detections.masks[index])}
        shapes.append(shape)
        if detections.keypoints is not None:
            shapes.append(_cvat_skeleton(found, index, f"{classes[label]}_skeleton", str(score)))
    return dumps(shapes)


def _listed(found: Found, box_format: BoxFormat) -> Iterator[tuple[int, list[float], float]]:
    detections = found.detections
    boxes = rounded_boxes(detections, box_format)
    return zip(detections.labels.tolist(), boxes, rounded_scores(detections), strict=True)


def _contours(masks: list[Rle], tolerance: float) -> list[Ints]:
    """The largest part of each mask through its pixels. An empty mask gives a point outside, three times: clients drop
    the masks of all detections where one has fewer than three points."""
    nothing = np.full((3, 2), -1)
    rings = [to_pixel_centres(_largest(each)) if each.polygons else nothing for each in trace(masks)]
    return simplify(rings, tolerance)


def _largest(outline: Outline) -> Ints:
    return max(outline.polygons, key=_area)


def _area(ring: Ints) -> int:
    """Twice the area within, by the shoelace formula; positive for outer rings."""
    after = np.roll(ring, -1, axis=0)
    return int((ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]).sum())


def _cvat_mask(mask: Rle) -> Ints:
    x, y, pixels = crop(mask)
    height, width = pixels.shape
    window = np.array([x, y, x + width - 1, y + height - 1], np.int32)
    return np.concatenate([pixels.ravel(), window], dtype=np.int32)  # a Python list would take twice the memory


def _cvat_skeleton(found: Found, index: int, label: str, confidence: str) -> Row:
    described, points = found.manifest.keypoints, found.detections.keypoints
    assert described is not None, "keypoints of a model without names for them"
    assert points is not None, "a skeleton without keypoints"
    elements = [
        {
            "label": name,
            "type": "points",
            "outside": int(score < VISIBLE),
            "points": [round(x, 2), round(y, 2)],
            "confidence": str(round(score, 4)),
        }
        for name, (x, y, score) in zip(described.names, points[index].tolist(), strict=True)
    ]
    return {"confidence": confidence, "label": label, "type": "skeleton", "elements": elements}


def _regions(found: Found) -> Iterator[Row]:
    detections, classes = found.detections, found.manifest.classes
    names = found.manifest.keypoints.names if found.manifest.keypoints else []
    percent = np.array([100 / detections.width, 100 / detections.height])
    for index, (label, box, score) in enumerate(_listed(found, "xywh")):
        common = {"score": score, "original_width": detections.width, "original_height": detections.height}
        x, y, width, height = (np.array(box) * np.tile(percent, 2)).round(4).tolist()
        value: Row = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
        yield _region(f"d{index}", "box", "rectanglelabels", classes[label], value, common)
        if detections.masks is not None:
            value = {"format": "rle", "rle": brush(detections.masks[index])}
            yield _region(f"d{index}m", "mask", "brushlabels", classes[label], value, common)
        if detections.keypoints is not None:
            for joint, point in enumerate(detections.keypoints[index].astype(np.float64)):
                if point[2] < VISIBLE:
                    continue
                x, y = (point[:2] * percent).round(4).tolist()
                value = {"x": x, "y": y, "width": 0.5}
                sure = {**common, "score": round(float(point[2]), 4), "parentID": f"d{index}"}
                yield _region(f"d{index}k{joint}", "keypoints", "keypointlabels", names[joint], value, sure)


def _region(key: str, control: str, kind: str, label: str, value: Row, common: Row) -> Row:
    value = {**value, kind: [label]}
    names = {"id": key, "type": kind, "from_name": control, "to_name": "image", "origin": "prediction"}
    return {**names, "image_rotation": 0, "value": value, **common}


_SIZES = (3, 4, 8, 16)  # bits that a run's length may take, as Label Studio's own encoder has them


def brush(mask: Rle) -> NDArray[np.uint8]:
    """Label Studio's run lengths (@thi.ng/rle-pack) of the mask as an RGBA picture, 255 or 0 in all four channels.

    A stream of bits: the number of values (32), of bits in a value less one (5), of bits in each kind of length less
    one (4 x 4); then for each run 1, the kind of its length (2), its length less one, its value (8). Written from the
    runs of the mask's window: the picture is never made.
    """
    height, width = mask["size"]
    value, length = _split(*_row_runs(mask), 2 ** _SIZES[-1])
    kind = np.searchsorted([2**bits for bits in _SIZES[:-1]], length)
    bits = np.array(_SIZES)[kind]
    codes = ((4 + kind) << bits | (length - 1)) << 8 | value
    header = [(4 * height * width, 32), (7, 5), *((size - 1, 4) for size in _SIZES)]
    return _packed(
        np.concatenate([[code for code, _ in header], codes]), np.concatenate([[size for _, size in header], bits + 11])
    )


def _row_runs(mask: Rle) -> tuple[Ints, Ints]:
    """Values (0 or 255) and lengths of runs of channel values, row by row, over the whole image."""
    height, width = mask["size"]
    x, y, pixels = crop(mask)
    padded = np.zeros((pixels.shape[0], pixels.shape[1] + 2), np.int8)
    padded[:, 1:-1] = pixels
    row, column = np.nonzero(np.diff(padded, axis=1))
    change = (row + y) * width + column + x
    # A row that ends at the right edge may go on in the next: no change there.
    lengths = 4 * np.diff(change, prepend=0, append=height * width)
    values = np.zeros(len(lengths), np.int64)
    values[1::2] = 255
    return values[lengths > 0], lengths[lengths > 0]


def _split(values: Ints, lengths: Ints, longest: int) -> tuple[Ints, Ints]:
    """Runs of at most `longest`."""
    pieces = -(-lengths // longest)
    split = np.full(pieces.sum(), longest)
    split[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * longest
    return np.repeat(values, pieces), split


def _packed(codes: Ints, bits: Ints) -> NDArray[np.uint8]:
    """The lowest `bits` of each code, one after the other, as bytes."""
    ends = np.cumsum(bits)
    shift = np.repeat(ends, bits) - 1 - np.arange(ends[-1])
    return np.packbits((np.repeat(codes, bits) >> shift & 1).astype(bool))
