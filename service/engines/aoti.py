"""Runs a bundle's AOTInductor packages: for GPUs where TensorRT is not installed. The one engine that needs torch.

What runs, and how, is in service/aoti/runner.py; this holds it to the bundle and to the service's errors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch

from service.aoti import devices, runner
from service.bundle import Bundle
from service.engines import Detected, Floats, Integers, Precision
from service.engines.plans import HeadName, Packages
from service.errors import BundleError, EngineFailed, EngineOutOfMemory, EngineUnavailable

log = structlog.get_logger()


class AotiEngine:
    name = "aoti"

    def __init__(self, bundle: Bundle, packages: Packages, directory: Path) -> None:
        """`directory` holds the packages' files. EngineUnavailable where they are not for this machine."""
        refuse_elsewhere(packages)
        self.precision: Precision = packages.precision
        self.max_batch, self.canvases = packages.max_batch, packages.canvases
        self.golden_file = f"{directory.name}/{packages.golden}"
        if missing := set(bundle.manifest.stages) - {"detect", *packages.heads}:
            raise BundleError(f"{directory} lacks {', '.join(sorted(missing))}: make it again with limner export aoti")
        device = devices.Cpu() if packages.gpu == "cpu" else devices.Cuda(warn=log.warning)
        described = runner.Packages(
            directory,
            {each.canvas: each.file for each in packages.detect},
            {str(head): file for head, file in packages.heads.items()},
            packages.batches,
            packages.rois,
            {key: kernel.model_dump() for key, kernel in packages.kernels.items()},
        )
        with _told("the packages do not load"):
            self._runner = runner.Runner(described, device)

    def detect(self, images: npt.NDArray[np.uint8], sizes: Integers, *_proposals: Floats) -> Detected:
        with _told("detect failed"):
            return Detected(*self._runner.detect(images, sizes))

    def masks(self, features: Any, rois: Floats, labels: Integers) -> Floats:
        return self._head("masks", features, rois, labels)

    def keypoints(self, features: Any, rois: Floats) -> Floats:
        return self._head("keypoints", features, rois, None)

    def _head(self, head: HeadName, features: Any, rois: Floats, labels: Integers | None) -> Floats:
        with _told(f"{head} failed"):
            return self._runner.head(head, features, rois, labels)

    def close(self) -> None:
        self._runner.close()


def refuse_elsewhere(packages: Packages) -> None:
    """Packages hold machine code, and calls into the torch that made them."""
    if packages.torch != torch.__version__:
        raise EngineUnavailable(
            f"the packages were made with torch {packages.torch}, here is {torch.__version__}: "
            "install that one, or make them again with limner export aoti"
        )
    if packages.gpu == "cpu":
        if packages.gpu_name != (here := torch.backends.cpu.get_cpu_capability()):
            raise EngineUnavailable(f"the packages are for processors with {packages.gpu_name}, this one has {here}")
        return
    if not torch.cuda.is_available():
        raise EngineUnavailable("torch finds no CUDA device")
    if packages.gpu != (here := "sm{}{}".format(*torch.cuda.get_device_capability(0))):
        raise EngineUnavailable(f"the packages are for {packages.gpu}, this GPU is {here}")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """torch's errors as the service's."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a package's own errors hold the text alone
        kind = EngineOutOfMemory if "out of memory" in str(error).lower() else EngineFailed
        raise kind(f"{what}: {error}") from error
