"""How each kernel is launched and compiled: one function a kernel, for every caller.

Sizes annotated Any may be ints or a compiler's symbolic expressions: no arithmetic is done on them. What shapes shared
memory, loops or the grid's slices must be an int, and becomes a define where a kernel has to know it: `*_defines`.
Letters: B images, G groups, N boxes of a group, R RoIs, C channels, L levels.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models import ops

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of elements.cuh
BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
MAX_LEVELS = 5
MAX_GROUP_SIZE = 4096  # boxes of a group: what 48 KB of shared memory sort
ITEMS_PER_BLOCK = 2048  # of RoIAlign and RoIPool: eight a thread
ROI_THREADS = 256
MERGE_THREADS = 128  # of nms.cu

Defines = dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch. `extras` are its int32 arguments, between the input and the output pointers."""

    kernel: str
    grid: tuple[Any, Any, Any]
    block: tuple[int, int, int]
    shared_bytes: int  # dynamic; what the kernels declare themselves is not in it
    extras: tuple[Any, ...]


def ceil_div(size: int, by: int) -> int:
    return -(-size // by)


# --- limner::nms: nms.cu, two launches ---


def nms_defines(iou: float, threshold: float, size: int, index: torch.dtype = torch.int64) -> Defines:
    """For N = `size` boxes a group. `index`: int64, the op's, or int32, of what the merge writes."""
    if iou < 0:
        raise ValueError(f"iou is {iou}: the kernel takes a threshold of 0 or more")
    capacity = group_capacity(size)
    return {
        "CAPACITY": capacity,
        "THREADS": group_threads(capacity),
        "SCORE_FLOOR": float_literal(threshold),
        "MAX_IOU": float_literal(round_down(iou)),
        "INDEX": {torch.int64: "long long", torch.int32: "int"}[index],
    }


def nms_launch(images: Any, groups: Any, size: int, keep: int) -> Launch:
    """limner_nms_groups: boxes (B, G, N, 4) float32, scores (B, G, N) float32 -> kept (B, G, M) int32, kept_scores
    (B, G, M) float32, kept_count (B, G) int32 with M = min(N, keep). Boxes must be aligned to 16 bytes.
    """
    block = (group_threads(group_capacity(size)), 1, 1)
    return Launch("limner_nms_groups", (groups, images, 1), block, 0, (size, min(size, keep)))


def nms_merge_launch(images: Any, groups: Any, size: int, keep: int) -> Launch:
    """limner_nms_merge: the three outputs of limner_nms_groups -> indices (B, keep), count (B,), both INDEX."""
    block = (MERGE_THREADS, 1, 1)
    return Launch("limner_nms_merge", (groups, images, 1), block, 0, (size, min(size, keep), keep))


def group_capacity(size: int) -> int:
    if not 1 <= size <= MAX_GROUP_SIZE:
        raise ValueError(f"{size} boxes in a group: the kernel takes 1 to {MAX_GROUP_SIZE}")
    return 1 << max(6, (size - 1).bit_length())


def group_threads(capacity: int) -> int:
    return min(1024, max(64, capacity // 2))


def round_down(value: float) -> float:
    """The largest float32 not above `value`: a float32 exceeds one exactly if it exceeds the other.

    The eager op compares a float32 IoU with a Python float; 0.1, say, is less than the nearest float32.
    """
    single = torch.tensor(value, dtype=torch.float32)
    if single.item() > value:
        single = torch.nextafter(single, torch.tensor(-math.inf))
    return single.item()


# --- limner::roi_align and its sibling RoIPool ---


def roi_align_defines(
    dtype: torch.dtype,
    channels_last: bool,
    levels: int,
    channels: int,
    size: int,
    sampling: int,
    aligned: bool,
    canonical: int,
    first_stride: int = 4,
) -> Defines:
    """Arguments as of `limner::roi_align`; `first_stride` is the first level's, and each level doubles it."""
    own: Defines = {"SAMPLING": sampling, "ALIGNED": int(aligned)}
    return own | roi_pool_defines(dtype, channels_last, levels, channels, size, canonical, first_stride)


def roi_pool_defines(
    dtype: torch.dtype,
    channels_last: bool,
    levels: int,
    channels: int,
    size: int,
    canonical: int,
    first_stride: int = 4,
) -> Defines:
    if dtype not in ELEMENTS:
        raise ValueError(f"features are {dtype}: the kernels take float32, float16 and bfloat16")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"{levels} pyramid levels: the kernels take 1 to {MAX_LEVELS}")
    return {
        "ELEMENT": ELEMENTS[dtype],
        "CHANNELS_LAST": int(channels_last),
        "VECTOR": vector_of(dtype, channels_last, channels),
        "LEVELS": levels,
        "FIRST_STRIDE": first_stride,
        "CANONICAL": float_literal(canonical),
        "LEVEL_EDGES": "{" + ",".join(map(float_literal, level_edges(levels))) + "}",
        "SIZE": size,
        "ITEMS": ITEMS_PER_BLOCK,
        "THREADS": ROI_THREADS,
    }


def roi_align_launch(
    num_rois: Any,
    images: Any,
    channels: int,
    sides: Sequence[tuple[Any, Any]],
    size: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Launch:
    """limner_roi_align: features (B, C, H, W) of each level, rois (R, 5) float32 -> (R, C, size, size), typed and laid
    out as the features are. `sides`: height and width of each level.
    """
    vector = vector_of(dtype, channels_last, channels)
    slices = ceil_div(channels // vector * size * size, ITEMS_PER_BLOCK)
    extras = (images, channels, *(side for level in sides for side in level))
    return Launch("limner_roi_align", (num_rois, slices, 1), (ROI_THREADS, 1, 1), 0, extras)


def roi_pool_launch(*args: Any) -> Launch:
    """limner_roi_pool; arguments and arrays as of `roi_align_launch`."""
    same = roi_align_launch(*args)
    return Launch("limner_roi_pool", same.grid, same.block, same.shared_bytes, same.extras)


def vector_of(dtype: torch.dtype, channels_last: bool, channels: int) -> int:
    """Channels in one load: 16 bytes where the number of channels allows it."""
    return math.gcd(channels, 16 // BYTES[dtype]) if channels_last else 1


@functools.cache
def level_edges(levels: int) -> tuple[float, ...]:
    """The smallest ratio sqrt(area) / canonical of each level but the first, as `ops.roi_levels` has it on a CPU.

    Level k begins about 7e-7 below 2^(k - 2), an epsilon of a few float32 steps; the steps around are tried one by one,
    so that a kernel compares instead of taking a logarithm whose last bit differs between devices.
    """
    edges = []
    for level in range(1, levels):
        bits = torch.tensor(2.0 ** (level - 2)).view(torch.int32) + torch.arange(-64, 65, dtype=torch.int32)
        ratios = bits.view(torch.float32)
        edges.append(ratios[ops.levels_of_ratios(ratios, levels) >= level].min().item())
    return tuple(edges)


def float_literal(value: float) -> str:
    """A C++ float constant with exactly these bits, rounded from Python's float as torch rounds a scalar."""
    single = torch.tensor(value, dtype=torch.float32).item()
    if not math.isfinite(single):
        raise ValueError(f"{value} is no finite float32")
    return f"{float(single).hex()}f"
