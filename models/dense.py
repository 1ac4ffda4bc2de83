"""The region proposal network: anchors on every cell of every level, scored, decoded and thinned to proposals.

B images, L levels, n_l anchors of a level, P the candidates taken from each level, R proposals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import boxes as box_ops
from models import losses, matching, ops
from models.heads import RPNHead

UNIT = (1.0, 1.0, 1.0, 1.0)
MIN_PROPOSAL_SIDE = 1e-3  # canvas pixels, torchvision's


class RegionProposals(nn.Module):
    """Faster R-CNN section 3 on a pyramid (FPN section 4.1): one anchor size a level, `ratios` are height / width."""

    def __init__(
        self, channels: int, sizes: tuple[int, ...], ratios: tuple[float, ...], depth: int, nms_iou: float
    ) -> None:
        super().__init__()
        self.head = RPNHead(channels, len(ratios), depth)
        self.nms_iou = nms_iou
        for level, size in enumerate(sizes):
            self.register_buffer(f"cell{level}", cell_anchors(size, ratios), persistent=False)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness logits (B, n_l) and deltas (B, n_l, 4) of each level."""
        logits, deltas = zip(*(self.head(level) for level in levels), strict=True)
        return list(logits), list(deltas)

    def anchors(self, levels: list[Tensor], canvas: torch.Size) -> list[Tensor]:
        """Anchors (n_l, 4) of each level on a canvas (..., H, W)."""
        grids = (grid_anchors(getattr(self, f"cell{i}"), level, canvas) for i, level in enumerate(levels))
        return list(grids)

    def propose(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor, pre_nms: int, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Proposals (B, R = keep, 4) on the canvas, zero past count, best first; and count (B,)."""
        best = [top(x, d, a, pre_nms) for x, d, a in zip(logits, deltas, anchors, strict=True)]
        boxes = box_ops.clip(torch.stack([b for b, _ in best], dim=1), sizes)
        scores = torch.stack([s for _, s in best], dim=1)
        scores = torch.where(box_ops.at_least(boxes, MIN_PROPOSAL_SIDE), scores, -1.0)
        # torchvision keeps scores >= 0, and a sigmoid may underflow to 0: only the -1 of invalid boxes must go.
        index, count = ops.nms(boxes, scores, self.nms_iou, -0.5, keep)
        valid = torch.arange(keep, device=boxes.device) < count[:, None]
        chosen = boxes.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4))
        return chosen * valid[..., None], count

    def losses(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        gt_boxes: list[Tensor],
        ignored: list[Tensor],
        num_samples: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss over `num_samples` anchors an image, half of them foreground at most."""
        all_logits, all_deltas, all_anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        picked_logits, labels, picked_deltas, targets = [], [], [], []
        for image, truth in enumerate(gt_boxes):
            label, index = matching.match(all_anchors, truth, ignored[image], 0.3, 0.7, rescue=True)
            chosen = matching.sample(label, num_samples, 0.5, generator)
            foreground = chosen[label[chosen] == matching.FOREGROUND]
            picked_logits.append(all_logits[image, chosen])
            labels.append(label[chosen])
            picked_deltas.append(all_deltas[image, foreground])
            if len(foreground):
                targets.append(box_ops.encode(truth[index[foreground]], all_anchors[foreground], UNIT))
        label = torch.cat(labels)
        target = torch.cat(targets) if targets else all_anchors.new_zeros((0, 4))
        return (
            losses.objectness(torch.cat(picked_logits), label),
            losses.deltas(torch.cat(picked_deltas), target, len(label)),
        )


def cell_anchors(size: int, ratios: tuple[float, ...]) -> Tensor:
    """Anchors (A, 4) around the origin, of area size^2, rounded to whole pixels as torchvision's are."""
    heights = torch.sqrt(torch.tensor(ratios, dtype=torch.float32))
    widths = 1 / heights
    sides = torch.stack((-widths * size, -heights * size, widths * size, heights * size), dim=1)
    return (sides / 2).round()


def grid_anchors(cell: Tensor, level: Tensor, canvas: torch.Size) -> Tensor:
    """The cell's anchors (A, 4) at every position of a level (B, C, h, w): (h * w * A, 4), order row, column, anchor.

    Centres lie at multiples of the stride, which is the canvas divided by the level, rounded down (torchvision).
    """
    height, width = level.shape[-2:]
    y = torch.arange(height, device=cell.device) * (canvas[-2] // height)
    x = torch.arange(width, device=cell.device) * (canvas[-1] // width)
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((shift_x, shift_y, shift_x, shift_y), dim=-1).reshape(-1, 1, 4)
    return (shifts + cell).reshape(-1, 4)


def top(logits: Tensor, deltas: Tensor, anchors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best anchors of a level, decoded: boxes (B, count, 4), scores (B, count), -1 where it has fewer.

    The level is padded by `count` so that its own size, which follows the canvas, never reaches an output's shape.
    """
    # Box arithmetic is float32 in every precision: a bfloat16 has four-pixel steps at 800.
    padded = F.pad(logits.float(), (0, count), value=-torch.inf)
    best, index = padded.topk(count, dim=1)
    index = index.clamp(max=logits.shape[1] - 1)
    chosen = deltas.float().gather(1, index[..., None].expand(-1, -1, 4))
    boxes = box_ops.decode(chosen, anchors[index], UNIT)
    return boxes, torch.where(best == -torch.inf, -1.0, best.sigmoid())
