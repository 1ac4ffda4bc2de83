"""The systems before the region proposal network, one short function each; `models.zoo` lists them.

Fast R-CNN, SPP-net and R-CNN take proposals; OverFeat looks at every window. `*_mobilenetv2` are for canvases of about
384 x 640 and for hours on a CPU instead of days.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torchvision
from torch import nn

from models.backbones import SingleMap, alexnet, fold_batch_norms, vgg16
from models.heads import BoxHead
from models.network import Rules
from models.overfeat import OverFeat
from models.pooling import RoIPool, SpatialPyramid, Warp
from models.proposed import Pixels, ProposalNetwork, RidgeBoxHead

MOBILENETV2_C4 = 96  # channels at stride 16
# Two pictures a step, 64 RoIs of each, a quarter of them foreground (Fast R-CNN section 2.3); NMS as in its code.
FAST = Rules(nms_iou=0.3, box_samples=64, foreground_fraction=0.25, background_floor=0.1)


def _mobilenetv2() -> nn.Sequential:
    return torchvision.models.mobilenet_v2(weights=None).features[:18].eval()


def mobilenetv2_c4() -> SingleMap:
    """MobileNetV2 up to its last block at stride 16, every BatchNorm folded."""
    layers = {str(index): (f"trunk.{index}.",) for index in range(14)}
    return SingleMap(fold_batch_norms(_mobilenetv2()[:14]), MOBILENETV2_C4, layers)


def _fast(backbone: SingleMap, size: int, num_classes: int, fc: int = 4096, **rules: Any) -> ProposalNetwork:
    head = BoxHead(backbone.width, num_classes, (), (fc, fc), cells=size**2)
    return ProposalNetwork(backbone, RoIPool(size, stride=16), head, replace(FAST, **rules))


def fast_rcnn_vgg16(num_classes: int, num_keypoints: int = 0, **options: Any) -> ProposalNetwork:
    """Fast R-CNN (Girshick 2015), model L: VGG-16, RoIPool of 7 x 7, fc6 and fc7."""
    return _fast(vgg16(), 7, num_classes, **options)


def fast_rcnn_mobilenetv2(num_classes: int, num_keypoints: int = 0, **options: Any) -> ProposalNetwork:
    """The light Fast R-CNN."""
    return _fast(mobilenetv2_c4(), 7, num_classes, **{"fc": 384, **options})


def _spp(
    backbone: SingleMap, num_classes: int, fc: int = 4096, is_fitted: bool = False, **rules: Any
) -> ProposalNetwork:
    pooler = SpatialPyramid()
    head = RidgeBoxHead(backbone.width, num_classes, (fc, fc), pooler.cells)
    return ProposalNetwork(backbone, pooler, head, replace(FAST, **rules), is_fitted=is_fitted)


def spp_net_vgg16(num_classes: int, num_keypoints: int = 0, **options: Any) -> ProposalNetwork:
    """SPP-net (He et al. 2014) on VGG-16, as Fast R-CNN compares it in its table 1: a pyramid of 1, 2, 3 and 6."""
    return _spp(vgg16(), num_classes, **options)


def spp_net_alexnet(num_classes: int, num_keypoints: int = 0, **options: Any) -> ProposalNetwork:
    """SPP-net on a network of the size of its ZF-5."""
    return _spp(alexnet(), num_classes, **options)


def spp_net_mobilenetv2(num_classes: int, num_keypoints: int = 0, **options: Any) -> ProposalNetwork:
    """The light SPP-net."""
    return _spp(mobilenetv2_c4(), num_classes, **{"fc": 384, **options})


def _r_cnn(
    trunk: nn.Module,
    channels: int,
    cells: int,
    warp: Warp,
    num_classes: int,
    fc: int = 4096,
    is_fitted: bool = False,
    **rules: Any,
) -> ProposalNetwork:
    head = RidgeBoxHead(channels, num_classes, (fc, fc), cells)
    own = replace(FAST, **{"background_floor": 0.0, **rules})  # section 2.3: all below an IoU of 0.5 are negatives
    return ProposalNetwork(Pixels(), warp, head, own, trunk, is_fitted)


def r_cnn_alexnet(num_classes: int, num_keypoints: int = 0, **options: Any) -> ProposalNetwork:
    """R-CNN (Girshick et al. 2014): a warp of 227 x 227 with 16 pixels around, AlexNet, pool5, fc6 and fc7."""
    return _r_cnn(torchvision.models.alexnet(weights=None).features, 256, 36, Warp(227, 16), num_classes, **options)


def r_cnn_vgg16(num_classes: int, num_keypoints: int = 0, side: int = 224, **options: Any) -> ProposalNetwork:
    """R-CNN on VGG-16 (section 3.3, "O-Net"), which takes 224 x 224. `side`: of the warp, a multiple of 32; the cost
    of a region goes with its square. ImageNet's fc6 fits 224 alone."""
    if side < 32 or side % 32:
        raise ValueError(f"side is {side}; it has to be a multiple of 32")
    trunk = torchvision.models.vgg16(weights=None, init_weights=False).features
    return _r_cnn(trunk, 512, (side // 32) ** 2, Warp(side, side // 14), num_classes, **options)


def r_cnn_mobilenetv2(num_classes: int, num_keypoints: int = 0, **options: Any) -> ProposalNetwork:
    """The light R-CNN: MobileNetV2 on a warp of 96 x 96."""
    return _r_cnn(fold_batch_norms(_mobilenetv2()), 320, 9, Warp(96, 7), num_classes, **{"fc": 384, **options})


def _overfeat(
    backbone: SingleMap, num_classes: int, hidden: int, pool: int, window: int, merge: float = 0.8, **rules: Any
) -> OverFeat:
    """`merge`: boxes whose match score is below are one (section 4.3, which gives no number)."""
    scales = {"scales": rules.pop("scales")} if "scales" in rules else {}
    own = Rules(box_samples=128, foreground_fraction=0.25, merge=merge, max_detections=100)
    return OverFeat(backbone, num_classes, (hidden, hidden), pool, window, replace(own, **rules), **scales)


def overfeat_alexnet(num_classes: int, num_keypoints: int = 0, **options: Any) -> OverFeat:
    """OverFeat (Sermanet et al. 2014) on AlexNet: pooling of 3 x 3 at 9 offsets, windows of 5 x 5 pooled cells: 240
    pixels, its fast model's are 231."""
    return _overfeat(alexnet(), num_classes, **{"hidden": 4096, "pool": 3, "window": 5, **options})


def overfeat_mobilenetv2(num_classes: int, num_keypoints: int = 0, **options: Any) -> OverFeat:
    """The light OverFeat: windows of 3 x 3 cells pooled by 2, 96 pixels."""
    return _overfeat(mobilenetv2_c4(), num_classes, **{"hidden": 256, "pool": 2, "window": 3, **options})


CLASSICS: tuple[Callable[..., ProposalNetwork | OverFeat], ...] = (
    overfeat_alexnet,
    overfeat_mobilenetv2,
    r_cnn_alexnet,
    r_cnn_vgg16,
    r_cnn_mobilenetv2,
    spp_net_alexnet,
    spp_net_vgg16,
    spp_net_mobilenetv2,
    fast_rcnn_vgg16,
    fast_rcnn_mobilenetv2,
)
