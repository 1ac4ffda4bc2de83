"""Runs the portable graphs with OpenVINO on the CPU.

An infer request owns its output tensors and writes them again at its next run. So a `Detected` borrows its request from
a pool and gives it back when its features are dropped: no copy of the pyramid, and none overwritten while in use.
"""

import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset15 as op

from service.bundle import GOLDEN, INT8_GOLDEN, Bundle, StageName
from service.engines import Detected, Floats, Integers, Precision, check_outputs, rounding, winograd, winograd_rows
from service.errors import BundleError, EngineUnavailable

INPUTS = ("images", "sizes", "proposals")
OWN = ("count", "boxes", "scores", "labels")
HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # int8 is in the graph


class _Features:
    """The pyramid, by level name, inside the request that computed it."""

    __slots__ = ("__weakref__", "levels")

    def __init__(self, levels: dict[str, Any]) -> None:
        self.levels = levels


class OpenvinoEngine:
    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int = 0, precision: Precision = "float32", streams: int = 1) -> None:
        core = openvino.Core()
        if precision == "bfloat16" and "BF16" not in _capabilities(core):
            raise EngineUnavailable("this CPU has no bfloat16 instructions: set LIMNER_PRECISION=float32")
        config = _config(threads, precision, streams)
        stages: dict[StageName, list[openvino.CompiledModel]] = {
            stage: _compile(core, bundle, stage, precision, config) for stage in bundle.manifest.stages
        }
        self._bundle = bundle
        self._threads = threads
        self._take(stages, precision)

    def _take(self, stages: dict[StageName, list[openvino.CompiledModel]], precision: Precision) -> None:
        self.precision: Precision = precision
        self.golden_file = INT8_GOLDEN if precision == "int8" else GOLDEN
        self._stages = stages
        self._first = [model.create_infer_request() for model in stages["detect"][:-1]]
        self._heads = {stage: parts[-1].create_infer_request() for stage, parts in stages.items() if stage != "detect"}
        self._free: deque[openvino.InferRequest] = deque()

    def split(self, num: int) -> list["OpenvinoEngine"]:
        """Streams of one compiled model, which keeps its weights once for all of them."""
        whole = OpenvinoEngine(self._bundle, self._threads, self.precision, num)
        return [whole, *(whole._beside() for _ in range(num - 1))]

    def _beside(self) -> "OpenvinoEngine":
        beside = object.__new__(OpenvinoEngine)
        beside._bundle, beside._threads = self._bundle, self._threads
        beside._take(dict(self._stages), self.precision)
        return beside

    def detect(self, images: npt.NDArray[np.uint8], sizes: Integers, *proposals: Floats) -> Detected:
        request = self._free.popleft() if self._free else self._stages["detect"][-1].create_infer_request()
        offered: dict[str, Any] = dict(zip(INPUTS, (images, sizes, *proposals), strict=False))
        for first in self._first:
            offered |= _run(first, offered)
        tensors = _run(request, offered)
        count, boxes, scores, labels = (np.array(tensors.pop(name).data) for name in OWN)
        features = _Features(tensors)
        weakref.finalize(features, self._free.append, request).atexit = False
        return Detected(count, boxes, scores, labels, features)

    def masks(self, features: Any, rois: Floats, labels: Integers) -> Floats:
        offered = {**features.levels, "rois": rois, "labels": labels}
        return np.array(_run(self._heads["masks"], offered)["probabilities"].data)

    def keypoints(self, features: Any, rois: Floats) -> Floats:
        offered = {**features.levels, "rois": rois}
        return np.array(_run(self._heads["keypoints"], offered)["heatmaps"].data)

    def close(self) -> None:
        self._free.clear()
        self._first.clear()
        self._heads.clear()
        self._stages.clear()


def _config(threads: int, precision: Precision, streams: int) -> dict[str, Any]:
    # f32 is asked for by name: on CPUs with AMX OpenVINO would take bfloat16 by itself, and boxes would move.
    config: dict[str, Any] = {"NUM_STREAMS": streams, "INFERENCE_PRECISION_HINT": HINTS[precision]}
    # Pinned, the threads of two models, or of two services on one machine, can all end up on the same cores.
    config["ENABLE_CPU_PINNING"] = False
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    return config


def _capabilities(core: openvino.Core) -> list[str]:
    return core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _has_winograd(core: openvino.Core) -> bool:
    """The capability is AVX-512, on which this was measured."""
    return "WINOGRAD" in _capabilities(core)


def _has_tiles(core: openvino.Core) -> bool:
    """AMX multiplies in bfloat16 eight times as fast again, and then transforms cost more than products. OpenVINO does
    not tell of it, but of FP16, which all processors with AMX have."""
    return "FP16" in _capabilities(core)


def fold_biases(model: openvino.Model) -> None:
    """Makes constants of the biases, which in a graph of eight bits are constants that are yet to be reshaped: those of
    sums that leave the graph or stay in float32 the plugin else adds in a step of their own."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Add":
            continue
        bias = node.input_value(1).get_node()
        if bias.get_type_name() == "Reshape" and bias.input_value(0).get_node().get_type_name() == "Constant":
            values = bias.input_value(0).get_node().get_data().reshape(bias.get_output_shape(0))
            node.input(1).replace_source_output(op.constant(values).output(0))


def _compile(
    core: openvino.Core, bundle: Bundle, stage: StageName, precision: Precision, config: dict[str, Any]
) -> list[openvino.CompiledModel]:
    """The stage's graph, or the parts of it that run one after the other: `float32_until` of the manifest divides."""
    path = bundle.stage_file(stage, precision)
    parts = []
    try:
        model = core.read_model(str(path))
        if precision == "bfloat16":
            until = bundle.manifest.compression.get("bfloat16", {}).get("float32_until")
            if until is not None and stage == "detect":
                first, model = rounding.divided(model, until)
                parts.append(core.compile_model(first, "CPU", {**config, "INFERENCE_PRECISION_HINT": "f32"}))
            if _has_winograd(core) and not _has_tiles(core):
                winograd_rows.rewrite(model, bundle.manifest.canvas.multiple)
            rounding.prepare(model)
        elif precision == "int8":
            fold_biases(model)
        elif precision == "float32" and _has_winograd(core):
            winograd.rewrite(model)
        compiled = core.compile_model(model, "CPU", config)
    except KeyError as error:
        raise BundleError(f"{path} has no tensor {error}, up to which it shall be float32: export it again") from None
    except RuntimeError as error:
        raise BundleError(f"{path} cannot be loaded by openvino {openvino.__version__}: {error}") from error
    check_outputs(bundle, stage, {name for port in compiled.outputs for name in port.names})
    if precision == "bfloat16" and (names := rounding.rounded(compiled)):
        raise EngineUnavailable(
            f"openvino {openvino.__version__} would round {len(names)} steps of {path} that must be exact, "
            f"first {names[0]}: set LIMNER_PRECISION=float32"
        )
    return [*parts, compiled]


def _run(request: openvino.InferRequest, offered: dict[str, Any]) -> dict[str, Any]:
    """Arrays and tensors by input name -> tensors, which the request owns, by output name."""
    model = request.get_compiled_model()
    held = []  # a tensor borrows its array's memory, so the arrays must outlive the run
    for port in model.inputs:
        # A head need not read every level of the pyramid.
        value = next(offered[name] for name in port.names if name in offered)
        if isinstance(value, np.ndarray):
            held.append(np.ascontiguousarray(value))
            value = openvino.Tensor(held[-1], shared_memory=True)
        request.set_tensor(port, value)
    request.infer(share_inputs=True, share_outputs=True)
    return {name: request.get_tensor(port) for port in model.outputs for name in port.names}
