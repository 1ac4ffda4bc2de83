"""How many frames a GIF and how many pages a TIFF have, counted along their chains of blocks without decoding any.

Pillow counts by loading each one, which takes as long as the sender of a hostile file likes. These stop as soon as the
limit is passed, at the first thing that makes no sense, and after a fixed number of steps: what they return is a lower
bound, and `limit + 1` at the most. Layouts: https://www.w3.org/Graphics/GIF/spec-gif89a.txt and TIFF 6.0, section 2.
"""

import struct
from collections.abc import Callable, Iterator

MAX_STEPS = 200_000  # blocks of a GIF, 255 bytes each at the most: files of 50 MB; a fraction of a second

GIF_EXTENSION, GIF_IMAGE = 0x21, 0x2C
# Byte order, and for BigTIFF ("+" instead of "*") wider counts and offsets.
TIFF_KINDS = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}


def of_gif(data: bytes, limit: int) -> int:
    number = 0
    try:
        at, steps = 13 + _colours(data[10]), iter(range(MAX_STEPS))
        for _ in steps:
            if data[at] == GIF_IMAGE:
                number += 1
                at += 10 + _colours(data[at + 9]) + 1
            elif data[at] == GIF_EXTENSION:
                at += 2
            else:
                break
            if number > limit:
                break
            at = _behind_blocks(data, at, steps)
    except IndexError:  # it ends in the middle: whether it can be shown is the decoder's affair
        pass
    return max(number, 1)


def _colours(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int, steps: Iterator[int]) -> int:
    for _ in steps:
        length = data[at]
        at += 1 + length
        if not length:
            return at
    raise IndexError("too many blocks")


def of_tiff(data: bytes, limit: int) -> int:
    order = TIFF_KINDS.get(data[:4])
    if order is None:
        return 1
    is_big = b"+" in data[:4]
    count, offset, entry = ("Q", "Q", 20) if is_big else ("H", "I", 12)
    counts, offsets = struct.Struct(order + count), struct.Struct(order + offset)
    seen: set[int] = set()
    try:
        (at,) = offsets.unpack_from(data, 8 if is_big else 4)
        while at and at not in seen and len(seen) <= limit:
            (num_entries,) = counts.unpack_from(data, at)
            seen.add(at)
            (at,) = offsets.unpack_from(data, at + counts.size + entry * num_entries)
    except (struct.error, OverflowError):  # as above
        pass
    return max(len(seen), 1)


COUNTED: dict[str, Callable[[bytes, int], int]] = {"GIF": of_gif, "TIFF": of_tiff}
