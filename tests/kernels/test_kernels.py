"""The CUDA kernels without a GPU: their sources, run on the CPU, give the bits of the eager ops.

Bit for bit, since nothing here may depend on luck: a level, a suppression or a rank that differs by one rounding moves
whole boxes. torchvision's CPU kernels are built without fused multiply-adds on x86-64, which the comparison needs.
"""

import platform

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from models import kernels, ops
from tests.kernels.emulator import Run, emulated

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="torchvision's CPU kernels fuse operations on this processor"
)
LEVELS = [(24, 40), (12, 20), (6, 10), (3, 5)]  # of a canvas of 96 x 160
FLOOR = 0.25


def nms(run: Run, boxes: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Both launches, into memory that holds something else: a kernel writes all of its outputs."""
    images, groups, size = scores.shape
    kept = torch.full((images, groups, min(size, keep)), -7, dtype=torch.int32)
    kept_scores, kept_count = torch.full(kept.shape, 7.0), torch.full((images, groups), -7, dtype=torch.int32)
    indices, count = torch.full((images, keep), -7), torch.full((images,), -7)
    run(kernels.nms_launch(images, groups, size, keep), [boxes, scores], [kept, kept_scores, kept_count])
    run(kernels.nms_merge_launch(images, groups, size, keep), [kept, kept_scores, kept_count], [indices, count])
    assert not kept[torch.arange(kept.shape[-1]) >= kept_count[..., None]].any()
    return indices, count


def check_nms(boxes: Tensor, scores: Tensor, iou: float, keep: int, threshold: float = FLOOR) -> Tensor:
    run = emulated("nms", kernels.nms_defines(iou, threshold, scores.shape[2]))
    indices, count = nms(run, boxes, scores, keep)
    wanted_indices, wanted_count = ops.nms(boxes, scores, iou, threshold, keep)
    assert count.tolist() == wanted_count.tolist()
    assert torch.equal(indices, wanted_indices)
    return count


def random_boxes(seed: int, *shape: int, canvas: float = 200.0) -> Tensor:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, canvas, (*shape, 2))
    return torch.from_numpy(np.concatenate([low, low + rng.lognormal(3, 0.8, (*shape, 2))], -1).astype(np.float32))


def coarse_case(seed: int) -> tuple[Tensor, Tensor, int]:
    """A coarse grid and few scores: equal scores, equal and empty boxes, overlaps of exactly 1/2 and 1/4 are common."""
    rng = np.random.default_rng(seed)
    images, groups, size = int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.integers(1, 65))
    corners = rng.integers(0, 5, (images, groups, size, 2))
    sides = rng.integers(rng.integers(0, 2), 5, corners.shape)
    levels = [[0, 0.25], [0.5], [0, 0.25, 0.5, 0.75, 1], [-1, 0.9], [-0.0, 0.0, 0.3]][seed % 5]
    boxes = np.concatenate([corners, corners + sides], -1).astype(np.float32)
    scores = rng.choice(np.array(levels, np.float32), (images, groups, size))
    return torch.from_numpy(boxes), torch.from_numpy(scores), int(rng.integers(1, 80))


@pytest.mark.parametrize("iou", [0.5, 0.25, 0.1])
def test_nms_of_ties_and_overlaps_at_the_threshold(iou: float) -> None:
    counts = [check_nms(*coarse_case(seed)[:2], iou, coarse_case(seed)[2]).sum().item() for seed in range(40)]
    assert len(set(counts)) > 10


@pytest.mark.parametrize(("size", "keep"), [(1, 1), (150, 70), (700, 1000), (3000, 40)])
def test_nms_of_many_boxes(size: int, keep: int) -> None:
    boxes = random_boxes(size, 1, 2, size)
    scores = torch.rand((1, 2, size), generator=torch.Generator().manual_seed(size)) + 0.3
    check_nms(boxes, scores, 0.7, keep)


def test_nms_of_a_float_iou_that_its_threshold_is_not() -> None:
    """0.1 as a float32 is above 0.1: an overlap of exactly that suppresses, and the kernel's constant must know."""
    boxes = torch.tensor([[[[0, 0, 10, 1], [0, 0, 1, 1.0]]]])
    scores = torch.tensor([[[0.9, 0.8]]])
    assert check_nms(boxes, scores, 0.1, 2).item() == 1
    assert check_nms(boxes, scores, float(torch.tensor(0.1)), 2).item() == 2


def test_nms_of_zeros_of_either_sign() -> None:
    scores = torch.tensor([[[0.0, -0.0, 0.0], [-0.0, 0.0, -0.0]]])
    boxes = torch.arange(6.0).reshape(1, 2, 3, 1) * 10 + torch.tensor([0.0, 0, 5, 5])
    assert check_nms(boxes, scores, 0.5, 6, threshold=-0.5).item() == 6


def test_nms_of_nothing_and_of_the_same_box_again_and_again() -> None:
    boxes = torch.tensor([3.0, 4, 50, 60]).expand(2, 3, 130, 4).contiguous()
    scores = torch.rand((2, 3, 130), generator=torch.Generator().manual_seed(0)) + 0.3
    scores[1, 1] = -1
    assert check_nms(boxes, scores, 0.5, 9).tolist() == [3, 2]
    assert check_nms(boxes, torch.full_like(scores, -1), 0.5, 9).tolist() == [0, 0]
    assert check_nms(torch.zeros_like(boxes), scores, 0.5, 9).tolist() == [9, 9]  # no area: 0 / 0 suppresses nothing


def test_nms_of_corners_the_wrong_way_round() -> None:
    boxes = random_boxes(5, 1, 2, 60, canvas=20.0)
    boxes[:, :, ::3] = boxes[:, :, ::3].roll(2, -1)
    check_nms(boxes, torch.rand(1, 2, 60, generator=torch.Generator().manual_seed(1)) + 0.3, 0.5, 60)


def rois(seed: int, count: int = 60) -> Tensor:
    """Every size, past every border, lines, points, and the levels' edges with their neighbours."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(-40, 160, (count, 2))
    some = np.concatenate([low, low + rng.lognormal(3.5, 1.3, (count, 2))], -1)
    odd = [[50, 50, 50, 50], [20, 30, 20, 90], [-300, -300, 600, 700], [0, 0, 160, 96], [159, 95, 160, 96],
           [80, 60, 20, 10], [80, 10, 20, 60], [500, 500, 600, 600], [-90, -90, -50, -50]]  # fmt: skip
    edges = [[0, 0, side * (1 + step * 2.0**-24), side] for side in (56, 112, 224, 448) for step in range(-40, 4)]
    boxes = np.concatenate([some, odd, edges])
    image = rng.integers(0, 2, (len(boxes), 1))
    found = torch.from_numpy(np.concatenate([image, boxes], -1).astype(np.float32))
    # torch's square root on a CPU (MKL's) is at times one rounding off, the kernel's never: it decides at an edge.
    areas = (found[:, 3] - found[:, 1]) * (found[:, 4] - found[:, 2])
    exact = areas.sqrt() == areas.double().sqrt().float()
    assert exact.sum() > 0.7 * (areas >= 0).sum()
    return found[exact | (areas < 0)]


def pyramid(dtype: torch.dtype, last: bool, channels: int, levels: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn((2, channels, *side), generator=generator).to(dtype) for side in LEVELS[:levels]]
    return [m.contiguous(memory_format=torch.channels_last) for m in maps] if last else maps


def pooled(kernel: str, maps: list[Tensor], regions: Tensor, size: int, last: bool, **own: int) -> Tensor:
    dtype, levels, (images, channels) = maps[0].dtype, len(maps), maps[0].shape[:2]
    form = torch.channels_last if last else torch.contiguous_format
    output = torch.empty((len(regions), channels, size, size), dtype=dtype, memory_format=form).fill_(77)
    if kernel == "roi_align":
        defines, launch = kernels.roi_align_defines, kernels.roi_align_launch
        more = (own["sampling"], bool(own["aligned"]), own["canonical"], own.get("first_stride", 4))
        values = defines(dtype, last, levels, channels, size, *more)
    else:
        launch = kernels.roi_pool_launch
        values = kernels.roi_pool_defines(dtype, last, levels, channels, size, 224, own["first_stride"])
    sides = [(m.shape[2], m.shape[3]) for m in maps]
    run = emulated(kernel, values)
    run(launch(len(regions), images, channels, sides, size, dtype, last), [*maps, regions], [output])
    return output


@pytest.mark.parametrize(
    ("dtype", "last", "aligned", "sampling", "canonical", "size", "channels", "levels"),
    [
        (torch.float32, False, False, 2, 224, 7, 3, 4),
        (torch.float32, True, True, 2, 112, 7, 8, 4),
        (torch.float32, True, False, 0, 224, 3, 6, 3),
        (torch.float32, False, True, 0, 224, 7, 2, 1),
        (torch.float32, False, False, 3, 224, 5, 50, 2),  # 3 * 3 divides no power of two; more than one slice a RoI
        (torch.float16, True, False, 2, 224, 7, 16, 4),
        (torch.float16, False, True, 2, 224, 7, 3, 4),
        (torch.bfloat16, True, True, 2, 224, 14, 4, 4),
        (torch.bfloat16, False, False, 2, 224, 7, 3, 4),
    ],
)
def test_roi_align_to_the_bit(
    dtype: torch.dtype,
    last: bool,
    aligned: bool,
    sampling: int,
    canonical: int,
    size: int,
    channels: int,
    levels: int,
) -> None:
    maps, regions = pyramid(dtype, last, channels, levels), rois(7)
    wanted = ops.roi_align(maps, regions, size, sampling, aligned, canonical)
    used = ops.roi_levels(regions, levels, canonical)
    assert len({level for level in used.tolist() if level >= 0}) == levels
    found = pooled("roi_align", maps, regions, size, last, sampling=sampling, aligned=aligned, canonical=canonical)
    assert wanted.abs().sum() > 10
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()


@pytest.mark.parametrize(("stride", "size", "sampling"), [(16, 14, 2), (1, 33, 1)], ids=["c4", "pixels"])
def test_roi_align_of_one_map_of_any_stride(stride: int, size: int, sampling: int) -> None:
    maps, regions = pyramid(torch.float32, False, 3, 1), rois(9)
    wanted = ops.roi_align(maps, regions, size, sampling, True, 224, stride)
    own = {"sampling": sampling, "aligned": 1, "canonical": 224, "first_stride": stride}
    assert torch.equal(pooled("roi_align", maps, regions, size, False, **own), wanted)


def test_roi_align_of_an_image_that_is_not_there_is_zero() -> None:
    maps, regions = pyramid(torch.float32, False, 3), torch.tensor([[2.0, 0, 0, 50, 50], [-1, 0, 0, 50, 50]])
    found = pooled("roi_align", maps, regions, 7, False, sampling=2, aligned=0, canonical=224)
    assert not found.any()


@pytest.mark.parametrize(("dtype", "last", "channels"), [(torch.float32, False, 3), (torch.float16, True, 8)])
def test_roi_pool_to_the_bit(dtype: torch.dtype, last: bool, channels: int) -> None:
    maps, regions = pyramid(dtype, last, channels, 1), rois(8)
    regions = regions[(regions[:, 3] >= regions[:, 1]) & (regions[:, 4] >= regions[:, 2])]
    wanted = torchvision.ops.roi_pool(maps[0].float().contiguous(), regions, 7, 1 / 8)
    found = pooled("roi_pool", maps, regions, 7, last, first_stride=8)
    assert torch.equal(found, wanted.to(dtype))


def test_levels_begin_where_the_eager_rule_has_them() -> None:
    """Around each edge, at every float32: the kernel compares with constants, the op takes a logarithm."""
    edges = kernels.launch.level_edges(4)
    for edge in edges:
        ratios = (torch.tensor(edge).view(torch.int32) + torch.arange(-500, 500, dtype=torch.int32)).view(torch.float32)
        wanted = ops.levels_of_ratios(ratios, 4)
        assert torch.equal(sum(ratios >= e for e in torch.tensor(edges)).to(torch.int64), wanted)
        assert len(set(wanted.tolist())) == 2


def test_a_group_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4096"):
        kernels.nms_launch(1, 1, 4097, 10)


def test_sizes_that_are_not_known_yet_pass_through() -> None:
    """A compiler's symbols: no arithmetic is done on them."""
    batch, count, side = object(), object(), object()
    sides = [(side, side)]
    launch = kernels.roi_align_launch(count, batch, 256, sides, 7, torch.float16, True)
    assert launch.grid == (count, 1, 1)
    assert launch.extras == (batch, 256, side, side)
    assert kernels.nms_launch(batch, 5, 1000, 300).grid == (5, batch, 1)
