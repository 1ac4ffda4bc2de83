"""OverFeat: the shortcut for its offset pooling, its windows, and who teaches the trunk."""

import pytest
import torch
import torch.nn.functional as F

from models import boxes as box_ops
from models.overfeat import OverFeat, WindowHead
from tests.models.classics import inputs, make, proposals, target
from tests.models.tiny import pictures

BATCH = pictures((96, 128), [(96, 128), (90, 100)])


def made() -> OverFeat:
    model, _ = make("overfeat_mobilenetv2")
    assert isinstance(model, OverFeat)
    return model


@pytest.mark.parametrize(("pool", "window"), [(3, 5), (2, 3), (3, 1)])
@torch.no_grad()
def test_one_dilated_pass_is_the_paper_s_pooling_at_every_offset(pool: int, window: int) -> None:
    """Section 3.3: pool without overlap at pool x pool offsets, slide the classifier over each, interleave."""
    torch.manual_seed(0)
    head = WindowHead(4, (6, 5), 3, pool, window)
    feature = torch.randn(2, 4, 17, 20)
    before = (head.span - 1) // 2
    padded = F.pad(feature, (before, head.span - 1 - before) * 2)
    expected = torch.zeros(2, 3, 17, 20)
    first = head.layers[0]
    for dy in range(pool):
        for dx in range(pool):
            pooled = F.max_pool2d(padded[:, :, dy:, dx:], pool, stride=pool)
            hidden = F.relu(F.conv2d(pooled, first.weight, first.bias))
            answers = head.outputs(head.layers[1:](hidden))
            rows, columns = expected[:, :, dy::pool, dx::pool].shape[2:]
            expected[:, :, dy::pool, dx::pool] = answers[:, :, :rows, :columns]
    torch.testing.assert_close(head(feature), expected.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_windows_are_what_the_classifier_sees() -> None:
    model = made()
    _, _, windows = model._look(torch.zeros(1, 3, 96, 128))
    large = windows[: 6 * 8]
    assert (box_ops.area(large) == 96**2).all()  # 3 x 3 cells of 2 x 16 pixels
    torch.testing.assert_close(large[8 + 2], torch.tensor([32.0 - 48, 16 - 48, 32 + 48, 16 + 48]))
    small = windows[6 * 8 :]  # the picture at 20/32, so the window is 32/20 as large on it
    torch.testing.assert_close(box_ops.area(small).sqrt(), torch.full((len(small),), 96 * 32 / 20))
    assert len(small) == 4 * 5  # 60 x 80 pixels


@torch.no_grad()
def test_finds_the_best_windows_of_all_scales() -> None:
    model = made()
    images, sizes = inputs(model, BATCH)
    found = model(images, sizes)
    logits, _, _ = model._look(images)
    best = logits.softmax(-1)[..., 1:].flatten(1).sort(descending=True).values[:, :8]
    torch.testing.assert_close(found.scores, best)
    assert found.count.tolist() == [8, 8]
    assert (found.boxes[1, :, 2] <= 100).all()
    alone = model(images[1:], sizes[1:])
    torch.testing.assert_close(found.boxes[1], alone.boxes[0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_what_lies_outside_the_picture_is_not_found() -> None:
    model = made()
    images, sizes = inputs(model, BATCH)
    model.classifier.outputs.bias[2] += 20.0  # all are surely of the second class,
    model.regressor.outputs.weight[4:8] = 0
    model.regressor.outputs.bias[4:8] = torch.tensor([9.0, 0, 0, 0])  # whose boxes are moved by nine widths
    found = model(images, sizes)
    assert (found.count == 0).all()
    model.classifier.outputs.bias[2] -= 20.0
    found = model(images, sizes)
    assert (found.count > 0).all()
    for image, count in enumerate(found.count.tolist()):
        assert (found.labels[image, :count] != 1).all()
        assert box_ops.at_least(found.boxes[image, :count], 0.01).all()


def test_the_regressor_does_not_teach_the_trunk() -> None:
    model = made()
    images, sizes = inputs(model, BATCH)
    none = proposals(sizes, 1)
    targets = [target([[0.0, 0, 96, 96]], none[0], [1]), target([], none[1])]
    found = model.losses(images, sizes, targets, torch.Generator().manual_seed(0))
    found["boxes"].backward(retain_graph=True)
    assert model.regressor.outputs.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    found["classes"].backward()
    assert any(parameter.grad is not None for parameter in model.backbone.parameters())
