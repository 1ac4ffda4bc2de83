"""A Mask R-CNN that finds discs, without training: a random trunk, its last layers by least squares.

A random trunk sees little beyond the cell that it looks at. So a disc's colour says all that has to be known there: red
and green where on the disc one looks, from edge to edge, blue how large it is, which is its class.

Random weights put thousands of candidates at nearly equal scores, so that one rounding chooses another ten of them, and
nobody can tell arithmetic that is wrong from arithmetic that is rounded. This model knows what it sees: its detections
can be compared, as those of a trained one can, and nothing has to be downloaded.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from models.servable import normalise

CELL = 160  # each disc has one to itself, px
SIDES = 76.0, 104.0, 142.0  # of each class, within 5 %, px
NOISE = 4.0
DISCS = 12
RIDGE = 1.0  # of the mean square of the inputs; weights that are smaller than they could be stand rounding better
SURE, OTHER = 4.0, -5.0  # logits
ROUNDS, LIKELY, WRONG = 8, 0.95, 3.0  # a region less likely than that to be what it is counts so much more next time
LESSONS, LESSON = 16, (512, 640)


class Scene(NamedTuple):
    """Discs on grey: images uint8 (1, H, W, 3), sizes (1, 2), the canvas (1, 3, H, W) as a network wants it, boxes
    (N, 4), labels (N,) from 0 on.
    """

    images: Tensor
    sizes: Tensor
    canvas: Tensor
    boxes: Tensor
    labels: Tensor

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.images.shape[1], self.images.shape[2])]


def scene(height: int, width: int, seed: int = 0) -> Scene:
    dice = torch.Generator().manual_seed(seed)
    coarse = 90 + 60 * torch.rand((1, 1, height // 16, width // 16), generator=dice)
    pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0, 0, ..., None].repeat(1, 1, 3)
    columns = width // CELL
    cells = torch.randperm(height // CELL * columns, generator=dice)[:DISCS]
    corners = torch.stack((cells % columns, cells // columns), 1) * CELL
    labels = torch.randint(len(SIDES), (len(cells),), generator=dice)
    sides = torch.tensor(SIDES)[labels, None] * (0.95 + 0.1 * torch.rand((len(cells), 2), generator=dice))
    first = corners + (CELL - sides) * torch.rand((len(cells), 2), generator=dice)
    boxes = torch.cat((first, first + sides), 1)
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for box, label in zip(boxes, labels, strict=True):
        disc = inside(box, y, x)
        along, down = (x - box[0]) / (box[2] - box[0]), (y[:, None] - box[1]) / (box[3] - box[1])
        pixels[disc] = 255 * torch.stack(torch.broadcast_tensors(along, down, label / (len(SIDES) - 1)), 2)[disc]
    pixels += NOISE * torch.randn(pixels.shape, generator=dice)
    images, sizes = pixels.clamp(0, 255).to(torch.uint8)[None].contiguous(), torch.tensor([[height, width]])
    return Scene(images, sizes, normalise(images, sizes), boxes, labels)


def inside(box: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Is (y, x) in the disc that fills the box? (len(y), len(x))."""
    (left, top), (right, bottom) = box[:2], box[2:]
    down, along = (2 * y - top - bottom) / (bottom - top), (2 * x - left - right) / (right - left)
    return down[:, None].square() + along.square() <= 1


@torch.no_grad()
def teach(model: Any) -> None:
    """Gives torchvision's model the last layers by which it finds the discs of `scene`."""
    lessons = [scene(*LESSON, seed) for seed in range(1000, 1000 + LESSONS)]
    features = [model.backbone(lesson.canvas) for lesson in lessons]
    _teach_proposals(model.rpn, lessons, features)
    _teach_heads(model, lessons, features)


def _teach_proposals(rpn: Any, lessons: list[Scene], features: list[dict[str, Tensor]]) -> None:
    inputs, wanted, offsets = [], [], []
    for lesson, levels in zip(lessons, features, strict=True):
        hidden = [rpn.head.conv(level) for level in levels.values()]
        inputs.append(torch.cat([each.flatten(2)[0].T for each in hidden]))
        anchors = rpn.anchor_generator(ImageList(lesson.canvas, lesson.shapes), list(levels.values()))
        labels, boxes = rpn.assign_targets_to_anchors(anchors, [{"boxes": lesson.boxes}])
        wanted.append(labels[0].view(len(inputs[-1]), -1))
        offsets.append(rpn.box_coder.encode(boxes, anchors)[0].view(len(inputs[-1]), -1, 4))
    rows, labels, deltas = torch.cat(inputs), torch.cat(wanted), torch.cat(offsets)
    for kind in range(labels.shape[1]):
        label = labels[:, kind]
        found, used = label == 1, label >= 0
        if not found.any():  # no disc is so long: this anchor sees none
            _set(rpn.head.cls_logits, slice(kind, kind + 1), torch.zeros(1, rows.shape[1]), torch.tensor([-SURE]))
            continue
        weights = torch.where(found, 0.3 * used.sum() / found.sum(), 1.0)[used]
        target = torch.where(found[used], SURE, -SURE)[:, None]
        _set(rpn.head.cls_logits, slice(kind, kind + 1), *solve(rows[used], target, weights))
        _set(rpn.head.bbox_pred, slice(4 * kind, 4 * kind + 4), *solve(rows[found], deltas[found, kind]))


def _teach_heads(model: Any, lessons: list[Scene], features: list[dict[str, Tensor]]) -> None:
    heads = model.roi_heads
    rows, offsets, labels, cells, covered = [], [], [], [], []
    for lesson, levels in zip(lessons, features, strict=True):
        proposals, _ = model.rpn(ImageList(lesson.canvas, lesson.shapes), levels)
        near = [lesson.boxes + 8 * torch.randn(lesson.boxes.shape) for _ in range(8)]
        proposals = [torch.cat((lesson.boxes, *near, *(_beside(lesson.boxes) for _ in range(8)), proposals[0]))]
        (match,), (label,) = heads.assign_targets_to_proposals(proposals, [lesson.boxes], [lesson.labels + 1])
        rows.append(heads.box_head(pooled(heads.box_roi_pool, levels, proposals, lesson.shapes)))
        offsets.append(heads.box_coder.encode([lesson.boxes[match]], proposals)[0])
        labels.append(label)
        picked = torch.nonzero(label > 0).flatten()[::5]
        rois = [proposals[0][picked]]
        hidden = heads.mask_head(pooled(heads.mask_roi_pool, levels, rois, lesson.shapes))
        hidden = torch.relu(heads.mask_predictor.conv5_mask(hidden))
        cells.append(hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1]))
        steps = (torch.arange(hidden.shape[-1]) + 0.5) / hidden.shape[-1]
        for truth, (left, top, right, bottom) in zip(lesson.boxes[match[picked]], rois[0], strict=True):
            covered.append(inside(truth, top + (bottom - top) * steps, left + (right - left) * steps).flatten())
    hidden, label = torch.cat(rows), torch.cat(labels)
    predictor = heads.box_predictor
    target = torch.full((len(label), predictor.cls_score.out_features), OTHER)
    target[torch.arange(len(label)), label] = SURE
    weights = torch.where(label > 0, (label == 0).sum() / (label > 0).sum(), 1.0)
    for _ in range(ROUNDS):
        weight, bias = solve(hidden, target, weights)
        chances = (hidden @ weight.T + bias).softmax(1)[torch.arange(len(label)), label]
        weights = weights * torch.where(chances < LIKELY, WRONG, 1.0)
    _set(predictor.cls_score, slice(None), weight, bias)
    deltas = solve(hidden[label > 0], torch.cat(offsets)[label > 0])
    _set(predictor.bbox_pred, slice(None), *(each.repeat(len(target[0]), *[1] * (each.ndim - 1)) for each in deltas))
    wanted = torch.where(torch.cat(covered), SURE, -SURE)[:, None]
    _set(heads.mask_predictor.mask_fcn_logits, slice(None), *solve(torch.cat(cells), wanted))


def _beside(boxes: Tensor) -> Tensor:
    """Of other sizes, about the same place: a part of a disc is none."""
    sides = boxes[:, 2:] - boxes[:, :2]
    middles = (boxes[:, 2:] + boxes[:, :2]) / 2 + 0.4 * sides * (torch.rand(sides.shape) - 0.5)
    halves = sides / 2 * 2 ** (1.5 * torch.randn(len(boxes), 1))
    return torch.cat((middles - halves, middles + halves), 1)


def pooled(pool: Any, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
    pool.scales = None  # torchvision infers them from the first picture and keeps them
    return pool(features, boxes, shapes)


def solve(rows: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ridge regression: rows (N, I), target (N, O), weights (N,) -> weight (O, I), bias (O,)."""
    rows, target = rows.double(), target.double()
    share = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double()
    share = (share / share.sum())[:, None]
    mean, level = (share * rows).sum(0), (share * target).sum(0)
    centred = rows - mean
    moments = centred.T @ (share * centred)
    moments += RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    weight = torch.linalg.solve(moments, centred.T @ (share * (target - level))).T
    return weight.float(), (level - weight @ mean).float()


def _set(layer: Any, rows: slice, weight: Tensor, bias: Tensor) -> None:
    place = layer.weight[rows]
    place.copy_(weight.reshape(weight.shape[0], *place.shape[1:]).expand_as(place))
    layer.bias[rows] = bias.expand_as(layer.bias[rows])
