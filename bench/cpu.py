"""One picture through Mask R-CNN R50-FPN on a CPU, ours against torchvision's: `python -m bench.cpu`.

One process, the same weights and the same canvas for all, routes in turn within each repetition so that a busy
machine slows all of them. `--write FILE` writes the page, `--quick` tries the program itself, on a small canvas.
`--prepared FOLDER --prepare` makes what is timed, which takes longer than the timing.

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
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference

from bench.machine import processor
from bench.networks import CLASSES, DETECTIONS, Below, torchvision_model, weights
from bench.results import publish
from bench.shapes import Scene, pooled, scene
from export import verify
from export.quantize import Work
from export.to_onnx import write_bundle
from models.importers import from_torchvision
from service.bundle import Bundle
from service.engines import EngineChoice, Precision, open_engine
from service.images import Canvas

THREADS = 2
CANVAS, SMALL = (800, 1088), (512, 640)
CALIBRATION_SEEDS, CERTIFICATE_SEEDS = (1, 2, 3), (11, 12, 13, 14)  # 0 is what is timed
BASELINE = "torchvision eager"
WEIGHTS, THEIRS, CERTIFICATES = "weights.pt", "torchvision.onnx", "certificates.md"
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


class Answers(Below):
    """Of one picture, as a tuple, which a graph can give."""

    def forward(self, canvas: Tensor) -> Any:
        found = super().forward(canvas)
        return tuple(found[0][name] for name in ("boxes", "labels", "masks"))


def export_theirs(model: Any, picture: Scene, file: Path) -> None:
    """torchvision's documented way to ONNX: tracing, a batch of one, this canvas only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        below = Answers(model, picture.shapes[0]).eval()
        torch.onnx.export(below, (picture.canvas,), file, dynamo=False, opset_version=17, input_names=["canvas"])


def theirs_exported(picture: Scene, file: Path) -> Route:
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
    images, sizes = picture.images.numpy(), picture.sizes.numpy()

    def route() -> Answer:
        start = time.perf_counter()
        found = engine.detect(images, sizes)
        between = time.perf_counter()
        boxes, labels = found.boxes[0, :DETECTIONS], found.labels[0, :DETECTIONS]
        rois = np.concatenate([np.zeros((len(boxes), 1), np.float32), boxes], axis=1)
        engine.masks(found.features, rois, labels)
        end = time.perf_counter()
        return Answer(boxes, labels, between - start, end - between, end - start)

    return route


def in_int8(bundle: Bundle, aside: Path, size: tuple[int, int]) -> Bundle:
    """Every layer, calibrated on three pictures of the same kind."""
    work = Work(bundle, aside, [], None, 0)
    work.quantize(canvases(size, CALIBRATION_SEEDS))
    return work.write([])


def canvases(size: tuple[int, int], seeds: Sequence[int]) -> list[Canvas]:
    return [Canvas(scene(*size, seed).images[0].numpy(), size, size) for seed in seeds]


def routes(prepared: Path, picture: Scene) -> dict[str, Route]:
    model = torchvision_model(torch.load(prepared / WEIGHTS))
    by_name: dict[str, Route] = {
        BASELINE: eager(model, picture, bfloat16=False),
        "torchvision, its ONNX export under ONNX Runtime": theirs_exported(picture, prepared / THEIRS),
        "torchvision, autocast bfloat16": eager(model, picture, bfloat16=True),
    }
    engines = our_engines(*bundles(prepared))
    return by_name | {name: ours(each, picture, *engine) for name, each, engine in engines}


def bundles(prepared: Path) -> tuple[Bundle, Bundle | None]:
    """In float32, and with int8 beside it where NNCF could make that."""
    int8 = prepared / "int8" / "1"
    return Bundle.read(prepared / "float32" / "1"), Bundle.read(int8) if int8.is_dir() else None


def our_engines(bundle: Bundle, int8: Bundle | None) -> list[tuple[str, Bundle, tuple[EngineChoice, Precision]]]:
    found: list[tuple[str, Bundle, tuple[EngineChoice, Precision]]] = [
        ("limner, ONNX Runtime", bundle, ("onnx", "float32")),
        ("limner, OpenVINO", bundle, ("openvino", "float32")),
        ("limner, OpenVINO bfloat16", bundle, ("openvino", "bfloat16")),
    ]
    return found if int8 is None else [*found, ("limner, OpenVINO int8", int8, ("openvino", "int8"))]


class Remembered(verify.TorchReference):
    """The eager model, asked once for what every certificate asks."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.answers: dict[bytes, Any] = {}

    def detect(self, images: Array, sizes: Array) -> Any:
        key = images.tobytes()
        if key not in self.answers:
            self.answers[key] = super().detect(images, sizes)
        return self.answers[key]


def certificates(network: Any, bundle: Bundle, int8: Bundle | None, size: tuple[int, int]) -> list[str]:
    """As `limner export` makes them, of pictures that are neither timed nor calibrated on: one row an engine."""
    reference, pictures, lines = Remembered(network), canvases(size, CERTIFICATE_SEEDS), []
    for name, each, engine in our_engines(bundle, int8):
        found, failed = verify.judge(reference, each, pictures, *engine, batches=(1,))
        box, score, mask = (found[kind] or {} for kind in ("box_px", "score", "mask_iou"))
        shown = [f"{part.get(rank, float('nan')):.2g}" for part in (box, score) for rank in ("p50", "p95", "worst")]
        shown += [f"{mask.get(rank, float('nan')):.4f}" for rank in ("p50", "p95")]
        sure = f"{found['judged_from_score']:g}" if "judged_from_score" in found else "all"
        count = f"{found['matched']}, {found['unmatched']}"
        lines.append(f"| {name} | {sure} | {count} | {' | '.join(shown)} | {'; '.join(failed) or 'yes'} |")
    return lines


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
    pairs = verify.match(wanted.boxes, wanted.labels, found.boxes, found.labels)
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


def page(answers: dict[str, list[Answer]], certified: list[str], canvas: tuple[int, int]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "onnxruntime", "openvino"))
    lines = [
        "# Mask R-CNN on a CPU",
        "",
        f"`python -m bench.cpu`, {date.today()}: {processor()}, {os.cpu_count()} cores, {THREADS} threads; Python "
        f"{platform.python_version()}, {packages}.",
        "",
        f"Mask R-CNN R50-FPN, {CLASSES} classes, 1000 proposals, one picture, canvas {canvas[0]} x {canvas[1]}, masks "
        f"of {DETECTIONS} detections. Medians of {len(answers[BASELINE])} repetitions, routes in turn, each twice of "
        "which the second counts, in one process, with the same weights: a random trunk under last layers that find "
        "discs (bench/shapes.py), so that the detections of two routes can be compared. torchvision is "
        "called below its transform (backbone, rpn, roi_heads), with frozen norms as in its published models; its "
        "ONNX export is traced (opset 17) for one picture of this canvas, while limner's graphs take any batch and "
        "canvas. Nobody resizes a picture or pastes a mask. limner's detect reads bytes and normalises them. The last "
        "column counts the eager model's detections that are found again (same class, IoU above 0.5) and their largest "
        "difference.",
        "",
        "| route | detect ms | masks ms | total ms | times faster than eager | same detections |",
        "|---|---:|---:|---:|---:|---|",
        *rows(answers),
        "",
        f"The certificates, by the bars of `limner export` and against the eager model, over {len(CERTIFICATE_SEEDS)} "
        f"other pictures; int8 is calibrated on {len(CALIBRATION_SEEDS)} further ones, every layer. Median, 95th "
        "percentile and worst; of the masks' IoU median and 5th. Judged are detections of at least the score named. "
        "What trained models lose is in their own certificates (docs/compression.md).",
        "",
        "| route | judged | matched, not | box px | | | score | | | mask IoU | | bars met |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        *certified,
    ]
    return "\n".join(lines) + "\n"


def prepare(folder: Path, size: tuple[int, int]) -> None:
    """All that is timed, and its certificates, which come last."""
    state = weights()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / WEIGHTS)
    export_theirs(torchvision_model(state), scene(*size), folder / THEIRS)
    names = [f"class_{i}" for i in range(CLASSES)]
    network, spec = from_torchvision(state, names, norm_eps=1e-5)
    (folder / "float32" / "1").mkdir(parents=True)
    write_bundle(network, spec, folder / "float32" / "1", ("mask_rcnn_r50_fpn", "1"), {})
    if importlib.util.find_spec("nncf"):
        in_int8(Bundle.read(folder / "float32" / "1"), folder / "int8", size)
    (folder / CERTIFICATES).write_text("\n".join(certificates(network, *bundles(folder), size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small canvas, once")
    parser.add_argument("--prepared", type=Path, metavar="FOLDER", help="keep there what is timed, or take it")
    parser.add_argument("--prepare", action="store_true", help="stop before the timing")
    options = parser.parse_args()
    if options.prepare and not options.prepared:
        parser.error("--prepare needs --prepared, where to keep it")
    size, repetitions = (SMALL, 1) if options.quick else (CANVAS, options.repetitions)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as aside:
        folder = options.prepared or Path(aside)
        if not (folder / CERTIFICATES).is_file():
            prepare(folder, size)
        if options.prepare:
            return
        answers = measure(routes(folder, scene(*size)), repetitions)
        text = page(answers, (folder / CERTIFICATES).read_text().splitlines(), size)
    publish(text, options.write)


if __name__ == "__main__":
    main()
