"""Requests: the options, and the three forms that carry a picture and options alike.

The forms are the raw bytes with options in the query, a multipart form, and JSON with base64. Everything here is plain
functions on bytes, so that they run in a thread pool; the reading of the socket is `service.app`'s, the answers are
`service.formats`', and `service.openapi` describes both.
"""

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import orjson
import python_multipart
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.detector import Interpolation
from service.errors import EmptyBody, InvalidOption, MalformedRequest, UnsupportedType
from service.keypoints import VISIBLE
from service.masks import FAINTEST

# What senders of raw bytes put there; the last is what `curl --data-binary` says by itself.
RAW_TYPES = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
IMAGE_FIELDS = ("image", "file")
SEND_HOW = "send the bytes of a picture, a multipart field 'image', or JSON with base64 in 'image'"


MaskFormat = Literal["rle", "polygon", "png", "bitmap", "probability", "none"]
BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
KeypointFormat = Literal["xys", "coco"]
AnswerFormat = Literal["json", "ndjson", "coco", "jpeg", "png", "roboflow", "labelstudio", "cvat"]


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
    masks: MaskFormat = Field(
        "rle",
        description="rle: COCO run lengths; polygon: rings on pixel corners; png, bitmap: the mask's own window as a "
        "picture or as packed bits; probability: what the network gave, to be pasted at any size; none: masks are not "
        "computed.",
    )
    mask_threshold: float | None = Field(
        None,
        ge=FAINTEST,
        le=1,
        allow_inf_nan=False,
        description="Foreground is where the probability is at least this. By default what the model was exported "
        "with, mostly 0.5. Not for masks=probability, whose reader decides.",
    )
    mask_interpolation: Interpolation = Field(
        "bilinear", description="How probabilities become pixels: bilinear as Detectron2 does, or bicubic, slower."
    )
    polygon_tolerance: float = Field(
        0,
        ge=0,
        le=10_000,
        allow_inf_nan=False,
        description="Pixels by which polygons may stray from the mask to have fewer corners; 0 is exact.",
    )
    box_format: BoxFormat = Field(
        "xyxy", description="xyxy: two corners; xywh: upper left corner and size; cxcywh: centre and size."
    )
    keypoints: bool = Field(True, description="false: keypoints are not computed.")
    keypoint_format: KeypointFormat = Field(
        "xys",
        description="xys: [x, y, score] for each; coco: one flat list of x, y, v, where v is 2 for a score of at least "
        f"{VISIBLE}, else 1.",
    )
    format: AnswerFormat | None = Field(
        None, description="Form of the answer, before what Accept asks for; by default json."
    )
    image_id: int = Field(0, ge=0, le=2**53 - 1, description="The image_id of format=coco.")
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
