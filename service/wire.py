"""Requests: the options, and the three forms that carry a picture and options alike.

The forms are the raw bytes with options in the query, a multipart form, and JSON with base64. Everything here is plain
functions on bytes, so that they run in a thread pool; the reading of the socket is `service.app`'s, the answers are
`service.formats`', and `service.openapi` describes both.
"""

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import orjson
import python_multipart
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.batching import Priority
from service.detector import Interpolation
from service.errors import EmptyBody, InvalidOption, MalformedRequest, UnsupportedType
from service.keypoints import VISIBLE
from service.masks import FAINTEST

# What senders of raw bytes put there; the last is what `curl --data-binary` says by itself.
RAW_TYPES = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
IMAGE_FIELDS = ("image", "file")
MAX_IMAGE_ID = 2**53 - 1  # the largest that JavaScript reads exactly
SEND_HOW = "send the bytes of a picture, a multipart field 'image', or JSON with base64 in 'image'"


MaskFormat = Literal["rle", "polygon", "png", "bitmap", "probability", "none"]
BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
KeypointFormat = Literal["xys", "coco"]
AnswerFormat = Literal["json", "ndjson", "coco", "jpeg", "png", "roboflow", "labelstudio", "cvat"]


MAX_PROPOSALS = 20_000  # that a request may bring, whatever the model
Coordinate = Annotated[float, Field(allow_inf_nan=False)]
Corners = Annotated[list[Coordinate], Field(min_length=4, max_length=4)]


class Options(BaseModel):
    """The same names in the query, in a form and in JSON; outside JSON a list is written as JSON."""

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
    image_id: int = Field(0, ge=0, le=MAX_IMAGE_ID, description="The image_id of format=coco.")
    timeout_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Longest wait for the engine, then 504; at most the service's LIMNER_DEADLINE_SECONDS.",
    )
    allow_partial: bool = Field(
        False,
        description="true: where the time left does not allow masks or keypoints, the answer comes without them and "
        'names them in "partial".',
    )
    proposals: list[Corners] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PROPOSALS,
        description="Boxes to look into, [[x1, y1, x2, y2], ...] in the pixels of the picture as a viewer shows it; "
        "for models that take proposals, instead of those that the service would search for.",
    )
    max_proposals: int | None = Field(
        None,
        ge=1,
        description="Most boxes that the service searches for, for models that take proposals: fewer are faster. At "
        "most, and by default, the model's limit.",
    )
    priority: Priority = Field("normal", description="high: one second ahead in the queue.")
    model: str | None = Field(None, description="`name` or `name@version`; by default the service's default model.")
    url: str | None = Field(
        None,
        description="Address of the picture, instead of a body or of image in JSON. Off unless the service is started "
        "with LIMNER_URL_INPUT.",
    )

    @field_validator("proposals", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"expected JSON such as [[x1, y1, x2, y2]] ({error})") from None

    @field_validator("proposals")
    @classmethod
    def _have_area(cls, value: list[Corners] | None) -> list[Corners] | None:
        for index, (x1, y1, x2, y2) in enumerate(value or ()):
            if not (x1 < x2 and y1 < y2):
                raise ValueError(f"box {index} has no area: x1 < x2 and y1 < y2 are expected")
        return value


OptionPairs = Iterable[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Upload:
    """The bytes of each picture, still encoded, and what is asked of all. Only a form holds more than one; without any
    the options have a url."""

    images: tuple[bytes, ...]
    options: Options

    @property
    def image(self) -> bytes:
        return self.images[0]


def parse_upload(content_type: str, body: bytes, query: OptionPairs) -> Upload:
    """Any of the three forms; raises the error that says what is wrong with it."""
    kind, _ = _content_type(content_type)
    given: list[tuple[str, Any]] = list(query)
    images: tuple[bytes, ...]
    if not body and any(name == "url" for name, _ in given):
        images, fields = (), []
    elif not body:
        raise EmptyBody(f"the body is empty: {SEND_HOW}")
    elif kind == "multipart/form-data":
        images, fields = _read_form(content_type, body)
    elif kind == "application/json":
        image, fields = _read_json(body)
        images = (image,) if image else ()  # else it names a url
    elif _is_raw(kind):
        images, fields = (body,), []
    else:
        raise UnsupportedType(f"the content type {kind!r} holds no picture: {SEND_HOW}")
    options = parse_options([*given, *fields])
    if images and options.url is not None:
        raise InvalidOption("the request has a picture and a url: give one of them")
    return Upload(images, options)


def parse_options(given: OptionPairs) -> Options:
    values: dict[str, Any] = {}
    for name, value in given:
        if name in values and values[name] != value:
            both = f"{_told(name, values[name])} and {_told(name, value)}"
            raise InvalidOption(f"option {short(name)!r} is given twice, as {both}: give it once")
        values[name] = value
    if unknown := sorted(values.keys() - Options.model_fields.keys()):
        raise InvalidOption(f"unknown option {short(', '.join(unknown))}; known are: {', '.join(Options.model_fields)}")
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        found = [f"{item['loc'][0]} = {_told(item['loc'][0], item['input'])}: {item['msg']}" for item in error.errors()]
        raise InvalidOption("; ".join(found)) from None


def _told(name: Any, value: Any) -> str:
    return "..." if name == "url" else short(repr(value))  # addresses may hold what is nobody else's business


def short(text: str) -> str:
    """A client's own words, told back to it: whatever their length, the answer stays small."""
    return text if len(text) <= 80 else text[:77] + "..."


def is_bare(content_type: str) -> bool:
    """Whether the body is a picture and nothing else."""
    return _is_raw(_content_type(content_type)[0])


def _is_raw(kind: str) -> bool:
    return kind in RAW_TYPES or kind.startswith("image/")


def _content_type(header: str) -> tuple[str, Mapping[bytes, bytes]]:
    kind, parameters = parse_options_header(header)
    return kind.decode("latin-1").lower(), parameters


def _read_form(content_type: str, body: bytes) -> tuple[tuple[bytes, ...], list[tuple[str, Any]]]:
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


def _split_form(fields: list[tuple[str, bytes]]) -> tuple[tuple[bytes, ...], list[tuple[str, Any]]]:
    images = tuple(value for name, value in fields if name in IMAGE_FIELDS)
    if not images:
        raise MalformedRequest("the form must hold a field 'image' (or 'file') with a picture, it has none")
    if b"" in images:
        which = f" {images.index(b'') + 1} of {len(images)}" if len(images) > 1 else ""
        raise EmptyBody(f"the form's image field{which} is empty")
    return images, [(name, _text(value)) for name, value in fields if name not in IMAGE_FIELDS]


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")


def _read_json(body: bytes) -> tuple[bytes, list[tuple[str, Any]]]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON ({error})") from error
    if isinstance(document, dict) and "image" not in document and isinstance(document.get("url"), str):
        return b"", list(document.items())
    if not isinstance(document, dict) or not isinstance(document.get("image"), str):
        raise MalformedRequest('the JSON must be an object with a string "image": {"image": "<base64>", ...options}')
    image = from_base64(cast(str, document.pop("image")), '"image"')
    return image, list(document.items())


def from_base64(encoded: str, name: str) -> bytes:
    """A picture's bytes out of base64 or a data: URL; `name` is what an error calls it."""
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        # Encoders may wrap lines; any other stray character is an error, as it would shift the rest.
        image = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedRequest(f"{name} is not base64 ({error})") from error
    if not image:
        raise EmptyBody(f"{name} is empty")
    return image
