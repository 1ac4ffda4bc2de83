"""What TensorRT plans a bundle has, and which of them a batch runs in. Pure: knows neither TensorRT nor a GPU.

    sm90.float16/plans.json  golden.npz  detect.384x640.plan  masks.plan  keypoints.plan

A plan takes one canvas and a few batch sizes (*buckets*), a head's plan any of the canvases and a few numbers of RoIs;
what is smaller is padded. B images, N RoIs.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.bundle import Bundle
from service.errors import BundleError, EngineFailed

FORMAT = 1
PLANS = "plans.json"
ALIGNMENT = 256  # bytes, of every device buffer

PlanPrecision = Literal["float32", "float16", "bfloat16"]
HeadName = Literal["masks", "keypoints"]
Shape = tuple[int, int]
Sizes = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class DetectPlan(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    canvas: Shape
    file: str


class Plans(BaseModel):
    """plans.json: all that an engine needs to know before it opens a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    precision: PlanPrecision
    gpu: str = Field(pattern=r"^sm\d+$")
    gpu_name: str
    tensorrt: str
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


class PlanSet(NamedTuple):
    plans: Plans
    directory: Path


def listed(bundle: Bundle) -> list[PlanSet]:
    """Every set of plans in the bundle, whichever GPU it is for."""
    files = [a.file for a in bundle.manifest.artifacts if a.runtime == "tensorrt" and Path(a.file).name == PLANS]
    return [PlanSet(read(bundle.directory / file), (bundle.directory / file).parent) for file in files]


def read(path: Path) -> Plans:
    try:
        plans = Plans.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BundleError(f"{path} cannot be read ({error}): make the plans again with limner export trt") from error
    if plans.format > FORMAT:
        raise BundleError(f"{path} has format {plans.format}, this limner reads up to {FORMAT}: install a newer limner")
    return plans


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `count`; the largest where none does."""
    return min((size for size in sizes if size >= count), default=max(sizes))


def chunks(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts `count` rows into (start, rows, bucket): full largest buckets, then the one that holds the rest."""
    largest = max(sizes)
    for start in range(0, count, largest):
        rows = min(largest, count - start)
        yield start, rows, bucket(rows, sizes)


def canvas_for(shape: Shape, canvases: Sequence[Shape]) -> Shape:
    """The canvas of the fewest pixels that holds (height, width); raises `EngineFailed` where none does."""
    fitting = [each for each in canvases if each[0] >= shape[0] and each[1] >= shape[1]]
    if not fitting:
        known = ", ".join(f"{height}x{width}" for height, width in canvases)
        raise EngineFailed(
            f"no TensorRT plan takes a canvas of {shape[0]}x{shape[1]}, there are {known}: "
            f"make one with limner export trt --canvas {shape[0]}x{shape[1]}"
        )
    return min(fitting, key=lambda each: (each[0] * each[1], each))


def layout(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of buffers of these many bytes, one behind the other, each aligned; and the bytes of all."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def padded_rois(rois: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """(N, 5) -> (size, 5); the rows behind are RoIs of no extent in the first picture, which cost nothing to sample."""
    rows = np.zeros((size, 5), np.float32)
    rows[: len(rois)] = rois
    return rows


def compute_capability(gpu: str) -> tuple[int, int]:
    """ "sm90" -> (9, 0)."""
    digits = re.fullmatch(r"sm(\d+)(\d)", gpu)
    if digits is None:
        raise ValueError(f"{gpu!r} is no compute capability")
    return int(digits[1]), int(digits[2])
