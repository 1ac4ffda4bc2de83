"""A toy detector that obeys the stage contract twice: as numpy (`ToyEngine`) and as ONNX graphs (`write_bundle`).

The red of the first pixel is the best score; four boxes are fixed fractions of the picture; masks and heatmaps carry
the mean of p2, so that a RoI read from the wrong image of a batch shows.
"""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
from onnx import TensorProto, helper, numpy_helper

from service.bundle import (
    Artifact,
    CanvasRule,
    Keypoints,
    Limits,
    Manifest,
    Normalisation,
    Port,
    Stage,
    Thresholds,
    file_sha256,
    write_manifest,
)
from service.engines import Detected, Precision

D, J = 4, 2
FACTORS = np.array([1.0, 0.8, 0.6, 0.4], np.float32)
FRACTIONS = np.array(
    [[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 0.9]], np.float32
)
LABELS = np.array([0, 1, 0, 1], np.int64)
FLOOR = 0.05
RULE = CanvasRule(short_side=64, long_side=96, multiple=32)
BLOB = np.clip(1.2 - np.hypot(*(np.mgrid[:28, :28] - 13.5)) / 14, 0, 1).astype(np.float32)
PEAKS = np.stack([np.exp(-((np.mgrid[:56, :56][0] - r) ** 2 + (np.mgrid[:56, :56][1] - c) ** 2) / 18.0)
                  for r, c in ((10, 20), (40, 30))]).astype(np.float32)  # fmt: skip


def picture(height: int = 64, width: int = 96, red: int = 250, seed: int = 0) -> np.ndarray:
    """Noise, of a brightness by `seed`, whose first pixel says how sure the toy is."""
    darkest = seed * 67 % 160
    image = np.random.default_rng(seed).integers(darkest, 256, (height, width, 3), dtype=np.uint8)
    image[0, 0, 0] = red
    return image


def encoded(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


class ToyEngine:
    """`free` cleared stops the device until it is set; `fail` makes the next batches fail; `batches` holds what ran."""

    name = "toy"
    precision: Precision = "float32"

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.fail = False
        self.closed = False
        self.batches: list[int] = []
        self.rois: dict[str, list[int]] = {"masks": [], "keypoints": []}

    def detect(self, images: np.ndarray, sizes: np.ndarray) -> Detected:
        assert images.dtype == np.uint8
        assert sizes.dtype == np.int64
        self.entered.set()
        assert self.free.wait(10)
        if self.fail:
            raise RuntimeError("secret inner state")
        self.batches.append(len(images))
        scores = (images[:, 0, 0, 0].astype(np.float32) / np.float32(255))[:, None] * FACTORS
        valid = scores >= FLOOR
        sides = sizes[:, [1, 0, 1, 0]].astype(np.float32)[:, None, :]
        boxes = sides * FRACTIONS * valid[:, :, None]
        labels = np.where(valid, LABELS, -1)
        return Detected(valid.sum(1), boxes, scores * valid, labels, features=_pooled(images))

    def masks(self, features: Any, rois: np.ndarray, labels: np.ndarray) -> np.ndarray:
        assert len(rois) == len(labels) > 0
        self.rois["masks"].append(len(rois))
        return BLOB * features.mean((1, 2, 3))[rois[:, 0].astype(int)][:, None, None] / np.float32(255)

    def keypoints(self, features: Any, rois: np.ndarray) -> np.ndarray:
        assert len(rois) > 0
        self.rois["keypoints"].append(len(rois))
        return PEAKS + features.mean((1, 2, 3))[rois[:, 0].astype(int)][:, None, None, None] / np.float32(255)

    def close(self) -> None:
        self.closed = True


def _pooled(images: np.ndarray) -> np.ndarray:
    """(B, 3, H/4, W/4)."""
    batch, height, width, _ = images.shape
    tiles = images.reshape(batch, height // 4, 4, width // 4, 4, 3).astype(np.float32)
    return tiles.mean((2, 4)).transpose(0, 3, 1, 2)


def write_bundle(
    root: Path, name: str = "toy", version: str = "1", heads: tuple[str, ...] = ("masks", "keypoints")
) -> Path:
    directory = root / name / version
    directory.mkdir(parents=True)
    graphs = {"detect": _detect_graph(), "masks": _masks_graph(), "keypoints": _keypoints_graph()}
    stages, artifacts = {}, []
    for stage in ("detect", *heads):
        graph, file = graphs[stage], f"{stage}.onnx"
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, directory / file)
        ports = {"inputs": graph.input, "outputs": graph.output}
        described = {
            side: [Port(name=value.name, dtype=_dtype(value), shape=_shape(value)) for value in values]
            for side, values in ports.items()
        }
        stages[stage] = Stage(file=file, **described)
        artifacts.append(
            Artifact(file=file, stage=stage, sha256=file_sha256(directory / file), runtime="onnx", precision="float32")
        )
    _write_golden(directory, heads)
    manifest = Manifest(
        name=name,
        version=version,
        created="2026-01-01T00:00:00Z",
        classes=["cat", "dog"],
        keypoints=Keypoints(names=["nose", "tail"], skeleton=[(0, 1)], flips=[0, 1]) if "keypoints" in heads else None,
        canvas=RULE,
        stages=stages,
        limits=Limits(max_detections=D, max_batch=16, max_canvas_pixels=96 * 96),
        thresholds=Thresholds(score_floor=FLOOR, nms_iou=0.5),
        artifacts=artifacts,
        normalisation=Normalisation(mean=[0, 0, 0], std=[1, 1, 1]),
        ap={"bbox": {"AP": 0.5}},
    )
    write_manifest(directory, manifest)
    return directory


def _write_golden(directory: Path, heads: tuple[str, ...]) -> None:
    engine = ToyEngine()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = (250, 30)
    sizes = np.array([[64, 90], [60, 96]], np.int64)
    found = engine.detect(images, sizes)
    golden: dict[str, np.ndarray] = {
        "images": images,
        "sizes": sizes,
        "count": found.count,
        "boxes": found.boxes,
        "scores": found.scores,
        "labels": found.labels,
    }
    batch, slot = np.nonzero(np.arange(D) < found.count[:, None])
    rois = np.concatenate([batch[:, None].astype(np.float32), found.boxes[batch, slot]], axis=1)
    if "masks" in heads:
        golden["probabilities"] = engine.masks(found.features, rois, found.labels[batch, slot])
    if "keypoints" in heads:
        golden["heatmaps"] = engine.keypoints(found.features, rois)
    np.savez(directory / "golden.npz", **golden)


def _value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _dtype(value: onnx.ValueInfoProto) -> str:
    return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _constants(**arrays: np.ndarray) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def _pyramid() -> list[onnx.ValueInfoProto]:
    return [_value(f"p{level}", TensorProto.FLOAT, "B", 3, f"H{level}", f"W{level}") for level in (2, 3, 4, 5)]


def _detect_graph() -> onnx.GraphProto:
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        node("AveragePool", ["planes"], ["p2"], kernel_shape=[4, 4], strides=[4, 4]),
        *(
            node("AveragePool", [f"p{level}"], [f"p{level + 1}"], kernel_shape=[2, 2], strides=[2, 2])
            for level in (2, 3, 4)
        ),
        node("Slice", ["planes", "zeros3", "ones3", "axes123"], ["corner"]),
        node("Reshape", ["corner", "column"], ["red"]),
        node("Div", ["red", "full"], ["best"]),
        node("Mul", ["best", "factors"], ["all_scores"]),
        node("GreaterOrEqual", ["all_scores", "floor"], ["valid"]),
        node("Cast", ["valid"], ["valid_float"], to=TensorProto.FLOAT),
        node("Cast", ["valid"], ["valid_int"], to=TensorProto.INT64),
        node("Mul", ["all_scores", "valid_float"], ["scores"]),
        node("ReduceSum", ["valid_int", "axis1"], ["count"], keepdims=0),
        node("Where", ["valid", "label_row", "minus"], ["labels"]),
        node("Gather", ["sizes", "whwh"], ["sides_int"], axis=1),
        node("Cast", ["sides_int"], ["sides_flat"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["sides_flat", "axis1"], ["sides"]),
        node("Mul", ["sides", "fractions"], ["all_boxes"]),
        node("Unsqueeze", ["valid_float", "axis2"], ["valid_rows"]),
        node("Mul", ["all_boxes", "valid_rows"], ["boxes"]),
    ]
    constants = _constants(
        zeros3=np.zeros(3, np.int64),
        ones3=np.ones(3, np.int64),
        axes123=np.array([1, 2, 3]),
        column=np.array([-1, 1]),
        full=np.float32(255),
        factors=FACTORS[None],
        floor=np.float32(FLOOR),
        axis1=np.array([1]),
        axis2=np.array([2]),
        label_row=LABELS[None],
        minus=np.array(-1),
        whwh=np.array([1, 0, 1, 0]),
        fractions=FRACTIONS[None],
    )
    inputs = [_value("images", TensorProto.UINT8, "B", "H", "W", 3), _value("sizes", TensorProto.INT64, "B", 2)]
    outputs = [
        _value("count", TensorProto.INT64, "B"),
        _value("boxes", TensorProto.FLOAT, "B", D, 4),
        _value("scores", TensorProto.FLOAT, "B", D),
        _value("labels", TensorProto.INT64, "B", D),
        *_pyramid(),
    ]
    return helper.make_graph(nodes, "detect", inputs, outputs, constants)


def _mean_nodes(*trailing: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """From p2 and rois to `level`, each RoI's own image's mean in 0..1, shaped (N, 1, ...)."""
    node = helper.make_node
    nodes = [
        node("ReduceMean", ["p2", "axes123"], ["means"], keepdims=0),
        node("Slice", ["rois", "zero1", "one1", "axis1"], ["index_float"]),
        node("Cast", ["index_float"], ["index_column"], to=TensorProto.INT64),
        node("Reshape", ["index_column", "flat"], ["index"]),
        node("Gather", ["means", "index"], ["own"]),
        node("Div", ["own", "full"], ["fraction"]),
        node("Reshape", ["fraction", "trailing"], ["level"]),
    ]
    constants = _constants(
        axes123=np.array([1, 2, 3]),
        zero1=np.array([0]),
        one1=np.array([1]),
        axis1=np.array([1]),
        flat=np.array([-1]),
        full=np.float32(255),
        trailing=np.array([-1, *trailing]),
    )
    return nodes, constants


def _masks_graph() -> onnx.GraphProto:
    nodes, constants = _mean_nodes(1, 1)
    nodes.append(helper.make_node("Mul", ["level", "blob"], ["probabilities"]))
    inputs = [*_pyramid(), _value("rois", TensorProto.FLOAT, "N", 5), _value("labels", TensorProto.INT64, "N")]
    outputs = [_value("probabilities", TensorProto.FLOAT, "N", 28, 28)]
    return helper.make_graph(nodes, "masks", inputs, outputs, [*constants, *_constants(blob=BLOB[None])])


def _keypoints_graph() -> onnx.GraphProto:
    nodes, constants = _mean_nodes(1, 1, 1)
    nodes.append(helper.make_node("Add", ["level", "peaks"], ["heatmaps"]))
    inputs = [*_pyramid(), _value("rois", TensorProto.FLOAT, "N", 5)]
    outputs = [_value("heatmaps", TensorProto.FLOAT, "N", J, 56, 56)]
    return helper.make_graph(nodes, "keypoints", inputs, outputs, [*constants, *_constants(peaks=PEAKS[None])])
