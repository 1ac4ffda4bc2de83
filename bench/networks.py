"""The one network that is timed, as torchvision and as limner have it: Mask R-CNN R50-FPN that finds discs
(`bench.shapes`). Needs torch and torchvision alone.
"""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops import FrozenBatchNorm2d

from bench.shapes import scene, teach

DETECTIONS = 10
CLASSES = 90
STATISTICS_SEED, STATISTICS_SIZE = 4, (512, 640)
BRANCH = 0.1  # what a block of the trunk adds to what it is given, as a share


@torch.no_grad()
def weights() -> dict[str, Tensor]:
    """Of torchvision's `maskrcnn_resnet50_fpn`: a random trunk, last layers that find discs."""
    torch.manual_seed(0)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1
    )
    theirs.train()
    for name, norm in theirs.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            if name.endswith("bn3"):  # fifty random layers in a row make noise of any rounding; trained ones do not
                nn.init.constant_(norm.weight, BRANCH)
    # Real statistics, or the random trunk drowns its input.
    theirs.backbone(scene(*STATISTICS_SIZE, STATISTICS_SEED).canvas)
    teach(theirs.eval())
    return {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}


def torchvision_model(state: dict[str, Tensor]) -> MaskRCNN:
    """As `maskrcnn_resnet50_fpn(weights=...)` builds it."""
    trunk = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    frozen = MaskRCNN(_resnet_fpn_extractor(trunk, 3), CLASSES + 1, box_detections_per_img=DETECTIONS)
    frozen.load_state_dict(state)
    return frozen.eval()


class Below(nn.Module):
    """torchvision's model below its transform, as one function of canvases of this shape that their pictures fill."""

    def __init__(self, model: Any, shape: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, canvas: Tensor) -> list[dict[str, Tensor]]:
        shapes = [self.shape] * len(canvas)
        features = self.model.backbone(canvas)
        proposals, _ = self.model.rpn(ImageList(canvas, shapes), features)
        found, _ = self.model.roi_heads(features, proposals, shapes)
        return found
