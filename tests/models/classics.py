"""A tiny model of each system before the region proposal network: random, with many detections of unequal scores."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import ProposalRule, Spec, build
from models.network import Network, Target
from models.overfeat import OverFeat
from models.proposed import ProposalNetwork
from models.regions import with_batch_index
from models.servable import normalise
from tests.models.tiny import CANVAS, CLASSES, LAST, Batch, pictures

WINDOWS = ProposalRule("sliding_window", max_proposals=60)
SMALL = {"fc": 32, "max_detections": 8}
CROPS = {**SMALL, "side": 64, "box_samples": 16}  # VGG-16 on one region of 224 x 224 takes a third of a second
SPECS = {
    **{
        name: Spec(name, CLASSES, None, CANVAS, SMALL, WINDOWS)
        for name in (
            "r_cnn_alexnet", "r_cnn_mobilenetv2", "spp_net_alexnet", "spp_net_vgg16", "spp_net_mobilenetv2",
            "fast_rcnn_vgg16", "fast_rcnn_mobilenetv2",
        )
    },
    "r_cnn_vgg16": Spec("r_cnn_vgg16", CLASSES, None, CANVAS, CROPS, WINDOWS),
    **{
        name: Spec(name, CLASSES, None, CANVAS, {"hidden": 16, "max_detections": 8, "scales": [32, 20]})
        for name in ("overfeat_alexnet", "overfeat_mobilenetv2")
    },
}  # fmt: skip
LIGHT = [name for name in SPECS if name.endswith("mobilenetv2")]


def make(name: str, classes: tuple[str, ...] = CLASSES, **options: Any) -> tuple[Network, Spec]:
    spec = replace(SPECS[name], classes=classes, options={**SPECS[name].options, **options})
    torch.manual_seed(0)
    model = build(spec).eval()
    spread(model)
    return model, spec


@torch.no_grad()
def spread(model: Network) -> None:
    """Scales each layer on two pictures, so that scores differ and no two detections are as good as equal."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    hooks = [layer.register_forward_hook(partial(_scale, set(), name)) for name, layer in layers.items()]
    images, sizes = pictures((96, 128), [(96, 128), (90, 100)])
    if isinstance(model, ProposalNetwork):
        rois = with_batch_index(proposals(sizes, 30))
        model.box_head(model._pool_boxes(model.backbone(normalise(images, sizes)), rois))
    else:
        assert isinstance(model, OverFeat)
        model._look(normalise(images, sizes))
    for hook in hooks:
        hook.remove()


def _scale(seen: set[str], name: str, layer: nn.Conv2d, _inputs: Any, output: Tensor) -> Tensor | None:
    if seen:
        return None
    seen.add(name)
    deviation = float(output.std())
    if deviation < 1e-9:  # deltas of a ridge that is not fitted
        return None
    last = {"classifier.outputs": 2.0, "regressor.outputs": 0.3, **LAST}.get(name, 1.0)
    factor = last / deviation
    layer.weight *= factor
    if layer.bias is not None:
        layer.bias *= factor
    return output * factor


def proposals(sizes: Tensor, count: int, seed: int = 0) -> Tensor:
    """(B, count, 4) inside each picture."""
    corners = torch.rand(len(sizes), count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=2).values
    corners[:, :, 1] = torch.maximum(corners[:, :, 1], corners[:, :, 0] + 0.05).clamp(max=1)
    return (corners * sizes.flip(1)[:, None, None]).flatten(2)


def inputs(model: Network, batch: Batch, count: int = 20) -> list[Tensor]:
    """Normalised, as `forward` takes them."""
    images, sizes = batch
    given = [proposals(sizes, count)] if model.takes_proposals else []
    return [normalise(images, sizes), sizes, *given]


def target(boxes: list[list[float]], given: Tensor, labels: list[int] | None = None, size: int = 128) -> Target:
    count = len(boxes)
    return Target(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * count, dtype=torch.int64),
        masks=torch.zeros(count, size, size, dtype=torch.uint8),
        has_mask=torch.zeros(count, dtype=torch.bool),
        keypoints=torch.zeros(count, 0, 3),
        has_keypoints=torch.zeros(count, dtype=torch.bool),
        ignore=torch.zeros(0, 4),
        proposals=given,
    )
