"""A tiny model for every name of the zoo: random, but its detections are many, of several sizes and of no equal scores.

Shared by the tests of the models, of the export and of the whole way.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.backbones import SingleMap
from models.checkpoint import CanvasRule, Keypoints, Spec, build
from models.dense import DenseNetwork
from models.network import Network
from models.regions import RegionNetwork, with_batch_index
from models.servable import MEAN, normalise

CLASSES = ("cat", "dog", "cow")
JOINTS = Keypoints(("nose", "left", "right"), ((0, 1), (0, 2)), (0, 2, 1))
CANVAS = CanvasRule(short_side=96, long_side=160)
RULES = {"pre_nms": 100, "num_proposals": 60, "max_detections": 8, "train_pre_nms": 100, "train_num_proposals": 60}
R50: dict[str, Any] = {"depth": "resnet18", "width": 32, **RULES}
X101 = {**R50, "depth": "resnext50_32x4d"}  # there is no smaller one in groups
C4 = {"depth": "resnet18", **RULES, "num_proposals": 12, "sizes": [16, 32, 64], "mask_width": 32}
PLAIN = {**RULES, "fc": 64, "sizes": [16, 32, 64]}
RETINA = {"width": 32, "pre_nms": 60, "max_detections": 8, "sizes": [8, 16, 32, 64, 128]}
LIGHT = {"width": 16, "fc": 32, "keypoint_width": 16, "keypoint_convs": 1, **RULES, "sizes": [8, 16, 32, 64, 128]}
SHALLOW = {"last": 4, "sizes": [8, 16, 32, 64]}  # the trunk ends at stride 16

SPECS = {
    "faster_rcnn_r50_fpn": Spec("faster_rcnn_r50_fpn", CLASSES, None, CANVAS, R50),
    "mask_rcnn_r50_fpn": Spec("mask_rcnn_r50_fpn", CLASSES, None, CANVAS, {**R50, "norm": "batch"}),
    "keypoint_rcnn_r50_fpn": Spec("keypoint_rcnn_r50_fpn", CLASSES[:1], JOINTS, CANVAS, R50),
    "mask_keypoint_rcnn_r50_fpn": Spec("mask_keypoint_rcnn_r50_fpn", CLASSES[:2], JOINTS, CANVAS, R50),
    "person_mobilenetv2_fpn": Spec("person_mobilenetv2_fpn", CLASSES[:1], JOINTS, CANVAS, LIGHT),
    "faster_rcnn_mobilenetv2_fpn": Spec("faster_rcnn_mobilenetv2_fpn", CLASSES, None, CANVAS, LIGHT),
    "mask_rcnn_mobilenetv2_fpn": Spec("mask_rcnn_mobilenetv2_fpn", CLASSES, None, CANVAS, {**LIGHT, **SHALLOW}),
    "faster_rcnn_x101_fpn": Spec("faster_rcnn_x101_fpn", CLASSES, None, CANVAS, X101),
    "mask_rcnn_x101_fpn": Spec("mask_rcnn_x101_fpn", CLASSES, None, CANVAS, X101),
    "faster_rcnn_r50_c4": Spec("faster_rcnn_r50_c4", CLASSES, None, CANVAS, C4),
    "mask_rcnn_r50_c4": Spec("mask_rcnn_r50_c4", CLASSES, None, CANVAS, {**C4, "norm": "batch"}),
    "faster_rcnn_vgg16": Spec("faster_rcnn_vgg16", CLASSES, None, CANVAS, PLAIN),
    "mask_rcnn_vgg16": Spec("mask_rcnn_vgg16", CLASSES, None, CANVAS, PLAIN),
    "faster_rcnn_alexnet": Spec("faster_rcnn_alexnet", CLASSES, None, CANVAS, PLAIN),
    "faster_rcnn_mobilenetv2": Spec("faster_rcnn_mobilenetv2", CLASSES, None, CANVAS, PLAIN),
    "retinanet_r50_fpn": Spec("retinanet_r50_fpn", CLASSES, None, CANVAS, {"depth": "resnet18", **RETINA}),
    "retinanet_mobilenetv2_fpn": Spec("retinanet_mobilenetv2_fpn", CLASSES[:1], None, CANVAS, RETINA),
}
V2 = {**R50, "norm": "batch", "v2": True, "num_proposals": 20}
RETINA_V2 = {"depth": "resnet18", "norm": "batch", "v2": True, **RETINA, "width": 64}
VARIANTS = {
    **SPECS,
    "mask_rcnn_r50_fpn_v2": Spec("mask_rcnn_r50_fpn", CLASSES, None, CANVAS, V2),
    "retinanet_r50_fpn_v2": Spec("retinanet_r50_fpn", CLASSES, None, CANVAS, RETINA_V2),
}
# What differs from another only in its trunk, or has a large one: with make test-all. Of every part one stays.
SLOW = {
    "faster_rcnn_x101_fpn", "mask_rcnn_x101_fpn", "faster_rcnn_r50_c4", "faster_rcnn_vgg16", "mask_rcnn_vgg16",
    "retinanet_r50_fpn", "faster_rcnn_mobilenetv2", "faster_rcnn_mobilenetv2_fpn", "mask_rcnn_mobilenetv2_fpn",
}  # fmt: skip
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
# Deviations of the last layers; every other layer passes on what it gets at deviation 1.
LAST = {
    "rpn.head.objectness": 2.0,
    "rpn.head.deltas": 0.3,
    "box_head.classes": 2.0,
    "box_head.deltas": 1.0,
    "detector.head.classes": 2.0,
    "detector.head.deltas": 0.3,
    "mask_head.logits": 2.0,
    "keypoint_head.upsample": 3.0,
}
# Of these: how far a blank picture is from any class, and how much wider the classes' logits are. By the layer chance
# gave the last, dull pictures are further from every class than a blank one is; negated, it says the reverse.
SPREAD = {"x101": (10.0, 3.0), "c4": (6.0, 1.0), "vgg16": (7.0, 2.0), "mask_rcnn_mobilenetv2_fpn": (4.0, -1.0)}
Batch = tuple[Tensor, Tensor]


def make(name: str, seed: int = 0, **options: Any) -> tuple[Network, Spec]:
    spec = VARIANTS[name]
    spec = replace(spec, options={**spec.options, **options})
    torch.manual_seed(seed)
    model = build(spec).eval()
    spread(model, *margin_and_contrast(name))
    return model, spec


def margin_and_contrast(name: str) -> tuple[float, float]:
    return next((given for trunk, given in SPREAD.items() if trunk in name), (4.0, 1.0))


@torch.no_grad()
def spread(model: Network, margin: float = 4.0, contrast: float = 1.0) -> None:
    """Scales each layer on two pictures and its way to them; in a blank picture there is then nothing, by `margin`.

    `contrast` widens the classes' logits; negative, it turns them round as well.
    """
    for norm in model.modules():
        if isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            shape = norm.weight.shape
            for tensor, values in (
                (norm.weight, torch.rand(shape) * 0.4 + 0.8),
                (norm.bias, torch.randn(shape) * 0.1),
                (norm.running_mean, torch.randn(shape) * 0.1),
                (norm.running_var, torch.rand(shape) + 0.5),
            ):
                assert tensor is not None
                tensor.copy_(values)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}
    seen = {"one_map"} if isinstance(model.backbone, SingleMap) else set()
    hooks = [m.register_forward_hook(partial(_scale, seen, name, contrast)) for name, m in layers.items()]
    images, sizes = pictures((128, 128), [(128, 128), (96, 120)])
    found = model(normalise(images, sizes), sizes)
    rois = torch.cat((with_batch_index(found.boxes)[:2], torch.tensor([[0.0, 8, 8, 90, 100], [1, 20, 10, 50, 60]])))
    if model.mask_head is not None:
        model.mask_probabilities(found.features, rois, torch.zeros(len(rois), dtype=torch.int64))
    if model.keypoint_head is not None:
        model.keypoint_heatmaps(found.features, rois)
    for hook in hooks:
        hook.remove()
    assert seen - {"one_map"} == layers.keys()
    _find_nothing_in_blank(model, margin)


def _scale(seen: set[str], name: str, contrast: float, layer: nn.Conv2d, _inputs: Any, output: Tensor) -> Tensor | None:
    if name in seen:  # the RPN's head: as its first level wants it
        return None
    seen.add(name)
    # Of RoIs averaged, or read whole from one small map, all are much alike: what counts is how they differ.
    alike = name == "box_head.classes" and "one_map" in seen
    widened = LAST.get(name, 1.0) * (contrast if name == "box_head.classes" else 1.0)
    factor = widened / (output.std(0).mean() if alike else output.std())
    layer.weight *= factor
    if layer.bias is not None:
        layer.bias *= factor
    return output * factor


def _find_nothing_in_blank(model: Network, margin: float) -> None:
    """The classes' biases such that a blank picture is background."""
    if isinstance(model, DenseNetwork):
        images, _ = _prepared(*blank((128, 128)))
        logits, _ = model.detector(model.backbone(images))
        bias = model.detector.head.classes.bias
        bias -= torch.cat(logits, 1)[0].unflatten(0, (-1, len(bias) // logits[0].shape[2])).amax(0).flatten() + margin
        return
    assert isinstance(model, RegionNetwork)
    given: list[Tensor] = []
    hook = model.box_head.classes.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    model(*_prepared(*blank((128, 128))))
    hook.remove()
    bias = model.box_head.classes.bias
    bias -= given[0].mean(0)
    bias[0] += margin


def _prepared(images: Tensor, sizes: Tensor) -> Batch:
    return normalise(images, sizes), sizes


def pictures(canvas: tuple[int, int], sizes: list[tuple[int, int]], seed: int = 0) -> Batch:
    """images uint8 (B, H, W, 3), sizes (B, 2): smooth pictures, zero in the padding."""
    images = torch.zeros(len(sizes), *canvas, 3, dtype=torch.uint8)
    for index, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        coarse = torch.rand(1, 3, 2 + height // 16, 2 + width // 16, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)
        images[index, :height, :width] = (smooth.permute(1, 2, 0) * 255).round().to(torch.uint8)
    return images, torch.tensor(sizes)


def blank(canvas: tuple[int, int]) -> Batch:
    """One picture of the mean colour."""
    colour = (torch.tensor(MEAN) * 255).round().to(torch.uint8)
    return colour.expand(1, *canvas, 3).contiguous(), torch.tensor([canvas])


def stacked(*batches: Batch) -> Batch:
    images, sizes = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(sizes)


Maker = Callable[..., tuple[Network, Spec]]
