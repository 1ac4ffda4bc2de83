"""The windowed bicubic paste against the same arithmetic at every pixel, and against PyTorch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from numpy.typing import NDArray

from service import bicubic
from service.bicubic import cubic_weights, rle
from service.masks import area, decode
from tests.service.test_masks import coordinates, encoded, levels, scattered, stress

Array = NDArray[Any]


def raster(mask: Array, box: Array, height: int, width: int, threshold: float = 0.5) -> Array:
    """The (height, width) uint8 paste, pixel by pixel of the image, in the operations that `service.bicubic` states."""
    cells, sides = len(mask), box[2:] - box[:2]
    painted = np.zeros((height, width), np.uint8)
    with np.errstate(all="ignore"):
        scales = np.float32(cells) / sides
        if not (np.isfinite(box).all() and (sides > 0).all() and np.isfinite([*sides, *scales]).all()):
            return painted
        padded, values = np.pad(mask, 5), np.zeros((height, width), np.float32)
        across, down = (
            [(np.float32(i) + np.float32(0.5) - low) * scale - np.float32(0.5) for i in range(length)]
            for length, low, scale in ((width, box[0], scales[0]), (height, box[1], scales[1]))
        )
    columns = [j for j, at in enumerate(across) if -2 <= at < cells + 1]
    for j in columns:
        c = np.floor(across[j])
        w = cubic_weights(np.array([across[j] - c]))[:, 0]
        profile = padded[:, int(c) + 4] * w[0]
        for tap in (1, 2, 3):
            profile = profile + padded[:, int(c) + 4 + tap] * w[tap]
        for i, at in enumerate(down):
            if -2 <= at < cells + 1:
                k = np.floor(at)
                v, first = cubic_weights(np.array([at - k]))[:, 0], int(k) + 4
                values[i, j] = profile[first] * v[0]
                for tap in (1, 2, 3):
                    values[i, j] += profile[first + tap] * v[tap]
                painted[i, j] = values[i, j] >= np.float32(threshold)
    return painted


@settings(max_examples=60, deadline=None)
@given(
    mask=st.integers(1, 6).flatmap(lambda cells: hn.arrays(np.float32, (1, cells, cells), elements=levels)),
    box=hn.arrays(np.float32, (1, 4), elements=coordinates),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    threshold=st.sampled_from([0.5, 0.25, 1.0, 0.01]),
)
def test_any_mask_box_and_size_equals_the_raster(mask: Array, box: Array, size: Any, threshold: float) -> None:
    assert rle(mask, box, *size, threshold) == [encoded(raster(mask[0], box[0], *size, threshold))]


def test_network_masks_equal_the_raster_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    probabilities = np.concatenate([stress(rng, kind, 2, 28) for kind in range(6)])
    boxes = scattered(rng, 12, 2, 80, 50)
    expected = [encoded(raster(one, box, 50, 60)) for one, box in zip(probabilities, boxes, strict=True)]
    assert rle(probabilities, boxes, 50, 60) == expected
    monkeypatch.setattr(bicubic, "_WORK", 100)  # a few columns at a time
    assert rle(probabilities, boxes, 50, 60) == expected


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_faint_thresholds_reach_the_outermost_pixels(cells: int) -> None:
    """Diagonally beyond a corner both weights are negative, and their product is not."""
    mask, box = np.ones((1, cells, cells), np.float32), np.array([[20, 18, 29, 26]], np.float32)
    expected = raster(mask[0], box[0], 50, 50, 1e-3)
    assert expected[:17, :19].any()
    assert rle(mask, box, 50, 50, 1e-3) == [encoded(expected)]


def test_agreement_with_pytorch() -> None:
    """Its float32 differs from ours by roundings, so a pixel in some millions may differ where the values are soft."""
    rng = np.random.default_rng(3)
    height, width, number, differing = 200, 220, 60, 0
    for kind in (0, 1):
        probabilities, boxes = stress(rng, kind, number, 28), scattered(rng, number, 1, 200, 200)
        low_x, low_y, high_x, high_y = torch.from_numpy(boxes)[:, :, None].unbind(1)
        y = (torch.arange(height) + 0.5 - low_y) / (high_y - low_y) * 2 - 1
        x = (torch.arange(width) + 0.5 - low_x) / (high_x - low_x) * 2 - 1
        shape = (number, height, width)
        grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)
        given = torch.from_numpy(probabilities)[:, None]
        theirs = torch.nn.functional.grid_sample(given, grid, mode="bicubic", align_corners=False)[:, 0] >= 0.5
        ours = np.stack([decode(one) for one in rle(probabilities, boxes, height, width)])
        differing += int((theirs.numpy() != ours).sum())
    assert differing <= 5


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [9, 5, 5, 9], [5, 5, 9, np.nan], [-np.inf, 5, 9, 9], [90, 5, 99, 9]])
def test_boxes_that_hold_no_pixel_give_an_empty_mask(box: list[float]) -> None:
    found = rle(np.ones((2, 28, 28), np.float32), np.array([[2, 2, 9, 9], box], np.float32), 20, 30)
    assert [area(one) for one in found] == [49, 0]
    assert rle(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), 20, 30) == []
