"""Masks to rings on the lattice of pixel corners, exactly, from their run lengths: no pixel is looked at.

A pixel (x, y) is the square from corner (x, y) to (x + 1, y + 1), as everywhere in this service and as pycocotools
reads polygons, so a traced ring rasterises to the very mask. Pixels that touch at a corner alone are separate parts.
On the screen outer rings run clockwise and holes counter-clockwise.

Each vertical span of a mask has an upper and a lower edge of one pixel. On a lattice line between two columns lie the
right ends of the edges of one and the left ends of those of the other; sorted downwards, they pair off: between the two
ends of a pair exactly one side is foreground, so a pair is a vertical piece of boundary. Following edge, piece, edge
and so on gives the rings. Where four edges meet, lower ones sort before upper ones: diagonal neighbours stay apart.

A part that lies in a hole of another would be lost when holes are taken from polygons. Such a hole is therefore opened
into its surroundings by a slit of no width, up the lattice line at its left end: the rings of both become one, nothing
else changes, and the union of `polygons` less the union of `holes` is the mask, as is the even-odd sum of all rings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.masks import Rle, Spans, spans

Ints = NDArray[np.signedinteger[Any]]
Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


class Outline(NamedTuple):
    """Rings of one mask, each (V, 2) x, y of its corners; the first is not repeated at the end."""

    polygons: list[Ints]
    holes: list[Ints]


class _Edges(NamedTuple):
    """Two edges for each of S spans, upper (even) then lower, over all masks.

    `left` and `y` (2 S,) place them, `line` (2 S,) is the lattice line of the left end, distinct between masks. `ends`
    (2 S, 2) holds the pairs of ends down all lines, an end being an edge, or for its right end the edge + 2 S; `next`
    (2 S,) is the edge that follows in the ring.
    """

    left: Ints
    y: Ints
    line: Ints
    ends: Ints
    next: Ints


class _Rings(NamedTuple):
    """`order` (2 S,) lists the edges ring by ring, each from its lowest edge on, rings by their lowest edge;
    `bounds` (R + 1,) divides them."""

    order: Ints
    bounds: Ints


def outlines(masks: Sequence[Rle], tolerance: float = 0) -> list[Outline]:
    """The outline of each mask, with fewer corners where a `tolerance` in pixels allows."""
    traced = trace(masks)
    if tolerance <= 0:
        return traced
    rings = iter(simplify([ring for outline in traced for part in outline for ring in part], tolerance))
    return [Outline(*([next(rings) for _ in part] for part in outline)) for outline in traced]


def trace(masks: Sequence[Rle]) -> list[Outline]:
    """The outline of each mask, exactly."""
    found = [spans(mask) for mask in masks]
    counts = [2 * len(each.column) for each in found]
    if not sum(counts):
        return [Outline([], []) for _ in masks]
    edges = _edges(found, masks)
    rings = _rings(edges.next)
    if opened := _slits(edges, rings):
        rings = _rings(_swapped(edges.next, opened))
    first = rings.order[rings.bounds[:-1]]
    owner = np.searchsorted(np.cumsum(counts), first, side="right")
    outlines = [Outline([], []) for _ in masks]
    for mask, start, corners in zip(owner.tolist(), first.tolist(), _corners(edges, rings), strict=True):
        outlines[mask][start % 2].append(corners)  # the lowest edge of a hole is the lower edge of the span above it
    return outlines


def _edges(found: list[Spans], masks: Sequence[Rle]) -> _Edges:
    counts = [len(each.column) for each in found]
    column = np.concatenate([each.column for each in found])
    y = np.stack([np.concatenate([each.top for each in found]), np.concatenate([each.bottom for each in found])], 1)
    widths = np.array([mask["size"][1] + 1 for mask in masks])
    shift = np.repeat(np.cumsum(widths) - widths, counts)
    left, y, line = np.repeat(column, 2), y.ravel(), np.repeat(column + shift, 2)
    ends = _pairs(line, y)
    # An upper edge runs to the right and a lower one to the left, so of a pair one end is a head and one a tail.
    is_head = (ends < len(y)) == (ends % 2 == 1)
    head = np.where(is_head[:, 0], ends[:, 0], ends[:, 1]) % len(y)
    following = np.empty(len(y), np.int64)
    following[head] = np.where(is_head[:, 0], ends[:, 1], ends[:, 0]) % len(y)
    return _Edges(left, y, line, ends, following)


def _pairs(line: Ints, y: Ints) -> Ints:
    """Ends down each lattice line, two by two."""
    place = (line * (int(y.max()) + 1) + y) * 2
    place[0::2] += 1  # upper edges after lower ones
    right = place + 2 * (int(y.max()) + 1)
    # Both halves are all but sorted, which the stable sort makes use of.
    return np.argsort(np.concatenate([place, right]), kind="stable").reshape(-1, 2)


def _rings(following: Ints) -> _Rings:
    successor = following.tolist()
    is_new = bytearray(b"\1") * len(successor)
    order: list[int] = []
    bounds = []
    for start in range(len(successor)):
        if is_new[start]:
            bounds.append(len(order))
            edge = start
            while is_new[edge]:
                is_new[edge] = 0
                order.append(edge)
                edge = successor[edge]
    return _Rings(np.array(order), np.array([*bounds, len(order)]))


def _corners(edges: _Edges, rings: _Rings) -> list[Ints]:
    """Where the boundary turns: both ends of each vertical piece that is not a mere step from edge to edge."""
    after = np.arange(1, len(rings.order) + 1)
    after[rings.bounds[1:] - 1] = rings.bounds[:-1]
    edge = rings.order
    y, x = edges.y[edge], edges.left[edge] + (edge % 2 == 0)
    turns = np.flatnonzero(y != y[after])
    corners = np.stack([x[turns], y[turns], x[turns], y[after[turns]]], axis=1).reshape(-1, 2)
    return np.split(corners, 2 * np.searchsorted(turns, rings.bounds[1:-1]))


def _slits(edges: _Edges, rings: _Rings) -> list[tuple[int, int]]:
    """For each hole that must be opened, the two edges whose successors change places."""
    first = rings.order[rings.bounds[:-1]]
    is_hole = first % 2 == 1
    if not is_hole.any():
        return []
    ring_of = np.empty(len(rings.order), np.int64)
    ring_of[rings.order] = np.repeat(np.arange(len(first)), np.diff(rings.bounds))
    pair_of = np.empty(2 * len(ring_of), np.int64)
    pair_of[edges.ends] = np.arange(len(edges.ends))[:, None]
    opened = _islanded(edges, first.tolist(), ring_of, is_hole)
    slits = []
    # From the last on: the ring above a hole starts before it, and if that is a hole too, it has to be opened as well.
    for hole in np.flatnonzero(is_hole)[::-1].tolist():
        if hole in opened:
            pair = int(pair_of[first[hole]])
            above, below = _head(edges, pair - 1), _head(edges, pair)
            slits.append((above, below))
            opened.add(int(ring_of[above]))
    return slits


def _islanded(edges: _Edges, first: list[int], ring_of: Ints, is_hole: Bools) -> set[int]:
    """Holes with a part in them. What an outer ring lies in, the boundary above its first edge tells."""
    around: list[int] = []  # of each ring, the hole that it lies in, or -1
    for ring, edge in enumerate(first):
        if is_hole[ring] or not edge or edges.line[edge - 1] != edges.line[edge]:
            around.append(-1)
            continue
        above = int(ring_of[edge - 1])
        around.append(above if is_hole[above] else around[above])
    return {hole for hole in around if hole >= 0}


def _head(edges: _Edges, pair: int) -> int:
    """The edge that runs into this vertical piece."""
    one, other = (int(end) for end in edges.ends[pair])
    size = len(edges.y)
    return (one if (one < size) == (one % 2 == 1) else other) % size


def _swapped(following: Ints, pairs: list[tuple[int, int]]) -> Ints:
    following = following.copy()
    for one, other in pairs:
        following[one], following[other] = following[other], following[one]
    return following


def to_pixel_centres(ring: Ints) -> Ints:
    """A traced ring as a contour through the pixels on its inside, as indices: what OpenCV gives, and fills."""
    back, ahead = np.roll(ring, 1, axis=0) - ring, np.roll(ring, -1, axis=0) - ring
    # One of the two pieces at a corner is horizontal, the other vertical. The inside is right of the direction.
    across, down = ahead[:, 0] - back[:, 0], ahead[:, 1] - back[:, 1]
    return ring - np.stack([down > 0, across < 0], axis=1)


def simplify(rings: Sequence[Ints], tolerance: float) -> list[Ints]:
    """Douglas and Peucker's reduction of closed rings; at least three corners of each are kept.

    Every point of a ring lies within `tolerance` of the piece that stands for it, so a ring changes sides over an area
    of at most tolerance times its length.
    """
    if not rings or tolerance <= 0:
        return list(rings)
    lengths = np.array([len(ring) + 1 for ring in rings])
    last = np.cumsum(lengths) - 1
    first = last - lengths + 1
    points = np.concatenate([part for ring in rings for part in (ring, ring[:1])]).astype(np.float64)
    keep = np.zeros(len(points), bool)
    keep[first] = keep[last] = True
    apart = ((points - np.repeat(points[first], lengths, axis=0)) ** 2).sum(axis=1)
    keep[_first_largest(apart, first)] = True
    keep[_first_largest(_apart(points, keep, np.arange(len(points)))[0], first)] = True
    _bend(points, keep, tolerance)
    flat = first[np.add.reduceat(keep, first, dtype=np.int64) < 4]  # a contour through a line or a single pixel
    keep[flat + 1] = keep[flat + 2] = True
    keep[last] = False
    kept = np.split(keep, first[1:])
    return [ring[some[:-1]] for ring, some in zip(rings, kept, strict=True)]


def _bend(points: Floats, keep: Bools, tolerance: float) -> None:
    """Keep the farthest point of each straight piece, until none is farther than `tolerance`."""
    left = np.arange(len(points))  # points of the pieces that may still have to bend
    while len(left):
        apart, starts = _apart(points, keep, left)
        farthest = _first_largest(apart, starts)
        bends = apart[farthest] > tolerance**2
        keep[left[farthest[bends]]] = True
        left = left[np.repeat(bends, np.diff(starts, append=len(left)))]


def _apart(points: Floats, keep: Bools, which: Ints) -> tuple[Floats, Ints]:
    """Squared distance of some points from the straight pieces between kept ones, and where each piece begins."""
    kept = np.flatnonzero(keep)
    piece = np.searchsorted(kept, which, side="right") - 1
    starts = np.flatnonzero(np.diff(piece, prepend=-1))
    start = points[kept[piece]]
    along, offset = points[kept[np.minimum(piece + 1, len(kept) - 1)]] - start, points[which] - start
    square = np.maximum((along**2).sum(axis=1), 1)  # corners are whole numbers: below 1 is 0, a piece without length
    part = ((offset * along).sum(axis=1) / square).clip(0, 1)
    return ((offset - part[:, None] * along) ** 2).sum(axis=1), starts


def _first_largest(values: Floats, starts: Ints) -> Ints:
    """Index of the first largest of `values` in each stretch, which begin at `starts`, the first at 0."""
    largest = np.repeat(np.maximum.reduceat(values, starts), np.diff(starts, append=len(values)))
    equal = np.flatnonzero(values == largest)
    return equal[np.searchsorted(equal, starts)]
