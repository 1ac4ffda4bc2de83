"""R-CNN, SPP-net and Fast R-CNN: what proposals do to them, and what they are trained on."""

import dataclasses

import pytest
import torch

from models import boxes as box_ops
from models.checkpoint import CheckpointError, Spec, build
from models.network import Rules
from models.proposed import REGIONS_AT_ONCE, ProposalNetwork, Walk, looped, scanned
from models.regions import with_batch_index
from tests.models.classics import SPECS, inputs, make, proposals, target
from tests.models.tiny import CLASSES, pictures

KINDS = ("r_cnn_mobilenetv2", "spp_net_mobilenetv2", "fast_rcnn_mobilenetv2")
BATCH = pictures((96, 128), [(96, 128), (90, 100)])


def made(name: str, **options) -> ProposalNetwork:
    model, _ = make(name, **options)
    assert isinstance(model, ProposalNetwork)
    return model


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_batch_is_its_pictures_whatever_pads_the_proposals(name: str) -> None:
    model = made(name)
    images, sizes, boxes = inputs(model, BATCH, 20)
    fewer = boxes.clone()
    fewer[1, 7:] = 0
    together = model(images, sizes, fewer)
    alone = [model(images[:1], sizes[:1], boxes[:1]), model(images[1:], sizes[1:], boxes[1:, :7])]
    assert int(together.count.min()) > 0
    for index, single in enumerate(alone):
        for name in ("count", "boxes", "scores", "labels"):
            torch.testing.assert_close(getattr(together, name)[index], getattr(single, name)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_without_any_proposal_nothing_is_found(name: str) -> None:
    model = made(name)
    images, sizes, _ = inputs(model, BATCH)
    found = model(images, sizes, torch.zeros(2, 1, 4))
    assert found.count.tolist() == [0, 0]
    assert found.boxes.shape == (2, 8, 4)
    assert (found.labels == -1).all()


@pytest.mark.parametrize(
    ("count", "walk"),
    [(1, looped), (REGIONS_AT_ONCE, looped), (REGIONS_AT_ONCE + 5, looped), (REGIONS_AT_ONCE + 5, scanned)],
)
@torch.no_grad()
def test_a_trunk_on_some_regions_at_a_time_is_the_trunk_on_all(count: int, walk: Walk) -> None:
    model = made("r_cnn_mobilenetv2")
    images, sizes, _ = inputs(model, BATCH)
    rois = with_batch_index(proposals(sizes[:1], count))
    features = model.backbone(images)
    torch.testing.assert_close(model._pool_all(features, rois, walk), model._pool_boxes(features, rois))


@torch.no_grad()
def test_fitted_scores_are_each_class_s_own_sigmoid() -> None:
    model = made("spp_net_mobilenetv2", is_fitted=True)
    logits = torch.tensor([[9.0, 0.0, -1.5, 3.0]])
    torch.testing.assert_close(model._scores(logits), torch.tensor([[0.0, -1.5, 3.0]]).sigmoid())


@torch.no_grad()
def test_until_ridge_is_fitted_boxes_are_the_proposals() -> None:
    model = made("r_cnn_mobilenetv2")
    images, sizes, boxes = inputs(model, BATCH)
    found = model(images, sizes, boxes)
    for image, count in enumerate(found.count.tolist()):
        nearest = box_ops.iou(found.boxes[image, :count], boxes[image]).amax(1)
        torch.testing.assert_close(nearest, torch.ones(count), rtol=0, atol=1e-4)


def sampler(**rules) -> ProposalNetwork:
    model = made("fast_rcnn_mobilenetv2")
    model.rules = dataclasses.replace(Rules(box_samples=8, foreground_fraction=0.25, background_floor=0.1), **rules)
    return model


TRUTH = [0.0, 0.0, 100.0, 100.0]
NEAR = [[0.0, 0.0, 100.0, 60.0 + i] for i in range(20)]  # IoU of 0.6 and more
TOUCHING = [[0.0, 0.0, 40.0, 40.0 + i] for i in range(20)]  # 0.16 to 0.24
FAR = [[110.0, 110.0, 120.0, 120.0 + i] for i in range(20)]


def test_a_quarter_is_foreground_and_the_rest_touches_an_object() -> None:
    given = torch.tensor([*NEAR, *TOUCHING, *FAR])
    sample = sampler()._sample(given, target([TRUTH], given), torch.Generator().manual_seed(0))
    assert sample.foreground.tolist() == [True] * 2 + [False] * 6
    overlaps = box_ops.iou(sample.rois, torch.tensor([TRUTH]))[:, 0]
    assert (overlaps[:2] >= 0.5).all()
    assert ((overlaps[2:] >= 0.1) & (overlaps[2:] < 0.5)).all()


def test_r_cnn_on_vgg16_takes_224_by_default_and_other_multiples_of_32() -> None:
    spec = SPECS["r_cnn_vgg16"]
    for options, side, fc6 in (({}, 224, 25088), ({"side": 64}, 64, 2048)):
        model = build(dataclasses.replace(spec, options={"fc": 8, **options}))
        assert isinstance(model, ProposalNetwork)
        pooled = model.box_pooler([torch.zeros(1, 3, 96, 128)], torch.tensor([[0.0, 8, 8, 60, 90]]))
        assert pooled.shape == (1, 3, side, side)
        assert model.box_head(model.region_trunk(pooled))[0].shape == (1, len(CLASSES) + 1)
        assert model.classifier_layers()[0].in_features == fc6  # 25088: ImageNet's
    for side in (0, 227):
        with pytest.raises(CheckpointError, match="multiple of 32"):
            build(dataclasses.replace(spec, options={"side": side}))


def test_r_cnn_takes_any_background() -> None:
    given = torch.tensor([*FAR])
    sample = sampler(background_floor=0.0)._sample(given, target([TRUTH], given), torch.Generator())
    assert sample.foreground.tolist() == [True] + [False] * 7  # the truth itself is a RoI, too


def test_pictures_without_objects_give_background() -> None:
    given = torch.tensor([*FAR])
    sample = sampler()._sample(given, target([], given), torch.Generator())
    assert sample.foreground.tolist() == [False] * 8


def test_difficult_objects_are_neither() -> None:
    given = torch.tensor([*NEAR])
    truth = target([], given)
    truth.ignore = torch.tensor([TRUTH])
    assert len(sampler()._sample(given, truth, torch.Generator()).rois) == 0


@pytest.mark.parametrize("name", KINDS)
def test_losses_reach_what_is_trained(name: str) -> None:
    model = made(name)
    images, sizes, boxes = inputs(model, BATCH)
    targets = [target([[10.0, 20, 80, 70]], boxes[0], [1]), target([], boxes[1])]
    found = model.losses(images, sizes, targets, torch.Generator().manual_seed(0))
    assert found.keys() == ({"classes", "boxes"} if name.startswith("fast") else {"classes"})
    torch.stack(list(found.values())).sum().backward()
    for layer in (model.box_head.classes, model.box_head.fcs[0], next(model.parameters())):
        gradient = layer.grad if isinstance(layer, torch.Tensor) else layer.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_lambda_weighs_the_boxes_alone() -> None:
    losses = []
    for weight in (1.0, 0.5, 0.0):
        model = made("fast_rcnn_mobilenetv2", box_loss_weight=weight)
        images, sizes, given = inputs(model, BATCH, 20)
        truths = [target([[10, 10, 60, 70]], each) for each in given]
        losses.append(model.losses(images, sizes, truths, torch.Generator().manual_seed(0)))
    whole, half, none = losses
    assert whole["boxes"] > 0
    torch.testing.assert_close(half["boxes"], whole["boxes"] / 2)
    assert none["boxes"] == 0
    assert whole["classes"] == half["classes"] == none["classes"]


def test_a_spec_without_its_rule_is_refused() -> None:
    with pytest.raises(CheckpointError, match="needs proposals"):
        build(dataclasses.replace(SPECS["fast_rcnn_mobilenetv2"], proposals=None))
    with pytest.raises(CheckpointError, match="takes no proposals"):
        build(Spec("person_mobilenetv2_fpn", CLASSES, proposals=SPECS["r_cnn_vgg16"].proposals))
