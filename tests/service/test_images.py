import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import blocks
from service.bundle import CanvasRule
from service.encoded import Encoded
from service.errors import BrokenImage, EmptyBody, ImageTooLarge, NotAnImage, TooManyFrames
from service.images import DecodeLimits, decode, fit, resized_size, size_by_header
from tests.service.toy import encoded

LIMITS = DecodeLimits(max_pixels=1_000_000, max_side=5_000)
COLOUR = (200, 100, 50)
RULE = CanvasRule(short_side=64, long_side=96, multiple=32)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image: PIL.Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def flat(mode: str) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (9, 7), COLOUR).convert(mode)


GREY = PIL.Image.new("RGB", (1, 1), COLOUR).convert("L").getpixel((0, 0))


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (saved(flat("RGB"), "PNG"), COLOUR),
        (saved(flat("RGB"), "BMP"), COLOUR),
        (saved(flat("RGB"), "WEBP", lossless=True), COLOUR),
        (saved(flat("RGB"), "TIFF"), COLOUR),
        (saved(flat("RGB"), "JPEG2000"), COLOUR),
        (saved(flat("RGB"), "JPEG", quality=95), COLOUR),
        (saved(flat("L"), "PNG"), (GREY,) * 3),
        (saved(flat("LA"), "PNG"), (GREY,) * 3),
        (saved(flat("P"), "PNG"), None),
        (saved(flat("P"), "GIF"), None),
        (saved(flat("1"), "PNG"), None),
        (saved(flat("CMYK"), "JPEG", quality=95), COLOUR),
        (saved(flat("CMYK"), "TIFF"), COLOUR),
        (saved(flat("YCbCr"), "TIFF"), COLOUR),
        (saved(flat("LAB"), "TIFF"), None),
        (saved(PIL.Image.new("RGBA", (9, 7), (200, 100, 50, 0)), "PNG"), (255, 255, 255)),
        (saved(PIL.Image.new("RGBA", (9, 7), (0, 0, 0, 51)), "PNG"), (204, 204, 204)),
        (saved(PIL.Image.new("LA", (9, 7), (0, 0)), "PNG"), (255, 255, 255)),
        (saved(PIL.Image.new("RGB", (9, 7), COLOUR), "PNG", transparency=COLOUR), (255, 255, 255)),
        (saved(PIL.Image.new("RGBA", (9, 7), (200, 100, 50, 0)).quantize(), "PNG"), (255, 255, 255)),
        (saved(PIL.Image.new("P", (9, 7), 3), "GIF", transparency=3), (255, 255, 255)),
        (saved(PIL.Image.fromarray(np.full((7, 9), 257 * 130, np.uint16)), "PNG"), (130,) * 3),
        (saved(PIL.Image.fromarray(np.full((7, 9), 257 * 130, np.uint16)), "TIFF"), (130,) * 3),
        (saved(PIL.Image.fromarray(np.full((7, 9), 257 * 130, np.int32)), "TIFF"), (130,) * 3),
    ],
)
def test_every_mode_becomes_rgb(data, colour):
    image = decode(data, LIMITS)
    assert image.dtype == np.uint8
    assert image.shape == (7, 9, 3)
    assert image.flags["C_CONTIGUOUS"]
    if colour is not None:
        assert np.abs(image.astype(int) - colour).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_the_picture_upright(orientation, kind):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # the marked corner is top left when shown
    unturn = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
              5: lambda a: a.transpose(1, 0, 2), 6: np.rot90,
              7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}  # fmt: skip
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(unturn[orientation](upright)))
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    image = decode(saved(stored, kind, exif=exif, **lossless), LIMITS)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).max() <= 3


@pytest.mark.parametrize("orientation", [0, *range(1, 10)])  # the outermost mean nothing
def test_the_header_of_a_jpeg_tells_its_canvas(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = saved(PIL.Image.fromarray(smooth(50, 90)), "JPEG", exif=exif)
    canvas = fit(decode(data, LIMITS), RULE)
    told = Encoded.of(data, LIMITS, RULE)
    assert told is not None
    assert (told.image_size, told.size, told.shape) == (canvas.image_size, canvas.size, canvas.shape)


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "RGB", "CMYK"]), st.booleans(), st.booleans(),
    st.sampled_from([{}, {"comment": b"a"}, {"icc_profile": b"b" * 70_000}, {"dpi": (72, 72)}, {"subsampling": 2}]),
)  # fmt: skip
def test_segments_tell_the_size_of_plain_jpegs_and_of_no_others(height, width, mode, progressive, turned, more):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    options = {**more, **({"exif": exif} if turned else {})}
    data = saved(PIL.Image.new(mode, (width, height)), "JPEG", progressive=progressive, **options)
    assert blocks.size_of_plain(data) == (None if progressive or turned else (height, width))


def test_what_is_unusual_in_segments_is_left_to_the_decoder():
    plain, exif = saved(PIL.Image.new("RGB", (9, 7)), "JPEG"), PIL.Image.Exif()
    exif[0x0112] = 6
    turn = b"\xff\xe1" + (len(exif.tobytes()) + 2).to_bytes(2, "big") + exif.tobytes()
    scan, frame = plain.index(b"\xff\xda"), plain.index(b"\xff\xc0")
    late = plain[:scan] + turn + plain[scan:]  # behind the size, where nobody writes it and Pillow reads it
    assert blocks.size_of_plain(plain) == (7, 9)
    assert size_by_header(late, LIMITS) == decode(late, LIMITS).shape[:2] == (9, 7)
    for odd in (late, plain[:frame] + plain[frame : frame + 19] + plain[frame:], plain[: frame + 6],
                plain[:2] + b"\xff\xfe\0\2" * 40 + plain[2:], plain[:2] + b"\0" + plain[2:], b""):  # fmt: skip
        assert blocks.size_of_plain(odd) is None


def test_the_header_of_other_kinds_is_not_relied_on():
    assert size_by_header(saved(flat("RGB"), "PNG"), LIMITS) is None
    assert size_by_header(b"no picture at all", LIMITS) is None
    assert size_by_header(saved(flat("RGB"), "JPEG"), LIMITS) == (7, 9)
    assert size_by_header(saved(flat("RGB"), "JPEG", progressive=True), LIMITS) is None
    assert Encoded.of(saved(flat("RGB"), "WEBP"), LIMITS, RULE) is None


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (saved(PIL.Image.new("L", (1001, 1000)), "JPEG"), ImageTooLarge),
        (saved(PIL.Image.new("L", (5001, 2)), "JPEG"), ImageTooLarge),
        (b"\xff\xd8\xff" + bytes(100), BrokenImage),
        (b"\xff\xd8\xff" + b"\xff\xe0\0\2" * (blocks.MAX_BLOCKS + 1), BrokenImage),
    ],
)
def test_what_the_header_gives_away_is_refused_before_anything_is_decoded(data, error):
    for read in (decode, size_by_header):
        with pytest.raises(error):
            read(data, LIMITS)


def test_first_frame_of_an_animation():
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, LIMITS)[0, 0].tolist() == [255, 0, 0]


def animation(kind: str, number: int, **options) -> bytes:
    stills = [PIL.Image.fromarray(smooth(20, 30, seed)) for seed in range(number)]
    return saved(stills[0], kind, save_all=True, append_images=stills[1:], **options)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_more_frames_than_the_limit_are_refused_by_its_name(kind):
    data = animation(kind, 5)
    with pytest.raises(TooManyFrames, match="more than 4 frames.*LIMNER_MAX_FRAMES"):
        decode(data, DecodeLimits(max_frames=4))
    assert decode(data, DecodeLimits(max_frames=5)).shape == (20, 30, 3)
    assert decode(animation(kind, 1), DecodeLimits(max_frames=1)).shape == (20, 30, 3)


def test_the_preview_of_a_photograph_is_no_frame():
    assert decode(animation("MPO", 2), DecodeLimits(max_frames=1)).shape == (20, 30, 3)


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("TIFF", {}), ("TIFF", {"big_tiff": True})])
def test_frames_are_counted_as_pillow_counts_them(kind, options, number):
    data = animation(kind, number, **options)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert blocks.COUNTED[kind](data, 1000) == getattr(opened, "n_frames", 1) == number
    assert blocks.COUNTED[kind](data, 3) == min(number, 4)
    for length in range(12, len(data), 41):
        assert 1 <= blocks.COUNTED[kind](data[:length], 1000) <= number


def test_counting_ends_on_files_that_go_on():
    block = b"\x21\xfe" + b"\x01a" * 1_000_000 + b"\0"
    assert blocks.of_gif(b"GIF89a" + bytes(7) + block + b"\x2c" + bytes(20), 1000) == 1
    assert blocks.of_gif(b"GIF89a" + bytes(7) + (b"\x2c" + bytes(11)) * 100_000, 1000) == 1001
    loop = b"II*\0" + struct.pack("<I", 8) + struct.pack("<HI", 0, 14) + struct.pack("<HI", 0, 8)
    assert blocks.of_tiff(loop, 1000) == 2
    chain = b"II*\0" + b"".join(struct.pack("<IH", 8 + 6 * i, 0) for i in range(50_000))
    assert blocks.of_tiff(chain, 1000) == 1001


def test_endless_headers_are_refused_before_pillow_reads_them():
    """It would take minutes for the 20 MB that a body may have."""
    still, many = encoded(smooth(8, 8)), 5_000_000
    comment = struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    jpeg = encoded(smooth(8, 8), "JPEG")
    for data in (
        b"\xff\xd8" + b"\xff\xe1\0\2" * many,
        b"\xff\xd8" + b"\xff" * many,
        b"\xff\xd8\xff\xe0\0\2" + bytes(many),
        b"\xff\xd8\xff\xd8" * many,
        still[:33] + comment * (many // 3) + still[33:],
    ):
        with pytest.raises(BrokenImage, match="blocks"):
            decode(data, LIMITS)
    # What real files have is far below.
    for data in (still[:33] + comment * 10_000 + still[33:], jpeg[:2] + b"\xff\xfe\0\2" * 10_000 + jpeg[2:]):
        assert decode(data, LIMITS).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "BMP"])
def test_truncated_is_broken_and_never_anything_else(kind):
    data = encoded(smooth(60, 70), kind)
    for length in {4, 20, 60, len(data) // 2, len(data) - 40}:
        with pytest.raises((BrokenImage, NotAnImage)) as caught:
            decode(data[:length], LIMITS)
        assert len(caught.value.detail) < 300


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_pictures_raise_our_errors_alone(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
    body = bytearray(encoded(smooth(12, 10), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode(bytes(body), LIMITS)
        except (BrokenImage, NotAnImage, ImageTooLarge):
            return
    assert image.ndim == 3


def test_no_picture():
    with pytest.raises(EmptyBody):
        decode(b"", LIMITS)
    for body in (b"just text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"<svg></svg>", b"\0" * 5000):
        with pytest.raises(NotAnImage):
            decode(body, LIMITS)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (6_000, 1), (1_001, 1_000)])
def test_bombs_are_refused_by_their_header(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLarge, match="LIMNER_MAX_"):
            decode(png_header(*size), LIMITS)


def interpolated(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """torch's rule written the slow way: half-pixel centres, scale = in / out, source clamped at 0, edges repeated."""
    axes = []
    for length, resized in zip(image.shape[:2], size, strict=True):
        source = np.maximum((np.arange(resized) + 0.5) * (length / resized) - 0.5, 0)
        low = np.minimum(np.floor(source).astype(int), length - 1)
        weights = np.zeros((resized, length))
        np.add.at(weights, (np.arange(resized), low), 1 - (source - low))
        np.add.at(weights, (np.arange(resized), np.minimum(low + 1, length - 1)), source - low)
        axes.append(weights)
    return np.einsum("ih,hwc,jw->ijc", axes[0], image.astype(np.float64), axes[1], optimize=True)


@pytest.mark.parametrize(
    "shape", [(48, 64), (300, 200), (37, 411), (64, 64), (1, 1), (1, 50), (200, 1), (65, 97), (128, 128)]
)
def test_fit_is_the_interpolation_of_training(shape):
    rule = CanvasRule(short_side=64, long_side=100, multiple=32)
    image = smooth(*shape)
    canvas = fit(image, rule)
    height, width = canvas.size
    found = canvas.pixels[:height, :width].astype(float)
    wanted = interpolated(image, canvas.size)
    assert np.abs(found - wanted).max() <= 1.0
    if found.size > 1000:
        assert abs((found - wanted).mean()) < 0.15  # no darkening by truncation
    assert canvas.image_size == shape


def test_fit_equals_torch():
    torch = pytest.importorskip("torch")
    image = smooth(211, 333)
    canvas = fit(image, CanvasRule(short_side=100, long_side=200))
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(planes, size=canvas.size, mode="bilinear", align_corners=False)
    found = canvas.pixels[: canvas.size[0], : canvas.size[1]]
    assert np.abs(found - wanted[0].permute(1, 2, 0).numpy()).max() <= 0.51


def test_antialiased_shrinking_averages():
    board = np.zeros((128, 128, 3), np.uint8)
    board[::2] = 255
    smoothed = fit(board, CanvasRule(short_side=32, long_side=32, antialias=True)).pixels
    assert np.abs(smoothed.astype(int) - 128).max() < 20


@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.integers(1, 1_500),
    st.integers(1, 2_000),
    st.sampled_from([1, 32]),
)
def test_resized_size_obeys_both_sides(height, width, short, long, multiple):
    rule = CanvasRule(short_side=short, long_side=long, multiple=multiple)
    h, w = resized_size(height, width, rule)
    assert 1 <= min(h, w) <= short
    assert max(h, w) <= max(long, 1)
    assert -(-h // multiple) * -(-w // multiple) * multiple**2 <= rule.max_pixels()


def test_padding_is_zero_and_bottom_right():
    canvas = fit(np.full((50, 70, 3), 9, np.uint8), CanvasRule(short_side=50, long_side=70))
    assert canvas.shape == (64, 96)
    assert canvas.size == (50, 70)
    assert (canvas.pixels[:50, :70] == 9).all()
    assert canvas.pixels.sum() == 9 * 50 * 70 * 3
