"""The forms an answer can have, and which one a request gets: to add one is to add a function to `FORMATS`.

Options that say how our own answers are written (`WRITING`) mean nothing to a form that others have fixed. There they
are refused, as an answer in another shape than asked for would be read wrongly.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from service import answers, clients, images
from service.answers import Found
from service.bundle import Manifest
from service.draw import draw, encode
from service.errors import InvalidOption
from service.wire import MAX_IMAGE_ID, AnswerFormat, MaskFormat, Options

Joiner = Callable[[Manifest, answers.Results, answers.Tell], bytes]

WRITING = ("box_format", "keypoint_format", "polygon_tolerance", "image_id")


@dataclass(frozen=True, slots=True)
class Format:
    """`takes` lists the options of `WRITING` that it obeys, `masks` the choices of that option.

    `join` makes one answer of several pictures'; a form without it is of one picture.
    """

    media_type: str
    encode: Callable[[Found], bytes]
    description: str
    takes: tuple[str, ...] = ()
    masks: tuple[MaskFormat, ...] = ("rle", "none")
    shows_picture: bool = False
    join: Joiner | None = None


def _drawn(kind: Literal["JPEG", "PNG"]) -> Callable[[Found], bytes]:
    def encode_drawn(found: Found) -> bytes:
        # Decoded a second time rather than kept: pixels would wait in the queue at many times the size of a file, and
        # the limits were checked when it was decoded first.
        image = images.decode(found.upload, images.DecodeLimits(2**62, 2**31, 2**31))
        drawn = draw(image, found.detections, found.manifest.classes, found.manifest.keypoints)
        return encode(drawn, kind)

    return encode_drawn


_OURS = ("box_format", "keypoint_format", "polygon_tolerance")
_ALL_MASKS: tuple[MaskFormat, ...] = ("rle", "polygon", "png", "bitmap", "probability", "none")

FORMATS: dict[AnswerFormat, Format] = {
    "json": Format(
        "application/json",
        answers.to_json,
        "One object with every detection.",
        takes=_OURS,
        masks=_ALL_MASKS,
        join=answers.join_json,
    ),
    "ndjson": Format(
        "application/x-ndjson",
        answers.to_ndjson,
        "A line with model, image, num_detections and timings_ms, then a line for each detection as in JSON.",
        takes=_OURS,
        masks=_ALL_MASKS,
        join=answers.join_ndjson,
    ),
    "coco": Format(
        "application/vnd.coco.results+json",
        answers.to_coco,
        "COCO results, as pycocotools' loadRes reads them: category_id is class_id + 1, keypoints are pixel indices "
        "(0.5 less than elsewhere).",
        takes=("image_id",),
        join=answers.join_coco,
    ),
    "jpeg": Format("image/jpeg", _drawn("JPEG"), "The picture with its detections drawn on it.", shows_picture=True),
    "png": Format("image/png", _drawn("PNG"), "The drawn picture without loss.", shows_picture=True),
    "roboflow": Format(
        "application/vnd.roboflow.inference+json",
        clients.to_roboflow,
        "As Roboflow Inference answers; supervision's Detections.from_inference and KeyPoints.from_inference read it.",
        takes=("polygon_tolerance",),
        masks=("rle", "polygon", "none"),
    ),
    "labelstudio": Format(
        "application/vnd.labelstudio.predictions+json",
        clients.to_labelstudio,
        "The predictions of a Label Studio task: rectanglelabels, brushlabels and keypointlabels.",
    ),
    "cvat": Format(
        "application/vnd.cvat.annotations+json",
        clients.to_cvat,
        "What CVAT expects of a Nuclio detector function.",
        takes=("polygon_tolerance",),
    ),
}


def chosen(options: Options, accept: str) -> Format:
    """The form that an option names, else the one that Accept likes best, else JSON. Refuses what it cannot obey."""
    name = options.format or _accepted(accept)
    form = FORMATS[name]
    defaults = Options.model_fields
    ignored = [each for each in WRITING if each not in form.takes and getattr(options, each) != defaults[each].default]
    if ignored:
        raise InvalidOption(f"format {name} has its own way to write this: leave out {', '.join(ignored)}")
    if options.masks not in form.masks:
        choices = " or ".join(f"masks={each}" for each in form.masks)
        raise InvalidOption(f"format {name} has its own masks: give {choices}, or leave masks={options.masks} out")
    return form


def joiner(form: Format) -> Joiner:
    """Refuses several pictures where the form is of one."""
    if form.join is None:
        joining = ", ".join(name for name, each in FORMATS.items() if each.join)
        raise InvalidOption(
            f"an answer of {form.media_type} is of one picture: send one at a time, or choose a format of: {joining}"
        )
    return form.join


def options_of(options: Options, index: int) -> Options:
    """Those of one among several pictures: image_id counts up from what was asked for."""
    image_id = options.image_id + index
    if image_id > MAX_IMAGE_ID:
        raise InvalidOption(f"image_id = {options.image_id}: the pictures after the first would exceed {MAX_IMAGE_ID}")
    return options.model_copy(update={"image_id": image_id})


def _accepted(accept: str) -> AnswerFormat:
    """By quality, then as the client lists them. A range such as image/* means the first of its kind here."""
    for wanted in _ranges(accept):
        for name, form in FORMATS.items():
            if wanted in (form.media_type, "*/*", form.media_type.partition("/")[0] + "/*"):
                return name
    return "json"


def _ranges(accept: str) -> Iterator[str]:
    """The media ranges of an Accept header, best first; one that cannot be read is passed over."""
    ranges: list[tuple[float, str]] = []
    for item in accept.lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        try:
            quality = next((float(part[2:]) for part in parameters if part.startswith("q=")), 1.0)
        except ValueError:
            continue
        if quality > 0:
            ranges.append((quality, media))
    return (media for _, media in sorted(ranges, key=lambda item: -item[0]))
