"""Mask probabilities to COCO run-length strings in image pixels, in closed form: nothing is drawn at image size.

Shapes: N instances of one image, M cells a side (28 in Mask R-CNN). Boxes are xyxy, continuous image pixels; the centre
of pixel i is at i + 0.5.

The function is Detectron2's paste (`detectron2/layers/mask_ops.py`: bilinear at pixel centres, zero outside the mask,
foreground where the value is at least the threshold). It is fixed to the last bit by this float32 arithmetic, one
rounding for each operation, with the mask less the threshold, A = m - t, padded by a ring of -t:

    p(i) = (i + 0.5 - low) * (M / (high - low)) + 0.5       place of pixel i on an axis, in cells of the padded mask
    c = floor(p), f = p - c; outside the mask unless 0 <= c <= M
    D[r]  = A[r, c] + f * (A[r, c + 1] - A[r, c])           the profile of an image column, at the mask rows
    value = D[k] + g * (D[k + 1] - D[k])                    k, g: cell and fraction of the image row
    foreground where value >= 0

Subtracting the threshold first makes the last comparison a question of sign, and a float sum has the exact sign. As
p >= 0 in the mask, f and g are exact and below 1. From that, for a <= b and a >= b alike:

1. a + g * (b - a) is monotone in g, because each rounding is; and p is monotone in i. So a cell of a column holds at
   most one change.
2. Ends of one sign leave no change between them: for a, b < 0 the rounded b - a is at most -a and g * (b - a) is below
   it; for a, b >= 0 the rounded b - a is at least -a. So changes lie exactly in the cells whose ends differ in sign,
   and a mask cell with four corners of one sign has none in any of its columns.
3. The change of a cell is the first pixel whose value has the sign of the lower end, or else the first beyond the
   cell. The closed form names it within 1/16 pixel (`_REACH`), so only a crossing that close to a pixel centre is in
   doubt, and that pixel is evaluated as above.

Work is one step for each crossing, whatever the height of the image or the box.
"""

from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]

_WORK = 2**19  # mask rows times columns handled together: 1 to 3 MB of arrays for smooth masks, 30 MB for pure noise
_SIDE = 2**22  # beyond it i + 0.5 is not a float32
FAINTEST = 1e-6  # a threshold far above float32's smallest numbers, where the rules above would not hold
_HALF = np.float32(0.5)

# The closed form against the arithmetic above, with coordinates below 2**15, sides below h = 2**16, u = 2**-24 and the
# worst M, 1: its seven roundings err by at most h * u pixels each, the three of p by (1.5 + 1.5 + 2) * h * u, that of
# the value by h * u. That is 13 * h * u = 0.051 pixels.
_REACH = 2.0**15
_NEAR = np.float32(1 / 16)


class Rle(TypedDict):
    """COCO run lengths: `size` is height, width; `counts` the compressed string of pycocotools, column by column."""

    size: list[int]
    counts: str


class Spans(NamedTuple):
    """A mask as vertical spans in order: pixels `top` to `bottom` (exclusive) of image column `column`, each (S,)."""

    column: Ints
    top: Ints
    bottom: Ints


class _Axis(NamedTuple):
    """One axis of N boxes: `low` (N,) pixels, `scale` (N,) cells a pixel, `far` (N,) beyond `_REACH`."""

    low: Floats
    scale: Floats
    far: Bools


class _Edges(NamedTuple):
    """The E mask cells that hold a change of sign, in the order instance, mask column, mask row.

    `corners` (E, 4) is value and slope along the upper edge, then along the lower; `counts` (N, M + 3) and `starts` are
    the cells in each mask column and the first of them, between two columns outside the mask; `owner` (E,) is the
    instance, `row` (E,) the mask row.
    """

    corners: Floats
    counts: Ints
    starts: Ints
    owner: Ints
    row: Floats


class _Columns(NamedTuple):
    """The C image columns of N instances: `bounds` (N + 1,) divides them, `column` in the image, `slot` in
    `_Edges.counts` and `part`, the fraction of the mask column, are (C,)."""

    bounds: Ints
    column: Ints
    slot: Ints
    part: Floats


def rle(probabilities: Floats, boxes: Floats, height: int, width: int, threshold: float = 0.5) -> list[Rle]:
    """One run-length encoded mask for each of `probabilities` (N, M, M) in `boxes` (N, 4), image pixels.

    Probabilities are clamped to 0..1 and NaN counts as 0. A box without finite, positive sides gives an empty mask.
    """
    probabilities, boxes = checked(probabilities, boxes, height, width, threshold)
    cells = probabilities.shape[-1]
    found: list[Rle] = []
    with np.errstate(all="ignore"):  # degenerate boxes divide by zero, and are given no columns
        first, last = window(boxes, cells, width)
        for batch in _batches(last - first, cells):
            across, down = _axis(boxes[batch, 0::2], cells), _axis(boxes[batch, 1::2], cells)
            edges = _edges(_levels(probabilities[batch], threshold))
            columns = _columns(across, first[batch], last[batch], cells)
            place, bounds = _places(edges, columns, down, height, np.int32 if height * width < 2**31 else np.int64)
            found += encode(place, bounds, height, width)
    return found


def checked(
    probabilities: Floats, boxes: Floats, height: int, width: int, threshold: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities, clamped, and boxes as float32; raises where a paste is not defined."""
    if not FAINTEST <= threshold <= 1:
        raise ValueError(f"thresholds are in (0, 1], at least {FAINTEST}, found {threshold}")
    if not (0 < height <= _SIDE and 0 < width <= _SIDE):
        raise ValueError(f"image sides are 1 to {_SIDE} pixels, found {height} x {width}")
    probabilities, boxes = np.asarray(probabilities, np.float32), np.asarray(boxes, np.float32)
    cells = probabilities.shape[-1]
    assert probabilities.shape == (len(boxes), cells, cells), (probabilities.shape, boxes.shape)
    return np.fmin(np.fmax(probabilities, 0), 1), boxes


def window(boxes: Floats, cells: int, width: int, reach: float = 0.5) -> tuple[Ints, Ints]:
    """First and one past the last image column (N,) that can meet a mask: at least those with 0 <= p < M + 1.

    `reach` is how far beyond the box the mask is interpolated into background, in cells.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    sound = (np.isfinite(boxes).all(axis=1) & (sides > 0).all(axis=1)) & np.isfinite(sides).all(axis=1)
    sound &= np.isfinite(np.float32(cells) / sides).all(axis=1)
    low, high = boxes[:, 0].astype(np.float64), boxes[:, 2].astype(np.float64)
    slack = (high - low) * reach / cells
    slack += 1 + 1e-6 * np.maximum(np.abs(low), np.abs(high))  # rounding of p
    first = np.where(sound, np.floor(low - slack), 0).clip(0, width).astype(np.int64)
    last = np.where(sound, np.ceil(high + slack), 0).clip(0, width).astype(np.int64)
    return first, last


def _batches(columns: Ints, cells: int) -> list[slice]:
    """Neighbouring instances of at most `_WORK` together, at least one each."""
    batches, start, total = [], 0, 0
    for index, count in enumerate(columns.tolist()):
        work = (count + cells) * (cells + 1)  # image columns, and mask columns
        if index > start and total + work > _WORK:
            batches.append(slice(start, index))
            start, total = index, 0
        total += work
    return [*batches, slice(start, len(columns))] if len(columns) else []


def _axis(ends: Floats, cells: int) -> _Axis:
    low, high = ends.T
    return _Axis(low, np.float32(cells) / (high - low), np.fmax(np.abs(low), np.abs(high)) > _REACH)


def _levels(probabilities: Floats, threshold: float) -> Floats:
    """(N, M + 2, M + 2) probabilities less the threshold in a ring of background, mask columns first."""
    number, cells = len(probabilities), probabilities.shape[-1]
    level = np.zeros((number, cells + 2, cells + 2), np.float32)
    level[:, 1:-1, 1:-1] = probabilities.transpose(0, 2, 1)
    level -= np.float32(threshold)
    return level


def _edges(level: Floats) -> _Edges:
    inside = level >= 0
    either, both = inside[:, 1:] | inside[:, :-1], inside[:, 1:] & inside[:, :-1]
    either, both = either[..., 1:] | either[..., :-1], both[..., 1:] & both[..., :-1]
    number, spans, side = len(level), level.shape[1] - 1, level.shape[1]
    line, row = np.divmod(np.flatnonzero(either ^ both), spans)
    owner = line // spans
    corner, flat = (line + owner) * side + row, level.ravel()
    corners = np.empty((len(line), 4), np.float32)
    for edge in (0, 1):
        value = flat[corner + edge]
        corners[:, 2 * edge], corners[:, 2 * edge + 1] = value, flat[corner + edge + side] - value
    counts = np.zeros((number, spans + 2), np.int64)
    counts[:, 1:-1] = np.bincount(line, minlength=number * spans).reshape(number, spans)
    starts = np.cumsum(counts).reshape(counts.shape) - counts
    return _Edges(corners, counts, starts, owner, row.astype(np.float32))


def _columns(across: _Axis, first: Ints, last: Ints, cells: int) -> _Columns:
    counts = last - first
    bounds = np.concatenate(([0], np.cumsum(counts)))
    column = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], counts)
    low, scale = np.repeat(across.low, counts), np.repeat(across.scale, counts)
    at = ((column.astype(np.float32) + _HALF - low) * scale + _HALF).clip(-1, cells + 1)
    cell = np.floor(at)
    slot = cell.astype(np.int64) + np.repeat(np.arange(len(counts)) * (cells + 3) + 1, counts)
    return _Columns(bounds, column, slot, at - cell)


def _places(edges: _Edges, columns: _Columns, down: _Axis, height: int, kind: type) -> tuple[Ints, Ints]:
    """Places (T,) where the masks change between background and foreground, and the bounds (N + 1,) of each mask's.

    A place is column * height + row in the image. A mask's are in order, two for each run.
    """
    counts = edges.counts.ravel()[columns.slot]
    ray = np.repeat(np.arange(len(counts)), counts)  # each cell with a change of sign, in each column through it
    edge = np.arange(len(ray)) + (edges.starts.ravel()[columns.slot] - (np.cumsum(counts) - counts))[ray]
    part, corners = columns.part[ray], edges.corners.take(edge, axis=0)
    top, bottom = corners[:, 0] + part * corners[:, 1], corners[:, 2] + part * corners[:, 3]
    some = np.flatnonzero((top >= 0) != (bottom >= 0))
    top, ray = top[some], ray[some]
    row = _change(top, bottom[some] - top, edge[some], edges, down, height)
    return row.astype(kind) + (columns.column * height).astype(kind)[ray], np.searchsorted(ray, columns.bounds)


def _change(top: Floats, slope: Floats, edge: Ints, edges: _Edges, down: _Axis, height: int) -> Floats:
    """First image row (T,) at or past the change of sign in each cell, 0 to height."""
    low, scale = down.low[edges.owner], down.scale[edges.owner]
    base, step = (edges.row - _HALF) / scale + low - _HALF, 1 / scale
    guess = (base[edge] - top / slope * step[edge]).clip(-1, height + 1)
    row, nearest = np.ceil(guess), np.rint(guess)
    doubt = np.flatnonzero(np.abs(guess - nearest) <= _NEAR)
    nearest, cell = nearest[doubt], edge[doubt]
    row[doubt] = nearest + ~_passed(nearest, top[doubt], slope[doubt], edges.row[cell], low[cell], scale[cell])
    if down.far.any():
        far = np.flatnonzero(down.far[edges.owner[edge]])
        cell = edge[far]
        row[far] = _bisect(height, top[far], slope[far], edges.row[cell], low[cell], scale[cell])
    return row.clip(0, height)


def _passed(row: Floats, top: Floats, slope: Floats, cell: Floats, low: Floats, scale: Floats) -> Bools:
    """Is each row at or past the change of sign in its cell? In the arithmetic of the module's docstring."""
    part = (row + _HALF - low) * scale + _HALF - cell
    return (part >= 1) | ((top + part * slope >= 0) == (slope > 0))


def _bisect(height: int, *cell: Floats) -> Floats:
    """`_change` of boxes so large or far away that rounding moves a crossing by pixels."""
    low, high = np.zeros(len(cell[0]), np.float32), np.full(len(cell[0]), height, np.float32)
    while (low < high).any():
        middle = np.floor((low + high) / 2)
        passed = _passed(middle, *cell) | (middle >= high)
        low, high = np.where(passed, low, middle + 1), np.where(passed, middle, high)
    return low


def encode(place: Ints, bounds: Ints, height: int, width: int) -> list[Rle]:
    """Masks from the places where they change, as `_places` gives them; equal places may come in pairs."""
    return _encode(*_cancel(place, bounds), height, width)


def _cancel(place: Ints, bounds: Ints) -> tuple[Ints, Ints]:
    """The places left when equal ones cancel in pairs: an empty run, or one that goes on in the next column."""
    new = np.ones(len(place) + 1, bool)
    new[1:-1] = place[1:] != place[:-1]
    new[bounds] = True
    if new.all():
        return place, bounds
    first = np.flatnonzero(new)
    kept = first[:-1][np.diff(first) % 2 == 1]
    return place[kept], np.searchsorted(kept, bounds)


def _encode(place: Ints, bounds: Ints, height: int, width: int) -> list[Rle]:
    ends = bounds[1:] + np.arange(len(bounds) - 1)  # of each mask's counts: one for each place, then the rest
    starts = np.concatenate(([0], ends[:-1] + 1))
    place = np.insert(place, bounds[1:], height * width)
    counts = np.diff(place, prepend=place[:1])
    counts[starts] = place[starts]
    delta = counts.copy()
    delta[2:] -= counts[:-2]  # maskApi.c, rleToString: from the fourth count on, less the last but one
    for step in range(3):
        which = (starts + step)[starts + step <= ends]
        delta[which] = counts[which]
    absent = ends[counts[ends] == 0]  # no run of no background at the end
    delta[absent] = 0
    text, stops = _characters(delta, absent)
    stop = stops[ends].tolist()
    pairs = zip([0, *stop[:-1]], stop, strict=True)
    return [{"size": [height, width], "counts": text[start:end]} for start, end in pairs]


def _characters(values: Ints, absent: Ints) -> tuple[str, Ints]:
    """Five bits a character, low group first, bit 0x20 while more follow, plus 48; and where each value's end.

    cocoapi `maskApi.c`, rleToString. The values at `absent`, zeros, are left out: the next value takes their place.
    """
    size = values ^ (values >> (8 * values.itemsize - 1))
    lengths = np.ones(len(values), np.uint8)
    levels = [np.flatnonzero(size >= 1 << (5 * more - 1)) for more in range(1, 13) if size.max() >> (5 * more - 1)]
    for longer in levels:
        lengths[longer] += 1
    lengths[absent] = 0
    stops = np.cumsum(lengths, dtype=np.int64)
    text = np.empty(stops[-1] + 1, np.uint8)
    starts = stops - lengths
    for shift, which in enumerate([slice(None), *levels]):
        group = (values[which] >> (5 * shift)).astype(np.uint8) & 31
        text[starts[which] + shift] = group + ((lengths[which] > shift + 1).astype(np.uint8) << 5) + 48
    return text[:-1].tobytes().decode("ascii"), stops


def runs(mask: Rle) -> Ints:
    """Run lengths of a compressed mask, background first."""
    code = np.frombuffer(mask["counts"].encode("ascii"), np.uint8).astype(np.int64) - 48
    stop = np.flatnonzero(code < 32)
    start = np.concatenate(([0], stop[:-1] + 1))
    bits = 5 * (np.arange(len(code)) - np.repeat(start, stop - start + 1))
    values = np.add.reduceat((code & 31) << bits, start)
    values -= ((code[stop] >> 4) & 1) << (bits[stop] + 5)  # the top bit of the last group is the sign
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values


def decode(mask: Rle) -> NDArray[np.uint8]:
    """(height, width) mask of zeros and ones."""
    height, width = mask["size"]
    lengths = runs(mask)
    return np.repeat((np.arange(len(lengths)) & 1).astype(np.uint8), lengths).reshape(width, height).T


def area(mask: Rle) -> int:
    """Foreground pixels."""
    return int(runs(mask)[1::2].sum())


def spans(mask: Rle) -> Spans:
    """The mask column by column: nothing is drawn, and a run that goes on in the next column is two spans."""
    height = mask["size"][0]
    place = np.cumsum(runs(mask))
    start, end = place[:-1:2], place[1::2]
    start, end = start[end > start], end[end > start]
    first = start // height
    count = (end - 1) // height - first + 1
    owner = np.repeat(np.arange(len(start)), count)
    column = np.arange(len(owner)) + (first - (np.cumsum(count) - count))[owner]
    top = np.maximum(start[owner] - column * height, 0)
    return Spans(column, top, np.minimum(end[owner] - column * height, height))
