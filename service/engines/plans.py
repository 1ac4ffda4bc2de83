"""What a bundle has for fixed shapes: TensorRT's plans and AOTInductor's packages. Pure: knows no runtime and no GPU.

    sm90.float16/plans.json  golden.npz  detect.384x640.plan  masks.plan  keypoints.plan
    aoti.sm90.float16/packages.json  golden.npz  detect.384x640.pt2  masks.pt2  keypoints.pt2  nms0.cubin ...

Each takes one canvas and a few batch sizes (*buckets*), a head's any of the canvases and a few numbers of RoIs; what is
smaller is padded (service/buckets.py).
"""

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.buckets import Shape
from service.bundle import Bundle
from service.errors import BundleError

FORMAT = 1
PLANS = "plans.json"
PACKAGES = "packages.json"
ALIGNMENT = 256  # bytes, of every device buffer

PlanPrecision = Literal["float32", "float16", "bfloat16"]
HeadName = Literal["masks", "keypoints"]
Sizes = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class DetectPlan(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    canvas: Shape
    file: str


class FixedShapes(BaseModel):
    """All that an engine needs to know before it opens a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    precision: PlanPrecision
    gpu_name: str
    batches: Sizes
    rois: Sizes
    detect: list[DetectPlan] = Field(min_length=1)
    heads: dict[HeadName, str] = {}
    golden: str

    @property
    def canvases(self) -> list[Shape]:
        return [each.canvas for each in self.detect]

    @property
    def max_batch(self) -> int:
        return max(self.batches)


class Plans(FixedShapes):
    """plans.json."""

    gpu: str = Field(pattern=r"^sm\d+$")
    tensorrt: str


class Kernel(BaseModel):
    """Machine code of one custom op, and how it is launched: threads of a block by kernel, slices of the grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    threads: dict[str, int]
    slices: int


class Packages(FixedShapes):
    """packages.json. `gpu` is "cpu" for the processor, whose vector instructions `gpu_name` then tells."""

    gpu: str = Field(pattern=r"^(sm\d+|cpu)$")
    torch: str
    kernels: dict[str, Kernel] = {}


class PlanSet(NamedTuple):
    plans: Plans
    directory: Path


class PackageSet(NamedTuple):
    packages: Packages
    directory: Path


def listed(bundle: Bundle) -> list[PlanSet]:
    """Every set of plans in the bundle, whichever GPU it is for."""
    return [PlanSet(_read(path, Plans, "trt"), path.parent) for path in _files(bundle, "tensorrt", PLANS)]


def packages(bundle: Bundle) -> list[PackageSet]:
    """Every set of packages in the bundle, whichever device it is for."""
    return [PackageSet(_read(path, Packages, "aoti"), path.parent) for path in _files(bundle, "aoti", PACKAGES)]


def _files(bundle: Bundle, runtime: str, name: str) -> list[Path]:
    files = [a.file for a in bundle.manifest.artifacts if a.runtime == runtime and Path(a.file).name == name]
    return [bundle.directory / file for file in files]


Described = TypeVar("Described", bound=FixedShapes)


def _read(path: Path, kind: type[Described], verb: str) -> Described:
    try:
        found = kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        made = {"trt": "plans", "aoti": "packages"}[verb]
        raise BundleError(
            f"{path} cannot be read ({error}): make the {made} again with limner export {verb}"
        ) from error
    if found.format > FORMAT:
        raise BundleError(f"{path} has format {found.format}, this limner reads up to {FORMAT}: install a newer limner")
    return found


def layout(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of buffers of these many bytes, one behind the other, each aligned; and the bytes of all."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def compute_capability(gpu: str) -> tuple[int, int]:
    """ "sm90" -> (9, 0)."""
    digits = re.fullmatch(r"sm(\d+)(\d)", gpu)
    if digits is None:
        raise ValueError(f"{gpu!r} is no compute capability")
    return int(digits[1]), int(digits[2])
