"""The one network that is timed, as torchvision and as limner have it: Mask R-CNN R50-FPN, random weights that find
something. Needs torch and torchvision alone.
"""

from typing import Any, NamedTuple

import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops import FrozenBatchNorm2d

from models.servable import normalise

DETECTIONS = 10
CLASSES = 90
SMALL = (256, 320)


class Scene(NamedTuple):
    """A picture as bytes (1, H, W, 3), its size (1, 2), and both as torchvision wants them."""

    images: NDArray[Any]
    sizes: NDArray[Any]
    canvas: Tensor
    shapes: list[tuple[int, int]]


def scene(height: int, width: int, seed: int = 0) -> Scene:
    """Smooth colours that fill the canvas."""
    coarse = torch.rand((1, 3, height // 16, width // 16), generator=torch.Generator().manual_seed(seed)) * 255
    fine = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    images = fine.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    sizes = torch.tensor([[height, width]])
    return Scene(images.numpy(), sizes.numpy(), normalise(images, sizes), [(height, width)])


def frozen_mask_rcnn() -> MaskRCNN:
    """As `maskrcnn_resnet50_fpn(weights=...)` builds it."""
    trunk = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    return MaskRCNN(_resnet_fpn_extractor(trunk, 3), CLASSES + 1, box_detections_per_img=DETECTIONS).eval()


@torch.no_grad()
def torchvision_model() -> MaskRCNN:
    """That, with random weights that find something."""
    torch.manual_seed(0)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1
    )
    theirs.train()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    theirs.backbone(torch.randn(2, 3, 128, 128))  # real statistics, or the random trunk drowns its input
    spread(theirs.eval())
    frozen = frozen_mask_rcnn()
    state = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    frozen.load_state_dict(state)
    return frozen


def spread(model: Any) -> None:
    """Last layers whose scores and boxes differ from RoI to RoI, background being the rule."""
    picture = scene(*SMALL)
    features = model.backbone(picture.canvas)
    logits, deltas = (torch.cat([level.flatten() for level in part]) for part in model.rpn.head([*features.values()]))
    model.rpn.head.cls_logits.weight *= 2.0 / logits.std()
    model.rpn.head.bbox_pred.weight *= 0.4 / deltas.std()
    proposals, _ = model.rpn(ImageList(picture.canvas, picture.shapes), features)
    hidden = model.roi_heads.box_head(pooled(model.roi_heads.box_roi_pool, features, proposals, picture.shapes))
    classes, boxes = model.roi_heads.box_predictor.cls_score, model.roi_heads.box_predictor.bbox_pred
    boxes.weight *= 1.5 / boxes(hidden).std()
    classes.weight *= 2.0 / classes(hidden).std(0)[:, None]
    classes.bias -= classes(hidden).mean(0)
    classes.bias[0] += 6.0


def pooled(pool: Any, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
    pool.scales = None  # torchvision infers them from the first picture and keeps them
    return pool(features, boxes, shapes)


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
