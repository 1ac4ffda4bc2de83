"""The named models, one short function each. A checkpoint says which one it is and with which options."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from models.backbones import (
    SingleMap,
    alexnet,
    mobilenetv2_fpn,
    norm_layer,
    resnet_c4,
    resnet_fpn,
    resnet_fpn_p3_p7,
    vgg16,
)
from models.classics import CLASSICS, mobilenetv2_c4
from models.dense import AnchorGrid, DenseNetwork, RegionProposals
from models.heads import BoxHead, KeypointHead, MaskHead, MeanBoxHead, RetinaHead
from models.imbalance import anchor_loss
from models.network import Network, Rules
from models.pooling import FPN_SIDE, Pooler, RoIAlign, RoIPool
from models.regions import RegionNetwork

RATIOS = (0.5, 1.0, 2.0)
SIZES = (32, 64, 128, 256, 512)  # FPN section 4.1: one size a level
CONVS4 = (256, 256, 256, 256)
# Of one map: 300 proposals, as in Faster R-CNN (section 4) and Mask R-CNN on C4 (section 3.1). The first paper takes
# 6,000 candidates; TensorRT's TopK ends at 3,840.
ONE_MAP = Rules(
    pre_nms=3000, num_proposals=300, train_pre_nms=12000, train_num_proposals=2000, box_samples=128,
)  # fmt: skip
RETINA = Rules(max_detections=300)


def _r50_fpn(
    num_classes: int,
    num_keypoints: int,
    masks: bool,
    depth: str = "resnet50",
    width: int = 256,
    norm: str = "frozen",
    norm_eps: float = 1e-5,
    v2: bool = False,
    sampling: int = 2,
    aligned: bool = False,
    canonical_side: int = FPN_SIDE,
    head_canonical_side: int = FPN_SIDE,
    **rules: Any,
) -> RegionNetwork:
    """ResNet-FPN detectors. `v2`: torchvision's improved form (Li et al. 2021): norms in the pyramid and the heads, two
    convolutions in the RPN, four before the box head's one fully connected layer."""
    layer = norm_layer(norm, norm_eps) if v2 else None
    # torchvision's v2 leaves the pyramid of an imported detector at the trunk's norm; its own eps is the default's
    return RegionNetwork(
        resnet_fpn(depth, width, norm, norm_eps, norm_in_fpn=v2),
        RegionProposals(width, _one_a_level(SIZES), RATIOS, 2 if v2 else 1, rules.get("rpn_nms_iou", 0.7)),
        RoIAlign(7, sampling, aligned, canonical_side),
        BoxHead(width, num_classes, *((CONVS4, (1024,)) if v2 else ((), (1024, 1024))), layer),
        RoIAlign(14, sampling, aligned, head_canonical_side),
        MaskHead(width, num_classes, CONVS4, 256, layer) if masks else None,
        KeypointHead(width, num_keypoints, (512,) * 8) if num_keypoints else None,
        replace(Rules(), **rules),
    )


def _one_a_level(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(size,) for size in sizes]


def faster_rcnn_r50_fpn(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """Faster R-CNN (Ren et al. 2015) on a feature pyramid (Lin et al. 2017); `depth` resnet101 for the deeper trunk."""
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


def faster_rcnn_x101_fpn(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """Faster R-CNN on ResNeXt-101-32x8d (Xie et al. 2017) with FPN."""
    return _r50_fpn(num_classes, 0, masks=False, **{"depth": "resnext101_32x8d", **options})


def mask_rcnn_x101_fpn(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """Mask R-CNN on ResNeXt-101-32x8d with FPN: the strongest row of its table 1, there 64x4d."""
    return _r50_fpn(num_classes, 0, masks=True, **{"depth": "resnext101_32x8d", **options})


def _c4(
    num_classes: int,
    masks: bool,
    depth: str = "resnet50",
    norm: str = "frozen",
    norm_eps: float = 1e-5,
    sampling: int = 2,
    aligned: bool = False,
    sizes: tuple[int, ...] = SIZES,
    mask_width: int = 256,
    **rules: Any,
) -> RegionNetwork:
    """Proposals and RoIs of 14 x 14 on conv4; conv5 runs on each RoI, for all heads (Mask R-CNN figure 4, left)."""
    backbone, conv5, width = resnet_c4(depth, norm, norm_eps)
    pooler = RoIAlign(14, sampling, aligned, stride=16)
    return RegionNetwork(
        backbone,
        RegionProposals(backbone.width, [tuple(sizes)], RATIOS, depth=1, nms_iou=rules.get("rpn_nms_iou", 0.7)),
        pooler,
        MeanBoxHead(width, num_classes),
        pooler,
        MaskHead(width, num_classes, (), mask_width, side=14) if masks else None,
        None,
        replace(ONE_MAP, **{"box_samples": 512, **rules}),
        conv5,
    )


def faster_rcnn_r50_c4(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """Faster R-CNN on ResNet-50 (`depth`: or resnet101) as in He et al. 2016: conv5 is the box head."""
    return _c4(num_classes, masks=False, **options)


def mask_rcnn_r50_c4(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """Mask R-CNN on ResNet-50 (`depth`: or resnet101) without a pyramid; its masks are 14 x 14."""
    return _c4(num_classes, masks=True, **options)


def _plain(
    backbone: SingleMap,
    pooler: Callable[[int], Pooler],
    size: int,
    num_classes: int,
    masks: bool = False,
    fc: int = 4096,
    sizes: tuple[int, ...] = (128, 256, 512),
    **rules: Any,
) -> RegionNetwork:
    """A trunk without shortcuts, its fc6 and fc7 as the box head; no dropout, so that training sees what is served."""
    return RegionNetwork(
        backbone,
        RegionProposals(backbone.width, [tuple(sizes)], RATIOS, depth=1, nms_iou=rules.get("rpn_nms_iou", 0.7)),
        pooler(size),
        BoxHead(backbone.width, num_classes, (), (fc, fc), cells=size**2),
        pooler(14),
        MaskHead(backbone.width, num_classes, CONVS4, 256) if masks else None,
        None,
        replace(ONE_MAP, **rules),
    )


POOLERS: dict[str, Callable[[int], Pooler]] = {
    "pool": partial(RoIPool, stride=16),
    "align": partial(RoIAlign, stride=16),
}


def _pooler(name: str) -> Callable[[int], Pooler]:
    if name not in POOLERS:
        raise ValueError(f"pooler is {name!r}; it can be {', '.join(POOLERS)}")
    return POOLERS[name]


def faster_rcnn_vgg16(num_classes: int, num_keypoints: int = 0, pooler: str = "pool", **options: Any) -> RegionNetwork:
    """Faster R-CNN as first published (Ren et al. 2015): conv5_3 of VGG-16, nine anchors a cell, RoIPool of 7 x 7.

    `pooler` "align" has RoIAlign in its place; that is aligned=False, torchvision's.
    """
    return _plain(vgg16(), _pooler(pooler), 7, num_classes, **options)


def mask_rcnn_vgg16(num_classes: int, num_keypoints: int = 0, pooler: str = "align", **options: Any) -> RegionNetwork:
    """Mask R-CNN on VGG-16: the box head's fc6 and fc7, and masks of 28 x 28 from RoIs of 14 x 14 on conv5_3."""
    return _plain(vgg16(), _pooler(pooler), 7, num_classes, masks=True, **options)


def faster_rcnn_alexnet(
    num_classes: int, num_keypoints: int = 0, pooler: str = "pool", **options: Any
) -> RegionNetwork:
    """Faster R-CNN on AlexNet: conv5, RoIPool of 6 x 6 (Fast R-CNN's model S has CaffeNet, its near twin)."""
    return _plain(alexnet(), _pooler(pooler), 6, num_classes, **options)


def faster_rcnn_mobilenetv2(
    num_classes: int, num_keypoints: int = 0, pooler: str = "pool", **options: Any
) -> RegionNetwork:
    """The light Faster R-CNN: the map and the box head of the light Fast R-CNN; for canvases of half the size."""
    light = {"fc": 384, "sizes": (32, 64, 128, 256), "box_samples": 64}
    return _plain(mobilenetv2_c4(), _pooler(pooler), 7, num_classes, **{**light, **options})


def retina_sizes(base: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Three sizes a level, a third of an octave apart (RetinaNet section 4), whole as torchvision has them."""
    return [(size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in base]


def retinanet_r50_fpn(
    num_classes: int,
    num_keypoints: int = 0,
    depth: str = "resnet50",
    width: int = 256,
    norm: str = "frozen",
    norm_eps: float = 1e-5,
    v2: bool = False,
    loss: dict[str, Any] | None = None,
    sizes: tuple[int, ...] = SIZES,
    **rules: Any,
) -> DenseNetwork:
    """RetinaNet (Lin et al. 2017): nine anchors on each cell of p3 to p7.

    That is 91,260 anchors on a picture of 600 x 800, 116,712 on one of 600 x 1000 (the paper says about 100k).

    `v2`: torchvision's improved form (Zhang et al. 2020): GroupNorm in the head, p6 from c5. `loss`: what
    `imbalance.anchor_loss` takes; focal with gamma 2 and alpha 0.25 by default.
    """
    group_norm: Callable[[int], nn.Module] | None = partial(nn.GroupNorm, 32) if v2 else None
    head = RetinaHead(width, 3 * len(RATIOS), num_classes, 4, group_norm)
    return DenseNetwork(
        resnet_fpn_p3_p7(depth, width, norm, norm_eps, p6_of_c5=v2),
        AnchorGrid(head, retina_sizes(tuple(sizes)), RATIOS),
        anchor_loss(**(loss or {})),
        replace(RETINA, **rules),
    )


def retinanet_mobilenetv2_fpn(
    num_classes: int,
    num_keypoints: int = 0,
    width: int = 64,
    convs: int = 2,
    loss: dict[str, Any] | None = None,
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256),
    ratios: tuple[float, ...] = RATIOS,
    last: int = 5,
    **rules: Any,
) -> DenseNetwork:
    """The light RetinaNet: MobileNetV2, a narrow pyramid, two convolutions a stack; for canvases of half the size.

    `last` 4: the trunk ends at stride 16, and there are p3 to p6; `sizes` has one entry a level.
    """
    _check_levels(sizes, last)
    head = RetinaHead(width, 3 * len(ratios), num_classes, convs, None)
    return DenseNetwork(
        mobilenetv2_fpn(width, p3_p7=True, last=last),
        AnchorGrid(head, retina_sizes(tuple(sizes)), tuple(ratios)),
        anchor_loss(**(loss or {})),
        replace(RETINA, **{"pre_nms": 300, "max_detections": 100, **rules}),
    )


def _check_levels(sizes: tuple[int, ...], last: int) -> None:
    """Of a light pyramid, p2 to p6 or p3 to p7 where the trunk's last level is p5."""
    if len(sizes) != last:
        raise ValueError(f"sizes has {len(sizes)} entries; with last {last} there are {last} levels")


def _light(
    num_classes: int,
    num_keypoints: int,
    masks: bool,
    width: int = 64,
    fc: int = 384,
    mask_convs: int = 2,
    keypoint_convs: int = 3,
    keypoint_width: int = 96,
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256),
    ratios: tuple[float, ...] = RATIOS,
    pooler: str = "align",
    sampling: int = 2,
    aligned: bool = True,
    canonical_side: int = 112,
    head_canonical_side: int = FPN_SIDE,
    last: int = 5,
    **rules: Any,
) -> RegionNetwork:
    """MobileNetV2 (Sandler et al. 2018), a narrow pyramid, short heads, few RoIs.

    Made for canvases of about 384 x 640, hence half the usual anchor sizes, and half the canonical RoI for boxes. Masks
    and keypoints keep the usual one, for they need the finer levels more than the larger context. `pooler` is `pool` or
    `align`. `last` 4: the trunk ends at stride 16; `sizes` has one entry a level, of which there is one less then.
    """
    light = Rules(
        pre_nms=300, num_proposals=150, train_pre_nms=600, train_num_proposals=400, rpn_samples=128, box_samples=96,
    )  # fmt: skip
    _check_levels(sizes, last)
    _pooler(pooler)

    def pool(size: int, canonical: int) -> Pooler:
        return RoIPool(size, canonical) if pooler == "pool" else RoIAlign(size, sampling, aligned, canonical)

    # Before the trunk, as ever: a seed's random weights follow the order in which parts are made.
    rpn = RegionProposals(width, _one_a_level(tuple(sizes)), tuple(ratios), 1, rules.get("rpn_nms_iou", 0.7))
    return RegionNetwork(
        mobilenetv2_fpn(width, last=last),
        rpn,
        pool(7, canonical_side),
        BoxHead(width, num_classes, (), (fc, fc)),
        pool(14, head_canonical_side),
        MaskHead(width, num_classes, (width,) * mask_convs, width) if masks else None,
        KeypointHead(width, num_keypoints, (keypoint_width,) * keypoint_convs) if num_keypoints else None,
        replace(light, **rules),
    )


def faster_rcnn_mobilenetv2_fpn(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """The light Faster R-CNN on a pyramid."""
    return _light(num_classes, 0, masks=False, **options)


def mask_rcnn_mobilenetv2_fpn(num_classes: int, num_keypoints: int = 0, **options: Any) -> RegionNetwork:
    """The light Mask R-CNN."""
    return _light(num_classes, 0, masks=True, **options)


def person_mobilenetv2_fpn(num_classes: int, num_keypoints: int, **options: Any) -> RegionNetwork:
    """The light person model: masks and keypoints, anchors for who stands."""
    return _light(num_classes, num_keypoints, masks=True, **{"ratios": (0.7, 1.4, 2.8), **options})


MODELS: dict[str, Callable[..., Network]] = {
    function.__name__: function
    for function in (
        faster_rcnn_r50_fpn,
        mask_rcnn_r50_fpn,
        keypoint_rcnn_r50_fpn,
        mask_keypoint_rcnn_r50_fpn,
        faster_rcnn_x101_fpn,
        mask_rcnn_x101_fpn,
        faster_rcnn_r50_c4,
        mask_rcnn_r50_c4,
        faster_rcnn_vgg16,
        mask_rcnn_vgg16,
        faster_rcnn_alexnet,
        faster_rcnn_mobilenetv2,
        retinanet_r50_fpn,
        retinanet_mobilenetv2_fpn,
        faster_rcnn_mobilenetv2_fpn,
        mask_rcnn_mobilenetv2_fpn,
        person_mobilenetv2_fpn,
        *CLASSICS,
    )
}
