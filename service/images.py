"""Bytes -> Image -> Canvas: decoding, and the one resize that training, evaluation and serving share.

An *image* is a uint8 array (H, W, 3), RGB, turned upright by its EXIF orientation. A *canvas* is that picture resized
by the model's rule and padded right and bottom. This module knows nothing of HTTP, bundles or engines; `fit` and
`resized_size` are pure, so that training reads pictures exactly as the service does.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageFile

from service import blocks
from service.errors import BrokenImage, EmptyBody, ImageTooLarge, NotAnImage, TooManyFrames

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Picture formats only. Pillow would otherwise try every plug-in it has, and EPS, for one, starts ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF")

# First bytes of those formats: a body that starts so and does not open is a broken image, not another kind of file.
JPEG_SIGNATURE = b"\xff\xd8\xff"
SIGNATURES = (JPEG_SIGNATURE, b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x4f")

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
SIDEWAYS = tuple(turn for orientation, turn in TURNS.items() if orientation >= 5)

# Pillow's bomb guard is one number for the whole process, warns below twice that number and knows no setting. `decode`
# checks the header against its own limits before any pixel is decoded, so the guard is switched off.
PIL.Image.MAX_IMAGE_PIXELS = None


class ResizeRule(Protocol):
    """What `fit` needs of a canvas rule; the bundle's and the checkpoint's `CanvasRule` both have it."""

    @property
    def short_side(self) -> int: ...
    @property
    def long_side(self) -> int: ...
    @property
    def multiple(self) -> int: ...
    @property
    def antialias(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    max_pixels: int = 50_000_000
    max_side: int = 20_000
    max_frames: int = 1000  # of which the first is read


@dataclass(frozen=True, slots=True)
class Canvas:
    """`pixels` (Hc, Wc, 3) uint8, zero in the padding; `size` (h, w) of the resized picture; `image_size` (H, W).

    `proposals` (R, 4) xyxy on the canvas, for a model that takes them.
    """

    pixels: Image
    size: tuple[int, int]
    image_size: tuple[int, int]
    proposals: Floats | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]


def decode(data: bytes, limits: DecodeLimits) -> Image:
    """One picture of any format in `FORMATS`; of an animation its first frame, of a document its first page."""
    opened = _open_within(data, limits)
    try:
        opened.load()
        check_size(opened.size, limits)
        pixels = _to_rgb(_upright(opened))
    except ImageTooLarge:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever their parsers meet on hostile bytes (struct.error, SyntaxError, IndexError,
        # zlib.error ...): there is no closed list to catch.
        raise BrokenImage(f"the {opened.format} data cannot be decoded ({error}): is the file complete?") from error
    return np.ascontiguousarray(pixels)


def size_by_header(data: bytes, limits: DecodeLimits) -> tuple[int, int] | None:
    """(H, W) of a JPEG, upright; raises what `decode` does before it decodes.

    None of another format, whose header does not always tell how it is turned, and of a progressive JPEG, which takes
    as long to decode as its sender likes.
    """
    if not data.startswith(JPEG_SIGNATURE):
        return None
    if (plain := blocks.size_of_plain(data)) is not None:
        height, width = plain
        check_size((width, height), limits)
        return plain
    opened = _open_within(data, limits)
    if "progressive" in opened.info:
        return None
    width, height = opened.size
    return (width, height) if _turn(opened) in SIDEWAYS else (height, width)


@lru_cache(maxsize=1)
def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow reads. The first call loads the plug-ins, some 60 ms."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _open_within(data: bytes, limits: DecodeLimits) -> PIL.ImageFile.ImageFile:
    """Reads the header alone."""
    if not data:
        raise EmptyBody("the body is empty: send the bytes of a picture, e.g. curl --data-binary @photo.jpg")
    opened = _open(data)
    check_size(opened.size, limits)
    _check_frames(opened, data, limits)
    return opened


def _open(data: bytes) -> PIL.ImageFile.ImageFile:
    if blocks.has_too_many(data):
        raise BrokenImage(f"the picture has more than {blocks.MAX_BLOCKS} blocks, nearly all empty: save it anew")
    try:
        opened = PIL.Image.open(io.BytesIO(data), formats=known_formats())
    except PIL.UnidentifiedImageError:
        if data.startswith(SIGNATURES):
            raise BrokenImage("the body starts like a picture but its header cannot be read") from None
        known = ", ".join(known_formats())
        raise NotAnImage(f"the {len(data)} bytes are no picture; known formats: {known}") from None
    except Exception as error:  # as in `decode`: no closed list
        raise BrokenImage(f"the picture's header cannot be read ({error})") from error
    return opened


def check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    """Of width and height, before memory is spent on them."""
    width, height = size
    if width < 1 or height < 1:
        raise BrokenImage(f"the picture has {width}x{height} pixels, no side may be 0")
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the picture has {width}x{height} = {width * height} pixels, at most {limits.max_pixels} are taken: "
            "send it smaller, or raise LIMNER_MAX_PIXELS"
        )
    if max(width, height) > limits.max_side:
        raise ImageTooLarge(
            f"the picture is {width}x{height}, no side may exceed {limits.max_side}: "
            "send it smaller, or raise LIMNER_MAX_SIDE"
        )


def _check_frames(opened: PIL.ImageFile.ImageFile, data: bytes, limits: DecodeLimits) -> None:
    """As far as counting is cheap; the second picture of an MPO is a preview or a depth map, not a frame."""
    if opened.format in blocks.COUNTED:  # Pillow would read the whole file for these
        number = blocks.COUNTED[opened.format](data, limits.max_frames)
    else:
        number = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
    if number > limits.max_frames:
        raise TooManyFrames(
            f"the {opened.format} file has more than {limits.max_frames} frames or pages, and only the first would be "
            "read: send each picture as a file of its own, or raise LIMNER_MAX_FRAMES"
        )


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # EXIF is a second hostile parser; a picture with a broken one is shown as stored
        return None
    return TURNS.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(image: PIL.Image.Image) -> Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pictures have no fixed range; save it with 8 or 16 bits a channel")
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _from_16_bit(image: PIL.Image.Image) -> Image:
    """Grey of 16 bits. Mode "I" (32 bits) is how some files of 16 bits open, so it is read on the same scale."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def resized_size(height: int, width: int, rule: ResizeRule) -> tuple[int, int]:
    """(h, w) on the canvas before padding. The same floats in the same order as torchvision, so the same floor."""
    scale = min(rule.short_side / min(height, width), rule.long_side / max(height, width))
    return max(1, int(height * scale)), max(1, int(width * scale))


def padded_size(size: tuple[int, int], rule: ResizeRule) -> tuple[int, int]:
    height, width = (-(-side // rule.multiple) * rule.multiple for side in size)
    return height, width


def fit(image: Image, rule: ResizeRule) -> Canvas:
    """Resize by the rule, then zero padding right and bottom to the rule's multiple."""
    height, width = image.shape[:2]
    size = resized_size(height, width, rule)
    resized = _resize(image, size, rule.antialias)
    pixels = np.zeros((*padded_size(size, rule), 3), dtype=np.uint8)
    pixels[: size[0], : size[1]] = resized
    return Canvas(pixels=pixels, size=size, image_size=(height, width))


def _resize(image: Image, size: tuple[int, int], antialias: bool) -> Image:
    height, width = image.shape[:2]
    if size == (height, width):
        return image
    # Where a picture grows the antialiased filter is plain bilinear at half-pixel centres, so Pillow's fast path
    # serves both rules there.
    if antialias or (size[0] >= height and size[1] >= width):
        resized = PIL.Image.fromarray(image).resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)
        return np.asarray(resized)
    return _bilinear(image, size)


def _bilinear(image: Image, size: tuple[int, int]) -> Image:
    """torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=False), rounded to 8 bits.

    Pillow's affine transform samples the same points but truncates to 8 bits, which darkens by half a grey level.
    """
    top, bottom, down = _taps(image.shape[0], size[0])
    left, right, across = _taps(image.shape[1], size[1])
    rows = _lerp(image[top], image[bottom], down[:, None, None])
    blended = _lerp(rows[:, left], rows[:, right], across[None, :, None])
    # Halves go to the even side: at scale 1/2 a quarter of all values are halves, and rounding them up would brighten.
    return np.rint(blended, out=blended).astype(np.uint8)


def _taps(length: int, resized: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]:
    """Per output index: the two source indices, and the weight of the second. Edges are clamped."""
    source = np.maximum((np.arange(resized) + 0.5) * (length / resized) - 0.5, 0.0)
    first = np.minimum(source.astype(np.intp), length - 1)
    second = np.minimum(first + 1, length - 1)
    return first, second, (source - first).astype(np.float32)


def _lerp(first: npt.NDArray[Any], second: npt.NDArray[Any], weight: Floats) -> Floats:
    start = first.astype(np.float32)
    step = second.astype(np.float32)
    step -= start
    step *= weight
    start += step
    return start
