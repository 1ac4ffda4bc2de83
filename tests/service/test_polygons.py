"""Rings against pixels: what pycocotools and OpenCV make of them is the mask again."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from numpy.typing import NDArray
from pycocotools import mask as coco

from service.masks import rle
from service.polygons import outlines, simplify, to_pixel_centres, trace
from tests.service.test_masks import blobs, encoded, scattered, stress

Array = NDArray[Any]

FRAME = np.pad(np.zeros((3, 3), np.uint8), 1, constant_values=1)
ISLAND = np.pad(np.pad(np.ones((1, 1), np.uint8), 1), 1, constant_values=1)
DIAGONAL = np.eye(4, dtype=np.uint8)
NESTED = np.pad(np.pad(np.pad(np.pad(ISLAND, 1), 2, constant_values=1), 1), 1, constant_values=1)

pictures = hn.arrays(np.uint8, st.tuples(st.integers(1, 16), st.integers(1, 16)), elements=st.integers(0, 1))
mostly = hn.arrays(
    np.uint8, st.tuples(st.integers(3, 16), st.integers(3, 16)), elements=st.integers(0, 1), fill=st.just(1)
)


def union(rings: list[Array], shape: tuple[int, ...]) -> Array:
    if not rings:
        return np.zeros(shape, np.uint8)
    height, width = shape
    return coco.decode(coco.merge(coco.frPyObjects([ring.ravel().tolist() for ring in rings], height, width)))


def assert_exact(painted: Array) -> None:
    """Under both readings of rings: polygons less holes, and the even-odd sum."""
    polygons, holes = trace([encoded(painted)])[0]
    taken = union(polygons, painted.shape) & ~union(holes, painted.shape)
    assert (taken == painted).all()
    summed = np.zeros_like(painted)
    for ring in [*polygons, *holes]:
        summed ^= union([ring], painted.shape)
    assert (summed == painted).all()


@settings(max_examples=400, deadline=None)
@given(st.one_of(pictures, mostly))
@example(np.zeros((3, 4), np.uint8))
@example(np.ones((3, 4), np.uint8))
@example(FRAME)
@example(ISLAND)
@example(NESTED)
@example(DIAGONAL)
@example(1 - DIAGONAL)
def test_any_mask_comes_back(painted: Array) -> None:
    assert_exact(painted)


def test_noise_and_network_masks_come_back() -> None:
    rng = np.random.default_rng(4)
    for share in (0.2, 0.5, 0.6, 0.8, 0.95):
        assert_exact((rng.random((45, 60)) < share).astype(np.uint8))
    for kind in range(6):
        for mask in rle(stress(rng, kind, 6, 28), scattered(rng, 6, 3, 120, 90), 90, 100):
            assert_exact(coco.decode({"size": mask["size"], "counts": mask["counts"].encode()}))


def test_masks_are_traced_together_as_alone() -> None:
    rng = np.random.default_rng(5)
    masks = [encoded((rng.random((9, 7)) < share).astype(np.uint8)) for share in (0, 0.3, 0.7, 0.9, 0, 1)]
    for one, mask in zip(trace(masks), masks, strict=True):
        alone = trace([mask])[0]
        assert [[ring.tolist() for ring in part] for part in one] == [
            [ring.tolist() for ring in part] for part in alone
        ]
    assert trace([]) == []


def listed(painted: Array) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    polygons, holes = trace([encoded(painted)])[0]
    return [ring.tolist() for ring in polygons], [ring.tolist() for ring in holes]


def test_rings_have_corners_only_and_turn_as_the_docstring_says() -> None:
    polygons, holes = listed(FRAME)
    assert polygons == [[[5, 0], [5, 5], [0, 5], [0, 0]]]
    assert holes == [[[1, 1], [1, 4], [4, 4], [4, 1]]]


def test_pixels_that_touch_at_a_corner_are_parts() -> None:
    polygons, holes = listed(DIAGONAL)
    assert [len(ring) for ring in polygons] == [4, 4, 4, 4]
    assert holes == []


def test_a_hole_with_a_part_in_it_is_opened() -> None:
    polygons, holes = listed(ISLAND)
    assert sorted(len(ring) for ring in polygons) == [4, 10]
    assert holes == []
    assert len(listed(NESTED)[0]) == 4


def shoelace(ring: Array) -> float:
    after = np.roll(ring, -1, axis=0)
    return float((ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]).sum()) / 2


@settings(max_examples=100, deadline=None)
@given(st.one_of(pictures, mostly))
def test_signed_areas_add_up(painted: Array) -> None:
    polygons, holes = trace([encoded(painted)])[0]
    assert all(shoelace(ring) > 0 for ring in polygons)
    assert all(shoelace(ring) < 0 for ring in holes)
    assert sum(map(shoelace, [*polygons, *holes])) == painted.sum()


@settings(max_examples=200, deadline=None)
@given(pictures)
def test_contours_through_pixels_fill_as_opencv_fills(painted: Array) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    for ring in trace([encoded(painted)])[0].polygons:
        filled = np.zeros_like(painted)
        cv2.fillPoly(filled, [to_pixel_centres(ring).astype(np.int32)], (1,))
        assert (filled == union([ring], painted.shape)).all()


def test_simplified_rings_keep_their_promise() -> None:
    """No corner strays beyond the tolerance, and the changed area is at most the tolerance times the length."""
    rng = np.random.default_rng(6)
    masks = rle(blobs(rng, 20), scattered(rng, 20, 20, 90, 100), 110, 110)
    exact = [ring for outline in trace(masks) for ring in outline.polygons]
    for tolerance in (0.5, 1, 3, 200):
        for ring, less in zip(exact, simplify(exact, tolerance), strict=True):
            assert 3 <= len(less) <= len(ring)
            assert {tuple(corner) for corner in less.tolist()} <= {tuple(corner) for corner in ring.tolist()}
            assert distances(ring, less).max() <= tolerance + 1e-9
            length = np.hypot(*(ring - np.roll(ring, 1, axis=0)).T).sum()
            fine = 8  # small pixels, to measure area with
            changed = union([ring * fine], (880, 880)) ^ union([less * fine], (880, 880))
            assert changed.sum() / fine**2 <= tolerance * length


def distances(ring: Array, less: Array) -> Array:
    """Of each corner from the nearest piece of the simplified ring."""
    start = less.astype(float)
    along = np.roll(start, -1, axis=0) - start
    offset = ring[:, None] - start
    part = ((offset * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-9)).clip(0, 1)
    return np.hypot(*np.moveaxis(offset - part[..., None] * along, -1, 0)).min(axis=1)


@settings(max_examples=100, deadline=None)
@given(pictures, st.sampled_from([0.5, 1.0, 2.0, 50.0]))
def test_no_ring_is_simplified_away(painted: Array, tolerance: float) -> None:
    mask = encoded(painted)
    exact, less = trace([mask])[0], outlines([mask], tolerance)[0]
    assert [len(part) for part in less] == [len(part) for part in exact]
    assert all(len(ring) >= 3 for part in less for ring in part)
    centres = [to_pixel_centres(ring) for ring in exact.polygons]
    assert all(len(ring) >= 3 for ring in simplify(centres, tolerance))


def test_a_staircase_becomes_its_slope() -> None:
    steps = np.tril(np.ones((40, 40), np.uint8))
    outline = outlines([encoded(steps)], 1)[0]
    assert len(outline.polygons[0]) <= 6
