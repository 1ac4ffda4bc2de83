"""What crosses the wire: bodies in, answers out, and their description for OpenAPI.

Three forms of request carry the same picture and options: the raw bytes with options in the query, a multipart form,
and JSON with base64. Everything here is plain functions on bytes, so that they run in a thread pool; the reading of the
socket is `service.app`'s. `service.openapi` describes the requests.
"""

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import orjson
import python_multipart
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.bundle import Manifest
from service.detector import Detections
from service.errors import EmptyBody, InvalidOption, MalformedRequest, UnsupportedType

# What senders of raw bytes put there; the last is what `curl --data-binary` says by itself.
RAW_TYPES = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
IMAGE_FIELDS = ("image", "file")
SEND_HOW = "send the bytes of a picture, a multipart field 'image', or JSON with base64 in 'image'"


class Options(BaseModel):
    """The same names in the query, in a form and in JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    confidence: float = Field(
        0.5,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Lowest score to answer. Values below the model's score_floor are accepted, but nothing "
        "with a score below that floor leaves the network.",
    )
    max_detections: int | None = Field(
        None, ge=1, description="Most detections to answer, the best first. At most, and by default, the model's limit."
    )
    masks: Literal["rle", "none"] = Field("rle", description="rle: COCO run lengths; none: masks are not computed.")
    keypoints: bool = Field(True, description="false: keypoints are not computed.")
    model: str | None = Field(None, description="Name of the model; by default the service's default model.")


OptionPairs = Iterable[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Upload:
    """The picture's bytes, still encoded, and what is asked of it."""

    image: bytes
    options: Options


def parse_upload(content_type: str, body: bytes, query: OptionPairs) -> Upload:
    """Any of the three forms; raises the error that says what is wrong with it."""
    kind, _ = _content_type(content_type)
    if not body:
        raise EmptyBody(f"the body is empty: {SEND_HOW}")
    given: list[tuple[str, Any]] = list(query)
    if kind == "multipart/form-data":
        image, fields = _read_form(content_type, body)
    elif kind == "application/json":
        image, fields = _read_json(body)
    elif kind in RAW_TYPES or kind.startswith("image/"):
        image, fields = body, []
    else:
        raise UnsupportedType(f"the content type {kind!r} holds no picture: {SEND_HOW}")
    return Upload(image, parse_options([*given, *fields]))


def parse_options(given: OptionPairs) -> Options:
    values: dict[str, Any] = {}
    for name, value in given:
        if name in values and values[name] != value:
            both = f"{_short(repr(values[name]))} and {_short(repr(value))}"
            raise InvalidOption(f"option {_short(name)!r} is given twice, as {both}: give it once")
        values[name] = value
    if unknown := sorted(values.keys() - Options.model_fields.keys()):
        raise InvalidOption(
            f"unknown option {_short(', '.join(unknown))}; known are: {', '.join(Options.model_fields)}"
        )
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        found = [f"{item['loc'][0]} = {_short(repr(item['input']))}: {item['msg']}" for item in error.errors()]
        raise InvalidOption("; ".join(found)) from None


def _short(text: str) -> str:
    """A client's own words, told back to it: whatever their length, the answer stays small."""
    return text if len(text) <= 80 else text[:77] + "..."


def _content_type(header: str) -> tuple[str, Mapping[bytes, bytes]]:
    kind, parameters = parse_options_header(header)
    return kind.decode("latin-1").lower(), parameters


def _read_form(content_type: str, body: bytes) -> tuple[bytes, list[tuple[str, Any]]]:
    boundary = _content_type(content_type)[1].get(b"boundary")
    if not boundary:
        raise MalformedRequest("the multipart content type lacks its boundary: let the HTTP client set the header")
    fields: list[tuple[str, bytes]] = []

    def on_field(field: Any) -> None:
        fields.append((_text(field.field_name), field.value or b""))

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        fields.append((_text(file.field_name), file.file_object.read()))

    # The body is capped already, so parts stay in memory: nothing of a user's picture is written to disk.
    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    kind = "multipart/form-data"
    try:
        parser = python_multipart.FormParser(kind, on_field, on_file, boundary=boundary, config=config)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"the multipart form cannot be read ({error})") from error
    return _split_form(fields)


def _split_form(fields: list[tuple[str, bytes]]) -> tuple[bytes, list[tuple[str, Any]]]:
    images = [value for name, value in fields if name in IMAGE_FIELDS]
    if len(images) != 1:
        raise MalformedRequest(f"the form must hold one field 'image' (or 'file') with a picture, it has {len(images)}")
    if not images[0]:
        raise EmptyBody("the form's image field is empty")
    return images[0], [(name, _text(value)) for name, value in fields if name not in IMAGE_FIELDS]


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")


def _read_json(body: bytes) -> tuple[bytes, list[tuple[str, Any]]]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("image"), str):
        raise MalformedRequest('the JSON must be an object with a string "image": {"image": "<base64>", ...options}')
    encoded = cast(str, document.pop("image"))
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        # Encoders may wrap lines; any other stray character is an error, as it would shift the rest.
        image = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedRequest(f'"image" is not base64 ({error})') from error
    if not image:
        raise EmptyBody('"image" is empty')
    return image, list(document.items())


def encode_detections(detections: Detections, manifest: Manifest) -> bytes:
    """The list of the answer's `detections`. Coordinates to 1/100 pixel: finer is below the network's own noise."""
    boxes = detections.boxes.astype(np.float64).round(2).tolist()
    scores = detections.scores.astype(np.float64).round(4).tolist()
    rows: list[dict[str, Any]] = []
    for index, class_id in enumerate(detections.labels.tolist()):
        row = {"label": manifest.classes[class_id], "class_id": class_id, "score": scores[index], "box": boxes[index]}
        if detections.masks is not None:
            mask = detections.masks[index]
            row["mask"] = {"format": "rle", "size": list(mask["size"]), "counts": mask["counts"]}
        if detections.keypoints is not None:
            row["keypoints"] = _rounded_points(detections.keypoints[index])
        rows.append(row)
    return orjson.dumps(rows)


def _rounded_points(points: np.ndarray) -> list[list[float]]:
    points = points.astype(np.float64)
    return np.concatenate([points[:, :2].round(2), points[:, 2:].round(4)], axis=1).tolist()


def encode_answer(manifest: Manifest, detections: Detections, encoded: bytes, timings_ms: Mapping[str, float]) -> bytes:
    return orjson.dumps(
        {
            "model": {"name": manifest.name, "version": manifest.version},
            "image": {"width": detections.width, "height": detections.height},
            "detections": orjson.Fragment(encoded),
            "timings_ms": {stage: round(passed, 3) for stage, passed in timings_ms.items()},
        }
    )


# What follows describes the answer to OpenAPI; answers are written by the two functions above, and a test holds them to
# these models.


class ModelId(BaseModel):
    name: str
    version: str


class ImageSize(BaseModel):
    """Of the picture as a viewer shows it: EXIF orientation applied."""

    width: int
    height: int


class MaskAnswer(BaseModel):
    """COCO run lengths at the size of the image; `pycocotools.mask.decode` reads it."""

    format: Literal["rle"]
    size: Annotated[list[int], Field(min_length=2, max_length=2, description="[height, width]")]
    counts: str


class DetectionAnswer(BaseModel):
    label: str
    class_id: int = Field(description="0-based index into the model's classes.")
    score: float
    box: Annotated[list[float], Field(min_length=4, max_length=4, description="[x1, y1, x2, y2] in image pixels.")]
    mask: MaskAnswer | None = Field(None, description="Absent where not asked for, or where the model has no masks.")
    keypoints: list[list[float]] | None = Field(
        None, description="[x, y, score] per keypoint name of the model, in image pixels. Absent like `mask`."
    )


class Timings(BaseModel):
    """Milliseconds; 0 for what did not run. `detect`, `masks`, `keypoints` include the whole batch's network time."""

    decode: float
    queue: float
    detect: float
    masks: float
    keypoints: float
    encode: float


EXAMPLE = {
    "model": {"name": "person", "version": "1"},
    "image": {"width": 640, "height": 480},
    "detections": [
        {
            "label": "person",
            "class_id": 0,
            "score": 0.9871,
            "box": [12.5, 30.25, 200.0, 410.75],
            "mask": {"format": "rle", "size": [480, 640], "counts": "Zjg01n>2O1O1N2..."},
            "keypoints": [[101.5, 62.25, 0.91], [104.0, 58.5, 0.87]],
        }
    ],
    "timings_ms": {"decode": 6.1, "queue": 0.1, "detect": 48.0, "masks": 9.5, "keypoints": 12.2, "encode": 0.2},
}


class Answer(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    model: ModelId
    image: ImageSize
    detections: list[DetectionAnswer]
    timings_ms: Timings


class Problem(BaseModel):
    """RFC 9457, application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
