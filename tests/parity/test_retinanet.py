"""torchvision's two RetinaNets, randomly initialised and imported, against torchvision's own pipeline: what it detects
on the same canvas, and what it loses on the same truth.
"""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from models.dense import DenseNetwork
from models.importers import from_torchvision
from models.network import Target
from tests.parity.test_torchvision import BOX_TOLERANCE, TOLERANCE, canvas, settle

NAMES = ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"]
NUM_CLASSES = 4  # and the channel for the background, that torchvision has and never trains
Pair = tuple[Any, DenseNetwork]


@torch.no_grad()
def make(name: str) -> Any:
    """Random last layers whose scores and boxes differ from anchor to anchor."""
    torch.manual_seed(0)
    build = getattr(torchvision.models.detection, name)
    model = build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1)
    settle(model)
    model.eval()
    features = list(model.backbone(canvas(64, 96, 1)[0]).values())
    found = model.head(features)
    classes, boxes = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    classes.weight *= 2.0 / found["cls_logits"].std()
    boxes.weight *= 0.25 / found["bbox_regression"].std()
    classes.bias[:] = -3.0
    classes.bias.unflatten(0, (-1, NUM_CLASSES + 1))[:, 0] = -200.0
    return model


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> Pair:
    theirs = make(request.param)
    ours, spec = from_torchvision(theirs.state_dict())
    assert (spec.architecture, len(spec.classes)) == ("retinanet_r50_fpn", NUM_CLASSES)
    assert spec.options["v2"] == request.param.endswith("v2")
    assert isinstance(ours, DenseNetwork)
    return theirs, ours


@torch.no_grad()
def detected(model: Any, images: Tensor, sizes: Tensor) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """torchvision's steps from the canvas on, as RetinaNet.forward has them."""
    shapes = [(int(h), int(w)) for h, w in sizes]
    features = list(model.backbone(images).values())
    outputs = model.head(features)
    anchors = model.anchor_generator(ImageList(images, shapes), features)
    per_level = [level.shape[2] * level.shape[3] * 9 for level in features]
    split = {name: list(values.split(per_level, dim=1)) for name, values in outputs.items()}
    return model.postprocess_detections(split, [list(each.split(per_level)) for each in anchors], shapes), features


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (160, 128)])
def test_same_canvas_same_answer(pair: Pair, height: int, width: int, batch: int) -> None:
    theirs, ours = pair
    images, sizes = canvas(height, width, batch)
    wanted, features = detected(theirs, images, sizes)
    with torch.no_grad():
        found = ours(images, sizes)
        levels = ours.backbone(images)
    assert len(levels) == len(features) == 5
    assert all(torch.equal(*each) for each in zip(levels, features, strict=True))
    assert min(len(image["boxes"]) for image in wanted) >= 100
    assert found.count.tolist() == [len(image["boxes"]) for image in wanted]
    for i, truth in enumerate(wanted):
        count = int(found.count[i])
        torch.testing.assert_close(found.scores[i, :count], truth["scores"], atol=TOLERANCE, rtol=0)
        assert torch.equal(found.labels[i, :count] + 1, truth["labels"])
        torch.testing.assert_close(found.boxes[i, :count], truth["boxes"], atol=BOX_TOLERANCE, rtol=0)
        assert not found.boxes[i, count:].any()
        assert bool((found.labels[i, count:] == -1).all())


def test_same_truth_same_losses(pair: Pair) -> None:
    """v2's box loss is another (GIoU); ours is v1's for both."""
    theirs, ours = pair
    images, sizes = canvas(128, 96, 2)
    truth = [torch.tensor([[10.0, 12, 50, 70], [30, 40, 90, 100]]), torch.zeros(0, 4)]
    labels = [torch.tensor([0, 3]), torch.zeros(0, dtype=torch.int64)]
    features = list(theirs.backbone(images).values())
    anchors = theirs.anchor_generator(ImageList(images, [(int(h), int(w)) for h, w in sizes]), features)
    targets = [{"boxes": boxes, "labels": own + 1} for boxes, own in zip(truth, labels, strict=True)]
    theirs.head.regression_head._loss_type = "l1"
    with torch.no_grad():
        wanted = theirs.compute_loss(targets, theirs.head(features), anchors)
        found = ours.losses(images, sizes, [target(*each) for each in zip(truth, labels, strict=True)], generator())
    torch.testing.assert_close(found["classes"], wanted["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["boxes"], wanted["bbox_regression"], rtol=1e-5, atol=0)


def target(boxes: Tensor, labels: Tensor) -> Target:
    none = torch.zeros(len(boxes), dtype=torch.bool)
    return Target(boxes, labels, torch.zeros(0, 1, 1), none, torch.zeros(0, 1, 3), none, torch.zeros(0, 4))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_names_of_the_first_release_and_a_model_without_background() -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    nn.init.normal_(model.head.classification_head.cls_logits.bias)
    state = model.state_dict()
    old = {
        name.replace(f"conv.{i}.0.", f"conv.{2 * i}.") if name.startswith("head.") else name: value
        for name, value in state.items()
        for i in [int(name.split("conv.")[1][0]) if "_head.conv." in name else 0]
    }
    ours, spec = from_torchvision(old, ["cat", "dog"])
    assert spec.classes == ("cat", "dog")
    assert isinstance(ours, DenseNetwork)
    assert torch.equal(ours.detector.head.classes.bias, state["head.classification_head.cls_logits.bias"])
    assert torch.equal(ours.detector.head.box_convs[6].weight, state["head.regression_head.conv.3.0.weight"])
    only, spec = from_torchvision(state, ["dog"])
    assert torch.equal(only.detector.head.classes.bias, state["head.classification_head.cls_logits.bias"][1::2])
