"""Box arithmetic, anchors and the choice of proposals, against torchvision bit for bit and against plain words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from models import boxes, dense

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]


def some_boxes(seed: int, count: int = 50, smallest: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 800
    sides = smallest + torch.rand(count, 2, generator=generator) ** 3 * 500
    return torch.cat((low, low + sides), dim=1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from(WEIGHTS))
def test_decode_undoes_encode(seed: int, other: int, weights: tuple[float, float, float, float]) -> None:
    truth, references = some_boxes(seed), some_boxes(other, smallest=16.0)
    deltas = boxes.encode(truth, references, weights)
    torch.testing.assert_close(boxes.decode(deltas, references, weights), truth, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_same_bits_as_torchvision(weights: tuple[float, float, float, float]) -> None:
    truth, references = some_boxes(1, 500), some_boxes(2, 500)
    coder = BoxCoder(weights)
    assert torch.equal(boxes.encode(truth, references, weights), coder.encode_single(truth, references))
    deltas = torch.randn(500, 4) * 5  # among them sides past the clamp
    assert torch.equal(boxes.decode(deltas, references, weights), coder.decode_single(deltas, references))


def test_sides_grow_at_most_by_the_clamp_and_shrink_freely() -> None:
    reference = torch.tensor([[0.0, 0, 16, 16]])
    largest = boxes.decode(torch.tensor([[0.0, 0, 50, -50]]), reference, (1.0, 1.0, 1.0, 1.0))[0]
    assert (largest[2] - largest[0]).item() == pytest.approx(1000.0, rel=1e-5)
    assert 0 <= (largest[3] - largest[1]).item() < 1e-5


def test_a_picture_clips_to_its_own_size() -> None:
    sizes = torch.tensor([[100, 200], [80, 50]])
    found = boxes.clip(torch.tensor([[-5.0, -6, 300, 400]]).expand(2, 3, 4), sizes)
    assert found[0].tolist() == [[0, 0, 200, 100]] * 3
    assert found[1].tolist() == [[0, 0, 50, 80]] * 3


def test_at_least_keeps_equality() -> None:
    sides = torch.tensor([[0.0, 0, 2, 1], [0, 0, 2, 0.999], [0, 0, 0.999, 2], [0, 0, 1, 1]])
    assert boxes.at_least(sides, 1.0).tolist() == [True, False, False, True]


def test_iou_and_coverage() -> None:
    one, other = some_boxes(3), some_boxes(4)
    torch.testing.assert_close(boxes.iou(one, other), box_iou(one, other))
    region = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    inside = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [22, 2, 24, 4], [50, 50, 60, 60], [0, 0, 40, 10]])
    assert boxes.coverage(inside, region).tolist() == [1.0, 0.5, 1.0, 0.0, 0.25]  # the larger part, not the sum
    assert boxes.coverage(inside, region[:0]).tolist() == [0.0] * 5


@pytest.mark.parametrize("canvas", [(128, 160), (96, 224), (32, 32)])
def test_anchors_are_torchvisions(canvas: tuple[int, int]) -> None:
    sizes, ratios = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
    levels = [torch.zeros(1, 8, -(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in (4, 8, 16, 32, 64)]
    generator = AnchorGenerator(tuple((size,) for size in sizes), (ratios,) * 5)
    wanted = generator(ImageList(torch.zeros(1, 3, *canvas), [canvas]), levels)[0]
    rpn = dense.RegionProposals(8, [(size,) for size in sizes], ratios, depth=1, nms_iou=0.7)
    found = rpn.anchors(levels, torch.Size((1, 3, *canvas)))
    assert [len(level) for level in found] == [3 * level.shape[-2] * level.shape[-1] for level in levels]
    assert torch.equal(torch.cat(found), wanted)


def test_a_level_with_too_few_anchors_is_padded() -> None:
    logits, deltas = torch.tensor([[[1.0], [3.0], [2.0]]]), torch.zeros(1, 3, 4)
    anchors = torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]])
    found, scores, labels = dense.top(logits, deltas, anchors, 5)
    assert not labels.any()
    assert found[0, :3].tolist() == anchors[[1, 2, 0]].tolist()
    assert scores[0].tolist() == [*torch.tensor([3.0, 2.0, 1.0]).sigmoid().tolist(), -1.0, -1.0]


def test_proposals_are_the_best_of_all_levels_and_need_a_side() -> None:
    rpn = dense.RegionProposals(8, [(8,), (16,)], (1.0,), depth=1, nms_iou=0.7)
    anchors = [
        torch.tensor([[0.0, 0, 8, 8], [20, 0, 28, 8], [90, 0, 98, 8]]),  # the last lies outside the picture
        torch.tensor([[0.0, 0, 8, 8], [0, 20, 16, 36]]),
    ]
    logits = [torch.tensor([[1.0, -200.0, 9.0]])[..., None], torch.tensor([[2.0, 0.0]])[..., None]]
    deltas = [torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)]
    proposals, count = rpn.propose(logits, deltas, anchors, torch.tensor([[64, 64]]), 3, 6)
    # Equal boxes of two levels stay both; a score that underflows to 0 is a proposal all the same.
    assert count.tolist() == [4]
    assert proposals[0].tolist() == [[0, 0, 8, 8], [0, 0, 8, 8], [0, 20, 16, 36], [20, 0, 28, 8], [0] * 4, [0] * 4]
