"""What is learnt: matching, sampling, and every loss on its edge cases and against torchvision's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks
from torch import Tensor
from torchvision.models.detection import roi_heads

from models import boxes as box_ops
from models import losses, matching
from models.regions import RegionNetwork, Target
from models.servable import normalise
from service import masks
from tests.models import tiny

CANVAS = (128, 160)
NAMES = ["mask_keypoint_rcnn_r50_fpn", "person_mobilenetv2_fpn"]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> RegionNetwork:
    return tiny.make(request.param)[0]


def target(count: int = 0, ignore: list[list[float]] | None = None, has: bool = True) -> Target:
    """`count` objects in a row; with `has` False without masks and keypoints."""
    corners = torch.tensor([[10.0 + 40 * i, 20] for i in range(count)]).reshape(-1, 2)
    boxes = torch.cat((corners, corners + 32), dim=1)
    filled = torch.zeros(count, *CANVAS, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(filled, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    joints = torch.cat((centres, torch.full((count, 1), 2.0)), dim=1)[:, None].expand(-1, 3, -1)
    return Target(
        boxes=boxes,
        labels=torch.zeros(count, dtype=torch.int64),
        masks=filled if has else filled[:0],
        has_mask=torch.full((count,), has),
        keypoints=joints if has else torch.zeros(count, 3, 3),
        has_keypoints=torch.full((count,), has),
        ignore=torch.tensor(ignore or []).reshape(-1, 4),
    )


def learn(model: RegionNetwork, *targets: Target) -> dict[str, Tensor]:
    """The losses, after the gradients of their sum were computed."""
    images, sizes = tiny.pictures(CANVAS, [CANVAS] * len(targets))
    model.zero_grad()
    found = model.losses(normalise(images, sizes), sizes, list(targets), torch.Generator().manual_seed(0))
    torch.stack(list(found.values())).sum().backward()
    return found


def gradient(model: RegionNetwork, part: str) -> float:
    """The largest of a part; every parameter of it must have one, if only zero."""
    largest = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith(part):
            assert parameter.grad is not None, f"{name} is not connected to the loss"
            largest = max(largest, float(parameter.grad.abs().max()))
    return largest


def test_pictures_without_objects(model: RegionNetwork) -> None:
    found = learn(model, target(), target())
    assert {name for name, loss in found.items() if loss == 0} == {"rpn_boxes", "boxes", "masks", "keypoints"}
    for part in ("mask_head.", "keypoint_head.", "box_head.deltas", "rpn.head.deltas"):
        assert gradient(model, part) == 0
    assert gradient(model, "backbone.") > 0
    assert gradient(model, "box_head.classes") > 0


def test_a_picture_without_objects_beside_one_with(model: RegionNetwork) -> None:
    found = learn(model, target(), target(2))
    assert all(loss > 0 for loss in found.values())


def test_objects_without_masks_and_keypoints(model: RegionNetwork) -> None:
    found = learn(model, target(2, has=False))
    assert {name for name, loss in found.items() if loss == 0} == {"masks", "keypoints"}
    assert gradient(model, "mask_head.") == gradient(model, "keypoint_head.") == 0
    assert gradient(model, "box_head.deltas") > 0


def test_masks_on_one_picture_only(model: RegionNetwork) -> None:
    """Those that there are teach as much as they do alone: an unlabelled mask is not an empty one."""
    both = target(3)
    both.has_mask = torch.tensor([True, False, True])
    both.masks[1] = 255  # whatever stands there
    found = learn(model, both)["masks"]
    both.masks[1] = 0
    assert torch.equal(found, learn(model, both)["masks"])
    assert found > 0


def test_what_is_ignored_everywhere_teaches_nothing(model: RegionNetwork) -> None:
    found = learn(model, target(ignore=[[0, 0, 160, 128]]))
    # Anchors that stick out of the canvas by more than half are no part of it and stay negative.
    assert {name for name, loss in found.items() if loss == 0} == found.keys() - {"rpn_objectness"}
    found = learn(model, target(ignore=[[-2000, -2000, 2000, 2000]]))
    assert all(loss == 0 for loss in found.values())
    assert all(gradient(model, part) == 0 for part in ("backbone.", "rpn.", "box_head.", "mask_head."))


def test_ignored_regions_are_no_negatives_and_truth_in_them_stays_foreground() -> None:
    references = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [6, 0, 16, 10], [40, 0, 50, 10], [41, 0, 51, 10]])
    truth, ignored = torch.tensor([[40.0, 0, 50, 10]]), torch.tensor([[0.0, 0, 10, 10], [38, 0, 60, 20]])
    labels, index = matching.match(references, truth, ignored, 0.5, 0.5, rescue=False)
    assert labels.tolist() == [-1, -1, 0, 1, 1]  # half inside is ignored, less is background
    assert index[3:].tolist() == [0, 0]
    for seed in range(5):
        chosen = matching.sample(labels, 4, 0.5, torch.Generator().manual_seed(seed))
        assert sorted(chosen.tolist()) == [2, 3, 4]


def test_between_the_thresholds_is_ignored_and_the_best_is_rescued() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110], [500, 500, 501, 501]])
    references = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 2], [100, 100, 120, 120], [300, 0, 310, 10]])
    none = torch.zeros(0, 4)
    labels, index = matching.match(references, truth, none, 0.3, 0.7, rescue=True)
    assert labels.tolist() == [1, -1, 0, 1, 0]  # the fourth overlaps by 1/4 alone, but nothing does more
    assert (index[0], index[3]) == (0, 1)
    assert matching.match(references, truth, none, 0.3, 0.7, rescue=False)[0].tolist() == [1, -1, 0, 0, 0]
    assert matching.match(references, truth[:0], none, 0.3, 0.7, rescue=True)[0].tolist() == [0] * 5


def test_samples_hold_their_fraction_and_depend_on_the_generator_alone() -> None:
    labels = torch.tensor([1] * 50 + [0] * 50 + [-1] * 50)

    def draw(seed: int, count: int = 20) -> list[int]:
        return matching.sample(labels, count, 0.25, torch.Generator().manual_seed(seed)).tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert [int(labels[i]) for i in draw(0)] == [1] * 5 + [0] * 15
    assert len(set(draw(0))) == 20
    assert len(draw(0, 1000)) == 100, "all there are, and none of the ignored"


def test_box_losses_are_torchvisions() -> None:
    torch.manual_seed(0)
    logits, deltas = torch.randn(30, 4), torch.randn(30, 3, 4)
    labels = torch.randint(0, 4, (30,))
    goals = torch.randn(30, 4)
    whole = torch.cat((torch.randn(30, 1, 4), deltas), dim=1).flatten(1)  # theirs has a background
    wanted = roi_heads.fastrcnn_loss(logits, whole, [labels], [goals])
    foreground = labels > 0
    mine = deltas[foreground, labels[foreground] - 1]
    torch.testing.assert_close(losses.classes(logits, labels), wanted[0])
    torch.testing.assert_close(losses.deltas(mine, goals[foreground], 30), wanted[1])


def test_keypoint_targets_and_loss_are_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    rois = torch.tensor([[10.0, 20, 66, 132], [0, 0, 30.5, 17.25]])
    joints = torch.rand(2, 40, 3, generator=generator) * torch.tensor([80.0, 140, 3])
    joints[..., 2] = joints[..., 2].floor()
    joints[0, 0], joints[0, 1] = torch.tensor([66.0, 132, 2]), torch.tensor([10.0, 20, 1])  # the corners
    joints[0, 2], joints[0, 3] = torch.tensor([66.01, 50, 2]), torch.tensor([9.99, 50, 2])  # just outside
    cells, visible = losses.keypoint_targets(joints, rois, 56)
    wanted, valid = roi_heads.keypoints_to_heatmap(joints, rois, 56)
    assert torch.equal(visible, valid.bool())
    assert torch.equal(cells, wanted)
    assert visible[0, :4].tolist() == [True, True, False, False]
    assert cells[0, :2].tolist() == [56 * 56 - 1, 0]
    logits = torch.randn(2, 40, 56, 56, generator=generator)
    theirs = roi_heads.keypointrcnn_loss(logits, [rois], [joints], [torch.tensor([0, 1])])
    torch.testing.assert_close(losses.keypoints(logits, cells, visible), theirs)


def test_a_soft_keypoint_target_is_a_gaussian_around_its_cell() -> None:
    logits = torch.randn(1, 2, 56, 56, generator=torch.Generator().manual_seed(0))
    cells, visible = torch.tensor([[20 * 56 + 31, 0]]), torch.tensor([[True, True]])
    rows, columns = torch.arange(56.0)[:, None], torch.arange(56.0)
    goals = torch.stack([(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 1.5**2)).exp() for y, x in ((20, 31), (0, 0))])
    goals = goals / goals.sum((1, 2), keepdim=True)  # the corner's is cut, and still sums to 1
    wanted = -(goals.flatten(1) * logits[0].flatten(1).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.keypoints(logits, cells, visible, 1.5), wanted)
    sharp = losses.keypoints(logits, cells, visible, 0.1)
    torch.testing.assert_close(sharp, losses.keypoints(logits, cells, visible))


def test_fewer_rois_train_the_heads(model: RegionNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for name, head in (("mask", model.mask_head), ("keypoint", model.keypoint_head)):
        assert head is not None, name
        monkeypatch.setattr(head, "forward", lambda x, forward=head.forward: (sizes.append(len(x)), forward(x))[1])
    learn(model, target(3), target(2))
    assert all(size > 2 for size in sizes)
    sizes.clear()
    monkeypatch.setattr(model, "rules", replace(model.rules, head_samples=1))
    learn(model, target(3), target(2))
    assert sizes == [1 + 1, 1 + 1]


def test_losses_of_nothing_are_zero_and_connected() -> None:
    for loss in (
        lambda x: losses.objectness(x, torch.zeros(0)),
        lambda x: losses.classes(x.reshape(0, 4), torch.zeros(0, dtype=torch.int64)),
        lambda x: losses.deltas(x.reshape(0, 4), torch.zeros(0, 4), 7),
        lambda x: losses.masks(x.reshape(0, 28, 28), torch.zeros(0, 28, 28)),
        lambda x: losses.keypoints(x.reshape(0, 3, 56, 56), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)),
    ):
        empty = torch.zeros(0, requires_grad=True)
        value = loss(empty)
        assert value == 0
        value.backward()
        assert empty.grad is not None


def ellipse(box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    x1, y1, x2, y2 = box
    return (((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1).astype(np.uint8)


ELLIPSE = (31.0, 22.0, 117.0, 101.0)


@pytest.mark.parametrize("margin", [(0, 0, 0, 0), (5, 9, 7, 3), (0.3, -0.4, 0.25, 0.5), (-4, 6, 12, 0)])
def test_cropping_a_target_and_pasting_a_mask_undo_each_other(margin: tuple[float, ...]) -> None:
    """What a perfect mask head learns from the truth is, when served, that truth: no shift by half a pixel."""
    truth = ellipse(ELLIPSE, CANVAS)
    roi = np.array([ELLIPSE]) + np.array([margin]) * [-1, -1, 1, 1]
    goal = losses.mask_targets(torch.from_numpy(truth)[None], torch.tensor([0]), torch.from_numpy(roi).float(), 28)
    assert goal.shape == (1, 28, 28)
    pasted = coco_masks.decode(masks.rle(goal.numpy(), roi.astype(np.float32), *CANVAS)[0])  # type: ignore[arg-type]
    x1, y1, x2, y2 = (int(round(side)) for side in roi[0])
    seen = np.zeros_like(truth)
    seen[y1:y2, x1:x2] = truth[y1:y2, x1:x2]  # of the truth outside its RoI nothing can be known

    def overlap(mask: np.ndarray) -> float:
        return float((mask & seen).sum() / (mask | seen).sum())

    def centre(mask: np.ndarray) -> np.ndarray:
        return np.argwhere(mask).mean(0)

    assert overlap(pasted) > 0.975
    assert np.abs(centre(pasted) - centre(seen)).max() < 0.1
    # Moving it by one pixel to any side is worse, hence it is where it belongs to within half a pixel.
    for axis in (0, 1):
        assert max(overlap(np.roll(pasted, step, axis)) for step in (-1, 1)) < overlap(pasted) - 0.002


def test_mask_targets_follow_their_index() -> None:
    truths = torch.stack([torch.full(CANVAS, value, dtype=torch.uint8) for value in (0, 1, 0, 1)])
    rois = torch.tensor([[8.0, 8, 40, 40]]).expand(5, 4)
    goals = losses.mask_targets(truths, torch.tensor([3, 0, 1, 2, 1]), rois, 28)
    assert goals.flatten(1).amin(1).tolist() == goals.flatten(1).amax(1).tolist() == [1, 0, 1, 0, 1]
    assert losses.mask_targets(truths, torch.zeros(0, dtype=torch.int64), rois[:0], 28).shape == (0, 28, 28)


def test_sampled_rois_learn_the_truth_they_match(model: RegionNetwork) -> None:
    """The truth itself is among the RoIs, and its box deltas are zero."""
    truth = target(3)
    samples = model._sample(torch.tensor([[0.0, 0, 5, 5]]), truth, torch.Generator().manual_seed(0))
    assert samples.foreground.tolist() == [True, True, True, False]
    goals = box_ops.encode(truth.boxes[samples.index[:3]], samples.rois[:3], (10.0, 10.0, 5.0, 5.0))
    assert not goals.any()
