"""Box arithmetic: xyxy float boxes, continuous coordinates, in whatever frame the caller works.

The order of operations follows torchvision (`torchvision/models/detection/_utils.py`), since float32 parity is tested
bit for bit. Deltas are (dx, dy, dw, dh) from a reference box, R-CNN appendix C.
"""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)  # a delta may not scale a side by more: exp() must stay finite


def encode(boxes: Tensor, references: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Deltas (..., 4) that take `references` (..., 4) to `boxes` (..., 4)."""
    widths, heights, center_x, center_y = _centers(references)
    gt_widths, gt_heights, gt_center_x, gt_center_y = _centers(boxes)
    wx, wy, ww, wh = weights
    return torch.stack(
        (
            wx * (gt_center_x - center_x) / widths,
            wy * (gt_center_y - center_y) / heights,
            ww * torch.log(gt_widths / widths),
            wh * torch.log(gt_heights / heights),
        ),
        dim=-1,
    )


def decode(deltas: Tensor, references: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes (..., 4) from deltas (..., 4) and reference boxes broadcastable to them."""
    widths, heights, center_x, center_y = _centers(references)
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = deltas.unbind(-1)
    half_width = 0.5 * (torch.exp(torch.clamp(dw / ww, max=MAX_LOG_SCALE)) * widths)
    half_height = 0.5 * (torch.exp(torch.clamp(dh / wh, max=MAX_LOG_SCALE)) * heights)
    x = dx / wx * widths + center_x
    y = dy / wy * heights + center_y
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)


def _centers(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    widths, heights = x2 - x1, y2 - y1
    return widths, heights, x1 + 0.5 * widths, y1 + 0.5 * heights


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (B, ..., 4) clipped to each picture's own area, `sizes` (B, 2) height, width, not to the padding."""
    high = sizes.to(boxes.dtype).flip(-1).repeat(1, 2)  # (B, 4): w, h, w, h
    high = high.reshape(high.shape[0], *([1] * (boxes.dim() - 2)), 4)
    return torch.minimum(boxes.clamp(min=0), high)


def at_least(boxes: Tensor, side: float) -> Tensor:
    """Boolean (...,): both sides of boxes (..., 4) are at least `side` long."""
    return (boxes[..., 2] - boxes[..., 0] >= side) & (boxes[..., 3] - boxes[..., 1] >= side)


def area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(one: Tensor, other: Tensor) -> Tensor:
    """Pairwise overlap areas (M, N) of boxes (M, 4) and (N, 4)."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Pairwise intersection over union (M, N)."""
    both = intersection(one, other)
    return both / (area(one)[:, None] + area(other)[None, :] - both)


def coverage(boxes: Tensor, regions: Tensor) -> Tensor:
    """The largest share (M,) of each box (M, 4) that lies inside one of the regions (N, 4); 0 where there are none."""
    if len(regions) == 0:
        return boxes.new_zeros(len(boxes))
    return (intersection(boxes, regions) / area(boxes)[:, None].clamp(min=1e-6)).amax(1)
