"""`make gpu-check`: torchvision's Mask R-CNN on the GPU, imported, against torchvision's own pipeline there.

What tests/parity compares to the bit on a CPU is compared here within what cuDNN's sums in another order may do.
"""

import pytest

pytest.importorskip("safetensors")

import torch
import torchvision

from bench.networks import CLASSES, DETECTIONS, Below, torchvision_model, weights
from bench.shapes import scene
from models.importers import from_torchvision
from models.servable import normalise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = (512, 640)  # room for twelve discs


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def test_same_canvas_same_answer() -> None:
    theirs = torchvision_model(weights())
    ours, _ = from_torchvision(theirs.state_dict(), [f"class_{i}" for i in range(CLASSES)], norm_eps=1e-5)
    ours, theirs = ours.cuda().eval(), theirs.cuda()
    images = torch.cat([scene(*SHAPE, seed).images for seed in range(3)]).cuda()
    sizes = torch.tensor([SHAPE] * 3, device="cuda")
    canvas = normalise(images, sizes)
    wanted, found = Below(theirs, SHAPE)(canvas), ours(canvas, sizes)
    features = theirs.backbone(canvas)
    for one, other in zip(found.features, features.values(), strict=False):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    matched = 0
    for image, answer in enumerate(wanted):
        assert len(answer["boxes"]) == DETECTIONS
        boxes, labels = found.boxes[image, :DETECTIONS], found.labels[image, :DETECTIONS]
        overlap = torchvision.ops.box_iou(answer["boxes"], boxes)
        overlap[(answer["labels"] - 1)[:, None] != labels[None]] = 0
        same = overlap.amax(1) > 0.98
        matched += int(same.sum())
        rois = torch.cat((torch.full((DETECTIONS, 1), float(image), device="cuda"), boxes), dim=1)
        masks = ours.mask_probabilities(found.features, rois, labels)[overlap.argmax(1)[same]]
        torch.testing.assert_close(masks, answer["masks"][same, 0], atol=0.02, rtol=0)
    assert matched >= 3 * DETECTIONS - 2  # of twelve discs the last two of ten may be others
