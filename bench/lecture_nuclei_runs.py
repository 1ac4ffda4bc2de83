"""Trainings and measurements behind the lecture's rows 7 to 9, on nuclei: small, dense, with masks.

Every variant is `limner train` with the arguments that the page gives, on one thread: the same pictures in the same
order, as many steps, the same seed. What was trained or measured stays in the cache and is not done again.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import spread
from bench.results import keep
from models import checkpoint, matching
from models.dense import DenseNetwork
from models.imbalance import focal as focal_terms
from models.servable import normalise
from service.detector import Interpolation
from service.images import DecodeLimits, decode
from training import evaluate, train
from training.batches import Batches
from training.compose import Augmentation, Composer
from training.data import Source, read_annotations, read_source
from training.engine import torch_detector

STEPS = 240
SIDE = 320
COMMON = ("--steps", str(STEPS), "--short-side", str(SIDE))
SIDES = (224, 256, 320, 384)  # of the canvas, at test
GAMMAS = (0.0, 0.5, 1.0, 2.0)
POINTS = 201  # of a curve
TIMED = 20  # pictures
Measured = dict[str, Any]


class Variant(NamedTuple):
    """A training: the recipe and what is changed in it."""

    recipe: str
    changes: tuple[str, ...] = ()

    def command(self) -> list[str]:
        return [self.recipe, *COMMON, *self.changes]


def loss(**settings: Any) -> Variant:
    return Variant("nuclei_retinanet", ("--option", "loss=" + json.dumps(settings)))


def focal(gamma: float, alpha: float) -> Variant:
    return loss(kind="focal", gamma=gamma, alpha=alpha)


def ohem(batch: int, nms_iou: float, one_to_three: bool = False) -> Variant:
    return loss(kind="ohem", batch=batch, nms_iou=nms_iou, one_to_three=one_to_three)


VARIANTS = {
    "focal_2": focal(2, 0.25),
    "ce_75": focal(0, 0.75),
    "faster": Variant("nuclei_faster_rcnn"),
    "mask": Variant("nuclei_mask_rcnn"),
    "mask_pool": Variant("nuclei_mask_rcnn", ("--option", 'pooler="pool"')),
    "focal_1": focal(1, 0.25),
    "focal_05": focal(0.5, 0.5),
    "ohem_128_5": ohem(128, 0.5),
    "ohem_13": ohem(128, 0.5, one_to_three=True),
    "ce_50": focal(0, 0.5),
}
STAGES = {"one": "focal_2", "two": "faster"}
ROWS: dict[int, tuple[str, ...]] = {
    7: ("focal_2", "ce_75", "focal_1", "focal_05", "ce_50", "ohem_128_5", "ohem_13"),
    8: tuple(STAGES.values()),
    9: ("mask", "mask_pool", "faster"),
}


class Bench:
    """Trains and measures; the folder `nuclei` of the cache keeps JSON by the name of what was measured."""

    def __init__(self, data: Path, trunk: Path, cache: Path) -> None:
        self.images, self.annotations = data / "images", data / "annotations"
        self.trunk, self.cache, self.results = trunk, cache, cache / "nuclei"
        self.results.mkdir(parents=True, exist_ok=True)

    def trained(self, name: str) -> Path:
        """The folder of the run. One that was stopped goes on."""
        run = self.cache / "runs" / f"nuclei_{name}"
        if not self._done(run):
            command = [*VARIANTS[name].command(), "--trunk", str(self.trunk), "--out", str(run), "--resume"]
            command += ["--data", f"nuclei={self.images}:{self.annotations / 'instances_train.json'}"]
            command += ["--device", "cpu", "--threads", "1", "--workers", "0", "--save-every", "60"]
            print(name, flush=True)
            if train.main(command) or not self._done(run):
                raise SystemExit(f"{name} is not trained yet; the same command goes on")
        return run

    def _done(self, run: Path) -> bool:
        return (run / "last").exists() and checkpoint.read_config(run / "last")["provenance"]["step"] >= STEPS

    def row(self, number: int) -> None:
        for name in ROWS[number]:
            self.scores(name)
        if number == 7:
            self.kept("curves", lambda: self.curves("focal_2"))
        if number == 8:
            for name in STAGES.values():
                for side in SIDES:
                    self.scores(name, side)
            self.kept("seconds", self.seconds)
        if number == 9:
            self.scores("mask", interpolation="bicubic")

    def kept(self, name: str, measure: Callable[[], Measured]) -> Measured:
        path = self.results / f"{name}.json"
        if not path.exists():
            print(f"measuring {name}", flush=True)
            keep(path, measure())
        return json.loads(path.read_text())

    def scores(self, name: str, side: int = SIDE, interpolation: Interpolation = "bilinear") -> Measured:
        """AP on the pictures for validation, and per picture which detections are true (beside it, as .npz)."""
        parts = [name, str(side) if side != SIDE else "", interpolation if interpolation != "bilinear" else ""]
        key = "-".join(filter(None, parts))
        run = self.trained(name)
        return self.kept(key, lambda: self._scores(run, key, side, interpolation))

    def _scores(self, run: Path, key: str, side: int, interpolation: Interpolation) -> Measured:
        model, spec = checkpoint.load(run / "last")
        spec = replace(spec, canvas=replace(spec.canvas, short_side=side))
        detector = torch_detector(model, spec)
        truth = read_annotations(self.annotations / "instances_val.json")
        found, seen = evaluate.predict(detector, self.images, truth, interpolation)
        kinds: tuple[spread.Kind, ...] = ("bbox", "segm") if detector.bundle.has_masks else ("bbox",)
        for kind in kinds:
            spread.save(self.results / f"{key}-{kind}.npz", spread.verdicts(found, seen, kind))
        scores = evaluate.score(found, seen, detector, reference=False)
        return {"scores": scores, "parameters": sum(p.numel() for p in model.parameters())}

    @torch.inference_mode()
    def curves(self, name: str) -> Measured:
        """RetinaNet's figure 4: of the trained model's foreground and background anchors, how much of the focal loss of
        each gamma lies on the easiest so many, as shares from 0 to 1 at POINTS places."""
        model, spec = checkpoint.load(self.trained(name) / "last")
        assert isinstance(model, DenseNetwork)
        source = Source("nuclei", self.images, self.annotations / "instances_val.json", 1.0)
        items = read_source(source, spec.classes, None)
        pictures = Batches(
            Composer(items, {"nuclei": 1.0}, spec.canvas, (), Augmentation(flip=0.0)), {"nuclei": 1.0}, 1, 0
        )
        logits: dict[int, list[torch.Tensor]] = {matching.BACKGROUND: [], matching.FOREGROUND: []}
        for number in range(len(items)):
            batch = pictures[number]
            levels = model.backbone(normalise(batch.images, batch.sizes))
            mine = torch.cat(model.detector(levels)[0], 1)[0, :, 0]
            anchors = torch.cat(model.detector.anchors(levels, batch.images.permute(0, 3, 1, 2).shape))
            label, _ = matching.match(anchors, batch.boxes, batch.ignore, 0.4, 0.5, rescue=True)
            for kind, list_ in logits.items():
                list_.append(mine[label == kind])
        result: Measured = {}
        for kind, title in ((matching.FOREGROUND, "foreground"), (matching.BACKGROUND, "background")):
            values = torch.cat(logits[kind]).double()
            goals = torch.full_like(values, kind)
            terms = {str(gamma): focal_terms(values, goals, gamma, None) for gamma in GAMMAS}
            result[title] = {
                "count": len(values),
                "shares": {gamma: cumulative(each.numpy()) for gamma, each in terms.items()},
            }
        return result

    def seconds(self) -> Measured:
        """Of the network and its NMS, one picture at a time on one thread: medians by stage and side."""
        torch.set_num_threads(1)
        content = read_annotations(self.annotations / "instances_val.json")["images"][:TIMED]
        paths = [self.images / each["file_name"] for each in content]
        result: Measured = {}
        for name in STAGES.values():
            model, spec = checkpoint.load(self.trained(name) / "last")
            for side in SIDES:
                detector = torch_detector(model, replace(spec, canvas=replace(spec.canvas, short_side=side)))
                canvases = [detector.fit(decode(path.read_bytes(), DecodeLimits())) for path in paths]
                _timed(detector.engine, canvases[0])  # allocates
                result[f"{name}-{side}"] = median(_timed(detector.engine, canvas) for canvas in canvases)
        return result


def cumulative(losses: np.ndarray) -> list[float]:
    """The share of the sum that the easiest 0 %, ... 100 % of `losses` (n,) hold, at POINTS places."""
    total = np.concatenate(([0.0], np.cumsum(np.sort(losses))))
    places = np.linspace(0, len(losses), POINTS)
    return (np.interp(places, np.arange(len(total)), total) / total[-1]).round(6).tolist()


def _timed(engine: Any, canvas: Any) -> float:
    images, sizes = canvas.pixels[None], np.array([canvas.size])
    began = time.perf_counter()
    engine.detect(images, sizes)
    return time.perf_counter() - began
