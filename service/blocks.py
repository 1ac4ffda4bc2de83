"""How many frames, pages and blocks a file has, counted along its chains of blocks without decoding any.

Pillow counts by loading each one, which takes as long as the sender of a hostile file likes. These stop as soon as the
limit is passed, at the first thing that makes no sense, and after a fixed number of steps: what they return is a lower
bound, and `limit + 1` at the most. Layouts: https://www.w3.org/Graphics/GIF/spec-gif89a.txt and TIFF 6.0, section 2.
"""

import struct
from collections.abc import Callable, Iterator
from itertools import islice

MAX_STEPS = 200_000  # blocks of a GIF, 255 bytes each at the most: files of 50 MB; a fraction of a second

# More blocks than this, and one for each kilobyte besides, no camera or encoder writes. Pillow takes some 10 us for
# each, however empty it is, so 20 MB of empty ones would keep a thread busy for a minute.
MAX_BLOCKS = 20_000
PLAIN_SEGMENTS = 32  # a plain picture has fewer
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the headers that tell a size
SEQUENTIAL = {0xC0, 0xC1}

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


def has_too_many(data: bytes) -> bool:
    """Whether a JPEG has more segments before its first scan, or a PNG more chunks, than any program writes."""
    if data.startswith(b"\xff\xd8\xff"):
        chain = _segments(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        chain = _chunks(data)
    else:
        return False
    return next(islice(chain, MAX_BLOCKS + len(data) // 1024, None), None) is not None


def size_of_plain(data: bytes) -> tuple[int, int] | None:
    """(H, W) of a JPEG without EXIF, further frames or progression, by its segments alone. None of any other: what
    is unusual is left to Pillow."""
    segments = list(islice(_segments(data), PLAIN_SEGMENTS + 1))
    frames = [at for at in segments if data[at + 1] in FRAMES]
    is_turned = any(data[at + 1] == 0xE1 or data[at + 4 : at + 8] == b"MPF\0" for at in segments)
    if len(segments) > PLAIN_SEGMENTS or len(frames) != 1 or is_turned or any(data[at] != 0xFF for at in segments):
        return None
    (at,) = frames
    if data[at + 1] not in SEQUENTIAL or len(data) < at + 9:
        return None
    precision, height, width = struct.unpack_from(">BHH", data, at + 4)
    return (height, width) if precision == 8 and height and width else None


def _segments(data: bytes) -> Iterator[int]:
    at = 2
    while at + 4 <= len(data) and data[at + 1] != 0xDA:  # start of scan: what follows is the decoder's, in C
        yield at
        # As Pillow does: a marker is found wherever the next 0xff is, and those without a length are passed over.
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):
            at += 1
        elif 0xD0 <= data[at + 1] <= 0xD9 or data[at + 1] == 0x01:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))


def _chunks(data: bytes) -> Iterator[int]:
    at = 8
    while at + 8 <= len(data):
        yield at
        at += 12 + int.from_bytes(data[at : at + 4], "big")


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
