"""Four poolers, one call: each against a plain form of its paper's words, and each as the ops mean it."""

import math

import pytest
import torch
import torchvision
from torch import Tensor

from models import ops
from models.pooling import Pooler, RoIAlign, RoIPool, SpatialPyramid, Warp

# On a canvas of 160 x 128: usual, whole, wide, within one cell, at the far corner, no area, past every border.
ROIS = torch.tensor(
    [
        [0, 3.3, 4.1, 90.7, 100.2], [1, 0, 0, 160, 128], [0, 10, 24, 150, 40], [1, 33, 34, 40, 44],
        [1, 146, 114, 160, 128], [0, 40, 40, 40, 40], [1, -30, -20, 200, 150],
    ]
)  # fmt: skip
POOLERS: list[Pooler] = [RoIAlign(7, stride=16), RoIPool(7, stride=16), SpatialPyramid(), Warp(64, 4)]


def maps(channels: int = 3, stride: int = 16) -> Tensor:
    return torch.randn(2, channels, 128 // stride, 160 // stride, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pooler", POOLERS, ids=lambda pooler: type(pooler).__name__)
def test_one_interface(pooler: Pooler) -> None:
    features = [maps(stride=1 if isinstance(pooler, Warp) else 16)]
    pooled = pooler(features, ROIS)
    assert pooled.shape[:2] == (len(ROIS), 3)
    assert math.prod(pooled.shape[2:]) == pooler.cells
    assert bool(pooled.isfinite().all())
    assert pooler(features, ROIS[:0]).shape == (0, *pooled.shape[1:])
    for i in range(len(ROIS)):
        assert torch.equal(pooler(features, ROIS[i : i + 1])[0], pooled[i]), "a RoI's answer is its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roi_pool_and_its_gradient_are_torchvisions(dtype: torch.dtype) -> None:
    ours, theirs = (maps().to(dtype).float().requires_grad_() for _ in range(2))
    found = RoIPool(7, stride=16)([ours.to(dtype)], ROIS)
    wanted = torchvision.ops.roi_pool(theirs, ROIS, 7, 1 / 16)
    assert torch.equal(found.float(), wanted)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found.float() * weights).sum().backward()
    (wanted * weights.to(dtype).float()).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0 if dtype == torch.float32 else 0.1)


def test_roi_pool_takes_the_level_that_roi_align_takes() -> None:
    levels = [maps(stride=4 << i) for i in range(4)]
    found = RoIPool(7)(levels, ROIS)
    used = ops.roi_levels(ROIS, 4, 224)
    assert len(set(used.tolist())) >= 2
    for i, level in enumerate(used.tolist()):
        wanted = torchvision.ops.roi_pool(levels[level], ROIS[i : i + 1], 7, 1 / (4 << level))
        assert torch.equal(found[i : i + 1], wanted)


def test_pytorch_accepts_roi_pool_as_an_operator() -> None:
    levels = [maps().requires_grad_()]
    torch.library.opcheck(ops.roi_pool, (levels, ROIS, 7, 224, 16))
    torch.library.opcheck(ops.roi_align, (levels, ROIS, 7, 2, True, 224, 16))


def test_a_stride_is_that_of_the_first_map() -> None:
    feature = maps()
    found = RoIAlign(14, aligned=True, stride=16)([feature], ROIS)
    assert torch.equal(found, torchvision.ops.roi_align(feature, ROIS, 14, 1 / 16, 2, True))


def test_spatial_pyramid_is_the_largest_of_cells_whose_centres_are_inside() -> None:
    feature = maps()
    found = SpatialPyramid()([feature], ROIS)
    for roi, pooled in zip(ROIS.tolist()[:5], found[:5], strict=True):
        x1, y1, x2, y2 = roi[1:]
        columns = [x for x in range(10) if x1 < 16 * x < x2] or [min(9, int(x2 / 16))]
        rows = [y for y in range(8) if y1 < 16 * y < y2] or [min(7, int(y2 / 16))]
        window = feature[int(roi[0])][:, rows][:, :, columns]
        assert torch.equal(pooled[:, 0], window.amax((1, 2))), "the grid of one"
        wanted = torch.cat([bins(window, grid) for grid in (1, 2, 3, 6)], dim=1)
        assert torch.equal(pooled, wanted)


def bins(window: Tensor, grid: int) -> Tensor:
    """The usual bins: bin i of n over a cells goes from floor(i a / n) to ceil((i + 1) a / n)."""
    height, width = window.shape[1:]
    each = [
        window[
            :,
            i * height // grid : -(-(i + 1) * height // grid),
            j * width // grid : -(-(j + 1) * width // grid),
        ].amax((1, 2))
        for i in range(grid)
        for j in range(grid)
    ]
    return torch.stack(each, dim=1)


def test_warp_keeps_a_border_of_context_around_the_roi() -> None:
    """On ramps a warped pixel is its own coordinate: the RoI's edges lie `context` pixels inside the square's."""
    y, x = torch.meshgrid(torch.arange(200.0) + 0.5, torch.arange(300.0) + 0.5, indexing="ij")
    pictures = torch.stack((x, y))[None]
    roi = torch.tensor([[0.0, 60, 50, 255, 89]])  # 195 x 39: a pixel of the square is 1 x 0.2 of the picture
    warped = Warp()([pictures], roi)[0]
    assert warped.shape == (2, 227, 227)
    columns, rows = warped[0, 100], warped[1, :, 100]
    torch.testing.assert_close(columns, 60 + (torch.arange(227) + 0.5 - 16) * 1.0, rtol=0, atol=1e-3)
    torch.testing.assert_close(rows, 50 + (torch.arange(227) + 0.5 - 16) * 0.2, rtol=0, atol=1e-3)


def test_warp_finds_the_mean_outside_the_picture() -> None:
    pictures = torch.ones(1, 3, 100, 100)
    warped = Warp()([pictures], torch.tensor([[0.0, 0, 0, 195, 50]]))[0]
    assert not warped[:, :, :14].any()
    assert bool((warped[:, 30:200, 20:110] == 1).all())
    assert not warped[:, :, 120:].any()
