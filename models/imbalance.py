"""What a dense detector's class loss does about a hundred thousand background anchors beside a few of foreground.

One interface: loss(logits (n, K), targets (n, K) of 0 and 1, anchors (n, 4)) -> the loss of one picture's anchors, all
of which are foreground (a 1 in their row) or background. RetinaNet (Lin et al. 2017), sections 3 and 5.1.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models import losses, ops


class AnchorLoss(Protocol):
    def __call__(self, logits: Tensor, targets: Tensor, anchors: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Focal:
    """Focal loss, equation 5: what is nearly right counts little. Summed, over the number of foreground anchors.

    gamma 0 is cross entropy, `alpha`-balanced (equation 3) or plain (None).
    """

    gamma: float = 2.0
    alpha: float | None = 0.25

    def __call__(self, logits: Tensor, targets: Tensor, anchors: Tensor) -> Tensor:
        return focal(logits, targets, self.gamma, self.alpha).sum() / targets.amax(1).sum().clamp(min=1)


def focal(logits: Tensor, targets: Tensor, gamma: float, alpha: float | None) -> Tensor:
    """Elementwise focal loss of logits and targets (any shape)."""
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if gamma:
        scores = logits.sigmoid()
        wrong = scores * (1 - targets) + (1 - scores) * targets  # 1 - p_t
        entropy = entropy * wrong.clamp(min=1e-12) ** gamma  # the slope of a root at 0 is infinite
    return entropy if alpha is None else entropy * (alpha * targets + (1 - alpha) * (1 - targets))


@dataclass(frozen=True, slots=True)
class HardExamples:
    """OHEM (Shrivastava et al. 2016) for anchors: cross entropy over a minibatch of those whose loss is highest, after
    NMS by their loss, so that one error is not counted over and over. The mean over the minibatch.

    `one_to_three`: a quarter of it foreground at most, and three of background to each (SSD's), the NMS among either.
    """

    batch: int = 128
    nms_iou: float = 0.7
    one_to_three: bool = False

    def __call__(self, logits: Tensor, targets: Tensor, anchors: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        chosen = self.choose(each.detach(), targets.amax(1) > 0, anchors)
        return each[chosen].mean() if len(chosen) else losses.nothing(logits)

    def choose(self, hardness: Tensor, foreground: Tensor, anchors: Tensor) -> Tensor:
        """Indices of the minibatch: hardness (n,), foreground (n,), anchors (n, 4)."""
        if not self.one_to_three:
            return hardest(hardness, anchors, self.nms_iou, self.batch)
        where = [mine.nonzero()[:, 0] for mine in (foreground, ~foreground)]
        positive = where[0][hardest(hardness[where[0]], anchors[where[0]], self.nms_iou, self.batch // 4)]
        wanted = 3 * max(1, len(positive))  # a picture of nothing but background has something to teach, too
        return torch.cat((positive, where[1][hardest(hardness[where[1]], anchors[where[1]], self.nms_iou, wanted)]))


def hardest(hardness: Tensor, anchors: Tensor, iou: float, count: int) -> Tensor:
    """Indices of the first `count` survivors of NMS by `hardness`, in its order.

    Greedy NMS goes from the hardest on, so a prefix of the order that has `count` survivors decides; it is doubled
    until it has.
    """
    size = min(len(hardness), 8 * count)
    while True:
        index = hardness.topk(size).indices
        kept = index[ops.nms_kernel(anchors[index], hardness[index], iou)]
        if len(kept) >= count or size == len(hardness):
            return kept[:count]
        size = min(len(hardness), 2 * size)


def anchor_loss(kind: str = "focal", **settings: Any) -> AnchorLoss:
    """From plain values, as a checkpoint's options hold them: `kind` is focal, cross_entropy (which takes `alpha`) or
    ohem. Raises ValueError or TypeError."""
    if kind == "focal":
        return Focal(**settings)
    if kind == "cross_entropy":
        return Focal(gamma=0.0, **{"alpha": None, **settings})
    if kind == "ohem":
        return HardExamples(**settings)
    raise ValueError(f"loss is {kind!r}; it can be 'focal', 'cross_entropy' or 'ohem'")
