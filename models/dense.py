"""Dense detectors: anchors on every cell of every map, each scored and moved; the RPN and RetinaNet are of this kind.

The RPN keeps the best boxes of one class as proposals, RetinaNet those of every class as detections.
B images, L levels, n_l anchors of a level, K classes, P candidates taken from each level, R proposals.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import boxes as box_ops
from models import losses, matching, ops
from models.backbones import Backbone
from models.heads import RetinaHead, RPNHead
from models.imbalance import AnchorLoss
from models.network import Network, Predictions, Rules, Target

UNIT = (1.0, 1.0, 1.0, 1.0)
MIN_PROPOSAL_SIDE = 1e-3  # canvas pixels, torchvision's
MAX_CANDIDATES = 3840  # of a picture in one NMS: what TensorRT's TopK gives, and no more than our kernel sorts


class AnchorGrid(nn.Module):
    """A convolutional head over anchors. `sizes`: of the anchors of each level, in canvas pixels; `ratios` are height /
    width; every size goes with every ratio."""

    def __init__(self, head: RPNHead | RetinaHead, sizes: Sequence[tuple[int, ...]], ratios: tuple[float, ...]) -> None:
        super().__init__()
        self.head = head
        for level, own in enumerate(sizes):
            self.register_buffer(f"cell{level}", cell_anchors(own, ratios), persistent=False)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, n_l, K) and deltas (B, n_l, 4) of each level."""
        logits, deltas = zip(*(self.head(level) for level in levels), strict=True)
        return list(logits), list(deltas)

    def anchors(self, levels: list[Tensor], canvas: torch.Size) -> list[Tensor]:
        """Anchors (n_l, 4) of each level on a canvas (..., H, W)."""
        grids = (grid_anchors(getattr(self, f"cell{i}"), level, canvas) for i, level in enumerate(levels))
        return list(grids)

    def candidates(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` = P best of each level: boxes (B, L, P, 4) clipped to each picture, scores (B, L, P), -1 where a
        level has fewer, and labels (B, L, P)."""
        best = [top(x, d, a, count) for x, d, a in zip(logits, deltas, anchors, strict=True)]
        boxes, scores, labels = (torch.stack(each, dim=1) for each in zip(*best, strict=True))
        return box_ops.clip(boxes, sizes), scores, labels


class RegionProposals(AnchorGrid):
    """Faster R-CNN section 3, on one map or on a pyramid (FPN section 4.1)."""

    def __init__(
        self,
        channels: int,
        sizes: Sequence[tuple[int, ...]],
        ratios: tuple[float, ...],
        depth: int,
        nms_iou: float,
    ) -> None:
        super().__init__(RPNHead(channels, len(sizes[0]) * len(ratios), depth), sizes, ratios)
        self.nms_iou = nms_iou

    def propose(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor, pre_nms: int, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Proposals (B, R = keep, 4) on the canvas, zero past count, best first; and count (B,)."""
        boxes, scores, _ = self.candidates(logits, deltas, anchors, sizes, pre_nms)
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
        all_logits, all_deltas, all_anchors = torch.cat(logits, 1)[..., 0], torch.cat(deltas, 1), torch.cat(anchors)
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


class DenseNetwork(Network):
    """RetinaNet (Lin et al. 2017, "Focal Loss for Dense Object Detection"): every cell of p3 to p7, every class."""

    exact = ("detector.head.deltas",)

    def __init__(self, backbone: Backbone, detector: AnchorGrid, loss: AnchorLoss, rules: Rules) -> None:
        super().__init__(backbone, rules)
        self.detector, self.loss = detector, loss
        self.mask_head = self.keypoint_head = None

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        levels = self.backbone(images)
        logits, deltas = self.detector(levels)
        anchors = self.detector.anchors(levels, images.shape)
        found = self.detector.candidates(logits, deltas, anchors, sizes, self.rules.pre_nms)
        features = levels[: len(self.backbone.levels)]
        return Predictions(*self._detections(*(each.flatten(1, 2) for each in found)), features)

    def _detections(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Candidates of all levels (B, N, ...) as count, boxes, scores, labels; a class is a group of the NMS."""
        rules, num_classes = self.rules, self.detector.head.num_classes
        if boxes.shape[1] > MAX_CANDIDATES:
            scores, best = scores.topk(MAX_CANDIDATES, dim=1)
            boxes, labels = boxes.gather(1, best[..., None].expand(-1, -1, 4)), labels.gather(1, best)
        size = boxes.shape[1]
        own = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]  # (B, K, N)
        in_class = torch.where(own, scores[:, None], -1.0)
        in_boxes = boxes[:, None].expand(-1, num_classes, -1, -1)
        keep = min(rules.max_detections, num_classes * size)
        index, count = ops.nms(in_boxes, in_class, rules.nms_iou, rules.score_floor, keep)
        valid = torch.arange(keep, device=boxes.device) < count[:, None]
        place = index % size
        chosen = boxes.gather(1, place[..., None].expand(-1, -1, 4)) * valid[..., None]
        return count, chosen, scores.gather(1, place) * valid, torch.where(valid, index // size, -1)

    def losses(
        self, images: Tensor, sizes: Tensor, targets: list[Target], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """RetinaNet section 3: the loss of all anchors' classes, and of the foreground's boxes.

        IoU 0.5 and more is foreground, below 0.4 background; each picture counts alike, its sums divided by the number
        of its foreground anchors, as torchvision has it (L1 for boxes, too; the paper's is smooth near 0).
        """
        levels = self.backbone(images)
        per_level = self.detector(levels)
        logits, deltas = (torch.cat(each, 1).float() for each in per_level)
        anchors = torch.cat(self.detector.anchors(levels, images.shape))
        class_losses, box_losses = [], []
        for image, target in enumerate(targets):
            label, index = matching.match(anchors, target.boxes, target.ignore, 0.4, 0.5, rescue=True)
            foreground = (label == matching.FOREGROUND).nonzero()[:, 0]
            goals = torch.zeros_like(logits[image])
            box_loss = losses.nothing(deltas[image])
            if len(foreground):
                goals[foreground, target.labels[index[foreground]]] = 1.0
                wanted = box_ops.encode(target.boxes[index[foreground]], anchors[foreground], UNIT)
                box_loss = F.l1_loss(deltas[image, foreground], wanted, reduction="sum") / len(foreground)
            taken = label != matching.IGNORED
            class_losses.append(self.loss(logits[image, taken], goals[taken], anchors[taken]))
            box_losses.append(box_loss)
        return {"classes": torch.stack(class_losses).mean(), "boxes": torch.stack(box_losses).mean()}


def cell_anchors(sizes: tuple[int, ...], ratios: tuple[float, ...]) -> Tensor:
    """Anchors (A, 4) around the origin, of areas sizes^2, rounded to whole pixels as torchvision's are; ratio by ratio,
    size by size."""
    heights = torch.sqrt(torch.tensor(ratios, dtype=torch.float32))
    widths = 1 / heights
    scales = torch.tensor(sizes, dtype=torch.float32)
    wide, high = ((sides[:, None] * scales).flatten() for sides in (widths, heights))
    return (torch.stack((-wide, -high, wide, high), dim=1) / 2).round()


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


def top(logits: Tensor, deltas: Tensor, anchors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best pairs of an anchor and a class of a level, logits (B, n, K): boxes (B, count, 4), decoded,
    scores (B, count), -1 where it has fewer, and labels (B, count).

    The level is padded by `count` so that its own size, which follows the canvas, never reaches an output's shape. The
    best pairs are among those of the anchors whose best class is best: n numbers are sorted, not n * K.
    """
    # Box arithmetic is float32 in every precision: a bfloat16 has four-pixel steps at 800.
    num_classes = logits.shape[2]
    best_class = logits.amax(2) if num_classes > 1 else logits[..., 0]
    padded = F.pad(best_class.float(), (0, count), value=-torch.inf)
    best, index = padded.topk(count, dim=1)
    index = index.clamp(max=logits.shape[1] - 1)
    labels = torch.zeros_like(index)
    if num_classes > 1:
        pairs = logits.float().gather(1, index[..., None].expand(-1, -1, num_classes))
        pairs = torch.where(best[..., None] == -torch.inf, -torch.inf, pairs).flatten(1)
        best, pair = pairs.topk(count, dim=1)
        index, labels = index.gather(1, pair // num_classes), pair % num_classes
    chosen = deltas.float().gather(1, index[..., None].expand(-1, -1, 4))
    boxes = box_ops.decode(chosen, anchors[index], UNIT)
    return boxes, torch.where(best == -torch.inf, -1.0, best.sigmoid()), labels
