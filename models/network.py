"""What training, export, evaluation and the rest ask of a model, whichever system of the family it is.

Inference is a pure function whose output shapes depend on the batch and the canvas alone; training is another method,
`losses`, and nothing hangs on `self.training`.
B images on a canvas (H, W), D detections, N RoIs, J joints, G truths of an image.
"""

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.backbones import Backbone
from models.heads import KeypointHead, MaskHead


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers of inference and training; the defaults are torchvision's for two stages."""

    pre_nms: int = 1000  # candidates of a level before NMS
    num_proposals: int = 1000
    rpn_nms_iou: float = 0.7
    score_floor: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    train_pre_nms: int = 2000
    train_num_proposals: int = 2000
    rpn_samples: int = 256
    box_samples: int = 512
    foreground_fraction: float = 0.25
    head_samples: int = 0  # of an image, at most, that train masks, and that train keypoints; 0: all foreground
    box_loss_weight: float = 1.0  # lambda of Fast R-CNN's equation 1
    background_floor: float = 0.0  # the least IoU with an object that a negative proposal has, in pictures with any
    merge: float = 0.0  # OverFeat's: boxes nearer than this are merged; 0: there is nothing to merge
    keypoint_sigma: float = 0.0  # cells; of the Gaussian that a joint's target is, 0: one-hot


class Predictions(NamedTuple):
    """A padded batch on the canvas: count (B,), boxes (B, D, 4), scores (B, D), labels (B, D), and the features, maps
    named by `Backbone.levels`.

    Labels index the classes (no background) and are -1 past count, where boxes and scores are 0.
    """

    count: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    features: list[Tensor]


@dataclass(slots=True)
class Target:
    """The truth of one image on its canvas: boxes (G, 4), labels (G,), masks (G, H, W) uint8 and has_mask (G,),
    keypoints (G, J, 3) x, y, v and has_keypoints (G,); ignore (I, 4): regions neither object nor background; proposals
    (P, 4), for networks that take them.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    has_mask: Tensor
    keypoints: Tensor
    has_keypoints: Tensor
    ignore: Tensor
    proposals: Tensor = field(default_factory=lambda: torch.zeros(0, 4))

    def to(self, device: torch.device | str) -> "Target":
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class Network(nn.Module):
    """A detector: `forward` detects, `losses` is what is minimised, heads read RoIs of the features."""

    takes_proposals = False  # a third input of `forward`, see models/proposed.py
    exact: tuple[str, ...] = ()  # layers that stay in float32 where the rest is halved: they place every box
    mask_head: MaskHead | None
    keypoint_head: KeypointHead | None

    def __init__(self, backbone: Backbone, rules: Rules) -> None:
        super().__init__()
        self.backbone, self.rules = backbone, rules

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        """images (B, 3, H, W) normalised, padding 0; sizes (B, 2) int64 height, width of each picture on the canvas."""
        raise NotImplementedError

    def losses(
        self, images: Tensor, sizes: Tensor, targets: list[Target], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of a batch by name; their sum is what is minimised."""
        raise NotImplementedError

    def mask_probabilities(self, features: list[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """(N, M, M) of RoIs (N, 5) batch index and canvas xyxy, each for its own class in labels (N,)."""
        raise AssertionError("this model has no mask head")

    def keypoint_heatmaps(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """(N, J, 56, 56) logits of RoIs (N, 5) batch index and canvas xyxy."""
        raise AssertionError("this model has no keypoint head")

    def layers(self) -> dict[str, tuple[str, ...]]:
        """The layers of the trunk by name, from the pixels on, with the prefixes of their parameters' names."""
        return {name: tuple(f"backbone.{p}" for p in prefixes) for name, prefixes in self.backbone.layers.items()}

    def before(self, layer: str) -> tuple[str, ...]:
        """The prefixes of all parameters of the trunk before `layer`: what stays as it is in fine-tuning from there on.

        Raises ValueError where the trunk has no such layer.
        """
        layers = self.layers()
        if layer not in layers:
            raise ValueError(f"this trunk has no layer {layer!r}; it has {', '.join(layers)}")
        earlier = list(layers.values())[: list(layers).index(layer)]
        return tuple(prefix for prefixes in earlier for prefix in prefixes)

    def classifier_trunk(self) -> list[nn.Module]:
        """The parts whose state dicts together are a classification network's, by its own names."""
        return [self.backbone.trunk]

    def classifier_layers(self) -> list[nn.Linear]:
        """The fully connected layers that such a network has, too, in order (fc6, fc7); none in most."""
        return []
