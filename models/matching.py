"""Which truth does a reference box learn? Match by IoU, label, sample. Only used in training.

Labels: 1 foreground, 0 background, -1 ignored. One image at a time; G truths, N reference boxes (anchors or proposals).
"""

import torch
from torch import Tensor

from models import boxes as box_ops

IGNORED, BACKGROUND, FOREGROUND = -1, 0, 1


def match(
    references: Tensor,
    gt_boxes: Tensor,
    ignored: Tensor,
    low_iou: float,
    high_iou: float,
    rescue: bool,
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int64 and the index (N,) of the truth of each reference box (0 where there is none).

    IoU >= high_iou is foreground, < low_iou background, between them ignored. `rescue` also makes the best anchors of
    each truth foreground, however low their IoU (Faster R-CNN section 3.1.2). Background boxes that lie by half or more
    in an ignored region (a crowd, an unlabelled person) are ignored: they are not negatives.
    """
    labels = torch.zeros(len(references), dtype=torch.int64, device=references.device)
    index = torch.zeros_like(labels)
    if len(gt_boxes):
        quality = box_ops.iou(gt_boxes, references)
        best, index = quality.max(0)
        labels[best >= low_iou] = IGNORED
        labels[best >= high_iou] = FOREGROUND
        if rescue:
            best_of_truth = quality.amax(1, keepdim=True)
            labels[((quality == best_of_truth) & (best_of_truth > 0)).any(0)] = FOREGROUND
    hidden = box_ops.coverage(references, ignored) >= 0.5
    labels[hidden & (labels == BACKGROUND)] = IGNORED
    return labels, index


def sample(labels: Tensor, count: int, foreground_fraction: float, generator: torch.Generator) -> Tensor:
    """Indices of at most `count` boxes, at most `foreground_fraction` of them foreground, foreground first."""
    foreground = _pick(torch.nonzero(labels == FOREGROUND).flatten(), int(count * foreground_fraction), generator)
    background = _pick(torch.nonzero(labels == BACKGROUND).flatten(), count - len(foreground), generator)
    return torch.cat((foreground, background))


def _pick(index: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(index) <= count:
        return index
    # The draw runs on the generator's device, so that a run's samples do not depend on where the boxes live.
    order = torch.randperm(len(index), generator=generator, device=generator.device)
    return index[order[:count].to(index.device)]
