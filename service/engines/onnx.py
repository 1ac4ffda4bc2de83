"""Runs the portable graphs with ONNX Runtime on the CPU; features stay OrtValues between stages."""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from service.bundle import Bundle, StageName
from service.engines import Detected, Floats, Integers, Precision, check_outputs, num_cores
from service.errors import BundleError

INPUTS = ("images", "sizes", "proposals")
OWN = ("count", "boxes", "scores", "labels")


class OnnxEngine:
    name = "onnx"
    precision: Precision = "float32"

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self._bundle = bundle
        self._threads = threads or num_cores()
        self._sessions = {stage: _session(bundle, stage, threads) for stage in bundle.manifest.stages}

    def split(self, num: int) -> list["OnnxEngine"]:
        """Sessions of one thread run in whichever thread calls them, so all lanes share them."""
        threads = max(1, self._threads // num)
        lanes = [OnnxEngine(self._bundle, threads) for _ in range(1 if threads == 1 else num)]
        return [lanes[0]._shared() for _ in range(num)] if threads == 1 else lanes

    def _shared(self) -> "OnnxEngine":
        shared = object.__new__(OnnxEngine)
        shared._bundle, shared._threads, shared._sessions = self._bundle, self._threads, dict(self._sessions)
        return shared

    def detect(self, images: npt.NDArray[np.uint8], sizes: Integers, *proposals: Floats) -> Detected:
        given = dict(zip(INPUTS, (images, sizes, *proposals), strict=False))
        values = self._run("detect", {name: _value(array) for name, array in given.items()})
        count, boxes, scores, labels = (values.pop(name).numpy() for name in OWN)
        return Detected(count, boxes, scores, labels, features=values)

    def masks(self, features: Any, rois: Floats, labels: Integers) -> Floats:
        values = self._run("masks", {**features, "rois": _value(rois), "labels": _value(labels)})
        return values["probabilities"].numpy()

    def keypoints(self, features: Any, rois: Floats) -> Floats:
        values = self._run("keypoints", {**features, "rois": _value(rois)})
        return values["heatmaps"].numpy()

    def close(self) -> None:
        self._sessions.clear()

    def _run(self, stage: StageName, offered: dict[str, Any]) -> dict[str, Any]:
        session = self._sessions[stage]
        outputs = [port.name for port in session.get_outputs()]
        # A head need not read every level of the pyramid.
        inputs = {port.name: offered[port.name] for port in session.get_inputs()}
        return dict(zip(outputs, cast(list[Any], session.run_with_ort_values(outputs, inputs)), strict=True))


def _value(array: npt.NDArray[Any]) -> Any:
    # Borrows the array's memory and holds the array.
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _session(bundle: Bundle, stage: StageName, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    path = bundle.stage_file(stage)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime has no public base class for its errors; whichever it is, this graph does not load.
        raise BundleError(f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}: {error}") from error
    check_outputs(bundle, stage, {port.name for port in session.get_outputs()})
    return session
