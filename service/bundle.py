"""THE CONTRACT between export and the service: a bundle, which is a directory with a manifest.

    bundles/<name>/<version>/manifest.json  golden.npz  detect.onnx  [masks.onnx  keypoints.onnx  ...]

This module owns the manifest's shape, reads a bundle and refuses one that is incomplete, altered or newer than this
reader. It knows nothing of engines or HTTP. docs/architecture.md has the stages' inputs and outputs; labels are 0-based
into `classes` and there is no background class.
"""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service.errors import BundleError

FORMAT = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
INT8_GOLDEN = "int8/golden.npz"

StageName = Literal["detect", "masks", "keypoints"]
NamePart = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Part(BaseModel):
    # A manifest is read years after it was written: an unknown field is a mistake or a newer format, never ignored.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def stride_of(level: str) -> int:
    """Of a map of features, by its name: the number in it is the stride's logarithm (p2 to p7 of a pyramid, c4)."""
    return 1 << int(level[1:])


class CanvasRule(_Part):
    """How an image becomes a canvas; `service.images.fit` obeys it."""

    short_side: int = Field(ge=1)
    long_side: int = Field(ge=1)
    multiple: int = Field(default=32, ge=1)
    antialias: bool = False

    def max_pixels(self) -> int:
        """Pixels of the largest canvas that the rule can make, padding included."""
        short, long = (-(-side // self.multiple) * self.multiple for side in (self.short_side, self.long_side))
        return short * long


class Keypoints(_Part):
    """Skeleton: 0-based index pairs. Flips: the permutation that a mirrored picture applies."""

    names: list[str] = Field(min_length=1)
    skeleton: list[tuple[int, int]] = []
    flips: list[int]

    @model_validator(mode="after")
    def _indices_exist(self) -> "Keypoints":
        count = len(self.names)
        if sorted(self.flips) != list(range(count)):
            raise ValueError(f"flips must be a permutation of 0..{count - 1}, got {self.flips}")
        if any(not 0 <= index < count for pair in self.skeleton for index in pair):
            raise ValueError(f"skeleton names a keypoint outside 0..{count - 1}")
        return self


class Port(_Part):
    """One input or output of a stage; a shape may hold symbols such as "B"."""

    name: str
    dtype: str
    shape: list[int | str]
    frame: str | None = None


class Stage(_Part):
    file: str
    inputs: list[Port]
    outputs: list[Port]


class Limits(_Part):
    max_detections: int = Field(ge=1)
    max_batch: int = Field(ge=1)
    max_canvas_pixels: int = Field(ge=1)


class ProposalRule(_Part):
    """Which boxes the service looks into where a request brings none; `service.proposals.propose` obeys it."""

    method: Literal["selective_search", "sliding_window"] = "selective_search"
    mode: Literal["fast", "quality"] = "fast"
    max_proposals: int = Field(default=2000, ge=1)
    width: int = Field(default=500, ge=1)  # of the picture that selective search looks at


class CascadeRule(_Part):
    """How a cascade looks through a canvas: see service/engines/cascade.py."""

    scale_factor: float = Field(default=1.1, gt=1)
    min_neighbors: int = Field(default=3, ge=1)  # windows that agree for a score of 0.5
    min_side: int = Field(default=24, ge=1)


class Thresholds(_Part):
    """Baked into the graph: a request may ask for more than `score_floor`, never see less."""

    score_floor: float = Field(ge=0, le=1)
    nms_iou: float = Field(ge=0, le=1)
    mask: float = Field(default=0.5, gt=0, lt=1)
    merge: float | None = Field(default=None, gt=0)  # after the graph: see service/merging.py


class Artifact(_Part):
    """One file of the bundle. `stage` is null for a file that several stages share."""

    file: str
    stage: StageName | None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    runtime: str
    runtime_version: str | None = None
    precision: str
    gpu: str | None = None


class Normalisation(_Part):
    """For the record: it is applied inside the graph."""

    mean: list[float]
    std: list[float]


class Manifest(_Part):
    format: int = FORMAT
    name: NamePart
    version: NamePart
    created: str
    classes: list[str] = Field(min_length=1)
    keypoints: Keypoints | None = None
    canvas: CanvasRule
    stages: dict[StageName, Stage]
    limits: Limits
    thresholds: Thresholds
    proposals: ProposalRule | None = None  # with the detect stage's input of that name
    cascade: CascadeRule | None = None  # the bundle is no graph but a cascade of OpenCV's
    artifacts: list[Artifact]
    normalisation: Normalisation
    provenance: dict[str, Any] = {}
    compression: dict[str, Any] = {}
    parity: dict[str, Any] = {}
    ap: dict[str, Any] = {}

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: list[str]) -> list[str]:
        if len(set(classes)) != len(classes):
            raise ValueError("two classes have the same name")
        return classes

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if "detect" not in self.stages:
            raise ValueError("stages lacks 'detect'")
        if ("keypoints" in self.stages) != (self.keypoints is not None):
            raise ValueError("a keypoints stage and the keypoint names go together; one of them is missing")
        inputs = {port.name for port in self.stages["detect"].inputs}
        if inputs and ("proposals" in inputs) != (self.proposals is not None):
            raise ValueError("the detect stage's input 'proposals' and the rule for it go together; one is missing")
        listed = {artifact.file for artifact in self.artifacts}
        for name, stage in self.stages.items():
            if stage.file not in listed:
                raise ValueError(f"artifacts does not list {stage.file!r}, the file of stage {name!r}")
        if self.canvas.max_pixels() > self.limits.max_canvas_pixels:
            raise ValueError(
                f"the canvas rule makes canvases of up to {self.canvas.max_pixels()} pixels, "
                f"limits.max_canvas_pixels is {self.limits.max_canvas_pixels}"
            )
        return self


@dataclass(frozen=True)
class Bundle:
    directory: Path
    manifest: Manifest

    @classmethod
    def read(cls, directory: Path | str) -> "Bundle":
        """Validates the manifest and every file it lists; raises `BundleError`, which says what to do."""
        directory = Path(directory)
        manifest = _read_manifest(directory)
        for artifact in manifest.artifacts:
            _check_artifact(directory, artifact)
        return cls(directory, manifest)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def has_masks(self) -> bool:
        return "masks" in self.manifest.stages

    @property
    def has_keypoints(self) -> bool:
        return "keypoints" in self.manifest.stages

    @property
    def mask_side(self) -> int:
        """Of a mask as its head gives it, in cells; 28 in most models."""
        stage = self.manifest.stages.get("masks")
        shapes = [port.shape for port in stage.outputs if port.name == "probabilities"] if stage else []
        return int(shapes[0][-1]) if shapes else 28

    @property
    def takes_proposals(self) -> bool:
        return self.manifest.proposals is not None

    @cached_property
    def size_bytes(self) -> int:
        return sum((self.directory / artifact.file).stat().st_size for artifact in self.manifest.artifacts)

    def stage_file(self, stage: StageName, precision: str = "float32") -> Path:
        """The stage's portable graph; a stage without one of this precision runs the one in float32."""
        for artifact in self.manifest.artifacts:
            if precision == "int8" and artifact.stage == stage and artifact.precision == precision:
                return self.directory / artifact.file
        return self.directory / self.manifest.stages[stage].file

    @property
    def has_int8(self) -> bool:
        return any(artifact.precision == "int8" for artifact in self.manifest.artifacts)

    def golden(self, file: str = GOLDEN) -> dict[str, npt.NDArray[Any]]:
        """Inputs and the outputs they must give; no pickle is ever read. An engine may have a file of its own, as that
        in int8 has: how far it may stray from float32 was judged when its graphs were made."""
        path = self.directory / file
        try:
            with np.load(path, allow_pickle=False) as archive:
                golden = {name: archive[name] for name in archive.files}
        except FileNotFoundError:
            raise BundleError(f"{path} is missing: export the bundle again") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from error
        expected = {"images", "sizes", "count", "boxes", "scores", "labels"}
        expected |= {"proposals"} if self.takes_proposals else set()
        expected |= {"probabilities"} if self.has_masks else set()
        expected |= {"heatmaps"} if self.has_keypoints else set()
        if missing := expected - golden.keys():
            raise BundleError(f"{path} lacks {', '.join(sorted(missing))}: export the bundle again")
        return golden


def write_manifest(directory: Path | str, manifest: Manifest) -> Path:
    """Written aside and renamed, so that a reader sees the old manifest or the new one, never half of one."""
    path = Path(directory) / MANIFEST
    aside = path.with_name(f".{MANIFEST}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(manifest.model_dump_json(indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
    return path


def file_sha256(path: Path | str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: give a directory of the form <bundles>/<name>/<version>") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({error})") from error
    _check_format(path, text)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(f"{path} is not a manifest of format {FORMAT}: {_in_words(error)}") from error


class _FormatOnly(BaseModel):
    format: int


def _check_format(path: Path, text: str) -> None:
    """Before the rest: a newer format may differ anywhere, and its reader should hear of the format first."""
    try:
        found = _FormatOnly.model_validate_json(text).format
    except ValidationError as error:
        raise BundleError(f"{path} is not a manifest: {_in_words(error)}") from error
    if found > FORMAT:
        raise BundleError(f"{path} has format {found}, this limner reads up to {FORMAT}: install a newer limner")
    if found < 1:
        raise BundleError(f"{path} has format {found}, which never existed")


def _in_words(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg']}" for item in error.errors())


def _check_artifact(directory: Path, artifact: Artifact) -> None:
    path = directory / artifact.file
    # Resolved, so that neither "../" nor a link leads outside: a manifest may come from anywhere.
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(f"{directory / MANIFEST} names {artifact.file!r}, which lies outside the bundle")
    if not path.is_file():
        raise BundleError(f"{path} is missing though the manifest lists it: copy or export the bundle again")
    if file_sha256(path) != artifact.sha256:
        raise BundleError(f"{path} differs from the manifest's sha256: it was altered or half copied; export it again")
