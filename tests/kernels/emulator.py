"""Runs the CUDA kernels' own sources on the CPU: emulator.h in place of CUDA, g++ in place of NVRTC."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from models.kernels import Launch
from models.kernels.nvrtc import SOURCES

HERE = Path(__file__).parent
# Neither fused multiply-adds nor shortcuts: NVRTC is asked for the same.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas")
KERNELS = {
    "nms": ("limner_nms_groups", "limner_nms_merge"),
    "roi_align": ("limner_roi_align",),
    "roi_pool": ("limner_roi_pool",),
}

Run = Callable[[Launch, Sequence[Tensor], Sequence[Tensor]], None]
_built: dict[str, ctypes.CDLL] = {}
_folder = tempfile.TemporaryDirectory(prefix="limner-kernels-")


def emulated(source_name: str, defines: Mapping[str, str | int | float]) -> Run:
    """A launcher of the source's kernels: run(launch, inputs, outputs)."""
    if platform.system() != "Linux" or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")
    library = _library(source_name, [f"-D{name}={value}" for name, value in sorted(defines.items())])

    def run(launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in inputs]
        extras = [ctypes.c_int32(value) for value in launch.extras]
        arguments = [*pointers, *extras, *(ctypes.c_void_p(t.data_ptr()) for t in outputs)]
        packed = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        assert launch.shared_bytes == 0
        library[f"run_{launch.kernel}"]((ctypes.c_uint * 6)(*launch.grid, *launch.block), packed)

    return run


def _library(source_name: str, defines: list[str]) -> ctypes.CDLL:
    entry = 'extern "C" void run_{0}(const unsigned* sizes, void** a) {{ emulator::launch({0}, sizes, a); }}\n'
    text = f'#include "emulator.h"\n#include "{source_name}.cu"\n' + "".join(map(entry.format, KERNELS[source_name]))
    key = hashlib.sha256("\0".join([text, *defines]).encode()).hexdigest()[:16]
    if key not in _built:
        source, binary = Path(_folder.name, f"{key}.cpp"), Path(_folder.name, f"{key}.so")
        source.write_text(text)
        command = ["g++", *FLAGS, *defines, f"-I{HERE}", f"-I{SOURCES}", "-o", binary, source]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr[:6000]
        _built[key] = ctypes.CDLL(str(binary))
    return _built[key]
