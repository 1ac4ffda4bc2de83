"""Models that describe the answers to OpenAPI, and the example of each form.

Answers are written by `service.answers` and `service.clients`, not by these; a test holds those to them. The examples
are not written down but encoded, from one small picture, so that they are what the service says.
"""

import json
import time
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from service import masks
from service.answers import Found
from service.bundle import CanvasRule, Keypoints, Limits, Manifest, ProposalRule, Thresholds
from service.detector import Detections, Head
from service.formats import FORMATS
from service.shelf import State
from service.wire import AnswerFormat, MaskFormat, Options

Offset = Annotated[list[int], Field(min_length=2, max_length=2, description="[x, y] of the window's first pixel.")]
Size = Annotated[list[int], Field(min_length=2, max_length=2, description="[height, width]")]
Box = Annotated[list[float], Field(min_length=4, max_length=4)]


class ModelId(BaseModel):
    name: str
    version: str


class ImageSize(BaseModel):
    """Of the picture as a viewer shows it: EXIF orientation applied."""

    width: int
    height: int


class RleMask(BaseModel):
    """COCO run lengths at the size of the image; `pycocotools.mask.decode` reads it."""

    format: Literal["rle"]
    size: Size
    counts: str


class PolygonMask(BaseModel):
    """Rings as flat lists x, y, x, y ... of pixel corners. The mask is the polygons less the holes."""

    format: Literal["polygon"]
    polygons: list[list[int]]
    holes: list[list[int]]


class PngMask(BaseModel):
    """The mask's window as a PNG of one bit, in base64; background outside."""

    format: Literal["png"]
    offset: Offset
    size: Size
    data: str


class BitmapMask(BaseModel):
    """The mask's window as bits, in base64: row by row, the leftmost pixel highest, rows filled up to whole bytes."""

    format: Literal["bitmap"]
    offset: Offset
    size: Size
    data: str


class ProbabilityMask(BaseModel):
    """What the network gave, over the box: bytes, row by row, in base64; a probability is a byte / 255."""

    format: Literal["probability"]
    box: Annotated[Box, Field(description="[x1, y1, x2, y2] in image pixels, whatever box_format says.")]
    size: Size
    data: str


class DetectionAnswer(BaseModel):
    label: str
    class_id: int = Field(description="0-based index into the model's classes.")
    score: float
    box: Annotated[Box, Field(description="In image pixels: [x1, y1, x2, y2] or as box_format says.")]
    mask: RleMask | PolygonMask | PngMask | BitmapMask | ProbabilityMask | None = Field(
        None, description="Absent where not asked for, or where the model has no masks."
    )
    keypoints: list[list[float]] | list[float] | None = Field(
        None,
        description="[x, y, score] per keypoint name of the model, in image pixels, or flat as keypoint_format says. "
        "Absent like `mask`.",
    )


class Timings(BaseModel):
    """Milliseconds; 0 for what did not run. `detect`, `masks`, `keypoints` include the whole batch's network time."""

    decode: float
    queue: float
    detect: float
    masks: float
    keypoints: float
    encode: float


class Answer(BaseModel):
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.update(example=example("json")))

    model: ModelId
    image: ImageSize
    partial: list[Head] | None = Field(
        None, description="With allow_partial, what was asked for and had no time. Absent where nothing is missing."
    )
    detections: list[DetectionAnswer]
    timings_ms: Timings


class Failed(BaseModel):
    """Stands for the answer of one among several pictures."""

    error: "Problem"


class Answers(BaseModel):
    """Of several pictures in one request, in their order."""

    model: ModelId
    results: list[Answer | Failed]


class Problem(BaseModel):
    """RFC 9457, application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str


class ProtocolError(BaseModel):
    """What the Open Inference Protocol wants of an error."""

    error: str


class VersionState(BaseModel):
    """How one version stands."""

    version: str
    state: State
    reason: str | None = Field(
        None, description="Why it is not ready, or why what is on disk now could not replace it; else absent."
    )
    engine: str | None = Field(None, description="What runs its graphs. Absent, as what follows, unless it is loaded.")
    load_seconds: float | None = None
    last_used: datetime | None = None


class ModelState(VersionState):
    """The version that answers a request for this name, and all there are."""

    name: str
    stages: list[Literal["detect", "masks", "keypoints"]] | None = None
    num_classes: int | None = None
    ap: dict[str, Any] | None = Field(None, description="As the bundle's exporter measured it.")
    versions: list[VersionState]


class Models(BaseModel):
    default: str | None = Field(description="The name that answers requests without one.")
    models: list[ModelState]


class Golden(BaseModel):
    """The largest differences to the bundle's golden outputs."""

    num_matched: int
    num_unmatched: int
    box_px: float
    score: float
    mask: float | None
    heatmap_fraction: float | None


class RunningEngine(BaseModel):
    name: str
    precision: str
    reason: str = Field(description="Why it was chosen.")
    num_lanes: int = Field(description="Batches that run at once under load; a lone request has the whole engine.")
    max_batch: int = Field(description="Pictures in a batch, above which nothing was gained when it was measured.")
    rates: dict[str, float] = Field(description="Pictures a second of what was tried. Empty: nothing was measured.")
    golden: Golden


class ModelDetails(BaseModel):
    """One model or version; what follows `versions` is there only where it is loaded."""

    name: str
    version: str
    state: State
    reason: str | None = None
    load_seconds: float | None = None
    last_used: datetime | None = None
    versions: list[VersionState]
    stages: list[Literal["detect", "masks", "keypoints"]] | None = None
    num_classes: int | None = None
    created: str | None = None
    classes: list[str] | None = None
    keypoints: Keypoints | None = None
    canvas: CanvasRule | None = None
    limits: Limits | None = None
    thresholds: Thresholds | None = None
    proposals: ProposalRule | None = Field(None, description="What is searched where a request brings no proposals.")
    ap: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    compression: dict[str, Any] | None = None
    size_bytes: int | None = None
    engine: RunningEngine | None = None


class LoadedVersion(VersionState):
    name: str


class Unloaded(BaseModel):
    name: str
    versions: list[VersionState]


class ModelReadiness(BaseModel):
    name: str
    ready: bool


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: Literal["BYTES", "UINT8", "INT64", "FP32"]
    shape: list[int] = Field(description="-1 is a length that differs from request to request.")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorAnswer(TensorMetadata):
    parameters: dict[str, int] | None = Field(None, description="binary_data_size, where the data is behind the JSON.")
    data: list[Any] | None = Field(None, description="Row by row, flat.")


class InferAnswer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())  # the protocol's names begin with model_

    model_name: str
    model_version: str
    id: str | None = Field(None, description="The request's own, absent where it had none.")
    outputs: list[TensorAnswer]


def example(name: AnswerFormat, mask_format: MaskFormat = "rle") -> Any:
    """The answer in this form on the picture of `_scene`: parsed JSON, or text for the form with many lines."""
    form = FORMATS[name]
    if form.shows_picture:
        return f"the bytes of a {name.upper()} file"
    found = Found(
        _manifest(), _scene(mask_format), Options.model_validate({"masks": mask_format}), _TIMINGS, time.perf_counter()
    )
    text = form.encode(found).decode()
    if name == "ndjson":
        head, *rows = text.splitlines()
        return "\n".join([json.dumps(_settled(json.loads(head)), separators=(",", ":")), *rows, ""])
    return _settled(json.loads(text))


_TIMINGS = {"decode": 6.1, "queue": 0.1, "detect": 48.0, "masks": 9.5, "keypoints": 12.2}


def _settled(document: Any) -> Any:
    """With a constant for the one value that differs from run to run."""
    if isinstance(document, dict) and "timings_ms" in document:
        document["timings_ms"]["encode"] = 0.2
    return document


@lru_cache(maxsize=1)
def _manifest() -> Manifest:
    """Of a bundle that does not exist: only what an answer tells of one."""
    joints = Keypoints(names=["nose", "left_eye"], skeleton=[(0, 1)], flips=[0, 1])
    return Manifest.model_construct(name="person", version="1", classes=["person"], keypoints=joints)


def _scene(mask_format: MaskFormat) -> Detections:
    """One person of 5 x 4 pixels in a picture of 16 x 12: small, so that the masks of all forms can be read."""
    height, width = 12, 16
    box = np.array([[3.25, 2.5, 8.5, 6.75]], np.float32)
    y, x = np.mgrid[:28, :28]
    level = np.clip(1.5 - np.hypot(y - 13.5, x - 13.5) / 14, 0, 1)[None].astype(np.float32)
    points = np.array([[[5.5, 3.25, 0.91], [6.25, 2.75, 0.04]]], np.float32)
    is_soft = mask_format == "probability"
    return Detections(
        height,
        width,
        box,
        np.array([0.9871], np.float32),
        np.array([0]),
        None if is_soft else masks.rle(level, box, height, width),
        points,
        probabilities=level if is_soft else None,
    )
