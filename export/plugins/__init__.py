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

from export.trt_graphs import DOMAIN, MAP_ROI_ALIGN, MAP_ROI_POOL, MERGE, NMS, ROI_ALIGN, SHORT_ROI_ALIGN
from models import kernels

NMS_ID, MERGE_ID = f"{DOMAIN}::{NMS}", f"{DOMAIN}::{MERGE}"
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
        _register_pooling(trtp, architecture, lazily)
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


def _register_pooling(trtp: Any, architecture: str, lazily: bool) -> None:
    """Of a pyramid, of one without p5 and of one map: as many inputs as maps, else the same."""
    Desc, Params, Extras, Out = trtp.TensorDesc, trtp.KernelLaunchParams, trtp.SymExprs, tuple[trtp.TensorDesc]
    Built, Combinations = tuple[str, bytes, Params, Extras], list[trtp.AutoTuneCombination]

    def shape(first: Any, rois: Any, channels: int, size: int) -> Any:
        return (trtp.from_shape_expr((rois.shape_expr[0], channels, size, size), dtype=first.dtype),)

    def types(num_maps: int) -> Any:
        kinds = "FP32|FP16|BF16"
        return [trtp.AutoTuneCombination(", ".join([*[kinds] * num_maps, "FP32", kinds]), "LINEAR")]

    def align(maps: Any, rois: Any, channels: int, size: int, *own: Any) -> Any:
        launch, dtype = _pooling_launch(kernels.roi_align_launch, maps, rois, channels, size)
        defines = kernels.roi_align_defines(dtype, False, len(maps), channels, size, *own)
        return _launched(trtp, launch, kernels.compile_ptx("roi_align", architecture, defines).text.encode())

    @trtp.register(f"{DOMAIN}::{ROI_ALIGN}", lazy_register=lazily)
    def describe_pyramid(
        p2: Desc, p3: Desc, p4: Desc, p5: Desc, rois: Desc,
        size: int, sampling: int, aligned: int, canonical: int, stride: int, channels: int,
    ) -> Out:  # fmt: skip
        return shape(p2, rois, channels, size)

    @trtp.autotune(f"{DOMAIN}::{ROI_ALIGN}")
    def tune_pyramid(p2: Desc, p3: Desc, p4: Desc, p5: Desc, rois: Desc, outputs: Out) -> Combinations:
        return types(4)

    @trtp.aot_impl(f"{DOMAIN}::{ROI_ALIGN}")
    def build_pyramid(
        p2: Desc, p3: Desc, p4: Desc, p5: Desc, rois: Desc,
        size: int, sampling: int, aligned: int, canonical: int, stride: int, channels: int, outputs: Out, tactic: int,
    ) -> Built:  # fmt: skip
        return align((p2, p3, p4, p5), rois, channels, size, sampling, bool(aligned), canonical, stride)

    @trtp.register(f"{DOMAIN}::{SHORT_ROI_ALIGN}", lazy_register=lazily)
    def describe_short(
        p2: Desc, p3: Desc, p4: Desc, rois: Desc,
        size: int, sampling: int, aligned: int, canonical: int, stride: int, channels: int,
    ) -> Out:  # fmt: skip
        return shape(p2, rois, channels, size)

    @trtp.autotune(f"{DOMAIN}::{SHORT_ROI_ALIGN}")
    def tune_short(p2: Desc, p3: Desc, p4: Desc, rois: Desc, outputs: Out) -> Combinations:
        return types(3)

    @trtp.aot_impl(f"{DOMAIN}::{SHORT_ROI_ALIGN}")
    def build_short(
        p2: Desc, p3: Desc, p4: Desc, rois: Desc,
        size: int, sampling: int, aligned: int, canonical: int, stride: int, channels: int, outputs: Out, tactic: int,
    ) -> Built:  # fmt: skip
        return align((p2, p3, p4), rois, channels, size, sampling, bool(aligned), canonical, stride)

    @trtp.register(f"{DOMAIN}::{MAP_ROI_ALIGN}", lazy_register=lazily)
    def describe_map(
        c4: Desc, rois: Desc, size: int, sampling: int, aligned: int, canonical: int, stride: int, channels: int
    ) -> Out:
        return shape(c4, rois, channels, size)

    @trtp.autotune(f"{DOMAIN}::{MAP_ROI_ALIGN}")
    def tune_map(c4: Desc, rois: Desc, outputs: Out) -> Combinations:
        return types(1)

    @trtp.aot_impl(f"{DOMAIN}::{MAP_ROI_ALIGN}")
    def build_map(
        c4: Desc, rois: Desc, size: int, sampling: int, aligned: int, canonical: int, stride: int, channels: int,
        outputs: Out, tactic: int,
    ) -> Built:  # fmt: skip
        return align((c4,), rois, channels, size, sampling, bool(aligned), canonical, stride)

    @trtp.register(f"{DOMAIN}::{MAP_ROI_POOL}", lazy_register=lazily)
    def describe_pool(c4: Desc, rois: Desc, size: int, canonical: int, stride: int, channels: int) -> Out:
        return shape(c4, rois, channels, size)

    @trtp.autotune(f"{DOMAIN}::{MAP_ROI_POOL}")
    def tune_pool(c4: Desc, rois: Desc, outputs: Out) -> Combinations:
        return types(1)

    @trtp.aot_impl(f"{DOMAIN}::{MAP_ROI_POOL}")
    def build_pool(
        c4: Desc, rois: Desc, size: int, canonical: int, stride: int, channels: int, outputs: Out, tactic: int
    ) -> Built:
        launch, dtype = _pooling_launch(kernels.roi_pool_launch, (c4,), rois, channels, size)
        defines = kernels.roi_pool_defines(dtype, False, 1, channels, size, canonical, stride)
        return _launched(trtp, launch, kernels.compile_ptx("roi_pool", architecture, defines).text.encode())


def _pooling_launch(launch: Any, maps: Any, rois: Any, channels: int, size: int) -> tuple[kernels.Launch, torch.dtype]:
    sides = [(each.shape_expr[2], each.shape_expr[3]) for each in maps]
    dtype = TORCH_TYPES[maps[0].dtype.name]
    return launch(rois.shape_expr[0], maps[0].shape_expr[0], channels, sides, size, dtype, False), dtype


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
