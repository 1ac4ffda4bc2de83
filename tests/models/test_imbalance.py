"""Class losses of dense detectors: focal loss against torchvision's, OHEM against its definition."""

import math

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from models.imbalance import Focal, HardExamples, anchor_loss, focal


def case(count: int = 400, classes: int = 3, foreground: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """logits, targets and anchors; some logits are far out, where a sigmoid is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * 4
    logits[:2] = torch.tensor([[120.0, -120, 0], [-120, 30, -30]])[:, :classes]
    targets = torch.zeros(count, classes)
    targets[torch.arange(foreground) * 7 % count, torch.arange(foreground) % classes] = 1
    corners = torch.rand(count, 2, generator=generator) * 300
    sides = 10 + torch.rand(count, 2, generator=generator) * 60
    return logits.requires_grad_(), targets, torch.cat((corners, corners + sides), dim=1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_focal_loss_is_torchvisions_in_value_and_gradient(gamma: float, alpha: float | None) -> None:
    ours, targets, _ = case()
    theirs = ours.detach().clone().requires_grad_()
    found = focal(ours, targets, gamma, alpha)
    wanted = sigmoid_focal_loss(theirs, targets, alpha=-1 if alpha is None else alpha, gamma=gamma)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert bool(ours.grad.isfinite().all())
    there = theirs.grad.isfinite()  # theirs is not, where a root's slope is infinite
    torch.testing.assert_close(ours.grad[there], theirs.grad[there], rtol=1e-4, atol=1e-5)


def test_focal_loss_is_divided_by_the_foreground() -> None:
    logits, targets, anchors = case()
    wanted = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, reduction="sum")
    torch.testing.assert_close(Focal()(logits, targets, anchors), wanted / 20)
    nothing = torch.zeros_like(targets)
    wanted = sigmoid_focal_loss(logits, nothing, alpha=0.25, gamma=2.0, reduction="sum")
    torch.testing.assert_close(Focal()(logits, nothing, anchors), wanted)


def test_at_the_prior_background_costs_little() -> None:
    """RetinaNet section 3.3: a hundred thousand anchors at 0.01 do not drown the few of foreground."""
    logits = torch.full((100_000, 1), -math.log(99))
    background = torch.zeros_like(logits)
    anchors = torch.zeros(100_000, 4)
    assert Focal()(logits, background, anchors) < 0.1
    assert Focal(gamma=0.0, alpha=None)(logits, background, anchors) > 900


@pytest.mark.parametrize("batch", [16, 64])
def test_hard_examples_are_the_hardest_after_nms(batch: int) -> None:
    logits, targets, anchors = case()
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    kept = torchvision.ops.nms(anchors, each.detach(), 0.3)[:batch]
    assert len(kept) == batch, "else nothing would be left out"
    found = HardExamples(batch, nms_iou=0.3)(logits, targets, anchors)
    torch.testing.assert_close(found, each[kept].mean())
    found.backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist() == sorted(kept.tolist())


def test_one_to_three() -> None:
    logits, targets, anchors = case()
    loss = HardExamples(batch=40, nms_iou=0.9, one_to_three=True)
    chosen = loss.choose(-torch.arange(400.0), targets.amax(1) > 0, anchors)
    foreground = targets.amax(1)[chosen] > 0
    assert (int(foreground.sum()), len(chosen)) == (10, 40)
    assert bool(foreground[:10].all())
    few = loss.choose(-torch.arange(400.0), torch.arange(400) == 5, anchors)
    assert few[0] == 5
    assert len(few) == 4
    assert len(loss.choose(-torch.arange(400.0), torch.zeros(400, dtype=torch.bool), anchors)) == 3


@pytest.mark.parametrize("one_to_three", [False, True])
def test_all_anchors_on_one_another_and_none_at_all(one_to_three: bool) -> None:
    logits, targets, _ = case()
    same = torch.tensor([0.0, 0, 10, 10]).expand(400, 4)
    loss = HardExamples(one_to_three=one_to_three)
    assert bool(loss(logits, targets, same).isfinite())
    empty = loss(logits[:0], targets[:0], same[:0])
    assert empty == 0
    empty.backward()


def test_from_plain_values() -> None:
    assert anchor_loss() == Focal(2.0, 0.25)
    assert anchor_loss("focal", gamma=1.0, alpha=None) == Focal(1.0, None)
    assert anchor_loss("cross_entropy") == Focal(0.0, None)
    assert anchor_loss("cross_entropy", alpha=0.75) == Focal(0.0, 0.75)
    assert anchor_loss("ohem", batch=256, one_to_three=True) == HardExamples(256, 0.7, True)
    with pytest.raises(ValueError, match="'hinge'; it can be 'focal', 'cross_entropy' or 'ohem'"):
        anchor_loss("hinge")
    with pytest.raises(TypeError, match="gamma"):
        anchor_loss("ohem", gamma=2.0)
