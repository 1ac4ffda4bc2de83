"""The named models, one short function each. A checkpoint says which one it is and with which options."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from models.backbones import mobilenetv2_fpn, norm_layer, resnet_fpn
from models.dense import RegionProposals
from models.heads import BoxHead, KeypointHead, MaskHead
from models.regions import RegionNetwork, Rules

RATIOS = (0.5, 1.0, 2.0)
SIZES = (32, 64, 128, 256, 512)  # FPN section 4.1: one size a level
CONVS4 = (256, 256, 256, 256)


def _r50_fpn(
    num_classes: int,
    num_keypoints: int,
    masks: bool,
    depth: str = "resnet50",
    width: int = 256,
    norm: str = "frozen",
    norm_eps: float = 1e-5,
    v2: bool = False,
    **rules: Any,
) -> RegionNetwork:
    """ResNet-FPN detectors. `v2`: torchvision's improved form (Li et al. 2021): norms in the pyramid and the heads, two
    convolutions in the RPN, four before the box head's one fully connected layer."""
    layer = norm_layer(norm, norm_eps) if v2 else None
    # torchvision's v2 leaves the pyramid of an imported detector at the trunk's norm; its own eps is the default's
    backbone = resnet_fpn(depth, width, norm, norm_eps, norm_in_fpn=v2)
    rpn = RegionProposals(width, SIZES, RATIOS, depth=2 if v2 else 1, nms_iou=rules.get("rpn_nms_iou", 0.7))
    box_head = BoxHead(width, num_classes, *((CONVS4, (1024,)) if v2 else ((), (1024, 1024))), layer)
    mask_head = MaskHead(width, num_classes, CONVS4, 256, layer) if masks else None
    keypoint_head = KeypointHead(width, num_keypoints, (512,) * 8) if num_keypoints else None
    return RegionNetwork(backbone, rpn, box_head, mask_head, keypoint_head, replace(Rules(), **rules))


def faster_rcnn_r50_fpn(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """Faster R-CNN (Ren et al. 2015) on a feature pyramid (Lin et al. 2017)."""
    return _r50_fpn(num_classes, 0, masks=False, **options)


def mask_rcnn_r50_fpn(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """Mask R-CNN (He et al. 2017)."""
    return _r50_fpn(num_classes, 0, masks=True, **options)


def keypoint_rcnn_r50_fpn(num_classes: int, num_keypoints: int, **options: Any) -> RegionNetwork:
    """Mask R-CNN with its keypoint head in the masks' place (He et al. 2017 section 5)."""
    return _r50_fpn(num_classes, num_keypoints, masks=False, **options)


def mask_keypoint_rcnn_r50_fpn(num_classes: int, num_keypoints: int, **options: Any) -> RegionNetwork:
    """Both heads on one trunk (He et al. 2017 table 5): a picture pays for its trunk once."""
    return _r50_fpn(num_classes, num_keypoints, masks=True, **options)


def person_mobilenetv2_fpn(
    num_classes: int,
    num_keypoints: int,
    width: int = 64,
    fc: int = 384,
    mask_convs: int = 2,
    keypoint_convs: int = 3,
    keypoint_width: int = 96,
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256),
    ratios: tuple[float, ...] = (0.7, 1.4, 2.8),
    **rules: Any,
) -> RegionNetwork:
    """The light person model: MobileNetV2 (Sandler et al. 2018), a narrow pyramid, short heads, tall anchors, few RoIs.

    Made for canvases of about 384 x 640, hence half the usual anchor sizes, and half the canonical RoI for boxes. Masks
    and keypoints keep the usual one, for they need the finer levels more than the larger context.
    """
    light = Rules(
        pre_nms=300, num_proposals=150, canonical_side=112, aligned=True, max_detections=100,
        train_pre_nms=600, train_num_proposals=400, rpn_samples=128, box_samples=96,
    )  # fmt: skip
    rpn = RegionProposals(width, tuple(sizes), tuple(ratios), depth=1, nms_iou=rules.get("rpn_nms_iou", 0.7))
    return RegionNetwork(
        mobilenetv2_fpn(width),
        rpn,
        BoxHead(width, num_classes, (), (fc, fc), None),
        MaskHead(width, num_classes, (width,) * mask_convs, width, None),
        KeypointHead(width, num_keypoints, (keypoint_width,) * keypoint_convs) if num_keypoints else None,
        replace(light, **rules),
    )


MODELS: dict[str, Callable[..., RegionNetwork]] = {
    function.__name__: function
    for function in (
        faster_rcnn_r50_fpn,
        mask_rcnn_r50_fpn,
        keypoint_rcnn_r50_fpn,
        mask_keypoint_rcnn_r50_fpn,
        person_mobilenetv2_fpn,
    )
}
