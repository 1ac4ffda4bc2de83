"""The custom ops: `limner::nms`, `limner::roi_align` and `limner::roi_pool`.

Each has one meaning, given here in its eager form over torchvision's kernels. Every output shape follows from input
shapes and integer arguments alone, which is what lets a detector export without data-dependent sizes.
On CUDA tensors the kernels of models/kernels run, which mean the same.
Letters: B images, G groups, N boxes in a group, R RoIs, C channels.
"""

from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor

nms_kernel = torchvision.ops.nms
roi_align_kernel = torchvision.ops.roi_align
roi_pool_kernel = torchvision.ops.roi_pool


def _eager_nms(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    num_images, num_groups, size = scores.shape
    indices = torch.zeros(num_images, keep, dtype=torch.int64, device=boxes.device)
    count = torch.zeros(num_images, dtype=torch.int64, device=boxes.device)
    for image in range(num_images):
        kept = _kept_in_groups(boxes[image], scores[image], iou, threshold)
        ranked = scores[image].reshape(-1)[kept].sort(descending=True, stable=True).indices[:keep]
        indices[image, : len(ranked)] = kept[ranked]
        count[image] = len(ranked)
    return indices, count


@torch.library.custom_op("limner::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression within each group, then the best `keep` over all groups.

    boxes (B, G, N, 4), scores (B, G, N). Candidates have score > threshold; a box goes when its IoU with a better kept
    box of its own group is strictly above `iou`. Returns indices (B, keep) int64 into the flattened G * N, best first,
    ties to the lower index, 0 past count; and count (B,) int64. A group is a pyramid level (RPN) or a class (box head).
    """
    return _eager_nms(boxes, scores, iou, threshold, keep)


@nms.register_kernel("cuda")
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    from models.kernels import torch_cuda  # compiles: only where there is something to compile for

    found = torch_cuda.nms(boxes, scores, iou, threshold, keep)
    return _eager_nms(boxes, scores, iou, threshold, keep) if found is None else found


def _kept_in_groups(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    """Ascending flat indices of the survivors of one image: boxes (G, N, 4), scores (G, N)."""
    num_groups, size = scores.shape
    candidate = scores > threshold
    kept = []
    for group in torch.nonzero(candidate.any(1)).flatten().tolist():
        index = torch.nonzero(candidate[group]).flatten()
        survivors = nms_kernel(boxes[group, index], scores[group, index], iou)
        kept.append(index[survivors] + group * size)
    if not kept:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    return torch.cat(kept).sort().values


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    num_images = scores.shape[0]
    return scores.new_empty((num_images, keep), dtype=torch.int64), scores.new_empty((num_images,), dtype=torch.int64)


@torch.library.custom_op("limner::roi_align", mutates_args=())
def roi_align(
    features: Sequence[Tensor], rois: Tensor, size: int, sampling: int, aligned: bool, canonical: int, stride: int = 4
) -> Tensor:
    """RoIAlign (Mask R-CNN section 3) over a pyramid, the level chosen per RoI.

    features: p2, p3, ... (B, C, H / s, W / s) with s = `stride` for the first and twice that for each next one; rois
    (R, 5): batch index, then xyxy on the canvas. `sampling` points per bin and axis (0: adaptive); `aligned` shifts by
    half a cell (Detectron2) or not (torchvision). The level is floor(4 + log2(sqrt(area) / canonical) + 1e-6), where 2
    is the first one, FPN equation 1, kept inside the pyramid: of a single map it is that map.
    Returns (R, C, size, size), channels-last in memory if all the features are.
    """
    return _eager_roi_align(features, rois, size, sampling, aligned, canonical, stride)


def _eager_roi_align(
    features: Sequence[Tensor], rois: Tensor, size: int, sampling: int, aligned: bool, canonical: int, stride: int
) -> Tensor:
    def pool(feature: Tensor, mine: Tensor, scale: float) -> Tensor:
        return roi_align_kernel(feature, mine, (size, size), scale, sampling, aligned)

    return _by_level(features, rois, size, canonical, stride, pool)


def _by_level(
    features: Sequence[Tensor],
    rois: Tensor,
    size: int,
    canonical: int,
    stride: int,
    pool: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Each level's RoIs by `pool(feature, rois, scale)`; 0 for a RoI of negative area, which has no level."""
    levels = roi_levels(rois, len(features), canonical)
    pooled = pooled_like(features, len(rois), size).zero_()
    for level, feature in enumerate(features):
        mine = torch.nonzero(levels == level).flatten()
        # Coordinates and sums are float32 in every precision, as the CUDA kernel's are.
        pooled[mine] = pool(feature.float(), rois[mine], 1.0 / (stride << level)).to(pooled.dtype)
    return pooled


@roi_align.register_kernel("cuda")
def _(
    features: Sequence[Tensor], rois: Tensor, size: int, sampling: int, aligned: bool, canonical: int, stride: int = 4
) -> Tensor:
    from models.kernels import torch_cuda

    found = torch_cuda.roi_align(features, rois, size, sampling, aligned, canonical, stride)
    return _eager_roi_align(features, rois, size, sampling, aligned, canonical, stride) if found is None else found


@torch.library.custom_op("limner::roi_pool", mutates_args=())
def roi_pool(features: Sequence[Tensor], rois: Tensor, size: int, canonical: int, stride: int = 4) -> Tensor:
    """RoIPool (Fast R-CNN section 2.1): the largest value of each bin of whole cells; levels as in `roi_align`.

    Corners are rounded to cells, half away from zero, and both belong to the RoI; bins share cells where a RoI has
    fewer than `size`; a bin outside the map is 0. The gradient goes to the cell that was the largest, to the first of
    equal ones. Returns (R, C, size, size), channels-last in memory if all the features are.
    """
    return _eager_roi_pool(features, rois, size, canonical, stride)


def _eager_roi_pool(features: Sequence[Tensor], rois: Tensor, size: int, canonical: int, stride: int) -> Tensor:
    def pool(feature: Tensor, mine: Tensor, scale: float) -> Tensor:
        return roi_pool_kernel(feature, mine, (size, size), scale)

    return _by_level(features, rois, size, canonical, stride, pool)


@roi_pool.register_kernel("cuda")
def _(features: Sequence[Tensor], rois: Tensor, size: int, canonical: int, stride: int = 4) -> Tensor:
    from models.kernels import torch_cuda

    found = torch_cuda.roi_pool(features, rois, size, canonical, stride)
    return _eager_roi_pool(features, rois, size, canonical, stride) if found is None else found


def pooled_like(features: Sequence[Tensor], num_rois: int, size: int) -> Tensor:
    """Room for what is pooled, (R, C, size, size), laid out as the features are."""
    form = torch.channels_last if channels_last(features) else torch.contiguous_format
    shape = (num_rois, features[0].shape[1], size, size)
    return torch.empty(shape, dtype=features[0].dtype, device=features[0].device, memory_format=form)


def channels_last(features: Sequence[Tensor]) -> bool:
    """Every map is channels-last, and that says something: a map of one channel or one cell is both."""
    last = all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)
    return last and not all(feature.is_contiguous() for feature in features)


def roi_levels(rois: Tensor, num_levels: int, canonical: int) -> Tensor:
    """Pyramid level (R,) int64 of each RoI, 0 for p2. The epsilon stands outside the logarithm, as in torchvision."""
    sides = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    return levels_of_ratios(sides / canonical, num_levels)


def levels_of_ratios(ratios: Tensor, num_levels: int) -> Tensor:
    """Levels int64, 0 for p2, of RoIs whose sides are `ratios` (any shape) of the canonical one."""
    levels = torch.floor(4 + torch.log2(ratios) + 1e-6)
    return (levels.clamp(2, 1 + num_levels) - 2).to(torch.int64)


@roi_align.register_fake
def _(
    features: Sequence[Tensor], rois: Tensor, size: int, sampling: int, aligned: bool, canonical: int, stride: int = 4
) -> Tensor:
    return pooled_like(features, rois.shape[0], size)


@roi_pool.register_fake
def _(features: Sequence[Tensor], rois: Tensor, size: int, canonical: int, stride: int = 4) -> Tensor:
    return pooled_like(features, rois.shape[0], size)


def _setup_roi_align(ctx, inputs, output) -> None:
    features, rois, ctx.size, ctx.sampling, ctx.aligned, ctx.canonical, ctx.stride = inputs
    ctx.shapes = [feature.shape for feature in features]
    ctx.save_for_backward(rois)


def _roi_align_backward(ctx, grad: Tensor) -> tuple:
    (rois,) = ctx.saved_tensors
    levels = roi_levels(rois, len(ctx.shapes), ctx.canonical)
    grads = []
    for level, shape in enumerate(ctx.shapes):
        mine = torch.nonzero(levels == level).flatten()
        part = torch.ops.torchvision._roi_align_backward(
            grad[mine].float().contiguous(), rois[mine], 1.0 / (ctx.stride << level),
            ctx.size, ctx.size, *shape, ctx.sampling, ctx.aligned,
        )  # fmt: skip
        grads.append(part.to(grad.dtype))
    return grads, None, None, None, None, None, None


roi_align.register_autograd(_roi_align_backward, setup_context=_setup_roi_align)


def _setup_roi_pool(ctx, inputs, output) -> None:
    features, rois, ctx.size, ctx.canonical, ctx.stride = inputs
    ctx.save_for_backward(rois, *features)


def _roi_pool_backward(ctx, grad: Tensor) -> tuple:
    """Which cell was the largest is found again: an op that gave it would have an output that nothing else reads."""
    rois, *features = ctx.saved_tensors
    levels = roi_levels(rois, len(features), ctx.canonical)
    grads = []
    for level, feature in enumerate(features):
        mine = torch.nonzero(levels == level).flatten()
        where = (rois[mine], 1.0 / (ctx.stride << level), ctx.size, ctx.size)
        _, cells = torch.ops.torchvision.roi_pool(feature.detach().float(), *where)
        part = torch.ops.torchvision._roi_pool_backward(
            grad[mine].float().contiguous(), rois[mine], cells, *where[1:], *feature.shape
        )
        grads.append(part.to(grad.dtype))
    return grads, None, None, None, None


roi_pool.register_autograd(_roi_pool_backward, setup_context=_setup_roi_pool)
