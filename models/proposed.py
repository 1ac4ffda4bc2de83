"""Systems that look into boxes which something else proposed: R-CNN (Girshick et al. 2014), SPP-net (He et al. 2014)
and Fast R-CNN (Girshick 2015).

They differ in what is pooled (pixels, or a trunk's map), how (a warp, a pyramid, RoIPool) and what is fitted (one loss,
or first a classifier and then support vector machines and ridge regression: training/svm.py).
B images, R proposals, N RoIs, C channels, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from models import boxes as box_ops
from models import matching
from models.backbones import Backbone
from models.heads import BoxHead
from models.network import Network, Predictions, Rules, Target
from models.pooling import Pooler
from models.regions import RegionNetwork, Samples, with_batch_index

REGIONS_AT_ONCE = 32  # through a trunk: the maps of one VGG-16 on a warped RoI are 60 MB


class Pixels(Backbone):
    """R-CNN's: the picture itself, of which RoIs are cut."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), 3, (), {})

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


class RidgeBoxHead(BoxHead):
    """Deltas from what was pooled instead of from the last fully connected layer: what ridge regression is fitted to
    (R-CNN appendix C, on pool5). Until it is, they are 0 and a box stays the proposal."""

    def __init__(self, channels: int, num_classes: int, fcs: Sequence[int], cells: int) -> None:
        super().__init__(channels, num_classes, (), fcs, cells=cells)
        self.deltas = nn.Linear(channels * cells, num_classes * 4)
        nn.init.zeros_(self.deltas.weight)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        features, hidden = self.describe(pooled)
        return self.classes(hidden), self.deltas(features).unflatten(1, (-1, 4))

    def describe(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """What ridge regression and what the support vector machines see: (N, C * cells), (N, last of the `fcs`)."""
        features = hidden = pooled.flatten(1)
        for fc in self.fcs:
            hidden = fc(hidden).relu()
        return features, hidden


class ProposalNetwork(RegionNetwork):
    """One head on pooled proposals. `is_fitted`: scores are sigmoids of support vector machines' margins, a class each,
    not a softmax; 0.5 is on the margin, and the order within a class is the machine's."""

    takes_proposals = True

    def __init__(
        self,
        backbone: Backbone,
        pooler: Pooler,
        box_head: BoxHead,
        rules: Rules,
        region_trunk: nn.Module | None = None,
        is_fitted: bool = False,
    ) -> None:
        Network.__init__(self, backbone, rules)
        backbone.levels = ()  # no head reads its maps later
        self.box_pooler, self.region_trunk = pooler, region_trunk or nn.Identity()
        self.box_head, self.mask_head, self.keypoint_head = box_head, None, None
        self.is_fitted = is_fitted

    def forward(
        self, images: Tensor, sizes: Tensor, proposals: Tensor | None = None, walk: "Walk | None" = None
    ) -> Predictions:
        """`proposals` (B, R, 4) on the canvas, never None here; rows without area are padding. `walk`: the loop over
        regions, Python's by default."""
        assert proposals is not None, "this network looks into boxes, and none are given"
        features = self.backbone(images)
        logits, deltas = self.box_head(self._pool_all(features, with_batch_index(proposals), walk or looped))
        found = self._detections(proposals, box_ops.area(proposals) > 0, logits, deltas, sizes)
        return Predictions(*found, [])

    def losses(
        self, images: Tensor, sizes: Tensor, targets: list[Target], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Fast R-CNN section 2.3; of the older two the classifier's alone, for ridge regression is fitted later."""
        features = self.backbone(images)
        samples = [self._sample(target.proposals, target, generator) for target in targets]
        result = self._box_losses(features, samples, targets)
        if isinstance(self.box_head, RidgeBoxHead):
            del result["boxes"]
        return result

    def describe(self, images: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        """What is fitted to, of RoIs (N, 5): see RidgeBoxHead."""
        assert isinstance(self.box_head, RidgeBoxHead)
        return self.box_head.describe(self._pool_all(self.backbone(images), rois, looped))

    def classifier_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.box_head.fcs if isinstance(layer, nn.Linear)]

    def _best(self, boxes: Tensor, scores: Tensor, keep: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Padded, so that the number of proposals, which is anyone's choice, never reaches an output's shape."""
        keep = keep or self.rules.max_detections
        return super()._best(F.pad(boxes, (0, 0, 0, keep)), F.pad(scores, (0, keep), value=-1.0), keep)

    def _scores(self, logits: Tensor) -> Tensor:
        return logits[:, 1:].float().sigmoid() if self.is_fitted else super()._scores(logits)

    def _sample(self, proposals: Tensor, target: Target, generator: torch.Generator) -> Samples:
        """Background only where a proposal touches an object, if the rules say so: the proposals of IoU in [0.1, 0.5)
        are the hard examples (Fast R-CNN section 2.3, SPP-net section 4.1). Pictures without objects give any."""
        rois = torch.cat((proposals, target.boxes))
        labels, index = matching.match(rois, target.boxes, target.ignore, 0.5, 0.5, rescue=False)
        if self.rules.background_floor and len(target.boxes):
            far = box_ops.iou(target.boxes, rois).amax(0) < self.rules.background_floor
            labels[far & (labels == matching.BACKGROUND)] = matching.IGNORED
        chosen = matching.sample(labels, self.rules.box_samples, self.rules.foreground_fraction, generator)
        return Samples(rois[chosen], labels[chosen] == matching.FOREGROUND, index[chosen])

    def _pool_all(self, features: list[Tensor], rois: Tensor, walk: "Walk") -> Tensor:
        """A trunk runs on some RoIs at a time: its maps of 2,000 at once would fill any memory."""
        if not isinstance(self.backbone, Pixels):
            return self._pool_boxes(features, rois)
        num = rois.shape[0]
        parts = (num + REGIONS_AT_ONCE - 1) // REGIONS_AT_ONCE
        padded = F.pad(rois, (0, 0, 0, parts * REGIONS_AT_ONCE - num)).reshape(parts, REGIONS_AT_ONCE, 5)
        return walk(lambda images, some: self._pool_boxes([images], some), features[0], padded)[:num]


Walk = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]
"""walk(pool, images, parts (P, n, 5)) -> what pool(images, part) gives, one part after the other."""


def looped(pool: Callable[[Tensor, Tensor], Tensor], images: Tensor, parts: Tensor) -> Tensor:
    """A loop of Python's, which a graph cannot keep open."""
    return torch.cat([pool(images, some) for some in parts])


def scanned(pool: Callable[[Tensor, Tensor], Tensor], images: Tensor, parts: Tensor) -> Tensor:
    """A loop of the graph's, ONNX's Scan; in torch it would be compiled anew for each shape.

    The pictures are handed on from step to step: OpenVINO reads no loop that looks outside itself.
    """
    carry_and_pooled: Any = scan(lambda images, some: (images.clone(), pool(images, some)), images, parts)
    return carry_and_pooled[1].flatten(0, 1)
