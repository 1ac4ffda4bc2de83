"""What looks into a RoI (box, mask and keypoint heads), and what looks at every cell (those of RPN and RetinaNet).

B images, N RoIs, C channels, A anchors a cell, K classes (background not counted), J joints.
"""

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module] | None


def conv_stack(channels: int, widths: Sequence[int], norm: Norm = None) -> nn.Sequential:
    """3x3 convolutions, each with its ReLU; with a norm between them the convolution has no bias."""
    blocks: list[nn.Module] = []
    for width in widths:
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=norm is None)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        blocks += [conv, nn.ReLU(inplace=True)] if norm is None else [conv, norm(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*blocks)


class RPNHead(nn.Module):
    """A level (B, C, h, w) -> objectness logits (B, h*w*A, 1), anchor deltas (B, h*w*A, 4), by row, column, anchor."""

    num_classes = 1

    def __init__(self, channels: int, num_anchors: int, depth: int) -> None:
        super().__init__()
        self.convs = conv_stack(channels, [channels] * depth)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        _start_small(self)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.convs(feature)
        return _by_anchor(self.objectness(hidden), 1), _by_anchor(self.deltas(hidden), 4)


class RetinaHead(nn.Module):
    """One level (B, C, h, w) -> class logits (B, h*w*A, K), anchor deltas (B, h*w*A, 4), by row, column, anchor.

    RetinaNet section 4: two stacks of `depth` convolutions, and a sigmoid a class, which starts at `prior`.
    """

    def __init__(
        self, channels: int, num_anchors: int, num_classes: int, depth: int, norm: Norm, prior: float = 0.01
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_convs = conv_stack(channels, [channels] * depth, norm)
        self.box_convs = conv_stack(channels, [channels] * depth, norm)
        self.classes = nn.Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        _start_small(self)
        assert self.classes.bias is not None
        nn.init.constant_(self.classes.bias, -math.log((1 - prior) / prior))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        logits = _by_anchor(self.classes(self.class_convs(feature)), self.num_classes)
        return logits, _by_anchor(self.deltas(self.box_convs(feature)), 4)


def _start_small(head: nn.Module) -> None:
    """Weights of deviation 0.01 and no biases, in every convolution (Faster R-CNN section 3.1.3, RetinaNet 4.1)."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _by_anchor(maps: Tensor, values: int) -> Tensor:
    """(B, A * values, h, w) -> (B, h * w * A, values)."""
    return maps.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, values))


class BoxHead(nn.Module):
    """Pooled RoIs (N, C, ...) of `cells` values a channel -> class logits (N, K + 1), column 0 background, and box
    deltas (N, K, 4).

    Convolutions, then fully connected layers: two of them on FPN, four and one in torchvision's v2, fc6 and fc7 on VGG.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        convs: Sequence[int],
        fcs: Sequence[int],
        norm: Norm = None,
        cells: int = 49,
    ) -> None:
        super().__init__()
        self.convs = conv_stack(channels, convs, norm)
        sizes = [(convs[-1] if convs else channels) * cells, *fcs]
        self.fcs = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        self.classes, self.deltas = _predictors(sizes[-1], num_classes)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.convs(pooled).flatten(1)
        for fc in self.fcs:
            hidden = F.relu(fc(hidden))
        return self.classes(hidden), self.deltas(hidden).unflatten(1, (-1, 4))


class MeanBoxHead(nn.Module):
    """What a trunk's conv5 made of the RoIs (N, C, h, w), averaged -> as BoxHead (He et al. 2016, appendix A)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classes, self.deltas = _predictors(channels, num_classes)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        hidden = pooled.mean((2, 3))
        return self.classes(hidden), self.deltas(hidden).unflatten(1, (-1, 4))


def _predictors(inputs: int, num_classes: int) -> tuple[nn.Linear, nn.Linear]:
    """The last layers, of class logits and of deltas (Fast R-CNN section 4.1)."""
    classes, deltas = nn.Linear(inputs, num_classes + 1), nn.Linear(inputs, num_classes * 4)
    nn.init.normal_(classes.weight, std=0.01)
    nn.init.normal_(deltas.weight, std=0.001)
    nn.init.zeros_(classes.bias)
    nn.init.zeros_(deltas.bias)
    return classes, deltas


class MaskHead(nn.Module):
    """Pooled RoIs (N, C, m, m) -> mask logits (N, K, side, side), side = 2 m: 28, or 14 behind conv5 of a C4 model."""

    def __init__(
        self, channels: int, num_classes: int, convs: Sequence[int], hidden: int, norm: Norm = None, side: int = 28
    ) -> None:
        super().__init__()
        self.side = side
        self.convs = conv_stack(channels, convs, norm)
        self.upsample = nn.ConvTranspose2d(convs[-1] if convs else channels, hidden, 2, stride=2)
        self.logits = nn.Conv2d(hidden, num_classes, 1)
        for layer in (self.upsample, self.logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.logits(F.relu(self.upsample(self.convs(pooled))))


class KeypointHead(nn.Module):
    """Pooled RoIs (N, C, 14, 14) -> heatmap logits (N, J, 56, 56)."""

    side = 56

    def __init__(self, channels: int, num_keypoints: int, convs: Sequence[int]) -> None:
        super().__init__()
        self.convs = conv_stack(channels, convs)
        self.upsample = nn.ConvTranspose2d(convs[-1], num_keypoints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.upsample.weight, mode="fan_out", nonlinearity="relu")
        assert self.upsample.bias is not None
        nn.init.zeros_(self.upsample.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.interpolate(self.upsample(self.convs(pooled)), scale_factor=2.0, mode="bilinear", align_corners=False)
