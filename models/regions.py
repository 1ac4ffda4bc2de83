"""The two-stage detector: backbone, proposals, and what is read out of each region (Faster and Mask R-CNN).

B images on a canvas (H, W), D detections, R proposals, N RoIs, K classes, J joints, G truths of an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import boxes as box_ops
from models import losses, matching, ops
from models.backbones import Backbone, SingleMap
from models.dense import RegionProposals
from models.heads import BoxHead, KeypointHead, MaskHead, MeanBoxHead
from models.network import Network, Predictions, Rules, Target
from models.pooling import Pooler

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # Fast R-CNN's normalisation of the targets, as every zoo writes it
MIN_BOX_SIDE = 1e-2  # canvas pixels, torchvision's


class RegionNetwork(Network):
    """Faster R-CNN, with a mask head, a keypoint head, or both on the same trunk.

    `region_trunk` is what of the trunk runs on each pooled RoI, before any head: conv5 of a C4 model, else nothing.
    """

    exact = ("box_head.classes", "box_head.deltas")  # a tenth of a percent of the arithmetic

    def __init__(
        self,
        backbone: Backbone,
        rpn: RegionProposals,
        box_pooler: Pooler,
        box_head: BoxHead | MeanBoxHead,
        head_pooler: Pooler,
        mask_head: MaskHead | None,
        keypoint_head: KeypointHead | None,
        rules: Rules,
        region_trunk: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone, rules)
        self.box_pooler, self.head_pooler = box_pooler, head_pooler
        self.rpn, self.region_trunk = rpn, region_trunk or nn.Identity()
        self.box_head, self.mask_head, self.keypoint_head = box_head, mask_head, keypoint_head

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        levels, rules = self.backbone(images), self.rules
        features = levels[: len(self.backbone.levels)]
        logits, deltas = self.rpn(levels)
        anchors = self.rpn.anchors(levels, images.shape)
        proposals, count = self.rpn.propose(logits, deltas, anchors, sizes, rules.pre_nms, rules.num_proposals)
        class_logits, box_deltas = self.box_head(self._pool_boxes(features, with_batch_index(proposals)))
        valid = torch.arange(proposals.shape[1], device=proposals.device) < count[:, None]
        return Predictions(*self._detections(proposals, valid, class_logits, box_deltas, sizes), features)

    def mask_probabilities(self, features: list[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        assert self.mask_head is not None, "this model has no mask head"
        logits = self.mask_head(self._pool_heads(features, rois))
        return _of_class(logits, labels).float().sigmoid()

    def keypoint_heatmaps(self, features: list[Tensor], rois: Tensor) -> Tensor:
        assert self.keypoint_head is not None, "this model has no keypoint head"
        return self.keypoint_head(self._pool_heads(features, rois)).float()

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Also what of the classification network works on RoIs: conv5 of a C4 model; fc6 and fc7 of VGG's kind."""
        own = super().layers()
        own |= {name: (f"region_trunk.{name}.",) for name, _ in self.region_trunk.named_children()}
        return own | {f"fc{6 + i}": (f"box_head.fcs.{i}.",) for i, _ in enumerate(self._own_fcs())}

    def classifier_trunk(self) -> list[nn.Module]:
        return [self.backbone.trunk, self.region_trunk]

    def classifier_layers(self) -> list[nn.Linear]:
        return [layer for layer in self._own_fcs() if isinstance(layer, nn.Linear)]

    def _own_fcs(self) -> list[nn.Module]:
        """Those that the trunk's own network has, too: of a box head on a trunk's own map."""
        if isinstance(self.backbone, SingleMap) and isinstance(self.box_head, BoxHead):
            return list(self.box_head.fcs)
        return []

    def losses(
        self, images: Tensor, sizes: Tensor, targets: list[Target], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Mask R-CNN section 3."""
        levels, rules = self.backbone(images), self.rules
        features = levels[: len(self.backbone.levels)]
        logits, deltas = self.rpn(levels)
        anchors = self.rpn.anchors(levels, images.shape)
        truth, ignored = [t.boxes for t in targets], [t.ignore for t in targets]
        rpn_losses = self.rpn.losses(logits, deltas, anchors, truth, ignored, rules.rpn_samples, generator)
        with torch.no_grad():
            proposals, count = self.rpn.propose(
                logits, deltas, anchors, sizes, rules.train_pre_nms, rules.train_num_proposals
            )
        samples = [self._sample(proposals[i, : int(count[i])], target, generator) for i, target in enumerate(targets)]
        result = {"rpn_objectness": rpn_losses[0], "rpn_boxes": rpn_losses[1]}
        result |= self._box_losses(features, samples, targets)
        if self.mask_head is not None:
            result["masks"] = self._mask_loss(features, samples, targets)
        if self.keypoint_head is not None:
            result["keypoints"] = self._keypoint_loss(features, samples, targets)
        return result

    def _pool_boxes(self, features: list[Tensor], rois: Tensor) -> Tensor:
        return self.region_trunk(self.box_pooler(features, rois))

    def _pool_heads(self, features: list[Tensor], rois: Tensor) -> Tensor:
        return self.region_trunk(self.head_pooler(features, rois))

    def _detections(
        self, proposals: Tensor, valid: Tensor, logits: Tensor, deltas: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The box head's outputs (B * R, ...) as count, boxes, scores, labels: every class of every RoI that is valid
        (B, R) competes."""
        num_images, num_rois = proposals.shape[:2]
        scores = self._scores(logits).unflatten(0, (num_images, num_rois))  # (B, R, K)
        boxes = box_ops.decode(deltas.float().unflatten(0, (num_images, num_rois)), proposals[:, :, None], BOX_WEIGHTS)
        boxes = box_ops.clip(boxes, sizes)  # (B, R, K, 4)
        scores = torch.where(valid[..., None] & box_ops.at_least(boxes, MIN_BOX_SIDE), scores, -1.0)
        return self._best(boxes.transpose(1, 2), scores.transpose(1, 2))

    def _scores(self, logits: Tensor) -> Tensor:
        """(N, K) of logits (N, K + 1)."""
        return logits.float().softmax(-1)[:, 1:]

    def _best(self, boxes: Tensor, scores: Tensor, keep: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The `keep` best (0: as many as there can be) of boxes (B, K, R, 4), scores (B, K, R); a class is a group."""
        rules, (num_classes, num_rois) = self.rules, scores.shape[1:]
        keep = keep or min(rules.max_detections, num_rois * num_classes)
        index, count = ops.nms(boxes, scores, rules.nms_iou, rules.score_floor, keep)
        valid = torch.arange(keep, device=boxes.device) < count[:, None]
        chosen = boxes.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None]
        chosen_scores = scores.flatten(1).gather(1, index) * valid
        labels = torch.where(valid, index // num_rois, -1)
        return count, chosen, chosen_scores, labels

    def _sample(self, proposals: Tensor, target: Target, generator: torch.Generator) -> "Samples":
        """Training RoIs of one image: proposals and the truth itself, matched at 0.5 (Fast R-CNN section 2.3)."""
        rois = torch.cat((proposals, target.boxes))
        labels, index = matching.match(rois, target.boxes, target.ignore, 0.5, 0.5, rescue=False)
        chosen = matching.sample(labels, self.rules.box_samples, self.rules.foreground_fraction, generator)
        return Samples(rois[chosen], labels[chosen] == matching.FOREGROUND, index[chosen])

    def _box_losses(self, features: list[Tensor], samples: list["Samples"], targets: list[Target]) -> dict[str, Tensor]:
        rois = _batch_rois([s.rois for s in samples])
        logits, deltas = self.box_head(self._pool_boxes(features, rois))
        foreground = torch.cat([s.foreground for s in samples])
        labels = torch.cat([_taken(t.labels, s.index[s.foreground]) for s, t in zip(samples, targets, strict=True)])
        truth = torch.cat([_taken(t.boxes, s.index[s.foreground]) for s, t in zip(samples, targets, strict=True)])
        classes = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
        classes[foreground] = labels + 1
        goal = box_ops.encode(truth, rois[foreground, 1:], BOX_WEIGHTS)
        return {
            "classes": losses.classes(logits, classes),
            "boxes": self.rules.box_loss_weight * losses.deltas(_of_class(deltas[foreground], labels), goal, len(rois)),
        }

    def _mask_loss(self, features: list[Tensor], samples: list["Samples"], targets: list[Target]) -> Tensor:
        assert self.mask_head is not None
        picked = [s.where(t.has_mask, self.rules.head_samples) for s, t in zip(samples, targets, strict=True)]
        rois = _batch_rois([s.rois for s in picked])
        pairs = list(zip(picked, targets, strict=True))
        labels = torch.cat([_taken(t.labels, s.index) for s, t in pairs])
        goals = torch.cat([losses.mask_targets(t.masks, s.index, s.rois, self.mask_head.side) for s, t in pairs])
        logits = self.mask_head(self._pool_heads(features, rois))
        return losses.masks(_of_class(logits, labels), goals)

    def _keypoint_loss(self, features: list[Tensor], samples: list["Samples"], targets: list[Target]) -> Tensor:
        assert self.keypoint_head is not None
        picked = [s.where(t.has_keypoints, self.rules.head_samples) for s, t in zip(samples, targets, strict=True)]
        rois = _batch_rois([s.rois for s in picked])
        truth = torch.cat([_taken(t.keypoints, s.index) for s, t in zip(picked, targets, strict=True)])
        cells, visible = losses.keypoint_targets(truth, rois[:, 1:], self.keypoint_head.side)
        heatmaps = self.keypoint_head(self._pool_heads(features, rois))
        return losses.keypoints(heatmaps, cells, visible, self.rules.keypoint_sigma)


class Samples(NamedTuple):
    """Sampled RoIs of one image: rois (S, 4), foreground (S,), index of each one's truth (S,)."""

    rois: Tensor
    foreground: Tensor
    index: Tensor

    def where(self, has: Tensor, most: int) -> "Samples":
        """The foreground RoIs whose truth has what is asked for; not more than `most` of them, unless that is 0."""
        chosen = self.foreground & _taken(has, self.index) if len(has) else self.foreground
        chosen = chosen.nonzero()[:, 0][: most or None]
        return Samples(self.rois[chosen], self.foreground[chosen], self.index[chosen])


def with_batch_index(boxes: Tensor) -> Tensor:
    """(B, R, 4) -> RoIs (B * R, 5)."""
    num_images, num_rois = boxes.shape[:2]
    # Counted in integers: an exported range of floats is what some runtimes cannot size.
    image = torch.arange(num_images, device=boxes.device).to(boxes.dtype)
    image = image[:, None, None].expand(-1, num_rois, 1)
    return torch.cat((image, boxes), dim=2).flatten(0, 1)


def _batch_rois(rois: list[Tensor]) -> Tensor:
    """RoIs (N, 5) of a batch from one (n, 4) an image."""
    return torch.cat([torch.cat((r.new_full((len(r), 1), i), r), dim=1) for i, r in enumerate(rois)])


def _of_class(values: Tensor, labels: Tensor) -> Tensor:
    """values (N, K, ...) -> (N, ...): each row's own class."""
    index = labels.clamp(min=0).reshape(-1, *([1] * (values.dim() - 1))).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """values[index]; where an image has no truth the index is empty, and so is the answer."""
    return values[index] if len(index) else values[:0]
