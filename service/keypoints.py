"""Keypoint heat maps to joints on the canvas: Mask R-CNN section 5, in the bicubic form of torchvision and Detectron2.

Shapes: N persons, J joints, S cells a side of a map (56), boxes xyxy on the canvas. With w = max(x2 - x1, 1) and its
ceiling wc, heights alike, both projects resize each map to (hc, wc), bicubic, and a joint is the first largest pixel
(xi, yi) of it, at x = (xi + 0.5) * w / wc + x1 (torchvision `roi_heads.py`, `heatmaps_to_keypoints`). Here all persons
are read at once and only the pixels that can be the largest are computed.

Which can: PyTorch's kernel (a = -0.75, borders repeated) makes the resized map a piecewise bicubic surface with the
value m and the slopes d = 0.75 * (right - left) at each cell centre, in x and y alike. Between two centres it is in
Bezier form, with control points m0, m0 + d0 / 3, m1 - d1 / 3, m1, and over a square of four centres with their
products: 16 points, four of them at each centre, m + i * gx + j * gy + i * j * gxy for i, j in {0, +-1}, where
gx = (right - left) / 4 and gxy is the same of gy. The surface is a convex combination of its control points, so within
a square it is at most the largest of

    m + max(|gx + gy| + gxy, |gx - gy| - gxy)                      (a form linear in i and in j is largest at +-1)

over its four centres. A pixel near the largest cell gives a value that is reached; squares whose bound is below it, less
the rounding of both, cannot hold the maximum and all others are searched. The same bound in y alone then drops columns
of a square. Sums are taken in another order than PyTorch's, so two pixels equal to the last bit or two can swap.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.signedinteger[Any]]

_CUBIC = np.float32(-0.75)  # PyTorch, UpSample.h
_QUARTER = np.float32(0.25)
_ROUNDING = np.float32(1e-5)  # of a map's largest magnitude: the bound and a pixel are some forty roundings of 2**-24
_SIDE = 2**15  # pixels; no canvas is larger
_MAPS = 34  # bounded together: their arrays stay within a processor's second-level cache
_CENTRES = 2**17  # kept together
_PIXELS = 2**18  # computed together


class _Axis(NamedTuple):
    """One axis of the N resized maps, their P pixels in one list.

    `low`, `side` (N,) are the box in canvas pixels, `length` (N,) that of the resized map, `start` (N,) its first pixel
    in the list. A pixel blends the cells `base` - 1 to `base` + 2 with its four `weights` (4, P). The pixels of map n
    with one base are first[k] to first[k + 1], k = n * (S + 1) + base + 1.
    """

    low: Floats
    side: Floats
    length: Ints
    start: Ints
    base: Ints
    weights: Floats
    first: Ints


class _Best(NamedTuple):
    """The largest pixel found so far of each of the Q maps: `value` and `place` (Q,), row * width + column."""

    value: Floats
    place: Ints


def decode(heatmaps: Floats, boxes: Floats) -> Floats:
    """Joints (N, J, 3) as x, y on the canvas and a score, from logits (N, J, S, S) and `boxes` (N, 4) on the canvas.

    The score is Detectron2's (`structures/keypoints.py`), the softmax over the S * S cells at the largest of them: it
    compares between persons of all sizes.
    """
    heatmaps, boxes = np.asarray(heatmaps, np.float32), np.asarray(boxes, np.float32)
    number, joints, cells = heatmaps.shape[:3]
    assert heatmaps.shape == (number, joints, cells, cells), heatmaps.shape
    assert boxes.shape == (number, 4), (heatmaps.shape, boxes.shape)
    found = np.zeros((number, joints, 3), np.float32)
    if not found.size:
        return found
    maps = heatmaps.reshape(-1, cells, cells)
    across, down = _axis(boxes[:, 0], boxes[:, 2], cells), _axis(boxes[:, 1], boxes[:, 3], cells)
    largest = maps.reshape(len(maps), -1).argmax(axis=1)
    place = _search(maps, largest, across, down).place.reshape(number, joints)
    row, column = np.divmod(place, across.length[:, None])
    for index, (axis, pixel) in enumerate(((across, column), (down, row))):
        step = axis.side / axis.length.astype(np.float32)
        found[..., index] = (pixel.astype(np.float32) + np.float32(0.5)) * step[:, None] + axis.low[:, None]
    found[..., 2] = _scores(maps, largest).reshape(number, joints)
    return found


def _axis(low: Floats, high: Floats, cells: int) -> _Axis:
    side = np.fmin(np.fmax(high - low, 1), _SIDE)
    length = np.ceil(side).astype(np.int64)
    start = np.cumsum(length) - length
    owner = np.repeat(np.arange(len(length)), length)
    pixel = (np.arange(len(owner)) - start[owner]).astype(np.float32)
    at = (np.float32(cells) / length.astype(np.float32))[owner] * (pixel + np.float32(0.5)) - np.float32(0.5)
    floor = np.floor(at)
    base = floor.astype(np.int64)
    counts = np.bincount(owner * (cells + 1) + base + 1, minlength=len(length) * (cells + 1))
    first = np.concatenate(([0], np.cumsum(counts)))
    return _Axis(low, side, length, start, base, _weights(at - floor), first)


def _weights(part: Floats) -> Floats:
    """(4, P) cubic convolution weights (Keys 1981) of the cells around positions a fraction past the second."""
    near, far = np.stack((part, 1 - part)), np.stack((part + 1, 2 - part))
    inner = ((_CUBIC + 2) * near - (_CUBIC + 3)) * near * near + 1
    outer = ((_CUBIC * far - 5 * _CUBIC) * far + 8 * _CUBIC) * far - 4 * _CUBIC
    return np.stack((outer[0], inner[0], inner[1], outer[1]))


def _scores(maps: Floats, largest: Ints) -> Floats:
    """(Q,) softmax of the `largest` cell of each map."""
    flat = maps.reshape(len(maps), -1)
    peak = np.take_along_axis(flat, largest[:, None], 1)
    scores = np.empty(len(flat), np.float32)
    for start in range(0, len(flat), _MAPS):
        some = slice(start, start + _MAPS)
        scores[some] = 1 / np.exp(flat[some] - peak[some]).sum(axis=1)
    return scores


def _search(maps: Floats, largest: Ints, across: _Axis, down: _Axis) -> _Best:
    """The first largest pixel of each resized map, from the `largest` cell (Q,) of each of `maps` (Q, S, S)."""
    flat = maps.reshape(len(maps), -1)
    best = _reached(maps, largest, across, down)
    peak = np.take_along_axis(flat, largest[:, None], 1)[:, 0]
    least = best.value - _ROUNDING * np.maximum(np.abs(peak), np.abs(flat.min(axis=1)))
    for centres in _centres(maps, least):
        for squares in _pieces(_squares(centres, maps.shape[1]), len(maps), across, down):
            best = _extend(maps, squares, least, best, across, down)
    return best


def _reached(maps: Floats, largest: Ints, across: _Axis, down: _Axis) -> _Best:
    """The best of the four pixels around the centre of the largest cell."""
    number, cells = len(maps), maps.shape[1]
    person = np.arange(number) // (number // len(across.length))
    pixels = []
    for axis, cell in ((down, largest // cells), (across, largest % cells)):
        length = axis.length[person]
        pixel = ((2 * cell + 1) * length - cells) // (2 * cells)  # (cell + 0.5) * length / S - 0.5
        pixels.append([(pixel + step).clip(0, length - 1) for step in (0, 1)])
    rows, columns = pixels
    row, column = np.stack([rows[0], rows[0], rows[1], rows[1]]), np.stack([*columns, *columns])
    value = _surface(maps, row + down.start[person], column + across.start[person], across, down)
    best = value.argmax(axis=0)[None]
    place = row * across.length[person] + column
    return _Best(np.take_along_axis(value, best, 0)[0], np.take_along_axis(place, best, 0)[0])


def _surface(maps: Floats, row: Ints, column: Ints, across: _Axis, down: _Axis) -> Floats:
    """Values (K, Q) at K listed pixels of each map."""
    taps = _taps(maps, np.arange(len(maps)), down.base[row], across.base[column])
    x, y = across.weights[:, column], down.weights[:, row]
    lines = [_blend(line, x) for line in taps]
    return _blend(lines, y)


def _taps(maps: Floats, which: Ints, row: Ints, column: Ints) -> Floats:
    """The 4 x 4 cells (4, 4, ...) around squares of cell centres, borders repeated."""
    cells = maps.shape[1]
    around = np.arange(-1, 3).reshape(4, *[1] * row.ndim)
    rows, columns = (row + around).clip(0, cells - 1), (column + around).clip(0, cells - 1)
    return maps.ravel()[(which * cells + rows)[:, None] * cells + columns]


def _blend(taps: Floats | list[Floats], weights: Floats) -> Floats:
    total = taps[0] * weights[0]
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        total += tap * weight
    return total


def _centres(maps: Floats, least: Floats) -> Iterator[Ints]:
    """Cell centres, as places in `maps`, whose control points can reach `least` (Q,), about `_CENTRES` at a time."""
    pending: list[Ints] = []
    for start in range(0, len(maps), _MAPS):
        some = maps[start : start + _MAPS]
        pending.append(_bounded(some, least[start : start + _MAPS]) + start * some[0].size)
        if sum(map(len, pending)) > _CENTRES:
            yield np.concatenate(pending)
            pending = []
    yield np.concatenate(pending or [np.empty(0, np.int64)])


def _bounded(maps: Floats, least: Floats) -> Ints:
    padded = _padded(maps)
    side = padded.shape[1]
    flat = padded.ravel()  # differences along the flat array are wrong only in the padding
    gy = flat[2 * side :] - flat[: -2 * side]
    gxy, gy = (gy[2:] - gy[:-2]) * _QUARTER, gy[1:-1]
    gx = flat[side + 2 : -side] - flat[side : -side - 2]
    along, against = gx + gy, gx - gy
    np.abs(along, out=along)
    np.abs(against, out=against)
    along += gxy
    against -= gxy
    np.maximum(along, against, out=along)
    along *= _QUARTER
    along += flat[side + 1 : -side - 1]
    flat[side + 1 : -side - 1] = along
    place = np.flatnonzero(padded.reshape(len(maps), -1) >= least[:, None])
    line, column = np.divmod(place, side)
    which, row = np.divmod(line, side)
    inner = (row > 0) & (row < side - 1) & (column > 0) & (column < side - 1)
    return (((which * (side - 2)) + row - 1) * (side - 2) + column - 1)[inner]


def _padded(maps: Floats) -> Floats:
    """`maps` with its border repeated once (np.pad does the same several times slower)."""
    number, cells = maps.shape[:2]
    padded = np.empty((number, cells + 2, cells + 2), np.float32)
    padded[:, 1:-1, 1:-1], padded[:, 0, 1:-1], padded[:, -1, 1:-1] = maps, maps[:, 0], maps[:, -1]
    padded[:, :, 0], padded[:, :, -1] = padded[:, :, 1], padded[:, :, -2]
    return padded


def _squares(centres: Ints, cells: int) -> Ints:
    """Ascending places in (Q, S + 1, S + 1) of the squares of four centres that have one of these."""
    line, column = np.divmod(centres, cells)
    which, row = np.divmod(line, cells)
    corner = (which * (cells + 1) + row) * (cells + 1) + column
    found = np.sort(np.concatenate([corner, corner + 1, corner + cells + 1, corner + cells + 2]))
    return found[np.diff(found, prepend=-1) > 0]  # np.unique hashes, ten times slower


class _Squares(NamedTuple):
    """Squares of four cell centres that hold pixels: `which` map, `row` and `column` of the first centre (from -1), all
    (C,), and the ranges of listed pixels in it."""

    which: Ints
    row: Ints
    column: Ints
    top: Ints
    height: Ints
    left: Ints
    width: Ints


def _pieces(squares: Ints, number: int, across: _Axis, down: _Axis) -> Iterator[_Squares]:
    """The `squares` of `number` maps that hold pixels, about `_PIXELS` pixels at a time."""
    joints = number // len(across.length)
    spans = (len(across.first) - 1) // len(across.length)
    line, column = np.divmod(squares, spans)
    which, row = np.divmod(line, spans)
    person = which // joints * spans
    left, top = across.first[person + column], down.first[person + row]
    width, height = across.first[person + column + 1] - left, down.first[person + row + 1] - top
    some = np.flatnonzero(width * height)
    kept = np.stack((which, row - 1, column - 1, top, height, left, width))[:, some]
    piece = np.cumsum(kept[4] * kept[6]) // _PIXELS
    for part in np.split(kept, np.flatnonzero(np.diff(piece)) + 1, axis=1) if len(some) else []:
        yield _Squares(*part)


def _extend(maps: Floats, squares: _Squares, least: Floats, best: _Best, across: _Axis, down: _Axis) -> _Best:
    """`best` of before and of all pixels of the squares."""
    taps = _taps(maps, squares.which, squares.row, squares.column)
    square, column = _ranges(squares.left, squares.width)
    weights = across.weights.take(column, axis=1)
    lines = np.stack([_blend(line.take(square, axis=1), weights) for line in taps])
    reach = np.maximum(lines[1] + _QUARTER * np.abs(lines[2] - lines[0]), lines[2] + _QUARTER * np.abs(lines[3] - lines[1]))
    some = np.flatnonzero(reach >= least[squares.which[square]])
    lines, square, column = lines[:, some], square[some], column[some]
    ray, row = _ranges(squares.top[square], squares.height[square])
    value = _blend(lines.take(ray, axis=1), down.weights.take(row, axis=1))
    return _better(best, squares.which[square], ray, row, column, value, across, down)


def _ranges(first: Ints, length: Ints) -> tuple[Ints, Ints]:
    """The members of ranges, as owner and value."""
    owner = np.repeat(np.arange(len(first)), length)
    return owner, np.arange(len(owner)) + (first - (np.cumsum(length) - length))[owner]


def _better(best: _Best, which: Ints, ray: Ints, row: Ints, column: Ints, value: Floats, across: _Axis, down: _Axis) -> _Best:
    if not len(ray):
        return best
    joint = which[ray]
    head = np.flatnonzero(np.diff(joint, prepend=-1))
    top = np.maximum.reduceat(value, head)
    group = np.repeat(np.arange(len(head)), np.diff(head, append=len(joint)))
    some = np.flatnonzero(value == top[group])
    person = joint[some] // (len(best.value) // len(across.length))
    place = (row[some] - down.start[person]) * across.length[person] + column[ray[some]] - across.start[person]
    first = np.full(len(head), np.iinfo(np.int64).max)
    np.minimum.at(first, group[some], place)
    who = joint[head]
    wins = (top > best.value[who]) | ((top == best.value[who]) & (first < best.place[who]))
    who, top, first = who[wins], top[wins], first[wins]
    best.value[who], best.place[who] = top, first
    return best
