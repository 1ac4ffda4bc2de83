"""The decoded joints against torchvision's loop, and against a full resize in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from numpy.typing import NDArray
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from service import keypoints
from service.keypoints import decode

Array = NDArray[Any]


def theirs(heatmaps: Array, boxes: Array) -> Array:
    """(N, J, 2) joints of torchvision."""
    return heatmaps_to_keypoints(torch.from_numpy(heatmaps), torch.from_numpy(boxes))[0].numpy()[..., :2]


def peaked(rng: np.random.Generator, number: int, joints: int = 17) -> Array:
    """Bumps on a rough floor at 28 x 28, doubled as the head does it."""
    y, x = np.mgrid[:28, :28]
    at, spread = rng.uniform(0, 28, (number, joints, 2, 1, 1)), rng.uniform(0.7, 2.5, (number, joints, 1, 1))
    bumps = np.exp(-((y - at[:, :, 0]) ** 2 + (x - at[:, :, 1]) ** 2) / (2 * spread**2))
    logits = rng.uniform(4, 14, (number, joints, 1, 1)) * bumps + rng.normal(-3, 0.7, (number, joints, 28, 28))
    doubled = torch.nn.functional.interpolate(torch.from_numpy(logits).float(), scale_factor=2, mode="bilinear")
    return doubled.numpy()


def noise(rng: np.random.Generator, number: int, joints: int = 17) -> Array:
    return rng.normal(0, 3, (number, joints, 56, 56)).astype(np.float32)


def persons(rng: np.random.Generator, number: int, smallest: float, largest: float) -> Array:
    sides = np.exp(rng.uniform(np.log(smallest), np.log(largest), (number, 2)))
    corner = rng.uniform(0, 800, (number, 2))
    return np.concatenate([corner, corner + sides], axis=1).astype(np.float32)


@pytest.mark.parametrize("maps", [peaked, noise])
@pytest.mark.parametrize("sides", [(0.2, 20), (20, 200), (150, 700)])
def test_joints_are_torchvisions(maps: Any, sides: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    heatmaps, boxes = maps(rng, 40), persons(rng, 40, *sides)
    apart = np.abs(decode(heatmaps, boxes)[..., :2] - theirs(heatmaps, boxes)).max(axis=-1)
    assert (apart <= 0.01).mean() >= 0.999
    assert apart.max() <= 1


def test_a_plateau_overtakes_the_largest_cell() -> None:
    """The cubic overshoots between large neighbours: searching only beside the largest cell would not do."""
    maps = np.zeros((1, 1, 56, 56), np.float32)
    maps[0, 0, 10, 10], maps[0, 0, 40:42, 40:42] = 1, 0.9
    boxes = np.array([[0, 0, 560, 560]], np.float32)
    found = decode(maps, boxes)
    np.testing.assert_allclose(found[0, 0, :2], 410, atol=1)
    np.testing.assert_allclose(found[..., :2], theirs(maps, boxes), atol=1.01)  # four pixels are equal by symmetry


def resized(maps: Array, box: Array) -> Array:
    side = np.ceil(np.maximum(box[2:] - box[:2], 1)).astype(int)
    full = torch.from_numpy(maps.astype(np.float64))[None]
    return torch.nn.functional.interpolate(full, size=(int(side[1]), int(side[0])), mode="bicubic")[0].numpy()


logits = st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-9, 9, width=32))


@settings(max_examples=200, deadline=None)
@given(
    maps=st.integers(1, 7).flatmap(lambda cells: hn.arrays(np.float32, (2, cells, cells), elements=logits)),
    side=hn.arrays(np.float32, 2, elements=st.floats(0, 40, width=32)),
)
def test_no_pixel_of_the_full_resize_is_larger(maps: Array, side: Array) -> None:
    box = np.concatenate([np.float32([3, 5]), np.float32([3, 5]) + side])
    full = resized(maps, box)
    span = np.maximum(box[2:] - box[:2], 1)
    place = (decode(maps[None], box[None])[0, :, :2] - box[:2]) / span * full.shape[:0:-1]
    column, row = np.rint(place - 0.5).astype(int).T
    largest = full.reshape(2, -1).max(axis=1)
    assert (full[[0, 1], row, column] >= largest - 1e-5 * (1 + np.abs(maps).max())).all()


def test_scores_are_the_softmax_over_the_cells() -> None:
    rng = np.random.default_rng(2)
    heatmaps = peaked(rng, 8)
    expected = torch.from_numpy(heatmaps).flatten(2).softmax(dim=2).amax(dim=2).numpy()
    np.testing.assert_allclose(decode(heatmaps, persons(rng, 8, 20, 300))[..., 2], expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 17), (3, 0), (0, 0)])
def test_nothing_to_decode(shape: tuple[int, int]) -> None:
    found = decode(np.zeros((*shape, 56, 56), np.float32), np.zeros((shape[0], 4), np.float32))
    assert (found.shape, found.dtype) == ((*shape, 3), np.float32)


def test_a_person_does_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    heatmaps, boxes = np.concatenate([peaked(rng, 8), noise(rng, 8)]), persons(rng, 16, 5, 400)
    together = decode(heatmaps, boxes)
    np.testing.assert_array_equal(together, [decode(heatmaps[i : i + 1], boxes[i : i + 1])[0] for i in range(16)])
    for limit, value in (("_MAPS", 5), ("_CENTRES", 50), ("_PIXELS", 500)):
        monkeypatch.setattr(keypoints, limit, value)
    np.testing.assert_array_equal(together, decode(heatmaps, boxes))


def test_a_level_map_gives_its_first_pixel() -> None:
    boxes = np.array([[10, 20, 110, 220], [0, 0, 0, 0]], np.float32)
    found = decode(np.full((2, 3, 56, 56), 2.5, np.float32), boxes)
    np.testing.assert_allclose(found, [[[10.5, 20.5, 56.0**-2]] * 3, [[0.5, 0.5, 56.0**-2]] * 3], rtol=1e-5)


def test_boxes_and_logits_that_are_not_finite_do_no_harm() -> None:
    rng = np.random.default_rng(4)
    heatmaps, boxes = peaked(rng, 4), persons(rng, 4, 20, 300)
    expected = decode(heatmaps, boxes)
    boxes[1], boxes[2, 2], heatmaps[3] = np.nan, np.inf, np.nan
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(decode(heatmaps, boxes)[0], expected[0])
