"""One picture through Mask R-CNN R50-FPN on a CPU, ours against torchvision's: `python -m bench.cpu`.

One process, the same random weights and the same canvas for all, routes in turn within each repetition so that a busy
machine slows all of them. `--write FILE` writes the page, `--quick` tries the program itself, on a small canvas.

torchvision is called below its transform (backbone, rpn, roi_heads), so nobody resizes a picture or pastes a mask; ours
normalises the bytes of the picture in `detect`, torchvision gets them normalised. Its norms are frozen, as in the
models that it publishes weights for. Every route reads the masks of 10 detections.
"""

import argparse
import importlib.util
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference

from bench.machine import processor
from bench.networks import CLASSES, DETECTIONS, SMALL, Below, Scene, pooled, scene, torchvision_model
from export.quantize import Work
from export.to_onnx import write_bundle
from export.verify import match
from models.importers import from_torchvision
from service.bundle import Bundle
from service.engines import EngineChoice, Precision, open_engine
from service.images import Canvas

THREADS = 2
CANVAS = (800, 1088)
BASELINE = "torchvision eager"
Array = NDArray[Any]


class Answer(NamedTuple):
    """Boxes (10, 4) on the canvas and labels (10,); seconds of detect and masks, NaN where a route has one stage."""

    boxes: Array
    labels: Array
    detect_s: float
    masks_s: float
    total_s: float


Route = Callable[[], Answer]


def eager(model: Any, picture: Scene, bfloat16: bool) -> Route:
    """What `roi_heads` does, stage by stage."""

    @torch.inference_mode()
    def route() -> Answer:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            start, heads = time.perf_counter(), model.roi_heads
            features = model.backbone(picture.canvas)
            proposals, _ = model.rpn(ImageList(picture.canvas, picture.shapes), features)
            hidden = heads.box_head(pooled(heads.box_roi_pool, features, proposals, picture.shapes))
            found = heads.postprocess_detections(*heads.box_predictor(hidden), proposals, picture.shapes)
            boxes, _, labels = found
            between = time.perf_counter()
            logits = heads.mask_predictor(heads.mask_head(pooled(heads.mask_roi_pool, features, boxes, picture.shapes)))
            maskrcnn_inference(logits, labels)
            end = time.perf_counter()
        return Answer(boxes[0].float().numpy(), labels[0].numpy() - 1, between - start, end - between, end - start)

    return route


class Answers(nn.Module):
    """torchvision's model of one picture, as an exporter wants it."""

    def __init__(self, model: Any, shape: tuple[int, int]) -> None:
        super().__init__()
        self.below = Below(model, shape)

    def forward(self, canvas: Tensor) -> tuple[Tensor, ...]:
        found = self.below(canvas)
        return tuple(found[0][name] for name in ("boxes", "labels", "masks"))


def their_export(model: Any, picture: Scene, folder: Path) -> Route:
    """torchvision's documented way to ONNX: tracing, a batch of one, this canvas only."""
    file = folder / "torchvision.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = Answers(model, picture.shapes[0]).eval()
        torch.onnx.export(one, (picture.canvas,), file, dynamo=False, opset_version=17, input_names=["canvas"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {"canvas": picture.canvas.numpy()}

    def route() -> Answer:
        start = time.perf_counter()
        boxes, labels, _ = session.run(None, feed)
        total = time.perf_counter() - start
        return Answer(np.asarray(boxes), np.asarray(labels) - 1, float("nan"), float("nan"), total)

    return route


def ours(bundle: Bundle, picture: Scene, choice: EngineChoice, precision: Precision) -> Route:
    engine = open_engine(bundle, choice, THREADS, precision).engine

    def route() -> Answer:
        start = time.perf_counter()
        found = engine.detect(picture.images, picture.sizes)
        between = time.perf_counter()
        boxes, labels = found.boxes[0, :DETECTIONS], found.labels[0, :DETECTIONS]
        rois = np.concatenate([np.zeros((len(boxes), 1), np.float32), boxes], axis=1)
        engine.masks(found.features, rois, labels)
        end = time.perf_counter()
        return Answer(boxes, labels, between - start, end - between, end - start)

    return route


def in_int8(bundle: Bundle, aside: Path, size: tuple[int, int]) -> Bundle:
    """Every layer, calibrated on three pictures of the same kind: random weights have no accuracy to keep."""
    calibration = [scene(*size, seed) for seed in (1, 2, 3)]
    work = Work(bundle, aside, [], None, 0)
    work.quantize([Canvas(each.images[0], each.shapes[0], each.shapes[0]) for each in calibration])
    return work.write([])


def routes(model: Any, bundle: Bundle, int8: Bundle | None, picture: Scene) -> dict[str, Route]:
    found = {
        BASELINE: eager(model, picture, bfloat16=False),
        "torchvision, its ONNX export under ONNX Runtime": their_export(model, picture, bundle.directory),
        "limner, ONNX Runtime": ours(bundle, picture, "onnx", "float32"),
        "limner, OpenVINO": ours(bundle, picture, "openvino", "float32"),
        "torchvision, autocast bfloat16": eager(model, picture, bfloat16=True),
        "limner, OpenVINO bfloat16": ours(bundle, picture, "openvino", "bfloat16"),
    }
    return found if int8 is None else {**found, "limner, OpenVINO int8": ours(int8, picture, "openvino", "int8")}


def measure(competitors: dict[str, Route], repetitions: int) -> dict[str, list[Answer]]:
    """Each route's answers. It runs twice at its turn and the second counts: memory left alone for ten seconds is cold.

    The first repetition is left out.
    """
    answers: dict[str, list[Answer]] = {name: [] for name in competitors}
    for repetition in range(1 + repetitions):
        for name, route in competitors.items():
            route()
            answer = route()
            assert len(answer.boxes) == DETECTIONS, f"{name} found {len(answer.boxes)}: another task"
            if repetition:
                answers[name].append(answer)
    return answers


def agreement(wanted: Answer, found: Answer) -> str:
    pairs = match(wanted.boxes, wanted.labels, found.boxes, found.labels)
    gaps = [float(np.abs(wanted.boxes[a] - found.boxes[b]).max()) for a, b in pairs]
    return f"{len(pairs)} of {DETECTIONS}" + (f", {max(gaps):.2g} px" if gaps else "")


def rows(answers: dict[str, list[Answer]]) -> list[str]:
    def milliseconds(name: str, part: str) -> str:
        value = 1e3 * median(getattr(answer, part) for answer in answers[name])
        return "" if np.isnan(value) else f"{value:.0f}"

    baseline = median(answer.total_s for answer in answers[BASELINE])
    lines = []
    for name, taken in answers.items():
        times = [milliseconds(name, part) for part in ("detect_s", "masks_s", "total_s")]
        ratio = baseline / median(answer.total_s for answer in taken)
        alike = "" if name == BASELINE else agreement(answers[BASELINE][-1], taken[-1])
        lines.append(f"| {name} | {' | '.join(times)} | {ratio:.2f} | {alike} |")
    return lines


def page(answers: dict[str, list[Answer]], canvas: tuple[int, int]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "onnxruntime", "openvino"))
    lines = [
        "# Mask R-CNN on a CPU",
        "",
        f"`python -m bench.cpu`, {date.today()}: {processor()}, {os.cpu_count()} cores, {THREADS} threads; Python "
        f"{platform.python_version()}, {packages}.",
        "",
        f"Mask R-CNN R50-FPN, {CLASSES} classes, 1000 proposals, one picture, canvas {canvas[0]} x {canvas[1]}, masks "
        f"of {DETECTIONS} detections. Medians of {len(answers[BASELINE])} repetitions, routes in turn, each twice of "
        "which the second counts, in one process, with the same random weights. torchvision is called below its "
        "transform (backbone, rpn, roi_heads), with "
        "frozen norms as in its published models; its ONNX export is traced (opset 17) for one picture of this canvas, "
        "while limner's graphs take any batch and canvas. Nobody resizes a picture or pastes a mask. limner's detect "
        "reads bytes and normalises them. The last column counts the eager model's detections that are found again "
        "(same class, IoU above 0.5) and their largest difference; random weights put thousands of candidates at "
        "nearly equal scores, of which bfloat16 and int8 pick others, torchvision's as well: the certificates that "
        "`limner export onnx` and `limner export int8` make judge trained ones. int8 (if nncf is there): every layer.",
        "",
        "| route | detect ms | masks ms | total ms | times faster than eager | same detections |",
        "|---|---:|---:|---:|---:|---|",
    ]
    return "\n".join(lines + rows(answers)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small canvas, once")
    options = parser.parse_args()
    size, repetitions = (SMALL, 1) if options.quick else (CANVAS, options.repetitions)
    torch.set_num_threads(THREADS)
    model, picture = torchvision_model(), scene(*size)
    names = [f"class_{i}" for i in range(CLASSES)]
    network, spec = from_torchvision(model.state_dict(), names, norm_eps=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "1").mkdir()
        write_bundle(network, spec, Path(folder) / "1", ("mask_rcnn_r50_fpn", "1"), {})
        bundle, aside = Bundle.read(Path(folder) / "1"), Path(folder) / "int8"
        int8 = in_int8(bundle, aside, size) if importlib.util.find_spec("nncf") else None
        answers = measure(routes(model, bundle, int8, picture), repetitions)
    text = page(answers, size)
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)


if __name__ == "__main__":
    main()
