"""OverFeat's merge (Sermanet et al. 2014, section 4.3): instead of suppressing what lies near the best box, boxes of a
class are averaged, the nearest two first, and their scores added. n boxes of an image.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from service.engines import Detected, Floats


def merged(detected: Detected, threshold: float) -> Detected:
    """What is left of each image when no two boxes of a class are nearer than the threshold, the surest first.

    Scores add up in the paper; so that they stay below 1 a sum s is told as 1 - exp(-s), which keeps their order.
    """
    boxes, scores, counts = (np.zeros_like(each) for each in (detected.boxes, detected.scores, detected.count))
    labels = np.full_like(detected.labels, -1)
    for image, count in enumerate(detected.count):
        own = detected.labels[image, :count]
        parts = []
        for label in np.unique(own):
            mine = own == label
            rows, sums = merge(detected.boxes[image, :count][mine], detected.scores[image, :count][mine], threshold)
            parts += [(total, label, row) for row, total in zip(rows, sums, strict=True)]
        parts.sort(key=lambda part: -part[0])
        counts[image] = len(parts)
        for slot, (total, label, row) in enumerate(parts):
            boxes[image, slot], scores[image, slot], labels[image, slot] = row, 1 - np.exp(-total), label
    return replace(detected, count=counts, boxes=boxes, scores=scores, labels=labels)


def merge(boxes: Floats, scores: Floats, threshold: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Boxes (m, 4) and sums of scores (m,): the two of least `distance` become their mean, until none is below."""
    rows, sums = boxes.astype(np.float64), scores.astype(np.float64)
    apart = distances(rows)
    np.fill_diagonal(apart, np.inf)
    while len(rows) > 1:
        first, second = sorted(np.unravel_index(int(np.argmin(apart)), apart.shape))
        if not apart[first, second] < threshold:
            break
        rows[first] = (rows[first] + rows[second]) / 2
        sums[first] += sums[second]
        rows, sums = np.delete(rows, second, 0), np.delete(sums, second)
        apart = np.delete(np.delete(apart, second, 0), second, 1)
        apart[first] = apart[:, first] = distances(rows, rows[first : first + 1])[:, 0]
        apart[first, first] = np.inf
    return rows, sums


def distances(boxes: npt.NDArray[np.float64], others: npt.NDArray[np.float64] | None = None) -> npt.NDArray[np.float64]:
    """The paper's match score, pairwise: the distance of the centres and the boxes' overlap, as a sum that is least for
    boxes that agree. Hence the overlap counts as 1 - IoU, and the distance in units of the boxes' mean side."""
    others = boxes if others is None else others
    sides, other_sides = boxes[:, 2:] - boxes[:, :2], others[:, 2:] - others[:, :2]
    gaps = (boxes[:, None, :2] + boxes[:, None, 2:] - others[None, :, :2] - others[None, :, 2:]) / 2
    unit = (sides.mean(1)[:, None] + other_sides.mean(1)[None]) / 2
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    union = sides.prod(1)[:, None] + other_sides.prod(1)[None] - both
    return np.hypot(gaps[..., 0], gaps[..., 1]) / np.maximum(unit, 1e-9) + 1 - both / np.maximum(union, 1e-9)
