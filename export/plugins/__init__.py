"""Our custom nodes as TensorRT plugins: ahead-of-time Python plugins over the PTX of `models/kernels`.

TensorRT calls these functions while it builds; the plan then holds the PTX and how to launch it, and needs neither
Python nor a plugin library. A kernel's parameters are the input pointers, int32 numbers, the output pointers; floats
such as thresholds, which no plugin may pass on, are compiled in.
"""

# pyright: reportInvalidTypeForm=false
# TensorRT reads the annotations below, of types that are only there where it is.
import importlib
from typing import Any

import torch

from export.trt_graphs import DOMAIN, MERGE, NMS, ROI_ALIGN
from models import kernels

NMS_ID, MERGE_ID, ROI_ALIGN_ID = (f"{DOMAIN}::{name}" for name in (NMS, MERGE, ROI_ALIGN))
TORCH_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}  # by TensorRT's names
_registered: list[str] = []  # for which GPU, in this process


def register(trt: Any, gpu: str, lazily: bool = False) -> None:
    """Makes the plugins known to TensorRT, once in a process, with kernels for this GPU ("sm90").

    `lazily`: only to Python, where there is no plugin registry to be asked.
    """
    trtp: Any = importlib.import_module("tensorrt.plugin")

    if not _registered:
        _registered.append(gpu)
        architecture = gpu.replace("sm", "compute_")
        _register_nms(trt, trtp, architecture, lazily)
        _register_roi_align(trtp, architecture, lazily)
    assert _registered == [gpu], "one process builds for one GPU"


def _register_nms(trt: Any, trtp: Any, architecture: str, lazily: bool) -> None:
    Desc, Params, Extras = trtp.TensorDesc, trtp.KernelLaunchParams, trtp.SymExprs
    Three, Two, Built = tuple[Desc, Desc, Desc], tuple[Desc, Desc], tuple[str, bytes, Params, Extras]
    Combinations = list[trtp.AutoTuneCombination]

    @trtp.register(NMS_ID, lazy_register=lazily)
    def describe(boxes: Desc, scores: Desc, iou: float, threshold: float, size: int, keep: int) -> Three:
        images, groups = scores.shape_expr[0], scores.shape_expr[1]
        rows = (images, groups, min(size, keep))
        return (
            trtp.from_shape_expr(rows, dtype=trt.int32),
            trtp.from_shape_expr(rows, dtype=trt.float32),
            trtp.from_shape_expr((images, groups), dtype=trt.int32),
        )

    @trtp.autotune(NMS_ID)
    def tune(boxes: Desc, scores: Desc, outputs: Three) -> Combinations:
        return [trtp.AutoTuneCombination("FP32, FP32, INT32, FP32, INT32", "LINEAR")]

    @trtp.aot_impl(NMS_ID)
    def build(
        boxes: Desc, scores: Desc, iou: float, threshold: float, size: int, keep: int, outputs: Three, tactic: int
    ) -> Built:
        launch = kernels.nms_launch(scores.shape_expr[0], scores.shape_expr[1], size, keep)
        return _launched(trtp, launch, _nms_code(architecture, iou, threshold, size))

    @trtp.register(MERGE_ID, lazy_register=lazily)
    def describe_merge(
        kept: Desc, kept_scores: Desc, kept_count: Desc, iou: float, threshold: float, size: int, keep: int
    ) -> Two:
        images = kept_count.shape_expr[0]
        return (
            trtp.from_shape_expr((images, keep), dtype=trt.int32),
            trtp.from_shape_expr((images,), dtype=trt.int32),
        )

    @trtp.autotune(MERGE_ID)
    def tune_merge(kept: Desc, kept_scores: Desc, kept_count: Desc, outputs: Two) -> Combinations:
        return [trtp.AutoTuneCombination("INT32, FP32, INT32, INT32, INT32", "LINEAR")]

    @trtp.aot_impl(MERGE_ID)
    def build_merge(
        kept: Desc, kept_scores: Desc, kept_count: Desc, iou: float, threshold: float, size: int, keep: int,
        outputs: Two, tactic: int,
    ) -> Built:  # fmt: skip
        images, groups = kept_count.shape_expr[0], kept_count.shape_expr[1]
        launch = kernels.nms_merge_launch(images, groups, size, keep)
        return _launched(trtp, launch, _nms_code(architecture, iou, threshold, size))


def _nms_code(architecture: str, iou: float, threshold: float, size: int) -> bytes:
    defines = kernels.nms_defines(iou, threshold, size, torch.int32)
    return kernels.compile_ptx("nms", architecture, defines).text.encode()


def _register_roi_align(trtp: Any, architecture: str, lazily: bool) -> None:
    Desc, Params, Extras, Out = trtp.TensorDesc, trtp.KernelLaunchParams, trtp.SymExprs, tuple[trtp.TensorDesc]

    @trtp.register(ROI_ALIGN_ID, lazy_register=lazily)
    def describe(
        p2: Desc, p3: Desc, p4: Desc, p5: Desc, rois: Desc,
        size: int, sampling: int, aligned: int, canonical: int, channels: int,
    ) -> Out:  # fmt: skip
        return (trtp.from_shape_expr((rois.shape_expr[0], channels, size, size), dtype=p2.dtype),)

    @trtp.autotune(ROI_ALIGN_ID)
    def tune(p2: Desc, p3: Desc, p4: Desc, p5: Desc, rois: Desc, outputs: Out) -> list[trtp.AutoTuneCombination]:
        kinds = "FP32|FP16|BF16"
        return [trtp.AutoTuneCombination(", ".join([*[kinds] * 4, "FP32", kinds]), "LINEAR")]

    @trtp.aot_impl(ROI_ALIGN_ID)
    def build(
        p2: Desc, p3: Desc, p4: Desc, p5: Desc, rois: Desc,
        size: int, sampling: int, aligned: int, canonical: int, channels: int, outputs: Out, tactic: int,
    ) -> tuple[str, bytes, Params, Extras]:  # fmt: skip
        levels, dtype = (p2, p3, p4, p5), TORCH_TYPES[p2.dtype.name]
        sides = [(level.shape_expr[2], level.shape_expr[3]) for level in levels]
        images = p2.shape_expr[0]
        launch = kernels.roi_align_launch(rois.shape_expr[0], images, channels, sides, size, dtype, False)
        defines = kernels.roi_align_defines(dtype, False, 4, channels, size, sampling, bool(aligned), canonical)
        return _launched(trtp, launch, kernels.compile_ptx("roi_align", architecture, defines).text.encode())


def _launched(trtp: Any, launch: kernels.Launch, ptx: bytes) -> tuple[Any, Any, Any, Any]:
    """What TensorRT wants, of a kernel, how it is launched, and its code."""
    params = trtp.KernelLaunchParams()
    params.grid_x, params.grid_y, params.grid_z = launch.grid
    params.block_x, params.block_y, params.block_z = launch.block
    params.shared_mem = launch.shared_bytes
    extras = trtp.SymIntExprs(len(launch.extras))
    for index, extra in enumerate(launch.extras):
        extras[index] = trtp.SymInt32(extra)
    return launch.kernel, ptx, params, extras
