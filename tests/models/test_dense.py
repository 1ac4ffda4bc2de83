"""Dense detectors: how many anchors, which pairs of anchor and class are candidates, NMS by class, and learning."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models import checkpoint, dense
from models.checkpoint import Spec
from models.dense import DenseNetwork
from models.imbalance import HardExamples
from models.servable import normalise
from tests.models import tiny
from tests.models.test_networks import shown, square


def test_about_a_hundred_thousand_anchors() -> None:
    """As RetinaNet's docstring says; the paper calls it about 100k at 600 pixels."""
    with torch.device("meta"):
        model = checkpoint.build(Spec("retinanet_r50_fpn", ("person",)))
    assert isinstance(model, DenseNetwork)
    counts = {}
    for height, width in ((608, 800), (608, 1024)):  # of 600 x 800 and 600 x 1000
        with torch.device("meta"):
            images = torch.zeros(1, 3, height, width)
            levels = model.backbone(images)
        counts[width] = sum(len(level) for level in model.detector.anchors(levels, images.shape))
    assert counts == {800: 91_260, 1024: 116_712}


def test_nine_anchors_a_cell_start_at_the_prior() -> None:
    model, _ = tiny.make("retinanet_mobilenetv2_fpn")
    fresh = checkpoint.build(tiny.SPECS["retinanet_mobilenetv2_fpn"])
    assert isinstance(model, DenseNetwork)
    assert isinstance(fresh, DenseNetwork)
    assert len(model.detector.get_buffer("cell0")) == 9
    images, sizes = tiny.pictures((64, 64), [(64, 64)])
    with torch.no_grad():
        logits, _ = fresh.detector(fresh.backbone(normalise(images, sizes)))
    torch.testing.assert_close(torch.cat(logits, 1).sigmoid().mean(), torch.tensor(0.01), rtol=0.05, atol=0)


@pytest.mark.parametrize(("anchors", "classes", "count"), [(50, 7, 20), (5, 3, 12), (3, 2, 10), (40, 1, 9)])
def test_the_best_pairs_are_those_of_all_pairs(anchors: int, classes: int, count: int) -> None:
    generator = torch.Generator().manual_seed(anchors)
    logits = torch.randn(2, anchors, classes, generator=generator)
    deltas, cells = (
        torch.zeros(2, anchors, 4),
        torch.arange(anchors)[:, None] * torch.ones(4) + torch.tensor([0, 0, 9, 9]),
    )
    boxes, scores, labels = dense.top(logits, deltas, cells, count)
    for image in range(2):
        best, pair = logits[image].flatten().topk(min(count, anchors * classes))
        torch.testing.assert_close(scores[image, : len(best)], best.sigmoid(), rtol=1e-6, atol=0)
        assert torch.equal(labels[image, : len(best)], pair % classes)
        assert torch.equal(boxes[image, : len(best), 0], (pair // classes).float())
        assert bool((scores[image, len(best) :] == -1).all())


def detections(model: DenseNetwork, *rows: list[tuple[Tensor, float, int]]) -> list[Tensor]:
    boxes, scores, labels = (torch.tensor([[row[i] for row in image] for image in rows]) for i in range(3))
    return list(model._detections(boxes, scores, labels))


def test_classes_do_not_suppress_each_other() -> None:
    model, _ = tiny.make("retinanet_r50_fpn", max_detections=5)
    assert isinstance(model, DenseNetwork)
    one: Any = [0.0, 0, 10, 10]
    near: Any = [0.0, 0, 10, 9]
    rows = [(near, 0.6, 2), (one, 0.9, 2), (one, 0.7, 0), ([50.0, 50, 60, 60], 0.05, 1), (one, -1.0, 1)]
    count, boxes, scores, labels = detections(model, rows)
    assert count.tolist() == [2], "at the floor is not above it"
    assert labels.tolist() == [[2, 0, -1, -1, -1]]
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.7, 0, 0, 0]]))
    assert boxes[0, 2:].abs().sum() == 0


def test_more_candidates_than_one_nms_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "MAX_CANDIDATES", 30)
    model, _ = tiny.make("retinanet_r50_fpn", max_detections=10)
    assert isinstance(model, DenseNetwork)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 200, 2, generator=generator) * 500
    boxes, scores = torch.cat((corners, corners + 40), 2), torch.rand(2, 200, generator=generator)
    labels = torch.randint(0, 3, (2, 200), generator=generator)
    few = model._detections(boxes, scores, labels)
    monkeypatch.setattr(dense, "MAX_CANDIDATES", 1000)
    for one, other in zip(few, model._detections(boxes, scores, labels), strict=True):
        assert torch.equal(one, other), "the best thirty decide the best ten"


def test_no_detections_at_all() -> None:
    model, _ = tiny.make("retinanet_mobilenetv2_fpn", score_floor=0.9999)
    images, sizes = tiny.pictures((96, 128), [(96, 128), (60, 90)])
    with torch.no_grad():
        found = model(normalise(images, sizes), sizes)
    assert found.count.tolist() == [0, 0]
    assert not found.boxes.any()
    assert bool((found.labels == -1).all())


def test_a_loss_by_name_is_an_option_of_the_checkpoint() -> None:
    model, spec = tiny.make("retinanet_mobilenetv2_fpn", loss={"kind": "ohem", "batch": 256})
    assert isinstance(model, DenseNetwork)
    assert model.loss == HardExamples(256)
    with pytest.raises(checkpoint.CheckpointError, match="does not take these options: loss is 'hinge'"):
        tiny.make("retinanet_mobilenetv2_fpn", loss={"kind": "hinge"})


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param({}, id="focal"),
        pytest.param({"kind": "cross_entropy"}, id="cross_entropy", marks=pytest.mark.slow),
        pytest.param({"kind": "ohem", "batch": 64, "one_to_three": True}, id="ohem", marks=pytest.mark.slow),
    ],
)
def test_one_picture_is_learnt(loss: dict[str, Any]) -> None:
    model, _ = tiny.make("retinanet_mobilenetv2_fpn", loss=loss)
    target = square(0)
    images, sizes = shown(target)
    pixels = normalise(images, sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator()
    for _ in range(40):
        total = torch.stack(list(model.losses(pixels, sizes, [target], generator).values())).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(pixels, sizes)
    assert found.scores[0, 0] > 0.5
    assert (found.boxes[0, 0] - target.boxes[0]).abs().max() < 8
