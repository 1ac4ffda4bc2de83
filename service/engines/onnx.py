"""Runs the portable graphs with ONNX Runtime, on the processor or with CUDA; features stay on its device.

What a stage gives is bound to a device before it runs: detections come down, the pyramid stays where the heads read it.
"""

import ctypes
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from service.bundle import Bundle, StageName
from service.engines import Detected, Floats, Integers, Precision, check_outputs, num_cores
from service.errors import BundleError, EngineFailed, EngineOutOfMemory, EngineUnavailable

INPUTS = ("images", "sizes", "proposals")
OWN = ("count", "boxes", "scores", "labels")
HEADS = ("probabilities", "heatmaps")
Device = Literal["cpu", "cuda"]
CUDA = "CUDAExecutionProvider"
# TF32 has ten bits of mantissa, and boxes would show it. Shapes vary, so no search for the best algorithm of each.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


class OnnxEngine:
    name = "onnx"
    precision: Precision = "float32"

    def __init__(self, bundle: Bundle, threads: int = 0, device: Device = "cpu") -> None:
        self._bundle, self._device = bundle, device
        self._threads = threads or num_cores()
        self._sessions = {stage: _session(bundle, stage, threads, device) for stage in bundle.manifest.stages}

    def split(self, num: int) -> list["OnnxEngine"]:
        """Sessions of one thread run in whichever thread calls them, so all lanes share them."""
        threads = max(1, self._threads // num)
        lanes = [OnnxEngine(self._bundle, threads) for _ in range(1 if threads == 1 else num)]
        return [lanes[0]._shared() for _ in range(num)] if threads == 1 else lanes

    def _shared(self) -> "OnnxEngine":
        shared = object.__new__(OnnxEngine)
        shared._bundle, shared._device = self._bundle, self._device
        shared._threads, shared._sessions = self._threads, dict(self._sessions)
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
        """OrtValues by name -> OrtValues by name."""
        session = self._sessions[stage]
        binding = session.io_binding()
        for port in session.get_inputs():  # a head need not read every level of the pyramid
            binding.bind_ortvalue_input(port.name, offered[port.name])
        outputs = [port.name for port in session.get_outputs()]
        for name in outputs:
            binding.bind_output(name, "cpu" if name in (*OWN, *HEADS) else self._device)
        try:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            if self._device == "cpu":
                raise
            kind = EngineOutOfMemory if "memory" in str(error).lower() else EngineFailed
            raise kind(f"onnxruntime on CUDA failed: {error}") from error
        return dict(zip(outputs, binding.get_outputs(), strict=True))


def _value(array: npt.NDArray[Any]) -> Any:
    # Borrows the array's memory and holds the array.
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def refuse_without_cuda() -> None:
    """Raises `EngineUnavailable` where ONNX Runtime has no CUDA or the machine no GPU."""
    if CUDA not in onnxruntime.get_available_providers():
        raise EngineUnavailable("this onnxruntime has no CUDA (pip install onnxruntime-gpu in its place)")
    if not (count := _num_gpus()):
        told = "no NVIDIA driver" if count is None else "no NVIDIA GPU"
        raise EngineUnavailable(f"onnxruntime has CUDA, and {told} is found here")
    if hasattr(onnxruntime, "preload_dlls"):  # CUDA's and cuDNN's libraries from their wheels, where they are
        onnxruntime.preload_dlls()


def _num_gpus() -> int | None:
    """Asked of the driver; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else None


def _session(bundle: Bundle, stage: StageName, threads: int, device: Device) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    path = bundle.stage_file(stage)
    cuda: list[Any] = [(CUDA, CUDA_OPTIONS)] if device == "cuda" else []
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[*cuda, "CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime has no public base class for its errors; whichever it is, this graph does not load.
        raise BundleError(f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}: {error}") from error
    if device == "cuda" and CUDA not in session.get_providers():
        raise EngineUnavailable("onnxruntime could not start CUDA (it needs CUDA 13 and cuDNN 9) and would use the CPU")
    check_outputs(bundle, stage, {port.name for port in session.get_outputs()})
    return session
