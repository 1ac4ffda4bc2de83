"""The five R-CNNs of torchvision, randomly initialised and imported, against torchvision's own pipeline.

Both get the same canvas, so that what is compared is the network. Random detectors spread their scores around one value
and find nothing; `spread` widens the last layers so that there are detections of many classes and sizes.

What was found on x86 CPUs (torch 2.14, torchvision 0.29): features, boxes, scores, masks and heat maps differ by 0.0 in
all cases, though our box head runs on padded RoIs. Proposals are the same numbers; where two have the same score,
torchvision's sort, which is not stable, may swap them.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from models.checkpoint import CanvasRule, Spec
from models.importers import from_torchvision
from models.regions import Predictions, RegionNetwork
from service.detector import Detector, Wants
from service.images import fit
from training.engine import torch_detector


class Case(NamedTuple):
    """How sure a random box head is of the background, and what keeps the cost of the expensive heads down: the most
    detections, and the RPN's NMS threshold (never the number of proposals: what NMS leaves is all compared)."""

    background: float
    max_detections: int = 100
    rpn_nms_iou: float = 0.7


CASES = {
    "fasterrcnn_resnet50_fpn": Case(3.0),
    "maskrcnn_resnet50_fpn": Case(6.0, 20),
    "keypointrcnn_resnet50_fpn": Case(6.0, 6),
    "fasterrcnn_resnet50_fpn_v2": Case(3.0, 100, 0.4),
    "maskrcnn_resnet50_fpn_v2": Case(6.0, 20, 0.4),
}
# Kernels may take another path where another number of rows is computed at once (other processors, other libraries):
# torchvision runs the box head on the proposals that exist; ours runs on padded RoIs.
BOX_TOLERANCE = 1e-3  # canvas pixels, float32 at coordinates of hundreds
TOLERANCE = 1e-5


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {} if name.startswith("keypoint") else {"num_classes": 5}
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, **options)
    settle(model)
    case = CASES[name]
    model.roi_heads.detections_per_img, model.rpn.nms_thresh = case.max_detections, case.rpn_nms_iou
    spread(model.eval(), case.background)
    return model


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """A random trunk that behaves: with statistics of ones and zeros it drowns its input, so it gets real ones; and as
    deep random layers make noise of any small difference, each residual branch adds less than its shortcut, and the
    stem sees what is smooth."""
    for name, module in model.backbone.body.named_modules():
        if name.endswith("bn3"):
            module.weight *= 0.2
    stem = model.backbone.body.conv1.weight
    stem += 2 * stem.mean((2, 3), keepdim=True)
    model.train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    model.backbone(canvas(128, 128, 2)[0])


@torch.no_grad()
def spread(model: nn.Module, background: float) -> None:
    """Random last layers whose scores and boxes differ from RoI to RoI, each scaled to a given deviation."""
    images, sizes = canvas(64, 96, 1)
    shapes = [(int(h), int(w)) for h, w in sizes]
    features = model.backbone(images)
    logits, deltas = (torch.cat([level.flatten() for level in part]) for part in model.rpn.head([*features.values()]))
    model.rpn.head.cls_logits.weight *= 2.0 / logits.std()
    model.rpn.head.bbox_pred.weight *= 0.25 / deltas.std()
    proposals, _ = model.rpn(ImageList(images, shapes), features)
    model.roi_heads.box_roi_pool.scales = None
    hidden = model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, proposals, shapes))
    classes, boxes = model.roi_heads.box_predictor.cls_score, model.roi_heads.box_predictor.bbox_pred
    boxes.weight *= 1.5 / boxes(hidden).std()
    classes.weight *= 2.0 / classes(hidden).std(0)[:, None]
    classes.bias -= classes(hidden).mean(0)
    classes.bias[0] += background


def canvas(height: int, width: int, batch: int) -> tuple[Tensor, Tensor]:
    """Smooth pictures as the trunk sees them, each of its own size on the canvas."""
    generator = torch.Generator().manual_seed(height + batch)
    sizes = torch.tensor([[height - 7 * i, width - 15 * i] for i in range(batch)])
    images = nn.functional.interpolate(
        torch.randn(batch, 3, height // 16, width // 16, generator=generator), size=(height, width), mode="bicubic"
    )
    for i, (h, w) in enumerate(sizes.tolist()):
        images[i, :, h:], images[i, :, :, w:] = 0, 0
    return images, sizes


class Torchvision:
    """torchvision's pipeline from the canvas on, with what passes between its parts."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.heatmaps: Tensor | None = None
        if model.roi_heads.keypoint_predictor is not None:
            model.roi_heads.keypoint_predictor.register_forward_hook(self._keep)
        filtered = model.rpn.filter_proposals

        def filter_proposals(*given):
            boxes, self.proposal_scores = filtered(*given)
            return boxes, self.proposal_scores

        model.rpn.filter_proposals = filter_proposals

    def _keep(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self.heatmaps = output

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor) -> tuple[list[dict[str, Tensor]], OrderedDict, list[Tensor]]:
        """Detections, features and proposals."""
        shapes = [(int(h), int(w)) for h, w in sizes]
        features = self.model.backbone(images)
        proposals, _ = self.model.rpn(ImageList(images, shapes), features)
        forget_scales(self.model)
        found, _ = self.model.roi_heads(features, proposals, shapes)
        return found, features, proposals


def forget_scales(model: nn.Module) -> None:
    """torchvision infers them from the first pictures it sees and keeps them."""
    for pool in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
        if getattr(model.roi_heads, pool) is not None:
            getattr(model.roi_heads, pool).scales = None


Pair = tuple[Torchvision, RegionNetwork, Spec]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    theirs, case = make(request.param), CASES[request.param]
    ours, spec = from_torchvision(theirs.state_dict())
    ours.rules = replace(ours.rules, max_detections=case.max_detections)
    ours.rpn.nms_iou = case.rpn_nms_iou
    return Torchvision(theirs), ours, spec


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 64)])
def test_same_canvas_same_answer(pair: Pair, height: int, width: int, batch: int) -> None:
    theirs, ours, _ = pair
    images, sizes = canvas(height, width, batch)
    found, features, proposals = theirs(images, sizes)
    compare_proposals(ours, features, proposals, theirs.proposal_scores, images, sizes)
    # Ours pads to num_proposals at full cost; below the default nothing is cut off that torchvision has.
    fewer = 50 * (max(len(boxes) for boxes in proposals) // 50 + 1)
    assert fewer < ours.rules.num_proposals
    compare(ours, replace(ours.rules, num_proposals=fewer), images, sizes, found, features, theirs.heatmaps)


@pytest.mark.parametrize("pair", ["fasterrcnn_resnet50_fpn"], indirect=True)
def test_more_proposals_and_detections_than_are_kept(pair: Pair) -> None:
    theirs, ours, _ = pair
    images, sizes = canvas(320, 256, 2)
    found, features, proposals = theirs(images, sizes)
    assert [len(boxes) for boxes in proposals] == [1000, 1000]
    assert [len(image["boxes"]) for image in found] == [100, 100]
    compare_proposals(ours, features, proposals, theirs.proposal_scores, images, sizes)
    compare(ours, ours.rules, images, sizes, found, features, None)


@torch.no_grad()
def compare_proposals(
    ours: RegionNetwork,
    features: OrderedDict,
    wanted: list[Tensor],
    scores: list[Tensor],
    images: Tensor,
    sizes: Tensor,
) -> None:
    levels = list(features.values())
    logits, deltas = ours.rpn(levels)
    anchors = ours.rpn.anchors(levels, images.shape)
    proposals, count = ours.rpn.propose(logits, deltas, anchors, sizes, ours.rules.pre_nms, ours.rules.num_proposals)
    assert count.tolist() == [len(boxes) for boxes in wanted]
    for found, truth, score in zip(proposals, wanted, scores, strict=True):
        assert not found[len(truth) :].any()
        places: dict[tuple, list[int]] = {}
        for index, box in enumerate(truth.tolist()):
            places.setdefault(tuple(box), []).append(index)
        order = [places[tuple(box)].pop(0) for box in found[: len(truth)].tolist()]  # KeyError: not a box of theirs
        assert torch.equal(score[order], score), "swapped, though the scores are not equal"
        assert sum(index != here for here, index in enumerate(order)) <= 0.02 * len(order)


@torch.no_grad()
def compare(
    ours: RegionNetwork,
    rules,
    images: Tensor,
    sizes: Tensor,
    found: list[dict[str, Tensor]],
    features: OrderedDict,
    heatmaps: Tensor | None,
) -> None:
    """The whole of our answer with theirs, the heads on their boxes, all images at once as the service does it."""
    before, ours.rules = ours.rules, rules
    answer = ours(images, sizes)
    ours.rules = before
    counts = [len(image["boxes"]) for image in found]
    assert min(counts) >= 5, f"{counts} detections: the comparison would be all but empty"
    assert answer.count.tolist() == counts
    assert len(answer.features) == 4
    for level, feature in zip(features.values(), answer.features, strict=False):  # theirs has p6 as well
        assert torch.equal(level, feature)
    for i, truth in enumerate(found):
        compare_image(answer, i, truth)
    boxes = [torch.cat((torch.full((n, 1), float(i)), found[i]["boxes"]), 1) for i, n in enumerate(counts)]
    rois, labels = torch.cat(boxes), torch.cat([image["labels"] for image in found]) - 1
    assert ("masks" in found[0]) == (ours.mask_head is not None)
    assert (heatmaps is not None) == (ours.keypoint_head is not None)
    if ours.mask_head is not None:
        masks = ours.mask_probabilities(answer.features, rois, labels)
        truth = torch.cat([image["masks"][:, 0] for image in found])
        assert truth.std() > 0.1
        torch.testing.assert_close(masks, truth, atol=TOLERANCE, rtol=0)
    if heatmaps is not None:
        # Their logits reach 100: the tolerance is relative to their deviation.
        assert heatmaps.abs().max() > 1
        for ours_there, theirs_there in zip(
            ours.keypoint_heatmaps(answer.features, rois).split(counts), heatmaps.split(counts), strict=True
        ):
            scale = heatmaps.std()
            torch.testing.assert_close(ours_there / scale, theirs_there / scale, atol=TOLERANCE, rtol=0)


def compare_image(answer: Predictions, i: int, truth: dict[str, Tensor]) -> None:
    count = int(answer.count[i])
    torch.testing.assert_close(answer.scores[i, :count], truth["scores"], atol=TOLERANCE, rtol=0)
    assert torch.equal(answer.labels[i, :count] + 1, truth["labels"])
    torch.testing.assert_close(answer.boxes[i, :count], truth["boxes"], atol=BOX_TOLERANCE, rtol=0)
    assert not answer.boxes[i, count:].any()
    assert not answer.scores[i, count:].any()
    assert bool((answer.labels[i, count:] == -1).all())


@pytest.mark.parametrize("pair", ["fasterrcnn_resnet50_fpn"], indirect=True)
def test_same_picture_same_detections(pair: Pair) -> None:
    """From the 8-bit picture on: our resize to 8 bits and canvas, torchvision's float transform.

    A detection that does not outlast noise as large as the rounding to 8 bits itself is not compared (which of two
    overlapping boxes wins in a random network may hang on that), nor is one whose score is within 0.02 of the floor.
    """
    theirs, ours, spec = pair
    state = {name: tensor.clone() for name, tensor in theirs.model.state_dict().items()}
    rules, nms_iou = ours.rules, ours.rpn.nms_iou
    ours.rules, ours.rpn.nms_iou = replace(rules, num_proposals=60, score_floor=FLOOR), 0.3
    calm(theirs.model)
    ours.load_state_dict(from_torchvision(theirs.model.state_dict())[0].state_dict())
    detector = torch_detector(ours, replace(spec, canvas=CanvasRule(short_side=256, long_side=320)))
    try:
        for height, width in ((300, 451), (450, 270), (330, 340)):
            image = picture(height, width)
            forget_scales(theirs.model)
            with torch.no_grad():
                found = theirs.model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
            wanted = Found(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy() - 1)
            compare_pictures(detector, image, wanted)
    finally:
        theirs.model.load_state_dict(state)
        ours.rules, ours.rpn.nms_iou = rules, nms_iou


FLOOR = 0.25


class Found(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def stays(self, others: "Found") -> np.ndarray:
        """Which of these have the same detection among the others: within half a pixel and 0.01."""
        box = np.abs(self.boxes[:, None] - others.boxes[None]).max(2)
        score = np.abs(self.scores[:, None] - others.scores[None])
        return ((box < 0.5) & (score < 0.01) & (self.labels[:, None] == others.labels[None])).any(1)


def calm(model: nn.Module) -> None:
    """Few proposals, and last layers under which a detection moves little when its features do."""
    model.transform = GeneralizedRCNNTransform(256, 320, model.transform.image_mean, model.transform.image_std).eval()
    model.rpn.nms_thresh, model.rpn._post_nms_top_n["testing"], model.roi_heads.score_thresh = 0.3, 60, FLOOR
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight *= 0.25
        predictor.bbox_pred.weight *= 0.2
        predictor.cls_score.weight *= 0.3
        predictor.cls_score.bias *= 0.3


def picture(height: int, width: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, height // 40, width // 40, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    return (smooth.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def compare_pictures(detector: Detector, image: np.ndarray, wanted: Found) -> None:
    def detect(pixels: np.ndarray) -> Found:
        raw = detector.run([replace(canvas, pixels=pixels)], [Wants(confidence=0.0)])[0]
        detections = detector.finish(raw)
        return Found(detections.boxes, detections.scores, detections.labels)

    canvas = fit(image, detector.bundle.manifest.canvas)
    found = detect(canvas.pixels)
    steady = found.scores > FLOOR + 0.02
    rng = np.random.default_rng(0)
    for size in (1, 1, 4):  # each pixel on its own, or in blocks, since rounding makes bands of what is smooth
        height, width = (side // size for side in canvas.shape)
        noise = rng.choice([-1, 0, 0, 1], (height, width, 3)).repeat(size, 0).repeat(size, 1)
        steady &= found.stays(detect((canvas.pixels + noise).clip(0, 255).astype(np.uint8)))
    assert steady.sum() >= 6
    assert found.stays(wanted)[steady].all()
    assert min(found.stays(wanted).mean(), wanted.stays(found).mean()) > 0.8, "of all, whether steady or not"
