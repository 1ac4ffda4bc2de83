"""The stages that get exported: what a bundle's graphs compute, from the served picture's own bytes on.

The contract is in docs/architecture.md. Normalisation is part of `detect`, so that no reader can get it wrong.
"""

import torch
from torch import Tensor, nn

from models.network import Network
from models.proposed import scanned

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, pixels in 0..1
STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor, sizes: Tensor, constants: Tensor | None = None) -> Tensor:
    """uint8 (B, H, W, 3) RGB -> float32 (B, 3, H, W), 0 outside each picture's own `sizes` (B, 2) height, width.

    The padding is 0 after normalisation, as in torchvision, whatever bytes stood there. `constants` (2, 3), MEAN and
    STD, are there where they must be on the device before the call, as for a CUDA graph.
    """
    if constants is None:
        mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    else:
        mean, std = constants.unbind()
    rows = torch.arange(images.shape[1], device=images.device) < sizes[:, :1]
    columns = torch.arange(images.shape[2], device=images.device) < sizes[:, 1:]
    inside = rows[:, :, None] & columns[:, None, :]
    # Channels first before the arithmetic: OpenVINO is slow at it over rows of three.
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return ((pixels - mean[:, None, None]) / std[:, None, None] * inside[:, None]).contiguous()


class DetectStage(nn.Module):
    """images uint8 (B, H, W, 3), sizes int64 (B, 2), for some proposals (B, R, 4) -> count, boxes, scores, labels, and
    each of the features."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor, proposals: Tensor | None = None) -> tuple[Tensor, ...]:
        given = () if proposals is None else (proposals, scanned)
        count, boxes, scores, labels, features = self.model(normalise(images, sizes), sizes, *given)
        return count, boxes, scores, labels, *features


class MaskStage(nn.Module):
    """The features, rois (N, 5), labels (N,) -> probabilities (N, M, M)."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> Tensor:
        *features, rois, labels = given
        return self.model.mask_probabilities(features, rois, labels)


class KeypointStage(nn.Module):
    """The features, rois (N, 5) -> heatmaps (N, J, 56, 56)."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> Tensor:
        *features, rois = given
        return self.model.keypoint_heatmaps(features, rois)
