"""Every model of the zoo: a picture's answer is its own, whatever lies beside it in the batch or in its padding."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from models.network import Network, Predictions, Target
from models.regions import RegionNetwork, with_batch_index
from models.servable import MEAN, STD, normalise
from tests.models import tiny

# A convolution may take another kernel where another number of pictures is computed at once: on x86 CPUs boxes were
# seen to move by 2e-4 pixels, scores by 5e-6.
BOX_PX, SCORE = 2e-3, 5e-5
CANVAS = (128, 160)


class Ran(NamedTuple):
    """A model and what it says of `mixed()`."""

    model: Network
    images: Tensor
    sizes: Tensor
    found: Predictions
    heads: dict[str, Tensor]


@pytest.fixture(scope="module", params=tiny.EACH)
def ran(request: pytest.FixtureRequest) -> Ran:
    model = tiny.make(request.param)[0]
    images, sizes = mixed()
    return Ran(model, images, sizes, *run(model, images, sizes))


def mixed() -> tiny.Batch:
    """Landscape, portrait, and a picture in which there is nothing."""
    return tiny.stacked(tiny.pictures(CANVAS, [(90, 160), (128, 77)]), tiny.blank(CANVAS))


@torch.no_grad()
def run(model: Network, images: Tensor, sizes: Tensor) -> tuple[Predictions, dict[str, Tensor]]:
    """The detections, and the heads on all of them, image by image."""
    found = model(normalise(images, sizes), sizes)
    valid = found.labels.flatten() >= 0
    rois, labels = with_batch_index(found.boxes)[valid], found.labels.flatten()[valid]
    heads = {}
    if model.mask_head is not None:
        heads["masks"] = model.mask_probabilities(found.features, rois, labels)
    if model.keypoint_head is not None:
        heads["keypoints"] = model.keypoint_heatmaps(found.features, rois)
    return found, heads


def test_a_batch_is_its_pictures(ran: Ran) -> None:
    model, images, sizes, found, heads = ran
    counts = found.count.tolist()
    assert min(counts[:2]) >= 3
    assert counts[2] == 0
    for i, count in enumerate(counts):
        alone, alone_heads = run(model, images[i : i + 1], sizes[i : i + 1])
        assert alone.count.tolist() == [count]
        assert torch.equal(alone.labels[0], found.labels[i])
        torch.testing.assert_close(alone.boxes[0], found.boxes[i], rtol=0, atol=BOX_PX)
        torch.testing.assert_close(alone.scores[0], found.scores[i], rtol=0, atol=SCORE)
        for name, values in heads.items():
            mine = values.split(counts)[i]
            assert count == 0 or mine.std() > 0.1
            torch.testing.assert_close(alone_heads[name], mine, rtol=0, atol=1e-3)


def test_what_is_past_count_and_how_detections_are_ordered(ran: Ran) -> None:
    for i, count in enumerate(ran.found.count.tolist()):
        height, width = ran.sizes[i].tolist()
        boxes, scores, labels = ran.found.boxes[i], ran.found.scores[i], ran.found.labels[i]
        assert not boxes[count:].any()
        assert not scores[count:].any()
        assert bool((labels[count:] == -1).all())
        assert bool((scores[:count] > ran.model.rules.score_floor).all())
        assert bool((scores.diff() <= 0).all())
        assert bool((labels[:count] >= 0).all())
        assert bool((boxes >= 0).all())
        assert bool((boxes <= torch.tensor([width, height, width, height])).all()), "outside its own picture"


def test_what_stands_in_the_padding_does_not_matter_nor_does_the_mode(ran: Ran) -> None:
    """No dropout, no batch statistics: what is evaluated during training is what is served."""
    dirty = torch.randint(0, 256, ran.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, (height, width) in enumerate(ran.sizes.tolist()):
        dirty[i, :height, :width] = ran.images[i, :height, :width]
    assert not torch.equal(dirty, ran.images)
    found, heads = run(ran.model.train(), dirty, ran.sizes)
    ran.model.eval()
    for one, other in zip(ran.found[:4], found[:4], strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(heads[name], ran.heads[name]) for name in heads)


@pytest.mark.parametrize("name", ["faster_rcnn_r50_fpn", "person_mobilenetv2_fpn"])
def test_no_detections_at_all(name: str) -> None:
    model, spec = tiny.make(name, score_floor=0.9999)
    assert model.rules.score_floor == spec.options["score_floor"]
    found, _ = run(model, *mixed())
    assert found.count.tolist() == [0, 0, 0]
    assert not found.boxes.any()
    assert not found.scores.any()
    assert bool((found.labels == -1).all())
    assert found.boxes.shape == (3, model.rules.max_detections, 4)


def test_normalisation_and_its_padding() -> None:
    images = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    found = normalise(images, torch.tensor([[5, 6], [3, 2]]))
    assert found.shape == (2, 3, 5, 6)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    wanted = ((images[1] / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(found[1, :, :3, :2], wanted[:, :3, :2])
    assert not found[1, :, 3:].any()
    assert not found[1, :, :, 2:].any()
    assert found[0].all()


def square(joints: int, side: float = 48.0) -> Target:
    """One object with everything there is to learn: a filled square with its corner at (40, 24)."""
    masks = torch.zeros(1, 128, 128, dtype=torch.uint8)
    masks[0, 24 : 24 + int(side), 40 : 40 + int(side)] = 1
    points = torch.tensor([[40.0, 24, 2], [40 + side, 24, 2], [40 + side / 2, 24 + side / 2, 1]])[:joints]
    return Target(
        boxes=torch.tensor([[40.0, 24, 40 + side, 24 + side]]),
        labels=torch.zeros(1, dtype=torch.int64),
        masks=masks,
        has_mask=torch.ones(1, dtype=torch.bool),
        keypoints=points[None],
        has_keypoints=torch.ones(1, dtype=torch.bool),
        ignore=torch.zeros(0, 4),
    )


def shown(target: Target) -> tiny.Batch:
    """A bright square on a dark ground."""
    images = torch.full((1, 128, 128, 3), 60, dtype=torch.uint8)
    images[0][target.masks[0] > 0] = torch.tensor([220, 190, 90], dtype=torch.uint8)
    return images, torch.tensor([[128, 128]])


def step_losses(model: Network, images: Tensor, sizes: Tensor, target: Target, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return model.losses(normalise(images, sizes), sizes, [target], generator)


@pytest.mark.parametrize("name", tiny.EACH)
def test_every_model_trains_a_step(name: str) -> None:
    model, spec = tiny.make(name)
    target = square(len(spec.keypoints.names) if spec.keypoints else 0)
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = step_losses(model.train(), *shown(target), target, 0)
    expected = {"classes", "boxes"}
    expected |= {"rpn_objectness", "rpn_boxes"} if isinstance(model, RegionNetwork) else set()
    expected |= {"masks"} if model.mask_head is not None else set()
    expected |= {"keypoints"} if model.keypoint_head is not None else set()
    assert losses.keys() == expected
    assert all(bool(loss.isfinite()) and loss > 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    stuck = [key for key, value in model.named_parameters() if value.grad is None or torch.equal(value, before[key])]
    assert not stuck


@pytest.mark.parametrize(("name", "steps"), [("mask_rcnn_r50_fpn", 60), ("person_mobilenetv2_fpn", 160)])
def test_one_picture_is_learnt(name: str, steps: int) -> None:
    """The loss falls by a lot, and the best box lands on the square with its mask and its joints.

    The trunk learns slowly and the rate ends at zero, as in training: at one rate to the end the last few steps decide,
    and they are different ones for another number of threads.
    """
    options: dict[str, Any] = {"rpn_samples": 64, "box_samples": 32}
    model, spec = tiny.make(name, **options)
    target = square(len(spec.keypoints.names) if spec.keypoints else 0)
    images, sizes = shown(target)
    trunk = [p for n, p in model.named_parameters() if n.startswith("backbone.trunk.")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("backbone.trunk.")]
    optimizer = torch.optim.Adam([{"params": trunk, "lr": 1e-4}, {"params": rest, "lr": 1e-3}])
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    history = []
    for step in range(steps):
        losses = torch.stack(list(step_losses(model.train(), images, sizes, target, step).values())).sum()
        optimizer.zero_grad()
        losses.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        rate.step()
        history.append(losses.item())
    found, heads = run(model.eval(), images, sizes)
    assert history[-1] < 0.3 * history[0]
    assert found.scores[0, 0] > 0.8
    assert found.labels[0, 0] == 0
    assert box_iou(found.boxes[0, :1], target.boxes).item() > 0.7
    assert heads["masks"][0].mean() > 0.8
