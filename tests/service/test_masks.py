"""The closed form against a raster in the same arithmetic, pixel for pixel, and both against Detectron2's paste."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from numpy.typing import NDArray
from pycocotools import mask as coco
from torchvision.ops import roi_align

from service import masks
from service.masks import Rle, area, decode, rle

Array = NDArray[Any]
HALF = np.float32(0.5)


def raster(mask: Array, box: Array, height: int, width: int, threshold: float = 0.5) -> Array:
    """The (height, width) uint8 paste, at every pixel, in the float32 operations that `service.masks` states."""
    cells, sides = len(mask), box[2:] - box[:2]
    painted = np.zeros((height, width), np.uint8)
    with np.errstate(all="ignore"):
        scales = np.float32(cells) / sides
    if not (np.isfinite(box).all() and (sides > 0).all() and np.isfinite(sides).all() and np.isfinite(scales).all()):
        return painted
    with np.errstate(over="ignore"):
        across = (np.arange(width, dtype=np.float32) + HALF - box[0]) * scales[0] + HALF
        down = (np.arange(height, dtype=np.float32) + HALF - box[1]) * scales[1] + HALF
    columns, rows = (np.flatnonzero((at >= 0) & (at < cells + 1)) for at in (across, down))
    level = np.pad(mask, 1) - np.float32(threshold)
    cell, row = (np.floor(at[some]).astype(int) for at, some in ((across, columns), (down, rows)))
    part = across[columns] - np.floor(across[columns])
    profile = level[:, cell] + part * (level[:, cell + 1] - level[:, cell])
    part = (down[rows] - np.floor(down[rows]))[:, None]
    value = profile[row] + part * (profile[row + 1] - profile[row])
    painted[np.ix_(rows, columns)] = value >= 0
    return painted


def assert_exact(probabilities: Array, boxes: Array, height: int, width: int, threshold: float = 0.5) -> None:
    """Pixels and strings: `coco.encode` of the raster is the closed form."""
    found = rle(probabilities, boxes, height, width, threshold)
    assert len(found) == len(boxes)
    for one, mask, box in zip(found, probabilities, boxes, strict=True):
        expected = raster(mask, box, height, width, threshold)
        assert one == encoded(expected), (box, height, width, threshold, int((decode(one) != expected).sum()))


def encoded(painted: Array) -> Rle:
    return {"size": list(painted.shape), "counts": coco.encode(np.asfortranarray(painted))["counts"].decode()}


def blobs(rng: np.random.Generator, number: int, cells: int = 28) -> Array:
    y, x = (np.mgrid[:cells, :cells] + 0.5) / cells - 0.5
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    heights, phases = rng.normal(0, 0.05, (5, number, 1, 1)), rng.uniform(0, 6.3, (5, number, 1, 1))
    waves = [heights[k] * np.cos(k * angle + phases[k]) for k in range(5)]
    logits = 25 * (0.4 + sum(waves) - radius) + rng.normal(0, 0.3, (number, cells, cells))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def scattered(rng: np.random.Generator, number: int, smallest: float, largest: float, extent: float) -> Array:
    sides = np.exp(rng.uniform(np.log(smallest), np.log(largest), (number, 2)))
    centres = rng.uniform(-0.2 * extent, 1.2 * extent, (number, 2))
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).astype(np.float32)


def stress(rng: np.random.Generator, kind: int, number: int, cells: int) -> Array:
    """Soft blobs; noise; zeros and ones; quarters; ones; flat around the threshold."""
    noise = rng.random((number, cells, cells))
    binary, quarters, flat = noise > 0.5, np.rint(noise * 4) / 4, 0.5 + 1e-6 * (noise - 0.5)
    return [blobs(rng, number, cells), noise, binary, quarters, noise >= 0, flat][kind].astype(np.float32)


def test_twenty_thousand_masks_equal_the_raster() -> None:
    rng = np.random.default_rng(7)
    for step in range(1000):
        cells = int(rng.choice([1, 2, 7, 14, 28, 28, 28, 56]))
        height, width = (int(side) for side in rng.integers(1, 260, 2))
        boxes = scattered(rng, 20, 0.05, 400, 260)
        if step % 3 == 0:
            boxes = np.rint(boxes * 2) / np.float32(2)  # corners and edges fall on pixel centres
        if step % 10 == 0:
            boxes *= np.float32(1000)  # beyond what the closed form resolves
        threshold = float(rng.choice([0.5, 0.5, 0.5, 0.25, 0.05, 1]))
        assert_exact(stress(rng, step % 6, 20, cells), boxes, height, width, threshold)


def test_long_thin_images_up_to_the_reach_of_rounding() -> None:
    rng = np.random.default_rng(8)
    for step in range(12):
        boxes = scattered(rng, 10, 3000, 32000, 32000)
        boxes[:, 0::2] /= 8000
        assert_exact(stress(rng, step % 6, 10, 28), boxes, 40_000, 5)
        assert_exact(stress(rng, step % 6, 10, 28), boxes[:, [1, 0, 3, 2]], 5, 40_000)


def test_pixels_beside_the_crossings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    mask, box = stress(rng, 3, 60, 28), np.rint(scattered(rng, 60, 20, 200, 200))
    assert_exact(mask, box, 200, 200)
    monkeypatch.setattr(masks, "_NEAR", np.float32(-1))
    with pytest.raises(AssertionError):
        assert_exact(mask, box, 200, 200)


coordinates = st.one_of(
    st.integers(-20, 80).map(float),
    st.integers(-40, 160).map(lambda half: half / 2),
    st.floats(-50, 100, width=32),
    st.floats(width=32),
)
levels = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, float(np.nextafter(HALF, 0)), float(np.nextafter(HALF, 1))])


@settings(max_examples=300, deadline=None)
@given(
    mask=st.integers(1, 6).flatmap(lambda cells: hn.arrays(np.float32, (1, cells, cells), elements=levels)),
    box=hn.arrays(np.float32, (1, 4), elements=coordinates),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    threshold=st.sampled_from([0.5, 0.25, 0.75, 1.0, 0.3]),
)
def test_any_mask_box_and_size(mask: Array, box: Array, size: tuple[int, int], threshold: float) -> None:
    assert_exact(mask, box, *size, threshold)


def test_ones_in_a_box_of_whole_pixels_fill_it() -> None:
    boxes = np.array([[3, 4, 10, 20], [0, 0, 50, 40], [-5, -5, 2, 2], [10, 10, 11, 11]], np.float32)
    found = rle(np.ones((4, 28, 28), np.float32), boxes, 40, 50)
    assert [area(one) for one in found] == [7 * 16, 40 * 50, 4, 1]
    assert decode(found[0])[4:20, 3:10].all()


def test_values_on_the_threshold_are_foreground() -> None:
    box = np.array([[0, 0, 8, 8]], np.float32)
    assert area(rle(np.full((1, 4, 4), 0.5, np.float32), box, 8, 8)[0]) == 36  # all but where the border fades it
    assert area(rle(np.full((1, 4, 4), np.nextafter(HALF, 0), np.float32), box, 8, 8)[0]) == 0


@pytest.mark.parametrize(
    "box",
    [
        [5, 5, 5, 9], [9, 5, 5, 9], [5, 9, 9, 5], [5, 5, 9, np.nan], [-np.inf, 5, 9, 9], [5, 5, np.inf, 9],
        [-3e38, 5, 3e38, 9], [5, 5, 5.01, 5.01], [200, 5, 300, 9], [5, -90, 9, -60], [5, 0, 5 + 5e-7, 20],
        [1e-45, 0, 2e-45, 9],
    ],
)  # fmt: skip
def test_boxes_that_hold_no_pixel_give_an_empty_mask(box: list[float]) -> None:
    boxes = np.array([[2, 2, 9, 9], box, [2, 2, 9, 9]], np.float32)
    before, empty, after = rle(np.ones((3, 28, 28), np.float32), boxes, 20, 30)
    assert empty == encoded(np.zeros((20, 30), np.uint8))
    assert (area(empty), before) == (0, after)


def test_no_instances() -> None:
    assert rle(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), 20, 30) == []


def test_probabilities_are_clamped() -> None:
    rng = np.random.default_rng(10)
    wild = rng.normal(0.5, 1, (20, 28, 28)).astype(np.float32)
    wild[rng.random(wild.shape) < 0.1] = np.nan
    boxes = scattered(rng, 20, 5, 90, 100)
    assert rle(wild, boxes, 100, 100) == rle(np.nan_to_num(wild).clip(0, 1), boxes, 100, 100)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, 1e-9, float("nan")])
def test_thresholds_outside_their_range_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        rle(np.zeros((1, 28, 28), np.float32), np.zeros((1, 4), np.float32), 20, 30, threshold)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (2**22 + 1, 5)])
def test_image_sizes_outside_their_range_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pixels"):
        rle(np.zeros((1, 28, 28), np.float32), np.zeros((1, 4), np.float32), *size)


def test_a_mask_does_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    probabilities, boxes = blobs(rng, 70), scattered(rng, 70, 0.5, 500, 400)
    together = rle(probabilities, boxes, 300, 400)
    assert together == [rle(probabilities[i : i + 1], boxes[i : i + 1], 300, 400)[0] for i in range(70)]
    monkeypatch.setattr(masks, "_WORK", 20_000)
    assert together == rle(probabilities, boxes, 300, 400)


def test_an_image_too_large_to_draw() -> None:
    rng = np.random.default_rng(12)
    probabilities, boxes = blobs(rng, 10), scattered(rng, 10, 20, 500, 400)
    small, large = rle(probabilities, boxes, 1000, 1000), rle(probabilities, boxes, 2**22, 2**22)
    assert [area(one) for one in small] == [area(one) for one in large]
    assert all(masks.runs(one).sum() == 2**44 for one in large)


def test_memory_for_three_hundred_instances_of_twelve_megapixels() -> None:
    rng = np.random.default_rng(13)
    probabilities, boxes = stress(rng, 1, 300, 28), scattered(rng, 300, 20, 2000, 3000)  # noise, the most runs
    tracemalloc.start()
    try:
        rle(probabilities, boxes, 3000, 4000)
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(hn.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1)))
def test_strings_of_pycocotools_decode(painted: Array) -> None:
    one = encoded(painted)
    assert (decode(one) == painted).all()
    assert area(one) == painted.sum()


def test_pycocotools_decodes_our_strings() -> None:
    rng = np.random.default_rng(14)
    for one in rle(stress(rng, 1, 20, 28), scattered(rng, 20, 5, 300, 300), 300, 280):
        theirs: Any = {"size": one["size"], "counts": one["counts"].encode()}
        assert (coco.decode(theirs) == decode(one)).all()
        assert coco.area(theirs) == area(one)


def grid_sample_paste(probabilities: Array, boxes: Array, height: int, width: int) -> Array:
    """Detectron2's `_do_paste_mask` (layers/mask_ops.py) over the whole image: (N, height, width)."""
    low_x, low_y, high_x, high_y = torch.from_numpy(boxes)[:, :, None].unbind(1)
    y = (torch.arange(height) + 0.5 - low_y) / (high_y - low_y) * 2 - 1
    x = (torch.arange(width) + 0.5 - low_x) / (high_x - low_x) * 2 - 1
    shape = (len(boxes), height, width)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)
    pasted = torch.nn.functional.grid_sample(torch.from_numpy(probabilities)[:, None], grid, align_corners=False)
    return (pasted[:, 0] >= 0.5).numpy()


def test_agreement_with_detectron2() -> None:
    """Its float32 differs from ours by roundings, so a pixel in some millions may differ where the values are soft."""
    rng = np.random.default_rng(15)
    differing = pixels = 0
    for kind in (0, 1):
        probabilities, boxes = stress(rng, kind, 150, 28), scattered(rng, 150, 1, 250, 300)
        expected = grid_sample_paste(probabilities, boxes, 300, 300)
        found = np.stack([decode(one) for one in rle(probabilities, boxes, 300, 300)])
        differing += int((found != expected).sum())
        pixels += expected.size
    assert differing <= 1e-6 * pixels, (differing, pixels)


def test_paste_is_the_inverse_of_roi_align() -> None:
    """Detectron2's training crop (`BitMasks.crop_and_resize`), pasted back, is the mask again."""
    rng = np.random.default_rng(16)
    box = np.array([[31.3, 22.8, 170.6, 181.1]], np.float32)
    truth = raster(blobs(rng, 1)[0], box[0], 200, 200)
    rois = torch.from_numpy(np.concatenate([[[0]], box], axis=1).astype(np.float32))
    crop = roi_align(torch.from_numpy(truth)[None, None].float(), rois, 28, aligned=True)[0].numpy()
    pasted = decode(rle((crop >= 0.5).astype(np.float32), box, 200, 200)[0])
    assert (pasted & truth).sum() / (pasted | truth).sum() > 0.95
