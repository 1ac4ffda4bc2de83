"""A picture with its detections drawn on it: masks, boxes, skeletons and labels. Knows nothing of HTTP.

Masks are painted inside their own windows. Lines and letters grow with the picture, so that it reads alike at any size.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from service.bundle import Keypoints
from service.crops import crop
from service.detector import Detections
from service.images import Image
from service.keypoints import VISIBLE
from service.masks import Rle

Colour = tuple[int, int, int]
Draw = PIL.ImageDraw.ImageDraw

# Of equal lightness or nearly so, and far apart in hue from one to the next.
COLOURS: tuple[Colour, ...] = (
    (255, 90, 60), (40, 170, 255), (255, 200, 40), (60, 200, 110), (200, 110, 255), (255, 120, 190),
    (30, 200, 200), (255, 150, 60), (150, 210, 50), (120, 140, 255), (235, 80, 130), (190, 160, 110),
)  # fmt: skip
_OPACITY = 112  # of a mask, in 255
_SMALLEST_TEXT = 12  # pixels; smaller letters cannot be read


def draw(image: Image, detections: Detections, classes: Sequence[str], keypoints: Keypoints | None) -> Image:
    """A copy of `image` (H, W, 3) with everything on it, the best detection on top."""
    canvas = PIL.Image.fromarray(image)
    order = list(range(len(detections.labels)))[::-1]  # detections come best first
    if detections.masks is not None:
        for index in order:
            _paint(canvas, detections.masks[index], _colour(index))
    pen = PIL.ImageDraw.Draw(canvas)
    shorter = min(image.shape[:2])
    line, text = max(1, round(shorter / 300)), max(_SMALLEST_TEXT, round(shorter / 45))
    boxes = detections.boxes.tolist()
    for index in order:
        pen.rectangle(_inside(boxes[index], canvas.size), outline=_colour(index), width=line)
    if detections.keypoints is not None and keypoints is not None:
        for index in order:
            _skeleton(pen, detections.keypoints[index], keypoints, _colour(index), line)
    # After all boxes, since what a label says should not be crossed out by another's box.
    taken: list[_Place] = []
    for index in reversed(order):
        name, score = classes[int(detections.labels[index])], f"{detections.scores[index]:.0%}"
        places = _places(name, score, boxes[index], text, canvas.size)
        if free := next((place for place in places if not any(place.meets(other) for other in taken)), None):
            taken.append(free)
            _label(pen, free, _colour(index), text)
    return np.asarray(canvas)


def encode(image: Image, kind: Literal["JPEG", "PNG"]) -> bytes:
    stream = io.BytesIO()
    # Subsampled colour would smear thin lines; PNG's stronger levels take seconds for a few per cent.
    options = {"quality": 90, "subsampling": 0} if kind == "JPEG" else {"compress_level": 1}
    PIL.Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def _colour(index: int) -> Colour:
    return COLOURS[index % len(COLOURS)]


def _paint(canvas: PIL.Image.Image, mask: Rle, colour: Colour) -> None:
    x, y, inside = crop(mask)
    canvas.paste(colour, (x, y), PIL.Image.fromarray(inside * np.uint8(_OPACITY)))


def _inside(box: list[float], size: tuple[int, int]) -> list[float]:
    """The pixels that the edges of the box run through, inside the picture."""
    x1, y1, x2, y2 = box
    right, bottom = min(x2, size[0]) - 1, min(y2, size[1]) - 1
    return [x1, y1, max(x1, right), max(y1, bottom)]


def _skeleton(pen: Draw, points: np.ndarray, keypoints: Keypoints, colour: Colour, line: int) -> None:
    # Pillow names a pixel by its index, whose centre is half a pixel on.
    places = [(float(x) - 0.5, float(y) - 0.5) for x, y, _ in points]
    seen = points[:, 2] >= VISIBLE
    for one, other in keypoints.skeleton:
        if seen[one] and seen[other]:
            pen.line([places[one], places[other]], fill=colour, width=line)
    for index in np.flatnonzero(seen):
        pen.circle(places[index], 1.5 * line, fill=(255, 255, 255), outline=colour, width=max(1, line // 2))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a label may stand, in whole pixels."""

    told: str
    x: int
    y: int
    width: int
    height: int

    def meets(self, other: "_Place") -> bool:
        across = self.x < other.x + other.width and other.x < self.x + self.width
        return across and self.y < other.y + other.height and other.y < self.y + self.height


def _places(name: str, score: str, box: list[float], size: int, picture: tuple[int, int]) -> list[_Place]:
    """Where a label may stand, the best first, all within the picture: above its box, if need be with the score alone;
    below, where it hides no face; inside, first where there is nothing above. service/web/draw.js does the same."""
    x1, y1, x2, y2 = map(round, box)
    margin = _margin(size)
    height = size + 2 * margin
    above, below, inside = [], [], []
    for told in (f"{name} {score}", score):
        width = round(_font(size).getlength(told)) + 2 * margin
        left, right = _within(x1, picture[0] - width), _within(x2 - width, picture[0] - width)

        def row(y: int, starts: tuple[int, ...], told: str = told, width: int = width) -> list[_Place]:
            return [_Place(told, x, _within(y, picture[1] - height), width, height) for x in starts]

        inside += row(y1, (left, right))
        above += row(y1 - height if y1 >= height else y1, (left, right))
        below += row(y2, (left,)) if y2 + height <= picture[1] else []
    return above + below + inside


def _within(start: int, last: int) -> int:
    return max(0, min(start, last))


def _margin(size: int) -> int:
    return max(1, size // 6)


def _label(pen: Draw, place: _Place, colour: Colour, size: int) -> None:
    corner = (place.x + place.width - 1, place.y + place.height - 1)
    pen.rectangle([(place.x, place.y), corner], fill=colour)
    middle = (place.x + _margin(size), place.y + place.height / 2)
    pen.text(middle, place.told, fill=_ink(colour), font=_font(size), anchor="lm")


def _ink(colour: Colour) -> Colour:
    """Black on light colours, white on dark ones, by the luma of ITU-R BT.601."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)


@lru_cache(maxsize=16)
def _font(size: int) -> PIL.ImageFont.FreeTypeFont:
    """The font that Pillow carries. It has Latin letters; others show as boxes."""
    font = PIL.ImageFont.load_default(size)
    assert isinstance(font, PIL.ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font
