"""Keypoint heat maps to joints on the canvas: Mask R-CNN's decoding, in the bicubic form of torchvision and Detectron2.

Shapes: N persons, J joints, Q = N * J maps of S cells a side (56), boxes xyxy on the canvas. With w = max(x2 - x1, 1),
its ceiling wc, and h, hc alike, both projects resize each map to (hc, wc), bicubic, and a joint is the first largest
pixel (xi, yi), at x = (xi + 0.5) * w / wc + x1 (torchvision `roi_heads.py`, `heatmaps_to_keypoints`). Here the maps of
all persons are read at once, and only pixels that can be the largest are computed.

Which can: PyTorch's kernel (a = -0.75, borders repeated) makes the resized map a piecewise bicubic surface with value m
and slope 0.75 * (right - left) at each cell centre, and alike in y. Between two centres that is a Bezier curve with the
control points m0, m0 + g0, m1 - g1, m1, where g = (right - left) / 4. Over a square of four centres it is a Bezier
surface with 16 of them, four at each centre: m + i * gx + j * gy + i * j * gxy, where i and j are 0 or the sign of the
direction into the square and gxy is the g in x of gy. A surface is a convex combination of its control points, so in a
square it is at most the largest of them, and in all four squares around a centre they are at most

    m + max(|gx + gy| + gxy, |gx - gy| - gxy)           (linear in i and in j, hence largest where both are -1 or 1)

A pixel next to the largest cell gives a value that is reached. Squares bounded below it, less the rounding of both,
cannot hold the maximum; of the others the most promising is computed first, then all that its maximum leaves over. The
bound in y alone drops columns of a square. Sums run in another order than PyTorch's, so pixels that are equal but for
the last bits can swap: neighbours at a symmetric top, any at a flat one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.bicubic import blend, cubic_weights

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]

VISIBLE = 0.05  # least score of a joint that Detectron2 draws (`utils/visualizer.py`), whose scores these are
_HALF, _QUARTER = np.float32(0.5), np.float32(0.25)
_ROUNDING = np.float32(1e-5)  # of a map's largest magnitude: a bound and a pixel are some forty roundings of 2**-24
_SIDE = 2**15  # pixels; no canvas is larger
_MAPS = 34  # bounded together: their arrays stay within a processor's second-level cache
_CENTRES = 2**17  # kept together
_PIXELS = 2**18  # computed together


class _Axis(NamedTuple):
    """One axis of the N resized maps, their P pixels in one list.

    `low`, `side` (N,) are the box in canvas pixels, `length` (N,) that of the resized map, `start` (N,) its first pixel
    in the list. A pixel blends the cells `base` - 1 to `base` + 2 with its four `weights` (4, P). Person n's pixels of
    one base are first[k] to first[k + 1], k = n * (S + 1) + base + 1.
    """

    low: Floats
    side: Floats
    length: Ints
    start: Ints
    base: Ints
    weights: Floats
    first: Ints


class _Resized(NamedTuple):
    """The maps (Q, S, S) and the axes of what they are resized to; `person` (Q,) is the owner of each map."""

    maps: Floats
    person: Ints
    down: _Axis
    across: _Axis


class _Best(NamedTuple):
    """The largest pixel found so far of each map, updated in place: `value` and `place` (Q,), row * width + column."""

    value: Floats
    place: Ints


class _Squares(NamedTuple):
    """C squares of four cell centres: map, row and column of the upper left centre (from -1), and the listed pixels."""

    which: Ints
    row: Ints
    column: Ints
    top: Ints
    height: Ints
    left: Ints
    width: Ints


def decode(heatmaps: Floats, boxes: Floats) -> NDArray[np.float32]:
    """Joints (N, J, 3) as x, y on the canvas and a score, from logits (N, J, S, S) and `boxes` (N, 4) on the canvas.

    The score is Detectron2's (`structures/keypoints.py`), the softmax over the S * S cells at the largest of them:
    in 0..1, and comparable between persons of all sizes.
    """
    heatmaps, boxes = np.asarray(heatmaps, np.float32), np.asarray(boxes, np.float32)
    number, joints, cells = heatmaps.shape[:3]
    assert heatmaps.shape == (number, joints, cells, cells), heatmaps.shape
    assert boxes.shape == (number, 4), (heatmaps.shape, boxes.shape)
    found = np.zeros((number, joints, 3), np.float32)
    if not found.size:
        return found
    maps, person = heatmaps.reshape(-1, cells, cells), np.repeat(np.arange(number), joints)
    down, across = _axis(boxes[:, 1], boxes[:, 3], cells), _axis(boxes[:, 0], boxes[:, 2], cells)
    largest = maps.reshape(len(maps), -1).argmax(axis=1)
    place = _search(_Resized(maps, person, down, across), largest).reshape(number, joints)
    row, column = np.divmod(place, across.length[:, None])
    for index, axis, pixel in ((0, across, column), (1, down, row)):
        step = axis.side / axis.length.astype(np.float32)
        found[..., index] = (pixel.astype(np.float32) + _HALF) * step[:, None] + axis.low[:, None]
    found[..., 2] = _scores(maps, largest).reshape(number, joints)
    return found


def _axis(low: Floats, high: Floats, cells: int) -> _Axis:
    side = np.fmin(np.fmax(high - low, 1), _SIDE)
    length = np.ceil(side).astype(np.int64)
    start = np.cumsum(length) - length
    owner = np.repeat(np.arange(len(length)), length)
    pixel = (np.arange(len(owner)) - start[owner]).astype(np.float32)
    at = (np.float32(cells) / length.astype(np.float32))[owner] * (pixel + _HALF) - _HALF
    base = np.floor(at).astype(np.int64)
    counts = np.bincount(owner * (cells + 1) + base + 1, minlength=len(length) * (cells + 1))
    first = np.concatenate(([0], np.cumsum(counts)))
    return _Axis(low, side, length, start, base, cubic_weights(at - np.floor(at)), first)


def _scores(maps: Floats, largest: Ints) -> Floats:
    """(Q,) softmax of the `largest` cell of each map."""
    flat = maps.reshape(len(maps), -1)
    peak = np.take_along_axis(flat, largest[:, None], 1)
    scores = np.empty(len(flat), np.float32)
    for start in range(0, len(flat), _MAPS):
        some = slice(start, start + _MAPS)
        scores[some] = 1 / np.exp(flat[some] - peak[some]).sum(axis=1)
    return scores


def _search(resized: _Resized, largest: Ints) -> Ints:
    """Place (Q,) of the first largest pixel of each resized map, from the `largest` cell of each map."""
    flat = resized.maps.reshape(len(resized.maps), -1)
    highest, lowest = np.take_along_axis(flat, largest[:, None], 1)[:, 0], flat.min(axis=1)
    best = _reached(resized, largest)
    slack = _ROUNDING * np.maximum(np.abs(highest), np.abs(lowest))
    level = highest == lowest  # all pixels are equal, and the first is the first
    best.place[level], slack[level] = 0, -np.inf
    for centres in _centres(resized.maps, best.value - slack):
        squares, bounds, which = _squares(resized.maps, centres, best.value - slack)
        first = bounds == _largest_of(bounds, which)
        _extend(best, resized, squares[first], slack)
        rest = ~first & (bounds >= (best.value - slack)[which])
        _extend(best, resized, squares[rest], slack)
    return best.place


def _reached(resized: _Resized, largest: Ints) -> _Best:
    """The best of the four pixels around the centre of the largest cell."""
    cells = resized.maps.shape[1]
    sides = []
    for axis, cell in ((resized.down, largest // cells), (resized.across, largest % cells)):
        length = axis.length[resized.person]
        pixel = ((2 * cell + 1) * length - cells) // (2 * cells)  # floor of (cell + 0.5) * length / S - 0.5
        sides.append([(pixel + step).clip(0, length - 1) for step in (0, 1)])
    row, column = np.repeat(sides[0], 2, axis=0), np.stack([*sides[1], *sides[1]])
    value = _surface(resized, row, column)
    best = value.argmax(axis=0)[None]
    place = row * resized.across.length[resized.person] + column
    return _Best(np.take_along_axis(value, best, 0)[0], np.take_along_axis(place, best, 0)[0])


def _surface(resized: _Resized, row: Ints, column: Ints) -> Floats:
    """Values at K pixels (K, Q) of each map."""
    row, column = row + resized.down.start[resized.person], column + resized.across.start[resized.person]
    taps = _taps(resized.maps, np.arange(len(resized.maps)), resized.down.base[row], resized.across.base[column])
    weights = resized.across.weights[:, column]
    return blend([blend(line, weights) for line in taps], resized.down.weights[:, row])


def _taps(maps: Floats, which: Ints, row: Ints, column: Ints, count: int = 4) -> Floats:
    """The cells (count, count, ...) from one before (row, column) on, borders repeated."""
    cells = maps.shape[1]
    around = np.arange(-1, count - 1).reshape(count, *[1] * row.ndim)
    rows, columns = (row + around).clip(0, cells - 1), (column + around).clip(0, cells - 1)
    return maps.ravel()[(which * cells + rows)[:, None] * cells + columns]


def _centres(maps: Floats, least: Floats) -> Iterator[Ints]:
    """Cell centres, as places in `maps`, beside which the surface can reach `least` (Q,), some `_CENTRES` at a time."""
    pending: list[Ints] = []
    for start in range(0, len(maps), _MAPS):
        some = maps[start : start + _MAPS]
        pending.append(_bounded(some, least[start : start + _MAPS]) + start * some[0].size)
        if sum(map(len, pending)) > _CENTRES:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def _bounded(maps: Floats, least: Floats) -> Ints:
    """Centres with a control point of at least `least`, by the bound of the module's docstring at every centre."""
    padded = _padded(maps)
    side = padded.shape[1]
    flat = padded.ravel()  # shifts of the flat array are wrong only in the padding
    gy = flat[2 * side :] - flat[: -2 * side]
    gxy, gy = (gy[2:] - gy[:-2]) * _QUARTER, gy[1:-1]
    gx = flat[side + 2 : -side] - flat[side : -side - 2]
    bound, other = gx + gy, gx - gy
    np.abs(bound, out=bound)
    np.abs(other, out=other)
    bound += gxy
    other -= gxy
    np.maximum(bound, other, out=bound)
    bound *= _QUARTER
    flat[side + 1 : -side - 1] += bound
    line, column = np.divmod(np.flatnonzero(padded.reshape(len(maps), -1) >= least[:, None]), side)
    which, row = np.divmod(line, side)
    inner = (row > 0) & (row < side - 1) & (column > 0) & (column < side - 1)
    return ((which * (side - 2) + row - 1) * (side - 2) + column - 1)[inner]


def _padded(maps: Floats) -> Floats:
    """`maps` with its border repeated once, in half the time of np.pad."""
    number, cells = maps.shape[:2]
    padded = np.empty((number, cells + 2, cells + 2), np.float32)
    padded[:, 1:-1, 1:-1], padded[:, 0, 1:-1], padded[:, -1, 1:-1] = maps, maps[:, 0], maps[:, -1]
    padded[:, :, 0], padded[:, :, -1] = padded[:, :, 1], padded[:, :, -2]
    return padded


def _squares(maps: Floats, centres: Ints, least: Floats) -> tuple[Ints, Floats, Ints]:
    """The squares beside `centres` that can reach `least`, as ascending places in (Q, S + 1, S + 1); bounds; maps."""
    cells = maps.shape[1]
    line, column = np.divmod(centres, cells)
    which, row = np.divmod(line, cells)
    taps, floor = _taps(maps, which, row, column, count=3), least[which]
    gx, gy = (taps[1, 2] - taps[1, 0]) * _QUARTER, (taps[2, 1] - taps[0, 1]) * _QUARTER
    gxy = ((taps[2, 2] - taps[2, 0]) - (taps[0, 2] - taps[0, 0])) * (_QUARTER * _QUARTER)
    corner = (which * (cells + 1) + row) * (cells + 1) + column
    places, bounds = [], []
    for j, i in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the square above and left of the centre, and so on
        x, y, both = (gx if i else -gx), (gy if j else -gy), (gxy if i == j else -gxy)
        bound = taps[1, 1] + np.maximum(np.maximum(x, y), np.maximum(x + y + both, 0))
        some = np.flatnonzero(bound >= floor)
        places.append(corner[some] + (j * (cells + 1) + i))
        bounds.append(bound[some])
    place, bound = np.concatenate(places), np.concatenate(bounds)
    order = np.argsort(place, kind="stable")
    place, bound = place[order], bound[order]
    new = np.diff(place, prepend=-1) > 0
    return place[new], _largest_of(bound, place)[new], place[new] // (cells + 1) ** 2


def _largest_of(values: Floats, group: Ints) -> Floats:
    """The largest value of its group for each of `values`; groups ascend."""
    head = np.flatnonzero(np.diff(group, prepend=-1))
    if not len(head):
        return values
    return np.repeat(np.maximum.reduceat(values, head), np.diff(head, append=len(group)))


def _extend(best: _Best, resized: _Resized, squares: Ints, slack: Floats) -> None:
    """Search the pixels of the squares at these places."""
    for piece in _pieces(resized, squares):
        least = (best.value - slack)[piece.which]
        taps = _taps(resized.maps, piece.which, piece.row, piece.column)
        square, column = _ranges(piece.left, piece.width)
        weights = resized.across.weights.take(column, axis=1)
        lines = np.stack([blend(line.take(square, axis=1), weights) for line in taps])
        above, below = np.abs(lines[2] - lines[0]), np.abs(lines[3] - lines[1])
        some = np.flatnonzero(np.maximum(lines[1] + _QUARTER * above, lines[2] + _QUARTER * below) >= least[square])
        lines, square, column = lines[:, some], square[some], column[some]
        ray, row = _ranges(piece.top[square], piece.height[square])
        value = blend(lines.take(ray, axis=1), resized.down.weights.take(row, axis=1))
        _keep(best, resized, piece.which[square][ray], row, column[ray], value)


def _pieces(resized: _Resized, squares: Ints) -> Iterator[_Squares]:
    """The squares that hold pixels, about `_PIXELS` pixels at a time."""
    spans = resized.maps.shape[1] + 1
    line, column = np.divmod(squares, spans)
    which, row = np.divmod(line, spans)
    slots = resized.person[which] * spans + row, resized.person[which] * spans + column
    top, left = resized.down.first[slots[0]], resized.across.first[slots[1]]
    height, width = resized.down.first[slots[0] + 1] - top, resized.across.first[slots[1] + 1] - left
    some = np.flatnonzero(height * width)
    fields = np.stack((which, row - 1, column - 1, top, height, left, width))[:, some]
    pixels = np.cumsum((height * width)[some])
    for piece in np.split(fields, np.flatnonzero(np.diff(pixels // _PIXELS)) + 1, axis=1):
        yield _Squares(*piece)


def _ranges(first: Ints, length: Ints) -> tuple[Ints, Ints]:
    """The members of ranges: index of the range, and value."""
    owner = np.repeat(np.arange(len(first)), length)
    return owner, np.arange(len(owner)) + (first - (np.cumsum(length) - length))[owner]


def _keep(best: _Best, resized: _Resized, which: Ints, row: Ints, column: Ints, value: Floats) -> None:
    """Enter the first largest of these listed pixels of each map, where it beats the best so far."""
    some = np.flatnonzero((value == _largest_of(value, which)) & (value >= best.value[which]))
    which, value, person = which[some], value[some], resized.person[which[some]]
    row, column = row[some] - resized.down.start[person], column[some] - resized.across.start[person]
    place = row * resized.across.length[person] + column
    best.place[which[value > best.value[which]]] = np.iinfo(np.int64).max
    np.minimum.at(best.place, which, place)
    best.value[which] = value
