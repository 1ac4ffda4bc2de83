"""`make gpu-check`: the ops and the networks on a CUDA device against the CPU. Needs torch and a GPU, nothing else.

Kernels and engines have their own checks beside this. Tolerances are of float32 without TF32.
"""

import pytest

pytest.importorskip("safetensors")

import torch

from models.checkpoint import COCO_PERSON, Spec, build
from models.network import Network, Target
from models.ops import nms, roi_align

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = torch.tensor([[192, 256], [180, 250]])


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return build(Spec("person_mobilenetv2_fpn", ("person",), COCO_PERSON)).eval()


def random_boxes(*shape: int) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(1)) * 200
    return torch.cat((corners.amin(-2), corners.amax(-2) + 4), dim=-1)


def test_nms_picks_the_same_boxes() -> None:
    boxes = random_boxes(2, 5, 400)
    scores = torch.rand(2, 5, 400, generator=torch.Generator().manual_seed(2))
    index, count = nms(boxes, scores, 0.5, 0.1, 300)
    there_index, there_count = nms(boxes.cuda(), scores.cuda(), 0.5, 0.1, 300)
    assert torch.equal(count, there_count.cpu())
    assert torch.equal(index, there_index.cpu())


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_agrees_with_its_gradient(aligned: bool) -> None:
    levels = [torch.randn(2, 8, 64 >> i, 64 >> i, requires_grad=True) for i in range(4)]
    there = [level.detach().cuda().requires_grad_() for level in levels]
    rois = torch.cat((torch.randint(0, 2, (50, 1)).float(), random_boxes(50)), dim=1)
    here_out = roi_align(levels, rois, 7, 2, aligned, 112)
    there_out = roi_align(there, rois.cuda(), 7, 2, aligned, 112)
    torch.testing.assert_close(there_out.cpu(), here_out, atol=1e-4, rtol=1e-4)
    weight = torch.randn_like(here_out)
    (here_out * weight).sum().backward()
    (there_out * weight.cuda()).sum().backward()
    for one, other in zip(levels, there, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad.cpu(), one.grad, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_features_and_heads_agree(model: Network) -> None:
    """Random weights rank boxes by noise, so what is compared is what does not depend on an order."""
    images = torch.randn(2, 3, 192, 256)
    rois = torch.tensor([[0.0, 8, 8, 100, 120], [1.0, 20, 30, 60, 80]])
    labels = torch.zeros(2, dtype=torch.int64)
    here = model(images, SIZES)
    masks, maps = model.mask_probabilities(here.features, rois, labels), model.keypoint_heatmaps(here.features, rois)
    there_model = model.cuda()
    there = there_model(images.cuda(), SIZES.cuda())
    for one, other in zip(here.features, there.features, strict=True):
        torch.testing.assert_close(other.cpu(), one, atol=1e-3, rtol=1e-3)
    there_masks = there_model.mask_probabilities(there.features, rois.cuda(), labels.cuda())
    torch.testing.assert_close(there_masks.cpu(), masks, atol=1e-3, rtol=1e-3)
    there_maps = there_model.keypoint_heatmaps(there.features, rois.cuda())
    torch.testing.assert_close(there_maps.cpu(), maps, atol=1e-2, rtol=1e-3)


def test_a_step_trains_under_bfloat16(model: Network) -> None:
    target = Target(
        boxes=torch.tensor([[20.0, 20, 120, 160]]),
        labels=torch.zeros(1, dtype=torch.int64),
        masks=torch.ones(1, 192, 256, dtype=torch.uint8),
        has_mask=torch.tensor([True]),
        keypoints=torch.full((1, 17, 3), 60.0),
        has_keypoints=torch.tensor([True]),
        ignore=torch.zeros(0, 4),
    ).to("cuda")
    model = model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        losses = model.losses(
            torch.randn(2, 3, 192, 256, device="cuda"), SIZES.cuda(), [target, target], torch.Generator().manual_seed(0)
        )
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
