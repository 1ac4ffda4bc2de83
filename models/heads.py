"""What looks into a RoI: the box head, the mask head, the keypoint head, and the RPN's convolutional head.

N RoIs, C channels, K classes (background not counted), J joints.
"""

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
    """One level (B, C, h, w) -> objectness logits (B, h*w*A), anchor deltas (B, h*w*A, 4), by row, column, anchor."""

    def __init__(self, channels: int, num_anchors: int, depth: int) -> None:
        super().__init__()
        self.convs = conv_stack(channels, [channels] * depth)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.convs(feature)
        logits = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.deltas(hidden).permute(0, 2, 3, 1).flatten(1)
        return logits, deltas.unflatten(1, (-1, 4))


class BoxHead(nn.Module):
    """Pooled RoIs (N, C, 7, 7) -> class logits (N, K + 1), column 0 background, and box deltas (N, K, 4)."""

    def __init__(self, channels: int, num_classes: int, convs: Sequence[int], fcs: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.convs = conv_stack(channels, convs, norm)
        sizes = [(convs[-1] if convs else channels) * 49, *fcs]
        self.fcs = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        self.classes = nn.Linear(sizes[-1], num_classes + 1)
        self.deltas = nn.Linear(sizes[-1], num_classes * 4)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)  # Fast R-CNN section 4.1
        nn.init.zeros_(self.classes.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.convs(pooled).flatten(1)
        for fc in self.fcs:
            hidden = F.relu(fc(hidden))
        return self.classes(hidden), self.deltas(hidden).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Pooled RoIs (N, C, 14, 14) -> mask logits (N, K, 28, 28)."""

    side = 28

    def __init__(self, channels: int, num_classes: int, convs: Sequence[int], hidden: int, norm: Norm) -> None:
        super().__init__()
        self.convs = conv_stack(channels, convs, norm)
        self.upsample = nn.ConvTranspose2d(convs[-1], hidden, 2, stride=2)
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
