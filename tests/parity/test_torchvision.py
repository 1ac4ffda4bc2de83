"""The five R-CNNs of torchvision, randomly initialised and imported, against torchvision's own pipeline.

Both get the same canvas, so that what is compared is the network. Random detectors spread their scores around one value
and find nothing; `spread` widens the last layers so that there are detections of many classes and sizes.
"""

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from models.importers import from_torchvision
from models.regions import Predictions, RegionNetwork

NAMES = (
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn_v2",
)
# Kernels may take another path where another number of rows is computed at once: torchvision runs the box head on the
# proposals that exist, and the heads on the detections that exist; ours on padded RoIs and on chosen ones.
BOX_TOLERANCE = 1e-3  # canvas pixels, float32 at coordinates of hundreds
TOLERANCE = 1e-5


SPREAD = {"cls_logits": 2.0, "rpn.head.bbox_pred": 0.4, "cls_score": 2.0, "box_predictor.bbox_pred": 1.5}


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Random weights whose scores and boxes differ from RoI to RoI: each last layer is scaled to a given deviation."""
    layers = {name: m for name, m in model.named_modules() if any(name.endswith(end) for end in SPREAD)}
    images, sizes = canvas(256, 320, 1)
    for name, layer in layers.items():
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output.flatten()))
        torchvision_answer(model, images, sizes)
        hook.remove()
        deviation = next(value for end, value in SPREAD.items() if name.endswith(end))
        layer.weight *= deviation / torch.cat(seen).std()


def make(name: str) -> tuple[torch.nn.Module, RegionNetwork]:
    torch.manual_seed(0)
    options = {} if name.startswith("keypoint") else {"num_classes": 7}
    theirs = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, **options)
    # With statistics of ones and zeros a deep random trunk drowns its input; real statistics keep it visible.
    theirs.train()
    with torch.no_grad():
        for norm in theirs.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = None
        theirs.backbone(torch.randn(2, 3, 128, 128))
    theirs.eval()
    spread(theirs)
    ours, _ = from_torchvision(theirs.state_dict())
    return theirs, ours


@torch.no_grad()
def torchvision_answer(model: torch.nn.Module, images: Tensor, sizes: Tensor) -> tuple[list[dict], OrderedDict]:
    shapes = [(int(h), int(w)) for h, w in sizes]
    features = model.backbone(images)
    proposals, _ = model.rpn(ImageList(images, shapes), features)
    for pool in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
        if getattr(model.roi_heads, pool) is not None:
            getattr(model.roi_heads, pool).scales = None  # inferred from the pictures, kept from the first call on
    found, _ = model.roi_heads(features, proposals, shapes)
    return found, features


def canvas(height: int, width: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height + batch)
    sizes = torch.tensor([[height - 7 * i, width - 20 * i] for i in range(batch)])
    images = torch.nn.functional.interpolate(
        torch.randn(batch, 3, height // 16, width // 16, generator=generator), size=(height, width), mode="bicubic"
    )
    for i, (h, w) in enumerate(sizes.tolist()):
        images[i, :, h:], images[i, :, :, w:] = 0, 0
    return images, sizes


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, RegionNetwork]:
    return make(request.param)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(256, 320), (416, 288)])
def test_same_canvas_same_answer(pair, height: int, width: int, batch: int) -> None:
    theirs, ours = pair
    images, sizes = canvas(height, width, batch)
    found, features = torchvision_answer(theirs, images, sizes)
    with torch.no_grad():
        answer = ours(images, sizes)
    assert sum(len(f["boxes"]) for f in found) >= 5 * batch, "no detections: the comparison would be empty"
    assert len(answer.features) == 4
    for level, feature in zip(features.values(), answer.features, strict=False):  # theirs has p6 as well
        assert torch.equal(level, feature)
    for i, truth in enumerate(found):
        compare_image(ours, answer, i, truth)


def compare_image(ours: RegionNetwork, answer: Predictions, i: int, truth: dict[str, Tensor]) -> None:
    count = int(answer.count[i])
    assert count == len(truth["boxes"])
    torch.testing.assert_close(answer.scores[i, :count], truth["scores"], atol=TOLERANCE, rtol=0)
    assert torch.equal(answer.labels[i, :count] + 1, truth["labels"])
    torch.testing.assert_close(answer.boxes[i, :count], truth["boxes"], atol=BOX_TOLERANCE, rtol=0)
    assert not answer.boxes[i, count:].any()
    assert not answer.scores[i, count:].any()
    assert bool((answer.labels[i, count:] == -1).all())
    rois = torch.cat((torch.full((count, 1), float(i)), truth["boxes"]), dim=1)
    with torch.no_grad():
        if "masks" in truth:
            masks = ours.mask_probabilities(answer.features, rois, truth["labels"] - 1)
            torch.testing.assert_close(masks, truth["masks"][:, 0], atol=TOLERANCE, rtol=0)
