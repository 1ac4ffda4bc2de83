"""What torch's compiler wants of a GPU's machine beyond a C++ compiler: CUDA's headers, and a libcuda to link with.

Where a driver came without the toolkit there is libcuda.so.1 alone, and `-lcuda` finds nothing; where CUDA came as
wheels nothing says where its headers are. Both are there, under other names.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def for_cuda() -> Iterator[None]:
    """The environment in which AOTInductor can compile and link for this machine's GPU."""
    before = {name: os.environ.get(name) for name in ("CUDA_HOME", "LIBRARY_PATH")}
    with tempfile.TemporaryDirectory() as folder:
        if driver := _loaded_driver():
            (Path(folder) / "libcuda.so").symlink_to(driver)
            # Searched after what the compiler is told by flags, so a toolkit's own stub comes first.
            os.environ["LIBRARY_PATH"] = ":".join(filter(None, (before["LIBRARY_PATH"], folder)))
        if home := _home_of_wheels():
            os.environ["CUDA_HOME"] = home
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _loaded_driver() -> str | None:
    """The file that torch's CUDA has loaded."""
    torch.cuda.init()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next((line.split()[-1] for line in lines if "/libcuda.so" in line), None)


def _home_of_wheels() -> str | None:
    """CUDA's folder among the Python packages, where nothing else says where CUDA is."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc"):
        return None
    if Path("/usr/local/cuda/include/cuda.h").is_file():
        return None
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations or []) if spec else []
    found = (path.parent.parent for root in roots for path in sorted(Path(root).glob("cu*/include/cuda.h")))
    return next((str(path) for path in found), None)
