"""`limner::nms`, `limner::roi_align` and `limner::roi_pool` on CUDA tensors: kernels, launched on torch's stream.

ctypes on libcuda and libnvrtc, so torch is all that is needed. Launches neither synchronise nor allocate outside torch:
after a first call, which compiles and loads, they can be captured in a CUDA graph.
What the kernels do not take (float64, a group of more than 4096 boxes, six levels) is left to the eager form.
"""

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models import ops
from models.kernels import launch as geometry
from models.kernels.launch import Launch
from models.kernels.nvrtc import KernelError, compile_cubin

_lock = threading.Lock()


def nms(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor] | None:
    """As `limner::nms`; None where the kernel does not take these arguments."""
    images, groups, size = scores.shape
    typed = boxes.dtype == scores.dtype == torch.float32
    if not (typed and 1 <= size <= geometry.MAX_GROUP_SIZE and images and groups and keep and iou >= 0):
        return None
    first = _kernel("nms", "limner_nms_groups", _defines("nms", iou, threshold, size), boxes.device.index)
    second = _kernel("nms", "limner_nms_merge", _defines("nms", iou, threshold, size), boxes.device.index)
    if first is None or second is None:
        return None
    kept = boxes.new_empty((images, groups, min(size, keep)), dtype=torch.int32)
    kept_scores = torch.empty_like(kept, dtype=torch.float32)
    kept_count = boxes.new_empty((images, groups), dtype=torch.int32)
    indices = boxes.new_empty((images, keep), dtype=torch.int64)
    count = boxes.new_empty((images,), dtype=torch.int64)
    inputs = (aligned(boxes.contiguous()), scores.contiguous())
    first(geometry.nms_launch(images, groups, size, keep), inputs, (kept, kept_scores, kept_count))
    merge = geometry.nms_merge_launch(images, groups, size, keep)
    second(merge, (kept, kept_scores, kept_count), (indices, count))
    return indices, count


def roi_align(
    features: Sequence[Tensor], rois: Tensor, size: int, sampling: int, shifted: bool, canonical: int, stride: int
) -> Tensor | None:
    """As `limner::roi_align`; None where the kernel does not take these arguments."""
    return _pooled("roi_align", features, rois, size, (sampling, shifted, canonical, stride))


def roi_pool(features: Sequence[Tensor], rois: Tensor, size: int, canonical: int, stride: int) -> Tensor | None:
    """As `limner::roi_pool`; None where the kernel does not take these arguments."""
    return _pooled("roi_pool", features, rois, size, (canonical, stride))


def _pooled(
    source: str, features: Sequence[Tensor], rois: Tensor, size: int, settings: tuple[int, ...]
) -> Tensor | None:
    dtype, levels, (images, channels) = features[0].dtype, len(features), features[0].shape[:2]
    if dtype not in geometry.ELEMENTS or levels > geometry.MAX_LEVELS or rois.dtype != torch.float32:
        return None
    last = ops.channels_last(features)
    form = torch.channels_last if last else torch.contiguous_format
    output = ops.pooled_like(features, len(rois), size)
    if output.numel() == 0:
        return output
    defines = _defines(source, dtype, last, levels, channels, size, *settings)
    kernel = _kernel(source, f"limner_{source}", defines, rois.device.index)
    if kernel is None:
        return None
    inputs = [*(aligned(f.contiguous(memory_format=form)) for f in features), rois.contiguous()]
    launch = geometry.roi_align_launch if source == "roi_align" else geometry.roi_pool_launch
    sides = [(f.shape[2], f.shape[3]) for f in features]
    kernel(launch(len(rois), images, channels, sides, size, dtype, last), inputs, (output,))
    return output


def aligned(tensor: Tensor) -> Tensor:
    """The kernels read 16 bytes at a time; a slice may start anywhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.preserve_format)


Run = Callable[[Launch, Sequence[Tensor], Sequence[Tensor]], None]
Defines = tuple[tuple[str, str | int | float], ...]


@functools.cache
def _defines(source: str, *arguments: Any) -> Defines:
    makers = {
        "nms": geometry.nms_defines,
        "roi_align": geometry.roi_align_defines,
        "roi_pool": geometry.roi_pool_defines,
    }
    make = makers[source]
    return tuple(make(*arguments).items())


@functools.cache
def _kernel(source: str, name: str, defines: Defines, device: int) -> Run | None:
    """The loaded kernel as run(launch, inputs, outputs); None, and a warning once, where it cannot be had."""
    try:
        with _lock:
            return _Kernel(source, name, defines, device)
    except KernelError as error:
        warnings.warn(f"{error}\nlimner's ops run without CUDA kernels: same results, slower", stacklevel=2)
        return None


class _Kernel:
    """One entry point of one module, loaded into a device's primary context, which is torch's."""

    def __init__(self, source: str, name: str, defines: Defines, device: int) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        image = compile_cubin(source, f"sm_{major}{minor}", dict(defines))
        self.device, self.driver = device, _driver()
        self.context, self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self._call("cuCtxSetCurrent", self.context)
        self._call("cuModuleLoadData", ctypes.byref(self.module), image)
        self._call("cuModuleGetFunction", ctypes.byref(self.function), self.module, name.encode())

    def __call__(self, launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        values = [
            *(ctypes.c_void_p(t.data_ptr()) for t in inputs),
            *(ctypes.c_int32(value) for value in launch.extras),
            *(ctypes.c_void_p(t.data_ptr()) for t in outputs),
        ]
        packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self._enter()
            self._call(
                "cuLaunchKernel", self.function, *launch.grid, *launch.block, launch.shared_bytes, stream, packed, None
            )

    def _enter(self) -> None:
        """A thread that has not used CUDA yet has no context; torch's backward threads and a server's may be such."""
        current = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value != self.context.value:
            self._call("cuCtxSetCurrent", self.context)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise KernelError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


@functools.cache
def _driver() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelError("no CUDA driver library (libcuda.so.1), though torch has a CUDA device")
