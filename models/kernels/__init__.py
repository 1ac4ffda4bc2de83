"""The CUDA kernels of the two custom ops: sources, their launch geometry, and NVRTC to compile them.

One source serves torch (`models/kernels/torch_cuda.py`) and TensorRT's ahead-of-time plugins. The ABI of each kernel is
all input pointers, then `Launch.extras` as int32, then all output pointers; floats are defines.
"""

from models.kernels.launch import (
    Launch,
    nms_defines,
    nms_launch,
    nms_merge_launch,
    roi_align_defines,
    roi_align_launch,
    roi_pool_defines,
    roi_pool_launch,
)
from models.kernels.nvrtc import KernelError, Ptx, compile_cubin, compile_ptx

__all__ = [
    "KernelError",
    "Launch",
    "Ptx",
    "compile_cubin",
    "compile_ptx",
    "nms_defines",
    "nms_launch",
    "nms_merge_launch",
    "roi_align_defines",
    "roi_align_launch",
    "roi_pool_defines",
    "roi_pool_launch",
]
