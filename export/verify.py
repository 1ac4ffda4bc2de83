"""Does a bundle compute what the torch model computes? The parity certificate, and the golden outputs.

The bundle is run by the service's own engines, the model by torch on the same canvases; detections are matched by class
and box, and their heads compared. N pictures, D detections.
"""

import hashlib
import importlib
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.network import Network, Predictions
from models.regions import with_batch_index
from models.servable import normalise
from service import keypoints
from service.buckets import canvas_for
from service.bundle import GOLDEN, Bundle
from service.engines import Engine, EngineChoice, Precision, open_engine
from service.images import Canvas, fit
from service.proposals import onto_canvas, propose, stacked

Array = npt.NDArray[Any]
BATCHES = (1, 2, 5)
INPUTS = ("images", "sizes", "proposals")
MOST_PROPOSALS = 100  # of a picture
SAME_BOX_IOU = 0.5  # a detection and its counterpart overlap by more than this


@dataclass(frozen=True, slots=True)
class Bars:
    """What a certificate may show at worst. Percentiles over all matched detections; None: not judged."""

    box_px: float
    score: float
    unmatched_fraction: float
    mask_iou: float
    keypoint_px: float
    percentile: float  # of the gaps that the bars above judge; 100: the worst one
    confident: float = 0.0  # only what one side at least scores so high is judged


# float32: only the order of sums differs. float16 and bfloat16: eleven and eight bits of mantissa in the convolutions;
# a heatmap's maximum may jump between two equal peaks and a box near the floor may come or go, so the worst case is
# shown but the 95th judged. int8: 256 values a layer; AP is what judges it, and this that no sure detection is lost,
# moved or deformed.
BARS: dict[Precision, Bars] = {
    "float32": Bars(box_px=0.05, score=1e-4, unmatched_fraction=0.0, mask_iou=0.99, keypoint_px=1.0, percentile=100),
    "float16": Bars(box_px=0.5, score=0.01, unmatched_fraction=0.02, mask_iou=0.95, keypoint_px=1.5, percentile=95),
    "bfloat16": Bars(box_px=2.0, score=0.03, unmatched_fraction=0.03, mask_iou=0.9, keypoint_px=3.0, percentile=95),
    "int8": Bars(
        box_px=4.0, score=0.1, unmatched_fraction=0.03, mask_iou=0.8, keypoint_px=8.0, percentile=95, confident=0.5
    ),
}


class ParityError(RuntimeError):
    """The bundle does not agree with the model; the message says by how much."""


@dataclass(slots=True)
class Gaps:
    """What was found over all pictures: one number a matched detection (and joint)."""

    box_px: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    mask_iou: list[float] = field(default_factory=list)
    keypoint_px: list[float] = field(default_factory=list)
    unmatched: int = 0
    confident: float = 0.0  # of detections that one side at least scores so high


class TorchReference:
    """The model itself behind the engine's questions."""

    def __init__(self, model: Network) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def detect(self, images: Array, sizes: Array, *proposals: Array) -> Predictions:
        there = torch.from_numpy(sizes)
        return self.model(normalise(torch.from_numpy(images), there), there, *map(torch.from_numpy, proposals))

    @torch.inference_mode()
    def heads(self, found: Predictions) -> dict[str, Array]:
        """Head outputs of every detection of the batch, padding left out, image by image."""
        valid = (torch.arange(found.boxes.shape[1]) < found.count[:, None]).flatten()
        rois, labels = with_batch_index(found.boxes)[valid], found.labels.flatten()[valid]
        outputs = {}
        if len(rois) and self.model.mask_head is not None:
            outputs["probabilities"] = self.model.mask_probabilities(found.features, rois, labels).numpy()
        if len(rois) and self.model.keypoint_head is not None:
            outputs["heatmaps"] = self.model.keypoint_heatmaps(found.features, rois).numpy()
        return outputs


class FloatReference:
    """The bundle's own float32 graphs in the model's place, for what is made from a bundle.

    It remembers its answers, for it is asked the same again and again; they hold no features.
    """

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        self.engine, self.has_masks, self.has_keypoints = engine, bundle.has_masks, bundle.has_keypoints
        self.answers: dict[bytes, tuple[Predictions, dict[str, Array]]] = {}
        self.last: dict[str, Array] = {}

    def detect(self, *inputs: Array) -> Predictions:
        key = hashlib.sha256(b"".join(each.tobytes() for each in inputs)).digest()
        if key not in self.answers:
            found = self.engine.detect(*inputs)
            numbers = [torch.from_numpy(each) for each in (found.count, found.boxes, found.scores, found.labels)]
            heads = self._heads(Predictions(*numbers, features=found.features))
            self.answers[key] = (Predictions(*numbers, features=[]), heads)
        predictions, self.last = self.answers[key]
        return predictions

    def heads(self, _found: Predictions) -> dict[str, Array]:
        """Of the batch that was asked last."""
        return self.last

    def _heads(self, found: Predictions) -> dict[str, Array]:
        features: Any = found.features
        valid = (torch.arange(found.boxes.shape[1]) < found.count[:, None]).flatten()
        rois, labels = with_batch_index(found.boxes)[valid].numpy(), found.labels.flatten()[valid].numpy()
        outputs = {}
        if len(rois) and self.has_masks:
            outputs["probabilities"] = self.engine.masks(features, rois, labels)
        if len(rois) and self.has_keypoints:
            outputs["heatmaps"] = self.engine.keypoints(features, rois)
        return outputs


Reference = TorchReference | FloatReference


def certify(
    model: Network,
    bundle: Bundle,
    canvases: Sequence[Canvas],
    choice: EngineChoice,
    precision: Precision,
    batches: Sequence[int] = (),
    allowed: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The certificate of one engine over these canvases; raises ParityError below the bar.

    `batches` are the sizes tried, BATCHES if none is given; `allowed` replaces numbers of the bar, and is written down.

    Every canvas is run alone, then in batches of 2 and 5 beside others of its shape and a blank picture, in which a
    trained model finds nothing. One that looks into proposals is given none of it: crops of one colour are all alike,
    and which of them a suppression keeps would be a matter of the last bit.
    """
    certificate, failed = judge(
        TorchReference(model), bundle, canvases, choice, precision, allowed, tuple(batches) or BATCHES
    )
    if failed:
        raise ParityError(
            f"{bundle.name} under {choice} ({precision}) strays from the torch model: {'; '.join(failed)}"
        )
    return certificate


def judge(
    reference: Reference,
    bundle: Bundle,
    canvases: Sequence[Canvas],
    choice: EngineChoice,
    precision: Precision,
    allowed: Mapping[str, float] | None = None,
    batches: Sequence[int] = (),
) -> tuple[dict[str, Any], list[str]]:
    """The certificate, and in words where it is below the bar. `allowed` lowers bars, and is recorded."""
    bars = replace(BARS[precision], **(allowed or {}))
    batches = tuple(batches) or BATCHES
    gaps = measure(reference, bundle, canvases, choice, precision, batches, bars.confident)
    certificate = {
        "engine": choice,
        "runtime_version": _runtime_version(choice),
        "precision": precision,
        "pictures": len(canvases),
        "batches": list(batches),
        "matched": len(gaps.box_px),
        "unmatched": gaps.unmatched,
        "box_px": _spread(gaps.box_px),
        "score": _spread(gaps.score),
        "mask_iou": _spread(gaps.mask_iou, low=True),
        "keypoint_px": _spread(gaps.keypoint_px),
    }
    if gaps.confident:
        certificate["judged_from_score"] = gaps.confident
    if allowed:
        certificate["allowed"] = dict(allowed)
    return certificate, _failures(gaps, bars)


def measure(
    reference: Reference,
    bundle: Bundle,
    canvases: Sequence[Canvas],
    choice: EngineChoice,
    precision: Precision,
    batches: Sequence[int],
    confident: float,
) -> Gaps:
    """What detections that one side at least scores `confident` differ by, over batches of these sizes."""
    engine = open_engine(bundle, choice, precision=precision).engine
    gaps = Gaps(confident=confident)
    try:
        for batch in batches:
            for group in _groups(canvases, batch):
                _compare(reference, engine, group, gaps)
    finally:
        engine.close()
    return gaps


def _runtime_version(choice: EngineChoice) -> str:
    if choice == "aoti":
        return torch.__version__
    if choice in ("onnx", "tensorrt"):  # several distributions hold the one module
        return str(importlib.import_module({"onnx": "onnxruntime"}.get(choice, choice)).__version__)
    return importlib.metadata.version(choice)


def write_golden(model: Network, directory: Path, canvases: Sequence[Canvas]) -> int:
    """`golden.npz`: one canvas and all that the model gives for it. Returns the number of detections in it.

    Of the canvases on which something is found, the one with the fewest: a heatmap is 3136 numbers a joint. They are
    stored as float16, whose steps are a tenth of what the golden check allows.
    """
    reference = TorchReference(model)
    tried = [(_batch([canvas]), reference.detect(*_batch([canvas]))) for canvas in canvases]
    inputs, found = min(tried, key=lambda each: int(each[1].count) or math.inf)
    arrays = {name: getattr(found, name).numpy() for name in ("count", "boxes", "scores", "labels")}
    arrays |= _heads_or_empty(model, reference.heads(found))
    if "heatmaps" in arrays:
        arrays["heatmaps"] = arrays["heatmaps"].astype(np.float16)
    aside = directory / f".{GOLDEN}.part"
    with aside.open("wb") as stream:
        np.savez_compressed(stream, **dict(zip(INPUTS, inputs, strict=False)), **arrays)
    aside.replace(directory / GOLDEN)
    return int(found.count.sum())


def _heads_or_empty(model: Network, heads: dict[str, Array]) -> dict[str, Array]:
    if model.mask_head is not None:
        heads.setdefault("probabilities", np.zeros((0, model.mask_head.side, model.mask_head.side), np.float32))
    if model.keypoint_head is not None:
        joints = model.keypoint_head.upsample.out_channels
        heads.setdefault("heatmaps", np.zeros((0, joints, 56, 56), np.float32))
    return heads


def _groups(canvases: Sequence[Canvas], batch: int) -> list[list[Canvas]]:
    """Batches that hold each canvas once, with others of its shape; what is left of a batch is blank pictures."""
    by_shape: dict[tuple[int, int], list[Canvas]] = {}
    for canvas in canvases:
        by_shape.setdefault(canvas.shape, []).append(canvas)
    room = max(1, batch - 1)
    groups = []
    for same in by_shape.values():
        none = None if same[0].proposals is None else np.zeros((0, 4), np.float32)
        blank = replace(same[0], pixels=np.full_like(same[0].pixels, 117), proposals=none)
        groups += [(same[i : i + room] + [blank] * batch)[:batch] for i in range(0, len(same), room)]
    return groups


def _batch(canvases: Sequence[Canvas]) -> list[Array]:
    """What an engine's `detect` is given, as INPUTS names it."""
    inputs: list[Array] = [np.stack([c.pixels for c in canvases]), np.array([c.size for c in canvases], np.int64)]
    return inputs if canvases[0].proposals is None else [*inputs, stacked(list(canvases))]


def _compare(reference: Reference, engine: Engine, group: list[Canvas], gaps: Gaps) -> None:
    inputs = _batch(group)
    wanted, found = reference.detect(*inputs), engine.detect(inputs[0], inputs[1], *inputs[2:])
    wanted_heads = reference.heads(wanted)
    wanted_start = np.concatenate([[0], np.cumsum(wanted.count.numpy())])
    for image in range(len(group)):
        count = int(wanted.count[image])
        boxes, scores, labels = (getattr(wanted, k)[image, :count].numpy() for k in ("boxes", "scores", "labels"))
        num = int(found.count[image])
        pairs = match(boxes, labels, found.boxes[image, :num], found.labels[image, :num])
        alone = [(scores, {pair[0] for pair in pairs}), (found.scores[image, :num], {pair[1] for pair in pairs})]
        gaps.unmatched += sum(
            bool(score >= gaps.confident) for side, taken in alone for row, score in enumerate(side) if row not in taken
        )
        pairs = [p for p in pairs if max(scores[p[0]], found.scores[image, p[1]]) >= gaps.confident]
        if not pairs:
            continue
        ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
        their_boxes = found.boxes[image, theirs]
        gaps.box_px += np.abs(boxes[ours] - their_boxes).max(1).tolist()
        gaps.score += np.abs(scores[ours] - found.scores[image, theirs]).tolist()
        rois = np.concatenate([np.full((len(theirs), 1), image, np.float32), their_boxes], 1)
        rows = wanted_start[image] + ours
        if "probabilities" in wanted_heads:
            masks = engine.masks(found.features, rois, found.labels[image, theirs])
            gaps.mask_iou += _mask_ious(wanted_heads["probabilities"][rows], masks)
        if "heatmaps" in wanted_heads:
            points = keypoints.decode(engine.keypoints(found.features, rois), their_boxes)
            wanted_points = keypoints.decode(wanted_heads["heatmaps"][rows], boxes[ours])
            gaps.keypoint_px += np.hypot(*np.moveaxis(points - wanted_points, -1, 0)[:2]).ravel().tolist()


def match(boxes: Array, labels: Array, other_boxes: Array, other_labels: Array) -> list[tuple[int, int]]:
    """Pairs of one class whose boxes overlap most, each detection at most once."""
    if not len(boxes) or not len(other_boxes):
        return []
    low = np.maximum(boxes[:, None, :2], other_boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], other_boxes[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area, other_area = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, other_boxes))
    iou = both / np.maximum(area[:, None] + other_area[None] - both, 1e-9)
    iou[labels[:, None] != other_labels[None]] = 0
    pairs = []
    while iou.max() > SAME_BOX_IOU:
        row, column = (int(i) for i in np.unravel_index(int(iou.argmax()), iou.shape))
        pairs.append((row, column))
        iou[row], iou[:, column] = 0, 0
    return pairs


def _mask_ious(one: Array, other: Array) -> list[float]:
    a, b = one >= 0.5, other >= 0.5
    union = (a | b).sum((1, 2))
    return np.where(union == 0, 1.0, (a & b).sum((1, 2)) / np.maximum(union, 1)).tolist()


def _spread(values: list[float], low: bool = False) -> dict[str, float] | None:
    """Median, 95th percentile and worst, from the side that is bad."""
    if not values:
        return None
    percentiles = (50, 5, 0) if low else (50, 95, 100)
    numbers = (round(float(np.percentile(values, p)), 7) for p in percentiles)
    return dict(zip(("p50", "p95", "worst"), numbers, strict=True))


def _failures(gaps: Gaps, bars: Bars) -> list[str]:
    failed = []
    allowed = bars.unmatched_fraction * max(1, len(gaps.box_px))
    if gaps.unmatched > allowed:
        failed.append(f"{gaps.unmatched} detections have no counterpart beside {len(gaps.box_px)} that have one")
    for name, unit in (("box_px", " px"), ("score", ""), ("keypoint_px", " px")):
        values, bar = getattr(gaps, name), getattr(bars, name)
        gap = float(np.percentile(values, bars.percentile)) if values else 0.0
        if not gap <= bar:  # NaN fails too
            failed.append(f"{name} differs by {gap:.4g}{unit}, at most {bar:g}{unit} is allowed")
    if gaps.mask_iou and not np.percentile(gaps.mask_iou, 100 - bars.percentile) >= bars.mask_iou:
        failed.append(
            f"mask IoU is {np.percentile(gaps.mask_iou, 100 - bars.percentile):.4f}, at least {bars.mask_iou}"
        )
    return failed


def padded(canvases: Sequence[Canvas], shapes: Sequence[tuple[int, int]]) -> list[Canvas]:
    """As an engine of fixed shapes gets them: what a network sees at a picture's border depends on the padding."""
    found = []
    for canvas in canvases:
        pixels = np.zeros((*canvas_for(canvas.shape, shapes), 3), np.uint8)
        pixels[: canvas.shape[0], : canvas.shape[1]] = canvas.pixels
        found.append(Canvas(pixels, canvas.size, canvas.image_size))
    return found


def canvases_of(images: Sequence[npt.NDArray[np.uint8]], bundle: Bundle) -> list[Canvas]:
    """With the first proposals of the bundle's own rule where the model takes any: each costs the same arithmetic."""
    rule = bundle.manifest.proposals
    canvases = [fit(image, bundle.manifest.canvas) for image in images]
    if rule is None:
        return canvases
    boxes = [propose(image, rule, MOST_PROPOSALS) for image in images]
    return [replace(c, proposals=onto_canvas(each, c)) for c, each in zip(canvases, boxes, strict=True)]
