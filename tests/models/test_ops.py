"""`limner::nms` against a naive reference, `limner::roi_align` and its gradient against torchvision's pooling."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from models import ops

THRESHOLD = 0.25


def naive_nms(
    boxes: np.ndarray, scores: np.ndarray, iou: float, threshold: float, keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """The words of `ops.nms`, one box after the other."""
    num_images, num_groups, size = scores.shape
    indices, counts = np.zeros((num_images, keep), np.int64), np.zeros(num_images, np.int64)
    for image in range(num_images):
        survivors: list[tuple[float, int]] = []
        for group in range(num_groups):
            kept: list[int] = []
            for n in sorted(range(size), key=lambda n: (-scores[image, group, n], n)):
                if scores[image, group, n] <= threshold:
                    continue
                if all(naive_iou(boxes[image, group, n], boxes[image, group, other]) <= iou for other in kept):
                    kept.append(n)
            survivors += [(-float(scores[image, group, n]), group * size + n) for n in kept]
        best = [index for _, index in sorted(survivors)][:keep]
        indices[image, : len(best)] = best
        counts[image] = len(best)
    return indices, counts


def naive_iou(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    both = float(np.prod(np.maximum(sides, 0)))
    union = float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - both
    return float(np.float32(both) / np.float32(union)) if union else 0.0


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Boxes on a coarse grid and few score levels: equal scores, equal boxes, overlaps of exactly `iou` are common."""
    num_images, num_groups, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corners = rng.integers(0, 5, (num_images, num_groups, size, 2)).astype(np.float32)
    sides = rng.integers(0 if draw(st.booleans()) else 1, 5, (num_images, num_groups, size, 2)).astype(np.float32)
    levels = np.array(draw(st.sampled_from([[0, 0.25], [0.5], [0, 0.25, 0.5, 0.75, 1], [-1, 0.9]])), np.float32)
    scores = rng.choice(levels, (num_images, num_groups, size))
    iou = draw(st.sampled_from([0.5, 0.25, 0.7]))  # an overlap can be equal to the first two
    return np.concatenate([corners, corners + sides], -1), scores, iou, draw(st.integers(1, 30))


def check_nms(case: tuple[np.ndarray, np.ndarray, float, int]) -> tuple[torch.Tensor, torch.Tensor]:
    boxes, scores, iou, keep = case
    found = ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou, THRESHOLD, keep)
    indices, counts = naive_nms(boxes, scores, iou, THRESHOLD, keep)
    assert found[0].tolist() == indices.tolist()
    assert found[1].tolist() == counts.tolist()
    return found


SAME = np.tile(np.array([0, 0, 2, 2], np.float32), (1, 2, 4, 1))
APART = SAME + 10 * np.arange(8, dtype=np.float32).reshape(1, 2, 4, 1)


@settings(max_examples=300, deadline=None)
@given(cases())
@example((APART, np.full((1, 2, 4), 0.5, np.float32), 0.5, 3))  # keep < survivors, all scores equal
@example((APART, np.full((1, 2, 4), THRESHOLD, np.float32), 0.5, 3))  # at the threshold is not above it
def test_nms_is_the_naive_one(case: tuple[np.ndarray, np.ndarray, float, int]) -> None:
    check_nms(case)


def test_equal_scores_go_by_index_and_groups_do_not_suppress_each_other() -> None:
    scores = np.full((1, 2, 4), 0.5, np.float32)
    indices, count = check_nms((APART, scores, 0.5, 5))
    assert (indices.tolist(), count.tolist()) == ([[0, 1, 2, 3, 4]], [5])
    indices, count = check_nms((SAME, scores, 0.5, 5))
    assert (indices.tolist(), count.tolist()) == ([[0, 4, 0, 0, 0]], [2])


def test_an_overlap_of_exactly_the_threshold_stays() -> None:
    boxes = np.array([[[[0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 1.5]]]], np.float32)  # IoU 1/2 and 3/4 with the first
    scores = np.array([[[0.9, 0.8, 0.7]]], np.float32)
    assert check_nms((boxes, scores, 0.5, 3))[1].tolist() == [2]


def test_nothing_above_the_threshold() -> None:
    indices, count = check_nms((APART, np.full((1, 2, 4), -1.0, np.float32), 0.5, 4))
    assert not indices.any()
    assert count.tolist() == [0]


def test_nms_of_large_real_coordinates() -> None:
    """600 boxes in 4 groups at coordinates of a canvas: no group is moved away to keep it apart from the others."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1300, (2, 4, 75, 2)) * [[[[1, 0.6]]]]
    boxes = np.concatenate([low, low + rng.lognormal(4, 0.7, low.shape)], -1).astype(np.float32)
    check_nms((boxes, rng.uniform(0, 1, (2, 4, 75)).astype(np.float32), 0.3, 200))


LEVELS = [(2, 3, 32 >> i, 40 >> i) for i in range(4)]  # of a canvas of 128 x 160
# Small, large, wide, past every border, an edge of the canvas, no area, a line, both images.
ROIS = torch.tensor(
    [
        [0, 3.3, 4.1, 20.7, 30.2], [1, 0, 0, 160, 128], [0, 10, 20, 150, 60], [1, -9.5, -3, 40, 33.3],
        [0, 100, 90, 175, 140], [1, 159, 127, 160, 128], [0, 50, 50, 50, 50], [1, 20, 30, 20, 90],
        [0, 7, 8, 7.001, 8.3],
        [1, -300, -300, 400, 500], [0, 0, 0, 112, 112], [1, 0, 0, 224, 224], [0, 0, 0, 448, 448],
    ]
)  # fmt: skip


def features(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in LEVELS]


def reference(
    levels: list[torch.Tensor], rois: torch.Tensor, size: int, sampling: int, aligned: bool, canonical: int
) -> torch.Tensor:
    """torchvision's own parts: its choice of the level, its RoIAlign of one level."""
    chosen = LevelMapper(2, 5, canonical_scale=canonical)([rois[:, 1:]])
    result = torch.zeros(len(rois), levels[0].shape[1], size, size, dtype=levels[0].dtype)
    for index, level in enumerate(levels):
        mine = torch.nonzero(chosen == index).flatten()
        pooled = torchvision.ops.roi_align(level, rois[mine], size, 1 / (4 << index), sampling, aligned)
        result = result.index_put((mine,), pooled)
    return result


@pytest.mark.parametrize("size", [7, 14])
def test_roi_align_is_torchvisions(size: int) -> None:
    levels = features()
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2)
    boxes = [ROIS[ROIS[:, 0] == image] for image in (0, 1)]
    named = OrderedDict((str(i), level) for i, level in enumerate(levels))
    wanted = pool(named, [b[:, 1:] for b in boxes], [(128, 160), (128, 160)])
    assert torch.equal(ops.roi_align(levels, torch.cat(boxes), size, 2, False, 224), wanted)


def test_every_level_is_used() -> None:
    """Else the comparisons here would say little."""
    assert set(ops.roi_levels(ROIS, 4, 224).tolist()) == {0, 1, 2, 3}
    assert set(ops.roi_levels(ROIS, 4, 112).tolist()) == {0, 1, 2, 3}


def test_levels_change_exactly_at_powers_of_two() -> None:
    sides = torch.tensor([111.9, 112.0, 223.9, 224.0, 447.9, 448.0])
    rois = torch.stack([torch.zeros(6), torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    assert ops.roi_levels(rois, 4, 224).tolist() == [0, 1, 1, 2, 2, 3]
    assert ops.roi_levels(rois, 3, 224).tolist() == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("sampling", "canonical"), [(2, 224), (0, 112)])
def test_roi_align_and_its_gradient(aligned: bool, sampling: int, canonical: int) -> None:
    ours, theirs = features(), features()
    settings = (ROIS, 7, sampling, aligned, canonical)
    found, wanted = ops.roi_align(ours, *settings), reference(theirs, *settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        assert its.grad.abs().sum() > 1
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-5)


def test_half_a_cell_is_the_difference_of_aligned() -> None:
    """On a ramp the pooled value is the coordinate itself: aligned gives pixel centres, else half a cell more."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    rois = torch.tensor([[0.0, 40, 40, 72, 72]])  # cells 10 to 18 of stride 4
    centre = {aligned: ops.roi_align([ramp], rois, 1, 2, aligned, 224).item() for aligned in (False, True)}
    assert centre == {False: 14.0, True: 13.5}


def test_no_rois() -> None:
    levels = features()
    pooled = ops.roi_align(levels, torch.zeros(0, 5), 7, 2, True, 224)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in levels)


def test_bfloat16_features_are_pooled_in_float32() -> None:
    levels = [level.detach().bfloat16() for level in features()]
    wanted = reference([level.float() for level in levels], ROIS, 7, 2, True, 224)
    found = ops.roi_align(levels, ROIS, 7, 2, True, 224)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


def test_pytorch_accepts_nms_as_an_operator() -> None:
    torch.library.opcheck(ops.nms, (torch.from_numpy(APART), torch.rand(1, 2, 4), 0.5, 0.1, 3))


@pytest.mark.parametrize("rois", [ROIS, ROIS[:0]], ids=["rois", "none"])
def test_pytorch_accepts_roi_align_as_an_operator(rois: torch.Tensor) -> None:
    torch.library.opcheck(ops.roi_align, (features(), rois, 7, 2, True, 224))
