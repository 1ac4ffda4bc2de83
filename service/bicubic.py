"""PyTorch's bicubic kernel (a = -0.75), and mask probabilities pasted with it.

Shapes: N instances of one image, M cells a side. Boxes, frames and limits are those of `service.masks`. The paste is
`grid_sample(mode="bicubic", align_corners=False)` with zeros outside the mask, foreground where the value is at least
the threshold. It is fixed by this float32 arithmetic, one rounding for each operation, with A zero outside the mask:

    p(i) = (i + 0.5 - low) * (M / (high - low)) - 0.5       place of pixel i on an axis, from the centre of cell 0
    c = floor(p), w = cubic_weights(p - c); outside the mask unless -2 <= p < M + 1
    D[r]  = A[r, c - 1] * w[0] + ... + A[r, c + 2] * w[3]   the profile of an image column, at the mask rows
    value = D[k - 1] * v[0] + ... + D[k + 2] * v[3]         k, v: cell and weights of the image row

A cubic can cross the threshold three times between two rows, so there is no short closed form as for the bilinear:
every pixel of the box's own window is evaluated, some columns at a time, and none outside it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import masks
from service.masks import Rle

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.signedinteger[Any]]

_CUBIC = np.float32(-0.75)  # PyTorch, UpSample.h
_HALF = np.float32(0.5)
_REACH = 1.5  # cells beyond the box, where the kernel still meets the outermost cell
_RING = 3  # cells of background around the mask: the last that a kernel within `_REACH` can ask for
_WORK = 2**19  # pixels evaluated together: some 10 MB


def rle(probabilities: Floats, boxes: Floats, height: int, width: int, threshold: float = 0.5) -> list[Rle]:
    """As `service.masks.rle`, pasted with the cubic kernel."""
    probabilities, boxes = masks.checked(probabilities, boxes, height, width, threshold)
    cells = probabilities.shape[-1]
    places: list[Ints] = []
    with np.errstate(all="ignore"):  # degenerate boxes divide by zero, and are given no columns
        columns = np.stack(masks.window(boxes, cells, width, _REACH), axis=1)
        rows = np.stack(masks.window(boxes[:, [1, 0, 3, 2]], cells, height, _REACH), axis=1)
        for mask, box, across, down in zip(probabilities, boxes, columns.tolist(), rows.tolist(), strict=True):
            places.append(_places(np.pad(mask, _RING), box, across, down, height, np.float32(threshold)))
    if not places:
        return []
    bounds = np.cumsum([0, *map(len, places)])
    return masks.encode(np.concatenate(places), bounds, height, width)


def cubic_weights(part: Floats) -> Floats:
    """(4, P) weights of the cells around positions `part` past the second (Keys 1981, in PyTorch's arithmetic)."""
    near, far = np.stack((part, 1 - part)), np.stack((part + 1, 2 - part))
    inner = ((_CUBIC + 2) * near - (_CUBIC + 3)) * near * near + 1
    outer = ((_CUBIC * far - 5 * _CUBIC) * far + 8 * _CUBIC) * far - 4 * _CUBIC
    return np.stack((outer[0], inner[0], inner[1], outer[1]))


def blend(taps: Floats | list[Floats], weights: Floats) -> Floats:
    """The sum of `taps` times `weights`, in their order."""
    total = taps[0] * weights[0]
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        total += tap * weight
    return total


def _places(
    padded: Floats, box: Floats, across: list[int], down: list[int], height: int, threshold: np.float32
) -> Ints:
    """Places (T,) where one mask changes, column * height + row, in the window of columns and rows."""
    (left, right), (top, bottom) = across, down
    if left >= right or top >= bottom:
        return np.zeros(0, np.int64)
    cells = len(padded) - 2 * _RING
    row_cell, row_weights = _axis(np.arange(top, bottom), box[1], box[3], cells)
    step = max(1, _WORK // (bottom - top))
    found: list[Ints] = []
    for start in range(left, right, step):
        columns = np.arange(start, min(start + step, right))
        cell, weights = _axis(columns, box[0], box[2], cells)
        profile = blend([padded.T[cell + tap] for tap in range(4)], weights[:, :, None])
        value = blend([profile[:, row_cell + tap] for tap in range(4)], row_weights[:, None])
        inside = np.zeros((len(columns), bottom - top + 2), bool)
        inside[:, 1:-1] = value >= threshold
        column, row = np.nonzero(inside[:, 1:] != inside[:, :-1])
        found.append((columns[column] * height) + row + top)
    return np.concatenate(found)


def _axis(pixel: Ints, low: Floats, high: Floats, cells: int) -> tuple[Ints, Floats]:
    """For each pixel the first of its four cells in the padded mask, and their weights (4, P), zero outside."""
    at = (pixel.astype(np.float32) + _HALF - low) * (np.float32(cells) / (high - low)) - _HALF
    base = np.floor(at)
    weights = cubic_weights(at - base) * ((at >= -2) & (at < cells + 1))
    return base.clip(-2, cells).astype(np.int64) + (_RING - 1), weights
