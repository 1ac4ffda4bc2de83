"""Trunks and their pyramids: images (B, 3, H, W) -> [p2, p3, p4, p5, p6], strides 4 to 64, all of one width.

The trunks are torchvision's classification networks; their BatchNorm statistics never change here (recipes with small
batches must not touch them).
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

Norm = Callable[[int], nn.Module] | None
RESNET_CHANNELS = {"resnet18": 64, "resnet34": 64, "resnet50": 256, "resnet101": 256}


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


class Backbone(nn.Module):
    """A trunk with taps at strides 4, 8, 16, 32 and a feature pyramid on them (FPN section 3); p6 is p5 subsampled."""

    def __init__(self, trunk: nn.Module, channels: list[int], width: int, norm: Norm = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), norm_layer=norm)
        self.width = width

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.fpn(OrderedDict(self.trunk(images))).values())


def resnet_fpn(depth: str, width: int, norm: str, norm_eps: float, norm_in_fpn: bool) -> Backbone:
    """ResNet-18/34/50/101 (`depth` is torchvision's name) with FPN."""
    if depth not in RESNET_CHANNELS:
        raise ValueError(f"depth is {depth!r}; it can be {', '.join(RESNET_CHANNELS)}")
    layer = norm_layer(norm, norm_eps)
    body = getattr(torchvision.models, depth)(weights=None, norm_layer=layer)
    trunk = IntermediateLayerGetter(body, {f"layer{i}": f"p{i + 1}" for i in range(1, 5)})
    first = RESNET_CHANNELS[depth]
    return Backbone(trunk, [first << i for i in range(4)], width, layer if norm_in_fpn else None)


def mobilenetv2_fpn(width: int) -> Backbone:
    """MobileNetV2 with FPN, every BatchNorm folded into its convolution.

    The statistics are fixed anyway, and on a CPU a separate scale and shift costs as much memory traffic as the
    depthwise convolutions themselves. The last 1x1 convolution to 1280 channels serves classification and is left out.
    """
    features = torchvision.models.mobilenet_v2(weights=None).features[:18]
    trunk = IntermediateLayerGetter(fold_batch_norms(features.eval()), {"3": "p2", "6": "p3", "13": "p4", "17": "p5"})
    return Backbone(trunk, [24, 32, 96, 320], width)


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


def load_trunk(model: nn.Module, path: str | Path) -> None:
    """Puts ImageNet weights (torchvision's names: `features.*` or a ResNet's) into the trunk of a detector.

    Raises ValueError where the file does not hold the trunk's weights.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    backbone = model.backbone
    assert isinstance(backbone, Backbone)
    if any(key.startswith("features.") for key in state):
        network = torchvision.models.mobilenet_v2(weights=None).features
        _load(network, {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}, path)
        source = fold_batch_norms(network[:18].eval())
        state = {k: v for k, v in source.state_dict().items()}
    _load(backbone.trunk, {k: v for k, v in state.items() if not k.startswith("fc.")}, path)


def _load(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    missing, unexpected = module.load_state_dict(state, strict=False)
    wrong = [key for key in [*missing, *unexpected] if not key.endswith("num_batches_tracked")]
    if wrong:
        raise ValueError(f"{path} does not fit this trunk: {len(wrong)} tensors differ, first {wrong[0]}")
