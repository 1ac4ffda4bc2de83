"""A mask as pixels, in its own window and nowhere else: the crop, and its PNG and packed-bit encodings."""

import struct
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.masks import Rle, spans

Bools = NDArray[np.bool_]


class Crop(NamedTuple):
    """The smallest window that holds the mask: `x`, `y` of its first pixel, `pixels` (h, w).

    The window of an empty mask is the image's first pixel, which is background: no reader need know of crops without
    a size.
    """

    x: int
    y: int
    pixels: Bools


def crop(mask: Rle) -> Crop:
    column, top, bottom = spans(mask)
    if not len(column):
        return Crop(0, 0, np.zeros((1, 1), bool))
    x, y, end = int(column[0]), int(top.min()), int(bottom.max())
    changes = np.zeros((int(column[-1]) - x + 1, end - y + 1), np.int8)
    changes[column - x, top - y] += 1
    changes[column - x, bottom - y] -= 1
    return Crop(x, y, np.cumsum(changes[:, :-1], axis=1, dtype=np.int8).view(bool).T)


def bitmap(pixels: Bools) -> bytes:
    """Row by row, eight pixels a byte, the leftmost in the highest bit, each row filled up to a whole byte."""
    return np.packbits(pixels, axis=1).tobytes()


def png(pixels: Bools) -> bytes:
    """Greyscale of one bit, foreground white. Rows are unfiltered and in one chunk, so a short reader will do.

    Written here because Pillow takes longer to set up than these few bytes take to compress.
    """
    height, width = pixels.shape
    rows = np.zeros((height, 1 + -(-width // 8)), np.uint8)  # each begins with its filter, none
    rows[:, 1:] = np.packbits(pixels, axis=1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
