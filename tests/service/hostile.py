"""Requests that nobody sends in good faith, as many as one likes: the same ones for the same seed.

Pictures of every format and mode that Pillow writes here, damaged and mislabelled, and bodies made by hand that declare
more than they hold or hold more than they declare.
"""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.features
import PIL.Image

INFER = "/v2/models/toy/infer"
MAX_SEED_BYTES = 400_000  # larger files take their time for their size, not for their oddness

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    # What the service does not take:
    **{kind: ("RGB",) for kind in ("PPM", "TGA", "ICO", "PCX", "SGI", "IM", "DDS", "PDF", "EPS")},
}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "JPEG": ({"progressive": True}, {"restart_marker_blocks": 1}),
    "PNG": ({"icc_profile": b"nonsense" * 50},),
    "WEBP": ({"lossless": True},),
    "TIFF": tuple({"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"))
    + ({"big_tiff": True},),
}
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF")
LABELS = (
    *("", "application/octet-stream", "image/png", "image/jpeg", "image/x-nonsense", "application/json", "text/html"),
    *("multipart/form-data", "multipart/form-data; boundary=b", 'multipart/form-data; boundary="', ";;;"),
)


@dataclass(frozen=True)
class Sent:
    told: str
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/detect"


def seeds() -> list[bytes]:
    """Whole pictures, each a few kilobytes."""
    known = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
    stills = {mode: _still(mode) for modes in MODES.values() for mode in modes}
    found: list[bytes] = []
    for kind, modes in MODES.items():
        if kind in known and not PIL.features.check(known[kind]):
            continue
        for mode in modes:
            found += _saved(stills[mode], kind)
        for options in VARIANTS.get(kind, ()):
            found += _saved(stills["RGB"], kind, **options)
        if kind in ANIMATED:
            found += _saved(stills["RGB"], kind, save_all=True, append_images=[stills["RGB"].rotate(90)] * 2)
    exif = PIL.Image.Exif()
    exif.update({0x0112: 6, 0x010E: "turned" * 20})
    return found + _saved(stills["RGB"], "JPEG", exif=exif) + _saved(stills["1"], "TIFF", compression="group4")


def _still(mode: str) -> PIL.Image.Image:
    pixels = np.random.default_rng(len(mode)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels[:8] = 0
    if mode == "I;16":
        return PIL.Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    image = PIL.Image.fromarray(pixels)
    return image.convert("L").convert(mode) if mode in ("1", "I", "F", "LA") else _converted(image, mode)


def _converted(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    return PIL.Image.new("LAB", image.size, (120, 10, 200)) if mode == "LAB" else image.convert(mode)


def _saved(image: PIL.Image.Image, kind: str, **options: Any) -> list[bytes]:
    """Nothing where this Pillow cannot write it so."""
    stream = io.BytesIO()
    try:
        image.save(stream, kind, **options)
    except (OSError, ValueError, KeyError, RuntimeError):
        return []
    return [stream.getvalue()]


def of_folder(folder: Path) -> list[bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and 0 < path.stat().st_size <= MAX_SEED_BYTES)
    return [path.read_bytes() for path in files]


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> tuple[str, bytes]:
    """`data` with up to four things wrong, most of them near its beginning, where the headers are."""
    body, told = bytearray(data), []
    for _ in range(rng.randint(1, 4)):
        at = min(rng.randrange(len(body) + 1), rng.randrange(len(body) + 1)) if body else 0
        length = rng.choice((1, 2, 4, 16, 200))
        harm = rng.choice(("cut", "flip", "insert", "delete", "repeat", "fill", "huge", "splice"))
        told.append(harm)
        if harm == "cut":
            del body[at:]
        elif harm == "flip":
            for _ in range(rng.randint(1, 8)):
                if body:
                    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        elif harm == "insert":
            body[at:at] = rng.randbytes(length)
        elif harm == "delete":
            del body[at : at + length]
        elif harm == "repeat":
            body[at:at] = body[at : at + length] * rng.choice((1, 3, 100))
        elif harm == "fill":
            body[at : at + length] = bytes([rng.choice((0, 0x7F, 0xFF))]) * length
        elif harm == "huge":
            body[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((2**32 - 1, 2**31 - 1, 2**24, 65535)))
        else:
            other = rng.choice(others)
            body[at:] = other[min(at, len(other)) :]
    return "+".join(told), bytes(body)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *chunks: bytes, data: bytes | None = None) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + 3 * width) * height), 9) if data is None else data
    parts = (_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", following) + bytes(64)


def _webp(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pictures that cost more than they weigh, if one believes them."""
    bomb = zlib.compress(bytes(64 * 2**20), 9)
    deep = 2**31 - 1
    for width, height in ((deep, deep), (30_000, 30_000), (0, 5), (1, 4_000_000), (2_000_000, 1)):
        yield f"png {width}x{height}", _png(width, height, data=zlib.compress(b"\0" * 100))
    yield "png data bomb", _png(8, 8, data=bomb)
    yield "png text bomb", _png(8, 8, _chunk(b"zTXt", b"key\0\0" + bomb))
    yield "png many texts", _png(8, 8, *[_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000), 9))] * 90)
    yield "png itxt bomb", _png(8, 8, _chunk(b"iTXt", b"key\0\1\0\0\0" + bomb))
    yield "png profile bomb", _png(8, 8, _chunk(b"iCCP", b"p\0\0" + bomb))
    yield "png frames", _png(8, 8, _chunk(b"acTL", struct.pack(">II", deep, 0)))
    yield "gif screen", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF7, 0, 0) + bytes(768) + b";"
    frame = b"\x2c" + struct.pack("<HHHHB", 60000, 60000, 5000, 5000, 0) + b"\x02\x02\x4c\x01\0;"
    yield "gif frame outside", b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0xF0, 0, 0) + bytes(6) + frame
    yield "gif many frames", b"GIF89a" + bytes(7) + (b"\x2c" + bytes(11)) * 100_000
    yield "gif small blocks", b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\x01a" * 400_000
    yield "tiff many values", _tiff((256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 2**28, 8), (279, 4, 2**28, 8))
    yield (
        "tiff huge",
        _tiff((256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)),
    )
    yield (
        "tiff loop",
        _tiff((256, 4, 1, 8), (257, 4, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 64), following=8),
    )
    yield "tiff pages", b"II*\0" + b"".join(struct.pack("<IH", 8 + 6 * index, 0) for index in range(100_000))
    canvas = struct.pack("<I", 0x12) + (2**24 - 1).to_bytes(3, "little") * 2
    yield "webp canvas", _webp(b"VP8X", canvas) + bytes(200)
    yield "webp lossless", _webp(b"VP8L", b"\x2f" + struct.pack("<I", 2**28 - 1) + bytes(200))
    for compression in (0, 1, 3):
        header = struct.pack("<IiiHHIIiiII", 40, deep, -deep, 1, 8, compression, 0, 0, 0, deep, 0)
        yield f"bmp {compression}", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header + bytes(100)
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65500, 65500, 3) + b"\1\x22\0\2\x11\0\3\x11\0"
    yield "jpeg huge", b"\xff\xd8" + frame + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0" + bytes(100)
    yield "jpeg markers", b"\xff\xd8" + b"\xff\xe1\0\x02" * 200_000
    size = struct.pack(">HIIIIIIIIH", 0, 2**32 - 1, 2**32 - 1, 0, 0, 1, 1, 0, 0, 3) + b"\7\1\1" * 3
    yield "jpeg2000 tiles", b"\xff\x4f\xff\x51" + struct.pack(">H", len(size) + 2) + size + bytes(100)
    yield "avif nothing", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + b"\xff\xff\xff\xffmeta" + bytes(100)
    for letters in (
        b"",
        b"\0",
        b"{",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"BM",
        b"RIFF\0\0\0\0WEBP",
        b"%!PS\n" * 50,
        b"\0" * 3000,
    ):
        yield f"only {letters[:8]!r}", letters


def _form(parts: Iterable[bytes], end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


def _part(name: str, body: bytes, more: bytes = b"") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"'.encode() + more + b"\r\n\r\n" + body


def requests_made_by_hand(picture: bytes) -> Iterator[Sent]:
    """Bodies whose form is the trouble."""
    form = {"content-type": "multipart/form-data; boundary=b"}
    image = _part("image", picture)
    forms = {
        "no end": _form([image], end=b""),
        "wrong boundary": _form([image]).replace(b"--b\r\n", b"--c\r\n"),
        "boundary inside": _form([_part("image", picture + b"\r\n--b\r\n" + picture)]),
        "end at once": b"--b--\r\n" + _form([image]),
        "no head": _form([picture]),
        "ten thousand empty parts": _form([_part("x", b"")] * 10_000),
        "as many pictures": _form([image] * 500),
        "long header": _form([b"X-Long: " + b"a" * 500_000 + b"\r\n" + image]),
        "many headers": _form([b"X-A: b\r\n" * 50_000 + image]),
        "long name": _form([_part("n" * 300_000, b"1"), image]),
        "encoded": _form([_part("image", base64.b64encode(picture), b"\r\nContent-Transfer-Encoding: base64")]),
        "bad encoding": _form([_part("image", b"=" * 9999, b"\r\nContent-Transfer-Encoding: quoted-printable")]),
        "unknown encoding": _form([_part("image", picture, b"\r\nContent-Transfer-Encoding: x-no")]),
        "file without a name": _form([_part("image", picture, b'; filename=""')]),
    }
    for told, body in forms.items():
        yield Sent(f"form: {told}", body, form)
    yield Sent(
        "form: boundary of 5000", _form([image]), {"content-type": "multipart/form-data; boundary=" + "b" * 5000}
    )
    encoded = base64.b64encode(picture).decode()
    whole = f'"image": "{encoded}"'
    documents = (
        *("[" * 200_000, '{"a":' * 200_000, '{"image": ' + "[" * 100_000, '{"image": 1e999}', "null", "1" * 5000),
        *('{"image": "\\ud800"}', '{"image": "data:,"}', '{"url": "\\u0000"}', '{"\\u0000": 1, "image": "AAAA"}'),
        *("{" + whole, "{" + whole + ', "image": 5}', "{" + whole + ', "image_id": 1e400}'),
        "{" + whole + ', "confidence": ' + "9" * 5000 + "}",
        "{" + whole + ', "masks": {"a": ' + "[" * 900 + "]" * 900 + "}}",
    )
    for text in documents:
        yield Sent(f"json: {text[:30]}", text.encode(), {"content-type": "application/json"})
        yield Sent(f"v2 json: {text[:30]}", text.encode(), {"content-type": "application/json"}, INFER)
    yield from _tensors(picture)


def _tensors(picture: bytes) -> Iterator[Sent]:
    huge, many = 2**31 - 1, [2**15] * 4
    inputs: list[dict[str, Any]] = [
        {"name": "pixels", "datatype": "UINT8", "shape": [huge, huge, huge, 3], "data": []},
        {"name": "pixels", "datatype": "UINT8", "shape": [1, huge, 1, 3], "parameters": {"binary_data_size": 10}},
        {"name": "pixels", "datatype": "UINT8", "shape": many, "data": [[[[]]]]},
        {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 2**60}},
        {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(picture)}},
        {"name": "image", "datatype": "BYTES", "shape": [100_000], "data": [""] * 100_000},
        {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["=" * 100_000]},
    ]
    for each in inputs:
        head = json.dumps({"inputs": [each]}).encode()
        for length in (len(head), 0, 10**20, len(head) + 5):
            headers = {"inference-header-content-length": str(length)}
            yield Sent(f"v2 tensor: {str(each)[:60]}", head + picture, headers, INFER)
    for name, level in (("gzip", 31), ("deflate", 15)):
        stream = zlib.compressobj(9, zlib.DEFLATED, level)
        body = stream.compress(bytes(128 * 2**20)) + stream.flush()
        yield Sent(f"v2 {name} bomb", body, {"content-encoding": name}, INFER)
        yield Sent(f"{name} bomb", body, {"content-encoding": name})


def requests(number: int, pictures: list[bytes], seed: int) -> Iterator[Sent]:
    """First each thing made by hand, whole and hence the same in every run, then damaged and mislabelled pictures."""
    rng = random.Random(seed)
    fixed = [Sent(f"bomb: {told}", body) for told, body in bombs()]
    fixed += requests_made_by_hand(pictures[0])
    yield from fixed[:number]
    for _ in range(number - len(fixed)):
        if rng.random() < 0.1:
            sent = rng.choice(fixed)
            told, body = damaged(sent.content[:100_000], pictures, rng)
            yield Sent(f"{sent.told}, {told}", body, sent.headers, sent.path)
        else:
            told, body = damaged(rng.choice(pictures), pictures, rng)
            yield _carried(told, body, rng)


def _carried(told: str, body: bytes, rng: random.Random) -> Sent:
    way = rng.random()
    if way < 0.6:
        return Sent(told, body, {"content-type": rng.choice(LABELS)})
    if way < 0.8:
        form = {"content-type": "multipart/form-data; boundary=b"}
        return Sent(f"form, {told}", _form([_part("image", body)] * rng.choice((1, 1, 3))), form)
    encoded = base64.b64encode(body).decode()
    if way < 0.9:
        return Sent(f"json, {told}", json.dumps({"image": encoded}).encode(), {"content-type": "application/json"})
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [encoded]}
    return Sent(f"v2, {told}", json.dumps({"inputs": [tensor]}).encode(), {"content-type": "application/json"}, INFER)
