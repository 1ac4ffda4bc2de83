"""Trunks and what is read of them: images (B, 3, H, W) -> maps of one width, finest first.

A map's name says its stride: p2 to p7 are the levels of a pyramid, c4 is a trunk's own map, and the number is the
stride's logarithm. The trunks are torchvision's classification networks; their BatchNorm statistics never change here
(recipes with small batches must not touch them).
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

Norm = Callable[[int], nn.Module] | None
# Channels of the first of four stages; each next one doubles them.
RESNET_CHANNELS = {
    "resnet18": 64, "resnet34": 64, "resnet50": 256, "resnet101": 256, "resnext50_32x4d": 256, "resnext101_32x8d": 256,
}  # fmt: skip
VGG_CHANNELS, ALEXNET_CHANNELS = 512, 256  # of conv5


class FixedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that always uses its stored statistics: `train()` does not change what the network computes."""

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        return super().train(False)


def norm_layer(kind: str, eps: float) -> Callable[[int], nn.Module]:
    """ "frozen": fixed scale and shift (published v1 detectors). "batch": trainable scale, fixed statistics (v2)."""
    if kind == "frozen":
        return lambda channels: FrozenBatchNorm2d(channels, eps=eps)
    if kind == "batch":
        return lambda channels: FixedBatchNorm2d(channels, eps=eps)
    raise ValueError(f"norm is {kind!r}; it can be 'frozen' or 'batch'")


Layers = dict[str, tuple[str, ...]]
"""The names of a trunk's layers, from the pixels on, each with the prefixes of its parameters' names."""


class Backbone(nn.Module):
    """images (B, 3, H, W) -> maps (B, width, H / s, W / s). `levels` names those that heads read, the first ones; what
    follows them, of sides that the canvas need not divide, is for a dense detector alone."""

    def __init__(self, trunk: nn.Module, width: int, levels: tuple[str, ...], layers: Layers) -> None:
        super().__init__()
        self.trunk, self.width, self.levels, self.layers = trunk, width, levels, layers

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError


class Pyramid(Backbone):
    """FPN section 3 on taps of a trunk, the `last` of which gives that level; `extra` makes coarser ones of it."""

    def __init__(
        self,
        trunk: nn.Module,
        channels: list[int],
        width: int,
        layers: Layers,
        norm: Norm = None,
        extra: ExtraFPNBlock | None = None,
        last: int = 5,
    ) -> None:
        levels = tuple(f"p{last - i}" for i in range(len(channels)))[::-1]
        super().__init__(trunk, width, levels, {**layers, "fpn": ("fpn.",)})
        self.fpn = FeaturePyramidNetwork(channels, width, extra or LastLevelMaxPool(), norm_layer=norm)

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.fpn(OrderedDict(self.trunk(images))).values())


class SingleMap(Backbone):
    """A trunk's own map at stride 16, c4: conv4 of a ResNet, conv5 of VGG-16 and AlexNet."""

    def __init__(self, trunk: nn.Module, width: int, layers: Layers) -> None:
        super().__init__(trunk, width, ("c4",), layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.trunk(images)]


def _resnet(depth: str, layer: Callable[[int], nn.Module]) -> nn.Module:
    if depth not in RESNET_CHANNELS:
        raise ValueError(f"depth is {depth!r}; it can be {', '.join(RESNET_CHANNELS)}")
    return getattr(torchvision.models, depth)(weights=None, norm_layer=layer)


def _resnet_layers(stages: int) -> Layers:
    stem = {"conv1": ("trunk.conv1.", "trunk.bn1.")}
    return stem | {f"layer{i}": (f"trunk.layer{i}.",) for i in range(1, stages + 1)}


def resnet_fpn(depth: str, width: int, norm: str, norm_eps: float, norm_in_fpn: bool) -> Pyramid:
    """ResNet-18/34/50/101 or ResNeXt (`depth` is torchvision's name) with FPN: p2 to p5, and p6, p5 subsampled."""
    layer = norm_layer(norm, norm_eps)
    trunk = IntermediateLayerGetter(_resnet(depth, layer), {f"layer{i}": f"p{i + 1}" for i in range(1, 5)})
    channels = [RESNET_CHANNELS[depth] << i for i in range(4)]
    return Pyramid(trunk, channels, width, _resnet_layers(4), layer if norm_in_fpn else None)


def resnet_fpn_p3_p7(depth: str, width: int, norm: str, norm_eps: float, p6_of_c5: bool) -> Pyramid:
    """The pyramid of RetinaNet (section 4): p3 to p5, then p6 and p7 by strided convolutions of p5, or of c5."""
    trunk = IntermediateLayerGetter(
        _resnet(depth, norm_layer(norm, norm_eps)), {f"layer{i}": f"p{i + 1}" for i in range(2, 5)}
    )
    channels = [RESNET_CHANNELS[depth] << i for i in range(1, 4)]
    extra = LastLevelP6P7(channels[-1] if p6_of_c5 else width, width)
    return Pyramid(trunk, channels, width, _resnet_layers(4), extra=extra)


def resnet_c4(depth: str, norm: str, norm_eps: float) -> tuple[SingleMap, nn.Sequential, int]:
    """A ResNet up to conv4, its conv5, which runs on each RoI, and the width of that (Ren et al. 2015 in He et al.
    2016, appendix A)."""
    body = _resnet(depth, norm_layer(norm, norm_eps))
    region = nn.Sequential(OrderedDict([("layer4", body.get_submodule("layer4"))]))
    first = RESNET_CHANNELS[depth]
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    trunk = nn.Sequential(OrderedDict((name, body.get_submodule(name)) for name in names))
    return SingleMap(trunk, first << 2, _resnet_layers(3)), region, first << 3


def vgg16() -> SingleMap:
    """VGG-16 up to conv5_3 and its ReLU, at stride 16: without the last of its five poolings."""
    network: Any = torchvision.models.vgg16(weights=None, init_weights=False)
    features = network.features[:30]
    layers, block, number = {}, 1, 0
    for index, layer in enumerate(features):
        if isinstance(layer, nn.MaxPool2d):
            block, number = block + 1, 0
        elif isinstance(layer, nn.Conv2d):
            number += 1
            layers[f"conv{block}_{number}"] = (f"trunk.{index}.",)
    return SingleMap(features, VGG_CHANNELS, layers)


def alexnet() -> SingleMap:
    """AlexNet (torchvision's: one tower, no response normalisation) up to conv5 and its ReLU, at stride 16.

    Padded as Fast R-CNN pads CaffeNet, so that a cell's centre lies at a multiple of 16 and the map's side is exactly a
    sixteenth of the canvas.
    """
    features: Any = torchvision.models.alexnet(weights=None).features[:12]
    layers = {}
    for index, layer in enumerate(features):
        if isinstance(layer, nn.MaxPool2d):
            layer.padding = 1
        elif isinstance(layer, nn.Conv2d):
            layers[f"conv{len(layers) + 1}"] = (f"trunk.{index}.",)
    features[0].padding = (5, 5)
    return SingleMap(features, ALEXNET_CHANNELS, layers)


def mobilenetv2_fpn(width: int, p3_p7: bool = False, last: int = 5) -> Pyramid:
    """MobileNetV2 with FPN, p2 to p6 or p3 to p7, every BatchNorm folded into its convolution.

    The statistics are fixed anyway, and on a CPU a separate scale and shift costs as much memory traffic as the
    depthwise convolutions themselves. The last 1x1 convolution to 1280 channels serves classification and is left out.

    `last` 4 ends the trunk at stride 16, with a coarsest level less: for small objects, which read nothing coarser, and
    without seven tenths of the trunk's weights.
    """
    if last not in (4, 5):
        raise ValueError(f"last is {last}; the trunk's coarsest level can be 4 or 5")
    taps = [(3, "p2", 24), (6, "p3", 32), (13, "p4", 96), (17, "p5", 320)][p3_p7 : last - 1]
    blocks = taps[-1][0] + 1
    features = torchvision.models.mobilenet_v2(weights=None).features[:blocks]
    trunk = IntermediateLayerGetter(fold_batch_norms(features.eval()), {str(block): name for block, name, _ in taps})
    layers = {str(index): (f"trunk.{index}.",) for index in range(blocks)}
    extra = LastLevelP6P7(width, width) if p3_p7 else None
    return Pyramid(trunk, [channels for *_, channels in taps], width, layers, extra=extra, last=last)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Replaces each (convolution, BatchNorm) neighbour pair of every Sequential by one convolution with a bias."""
    for parent in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        names = list(parent._modules)
        for name, following in zip(names, names[1:], strict=False):
            conv, norm = parent._modules[name], parent._modules[following]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
                assert fused.bias is not None
                fused.bias.requires_grad_(True)  # else frozen, since the convolution had none: the norm's shift learns
                parent._modules[name] = fused
                parent._modules[following] = nn.Identity()
    return module


def read_trunk(path: str | Path, parts: list[nn.Module], linears: list[nn.Linear]) -> None:
    """Puts a classification network's weights (torchvision's names) into the parts that a detector has of it.

    `parts` together hold the trunk; what the network has beyond them is left out, but for its fully connected layers,
    which go into `linears` in their order where the shapes agree (fc6 and fc7 of VGG-16 and AlexNet).
    Raises ValueError where the file does not hold the trunk's weights.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "features.1.conv.0.0.weight" in state:
        network = torchvision.models.mobilenet_v2(weights=None).features
        _load([network], {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}, path)
        blocks = {name.split(".")[0] for part in parts for name in part.state_dict()}
        folded = fold_batch_norms(network[:18].eval()).state_dict()
        state = {name: value for name, value in folded.items() if name.split(".")[0] in blocks}
    dense = [name.removesuffix(".weight") for name in state if re.fullmatch(r"classifier\.\d+\.weight", name)]
    trunk = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    _load(parts, trunk, path)
    for layer, name in zip(linears, dense, strict=False):
        if layer.weight.shape == state[f"{name}.weight"].shape:
            layer.load_state_dict({part: state[f"{name}.{part}"] for part in ("weight", "bias")})


def _load(modules: list[nn.Module], state: dict[str, Tensor], path: str | Path) -> None:
    left, missing = set(state), set()
    for module in modules:
        mine = {name: state[name] for name in module.state_dict() if name in state}
        left -= mine.keys()
        try:
            missing |= set(module.load_state_dict(mine, strict=False).missing_keys)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit this trunk: {error}") from error
    wrong = [key for key in sorted(missing | left) if not key.endswith("num_batches_tracked")]
    if wrong:
        raise ValueError(f"{path} does not fit this trunk: {len(wrong)} tensors differ, first {wrong[0]}")
