"""The losses of the two-stage detectors, each over what was sampled, all computed in float32.

S samples of a batch, K classes, F foreground samples, J joints, M mask side. A head with nothing to learn gives an
exact zero that is still connected to the graph, so that a batch without masks or keypoints trains like any other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

SMOOTH_L1_BETA = 1 / 9  # torchvision's and Detectron's: a quadratic zone of 1/9 around zero


def nothing(predictions: Tensor) -> Tensor:
    """Zero, with a gradient of zero for everything that made `predictions`."""
    return predictions.float().sum() * 0.0


def objectness(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy over sampled anchors: logits (S,), labels (S,) in {0, 1}. Faster R-CNN equation 1."""
    if len(labels) == 0:
        return nothing(logits)
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def classes(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over sampled RoIs: logits (S, K + 1), targets (S,) with 0 for background. Fast R-CNN equation 1."""
    if len(targets) == 0:
        return nothing(logits)
    return F.cross_entropy(logits.float(), targets)


def deltas(predicted: Tensor, targets: Tensor, num_samples: int) -> Tensor:
    """Smooth L1 of foreground deltas (F, 4), divided by the number of all samples. Fast R-CNN equations 2 and 3."""
    if len(targets) == 0:
        return nothing(predicted)
    return F.smooth_l1_loss(predicted.float(), targets, beta=SMOOTH_L1_BETA, reduction="sum") / num_samples


def masks(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of the true class's masks (F, M, M). Mask R-CNN section 3."""
    if len(targets) == 0:
        return nothing(logits)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def keypoints(logits: Tensor, cells: Tensor, visible: Tensor, sigma: float = 0.0) -> Tensor:
    """Cross entropy over the cells of each visible joint: logits (F, J, M, M), cells (F, J) flat, visible (F, J).

    Mask R-CNN section 5: a one-hot map a joint, softmax over the M * M cells. With `sigma` in cells the map is a
    Gaussian around that cell instead: a near miss costs less than a far one, which little data needs to be told.
    """
    if not bool(visible.any()):
        return nothing(logits)
    chosen = logits[visible].float()
    if not sigma:
        return F.cross_entropy(chosen.flatten(1), cells[visible])
    side = logits.shape[-1]
    at = torch.arange(side, device=logits.device, dtype=torch.float32)
    bumps = (-0.5 * ((at[:, None] - at) / sigma) ** 2).softmax(dim=1)  # (cell, M): sums to 1 at the border, too
    row, column = bumps[cells[visible] // side], bumps[cells[visible] % side]
    goals = (row[:, :, None] * column[:, None, :]).flatten(1)
    return F.cross_entropy(chosen.flatten(1), goals)


def mask_targets(gt_masks: Tensor, index: Tensor, rois: Tensor, side: int) -> Tensor:
    """Truth cropped to each RoI: gt_masks (G, H, W) uint8, index (F,), rois (F, 4) canvas -> (F, side, side) in 0..1.

    Aligned RoIAlign at scale 1: the inverse of the paste that serves the masks (half-pixel centres on both sides).
    """
    if len(index) == 0:
        return rois.new_zeros((0, side, side))
    used, index = index.unique(return_inverse=True)
    boxes = torch.cat((index[:, None].to(rois.dtype), rois), dim=1)
    return roi_align(gt_masks[used, None].to(rois.dtype), boxes, (side, side), aligned=True)[:, 0]


def keypoint_targets(gt_keypoints: Tensor, rois: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Flat cells (F, J) and which are visible (F, J): gt_keypoints (F, J, 3) canvas x, y, v; rois (F, 4) canvas.

    A joint exactly on the far edge belongs to the last cell; one outside its RoI teaches nothing.
    """
    x1, y1, x2, y2 = rois[:, None].unbind(-1)
    x, y, v = gt_keypoints.unbind(-1)
    column = ((x - x1) * side / (x2 - x1)).floor().long()
    row = ((y - y1) * side / (y2 - y1)).floor().long()
    column = torch.where(x == x2, side - 1, column)
    row = torch.where(y == y2, side - 1, row)
    visible = (v > 0) & (column >= 0) & (row >= 0) & (column < side) & (row < side)
    return (row * side + column) * visible, visible
