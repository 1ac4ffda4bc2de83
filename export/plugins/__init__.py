"""Our two custom nodes as TensorRT plugins: ahead-of-time Python plugins over the PTX of `models/kernels`.

TensorRT calls these functions while it builds; the plan then holds the PTX and how to launch it, and needs neither
Python nor a plugin library. A kernel's parameters are the input pointers, int32 numbers, the output pointers. Thresholds
are floats, which no plugin may pass on: they are compiled in.
"""

from collections.abc import Sequence
from typing import Any

from export.trt_graphs import DOMAIN, NMS, ROI_ALIGN

NMS_ID, ROI_ALIGN_ID = f"{DOMAIN}::{NMS}", f"{DOMAIN}::{ROI_ALIGN}"
KERNEL_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # TensorRT's names -> those of the kernels
_registered: list[str] = []  # for which GPU, in this process


def register(trt: Any, gpu: str, lazily: bool = False) -> None:
    """Makes both plugins known to TensorRT, once in a process, with kernels for this GPU ("sm90").

    `lazily`: only to Python, where there is no plugin registry to be asked.
    """
    import tensorrt.plugin as trtp

    if not _registered:
        _registered.append(gpu)
        architecture = gpu.replace("sm", "sm_")
        _register_nms(trt, trtp, architecture, lazily)
        _register_roi_align(trt, trtp, architecture, lazily)
    assert _registered == [gpu], "one process builds for one GPU"


def _register_nms(trt: Any, trtp: Any, architecture: str, lazily: bool) -> None:
    Desc, Params, Extras = trtp.TensorDesc, trtp.KernelLaunchParams, trtp.SymExprs
    Pair = tuple[Desc, Desc]

    @trtp.register(NMS_ID, lazy_register=lazily)
    def describe(boxes: Desc, scores: Desc, iou: float, threshold: float, keep: int) -> Pair:
        batch = boxes.shape_expr[0]
        return (
            trtp.from_shape_expr((batch, keep), dtype=trt.int32),
            trtp.from_shape_expr((batch,), dtype=trt.int32),
        )

    @trtp.autotune(NMS_ID)
    def tune(boxes: Desc, scores: Desc, outputs: Pair) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination("FP32, FP32, INT32, INT32", "LINEAR")]

    @trtp.aot_impl(NMS_ID)
    def build(
        boxes: Desc, scores: Desc, iou: float, threshold: float, keep: int, outputs: Pair, tactic: int
    ) -> tuple[str, bytes, Params, Extras]:
        from models import kernels

        batch, groups, size = (scores.shape_expr[axis] for axis in range(3))
        launch = kernels.nms_launch(batch=batch, groups=groups, size=size, keep=keep)
        ptx = kernels.compile_ptx("nms", architecture, {"IOU": _literal(iou), "THRESHOLD": _literal(threshold)})
        return _launched(trtp, launch, ptx)


def _register_roi_align(trt: Any, trtp: Any, architecture: str, lazily: bool) -> None:
    Desc, Params, Extras, Out = trtp.TensorDesc, trtp.KernelLaunchParams, trtp.SymExprs, tuple[trtp.TensorDesc]

    @trtp.register(ROI_ALIGN_ID, lazy_register=lazily)
    def describe(
        rois: Desc, p2: Desc, p3: Desc, p4: Desc, p5: Desc, size: int, sampling: int, aligned: int, canonical: int
    ) -> Out:
        return (trtp.from_shape_expr((rois.shape_expr[0], p2.shape_expr[1], size, size), dtype=p2.dtype),)

    @trtp.autotune(ROI_ALIGN_ID)
    def tune(
        rois: Desc, p2: Desc, p3: Desc, p4: Desc, p5: Desc, outputs: Out
    ) -> list[trtp.AutoTuneCombination]:
        features = "FP32|FP16|BF16"
        return [trtp.AutoTuneCombination(", ".join(["FP32", *[features] * 5]), "LINEAR")]

    @trtp.aot_impl(ROI_ALIGN_ID)
    def build(
        rois: Desc, p2: Desc, p3: Desc, p4: Desc, p5: Desc, size: int, sampling: int, aligned: int, canonical: int,
        outputs: Out, tactic: int,
    ) -> tuple[str, bytes, Params, Extras]:  # fmt: skip
        from models import kernels

        levels = [(level.shape_expr[2], level.shape_expr[3]) for level in (p2, p3, p4, p5)]
        launch = kernels.roi_align_launch(
            num_rois=rois.shape_expr[0], channels=p2.shape_expr[1], levels=levels, size=size, sampling=sampling,
            aligned=bool(aligned), canonical=canonical,
        )  # fmt: skip
        defines = {
            "ELEMENT": KERNEL_TYPES[p2.dtype.name], "SIZE": size, "SAMPLING": sampling, "ALIGNED": aligned,
            "CANONICAL": canonical,
        }  # fmt: skip
        return _launched(trtp, launch, kernels.compile_ptx("roi_align", architecture, defines))


def _literal(value: float) -> str:
    """A float32 in C. What comes out of an ONNX attribute is a float32 already."""
    return f"{value:.9g}f" if "." in f"{value:.9g}" or "e" in f"{value:.9g}" else f"{value:.9g}.0f"


def _launched(trtp: Any, launch: Any, ptx: str | bytes) -> tuple[Any, Any, Any, Any]:
    """What TensorRT wants, of a kernel, how it is launched, and its code."""
    params = trtp.KernelLaunchParams()
    params.grid_x, params.grid_y, params.grid_z = _three(launch.grid)
    params.block_x, params.block_y, params.block_z = _three(launch.block)
    params.shared_mem = launch.shared_bytes
    extras = trtp.SymIntExprs(len(launch.extras))
    for index, extra in enumerate(launch.extras):
        extras[index] = trtp.SymInt32(extra)
    return launch.kernel, ptx if isinstance(ptx, bytes) else ptx.encode(), params, extras


def _three(sizes: Any) -> Sequence[Any]:
    given = list(sizes) if isinstance(sizes, (tuple, list)) else [sizes]
    return [*given, 1, 1][:3]
