"""The two custom ops as a compiled package calls them: `limner_served::nms` and `limner_served::roi_align`.

A package (.pt2) holds a call of each op by name, so both have to be registered before it is loaded: importing this does
that. They mean what `limner::nms` and `limner::roi_align` mean (models/ops.py, which the service may not import), under
names of their own, so that a certificate that is made where both exist is of what will be served.

On CUDA an op launches machine code that came with the artifact (`offer`), through the driver and on torch's stream;
nothing is compiled here. A kernel's parameters are the input pointers, int32 numbers, the output pointers. On a CPU it
is torchvision's operators. B images, G groups, N boxes of a group, R RoIs, C channels.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS, MERGE, ROI_ALIGN = "limner_nms_groups", "limner_nms_merge", "limner_roi_align"
LIBRARY = torch.library.Library("limner_served", "DEF")
LIBRARY.define("nms(Tensor boxes, Tensor scores, float iou, float threshold, int keep) -> (Tensor, Tensor)")
LIBRARY.define(
    "roi_align(Tensor[] features, Tensor rois, int size, int sampling, bool aligned, int canonical, int stride=4)"
    " -> Tensor"
)


class Code(NamedTuple):
    """Machine code of one op with its constants compiled in, and the rest of how it is launched."""

    cubin: bytes
    threads: Mapping[str, int]  # a block of each kernel in it
    slices: int = 1  # of the grid's second axis, for RoIAlign


Grid = tuple[int, int, int]
Launch = Callable[[str, Grid, int, Sequence[int], Sequence[Tensor], Sequence[Tensor]], None]
_offered: dict[str, Code] = {}
_lock = threading.Lock()


class KernelMissing(RuntimeError):
    """A package calls a kernel that no artifact has brought, or the driver refuses it."""


def offer(codes: Mapping[str, Code]) -> None:
    """What artifacts bring, by `nms_key` and `roi_align_key`. The same key is the same function, so the first stays."""
    for key, code in codes.items():
        _offered.setdefault(key, code)


def nms_key(iou: float, threshold: float, size: int) -> str:
    return f"nms {iou!r} {threshold!r} {size}"


def roi_align_key(
    dtype: torch.dtype,
    last: bool,
    levels: int,
    channels: int,
    size: int,
    sampling: int,
    aligned: bool,
    canonical: int,
    stride: int = 4,
) -> str:
    numbers = (int(last), levels, channels, size, sampling, int(aligned), canonical, stride)
    return f"roi_align {str(dtype).removeprefix('torch.')} {' '.join(map(str, numbers))}"


def channels_last(features: Sequence[Tensor]) -> bool:
    """Every map is channels-last, and that says something: a map of one channel or one cell is both."""
    last = all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)
    return last and not all(feature.is_contiguous() for feature in features)


def pooled_like(features: Sequence[Tensor], num_rois: int, size: int) -> Tensor:
    """Room for (R, C, size, size), laid out as the features are."""
    form = torch.channels_last if channels_last(features) else torch.contiguous_format
    shape = (num_rois, features[0].shape[1], size, size)
    return torch.empty(shape, dtype=features[0].dtype, device=features[0].device, memory_format=form)


@torch.library.register_fake("limner_served::nms")
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    return boxes.new_empty((scores.shape[0], keep), dtype=torch.int64), boxes.new_empty(
        (scores.shape[0],), dtype=torch.int64
    )


@torch.library.register_fake("limner_served::roi_align")
def _(
    features: list[Tensor], rois: Tensor, size: int, sampling: int, aligned: bool, canonical: int, stride: int = 4
) -> Tensor:
    return pooled_like(features, rois.shape[0], size)


# --- on a GPU ---


@torch.library.impl(LIBRARY, "nms", "CUDA")
def nms_on_gpu(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    return launch_nms(_loaded, boxes, scores, iou, threshold, keep)


def launch_nms(
    loaded: Callable[[str, int | None], tuple[Code, Launch]],
    boxes: Tensor,
    scores: Tensor,
    iou: float,
    threshold: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """boxes (B, G, N, 4), scores (B, G, N), both float32 -> indices (B, keep) into G * N, count (B,), int64."""
    images, groups, size = scores.shape
    code, launch = loaded(nms_key(iou, threshold, size), boxes.device.index)
    most = min(size, keep)
    kept = torch.empty((images, groups, most), dtype=torch.int32, device=boxes.device)
    kept_scores = torch.empty_like(kept, dtype=torch.float32)
    kept_count = torch.empty((images, groups), dtype=torch.int32, device=boxes.device)
    indices = torch.empty((images, keep), dtype=torch.int64, device=boxes.device)
    count = torch.empty((images,), dtype=torch.int64, device=boxes.device)
    thinned = (kept, kept_scores, kept_count)
    grid = (groups, images, 1)
    inputs = (_aligned(boxes.contiguous()), scores.contiguous())
    launch(GROUPS, grid, code.threads[GROUPS], (size, most), inputs, thinned)
    launch(MERGE, grid, code.threads[MERGE], (size, most, keep), thinned, (indices, count))
    return indices, count


@torch.library.impl(LIBRARY, "roi_align", "CUDA")
def roi_align_on_gpu(
    features: list[Tensor], rois: Tensor, size: int, sampling: int, aligned: bool, canonical: int, stride: int = 4
) -> Tensor:
    return launch_roi_align(_loaded, features, rois, size, sampling, aligned, canonical, stride)


def launch_roi_align(
    loaded: Callable[[str, int | None], tuple[Code, Launch]],
    features: Sequence[Tensor],
    rois: Tensor,
    size: int,
    sampling: int,
    aligned: bool,
    canonical: int,
    stride: int = 4,
) -> Tensor:
    """features (B, C, h, w) of each level, rois (R, 5) float32 -> (R, C, size, size), typed and laid out alike."""
    last, (images, channels) = channels_last(features), features[0].shape[:2]
    dtype = features[0].dtype
    key = roi_align_key(dtype, last, len(features), channels, size, sampling, aligned, canonical, stride)
    code, launch = loaded(key, rois.device.index)
    form = torch.channels_last if last else torch.contiguous_format
    output = pooled_like(features, len(rois), size)
    inputs = [*(_aligned(feature.contiguous(memory_format=form)) for feature in features), rois.contiguous()]
    sides = [side for feature in features for side in feature.shape[2:]]
    launch(
        ROI_ALIGN, (len(rois), code.slices, 1), code.threads[ROI_ALIGN], (images, channels, *sides), inputs, [output]
    )
    return output


def _aligned(tensor: Tensor) -> Tensor:
    """The kernels read 16 bytes at a time; a slice may start anywhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.preserve_format)


@functools.cache
def _loaded(key: str, device: int | None) -> tuple[Code, Launch]:
    if key not in _offered:
        raise KernelMissing(f"no artifact brought a kernel for {key!r}: make it again with limner export aoti")
    with _lock:
        return _offered[key], _Module(_offered[key], device or 0)


class _Module:
    """Machine code loaded into a device's primary context, which is torch's."""

    def __init__(self, code: Code, device: int) -> None:
        self.device, self.driver = device, _driver()
        self.context, self.module = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self._call("cuCtxSetCurrent", self.context)
        self._call("cuModuleLoadData", ctypes.byref(self.module), code.cubin)
        self.functions = {name: ctypes.c_void_p() for name in code.threads}
        for name, function in self.functions.items():
            self._call("cuModuleGetFunction", ctypes.byref(function), self.module, name.encode())

    def __call__(
        self,
        kernel: str,
        grid: Grid,
        threads: int,
        extras: Sequence[int],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        if math.prod(grid) == 0:
            return
        values = [
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs),
            *(ctypes.c_int32(value) for value in extras),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in outputs),
        ]
        packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self._enter()
            function = self.functions[kernel]
            self._call("cuLaunchKernel", function, *grid, threads, 1, 1, 0, stream, packed, None)

    def _enter(self) -> None:
        """A thread that has not used CUDA yet has no context."""
        current = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value != self.context.value:
            self._call("cuCtxSetCurrent", self.context)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise KernelMissing(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelMissing(f"no CUDA driver library ({error}), though torch has a CUDA device") from None


# --- on a CPU ---


@torch.library.impl(LIBRARY, "nms", "CPU")
def nms_on_cpu(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    indices = torch.zeros(len(scores), keep, dtype=torch.int64)
    count = torch.zeros(len(scores), dtype=torch.int64)
    for image, (its_boxes, its_scores) in enumerate(zip(boxes, scores, strict=True)):
        kept = _kept_in_groups(its_boxes, its_scores, iou, threshold)
        best = its_scores.reshape(-1)[kept].sort(descending=True, stable=True).indices[:keep]
        indices[image, : len(best)], count[image] = kept[best], len(best)
    return indices, count


def _kept_in_groups(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    """Ascending indices into G * N of the survivors of one image: boxes (G, N, 4), scores (G, N)."""
    import torchvision

    kept, size = [torch.zeros(0, dtype=torch.int64)], scores.shape[1]
    for group in torch.nonzero((scores > threshold).any(1)).flatten().tolist():
        index = torch.nonzero(scores[group] > threshold).flatten()
        kept.append(index[torchvision.ops.nms(boxes[group, index], scores[group, index], iou)] + group * size)
    return torch.cat(kept).sort().values


@torch.library.impl(LIBRARY, "roi_align", "CPU")
def roi_align_on_cpu(
    features: list[Tensor], rois: Tensor, size: int, sampling: int, aligned: bool, canonical: int, stride: int = 4
) -> Tensor:
    import torchvision

    sides = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    levels = torch.floor(4 + torch.log2(sides / canonical) + 1e-6).clamp(2, 1 + len(features)) - 2
    pooled = pooled_like(features, len(rois), size).zero_()
    for level, feature in enumerate(features):
        mine = torch.nonzero(levels == level).flatten()
        scale = 1.0 / (stride << level)
        part = torchvision.ops.roi_align(feature.float(), rois[mine], (size, size), scale, sampling, aligned)
        pooled[mine] = part.to(pooled.dtype)
    return pooled
