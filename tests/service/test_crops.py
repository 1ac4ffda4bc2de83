import io

import numpy as np
import PIL.Image
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from service.crops import bitmap, crop, png
from service.masks import decode, rle, spans
from tests.service.test_masks import encoded, scattered, stress

pictures = hn.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(0, 1))


def placed(pixels: np.ndarray, x: int, y: int, shape: tuple[int, ...]) -> np.ndarray:
    full = np.zeros(shape, np.uint8)
    full[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return full


def assert_same(painted: np.ndarray) -> None:
    mask = encoded(painted)
    x, y, pixels = crop(mask)
    assert (placed(pixels, x, y, painted.shape) == painted).all()
    shown = PIL.Image.open(io.BytesIO(png(pixels)))
    shown.load()
    assert (shown.mode, shown.format) == ("1", "PNG")
    assert (np.asarray(shown) == pixels).all()
    rows = np.frombuffer(bitmap(pixels), np.uint8).reshape(len(pixels), -1)
    assert (np.unpackbits(rows, axis=1, count=pixels.shape[1]) == pixels).all()


@settings(max_examples=200, deadline=None)
@given(pictures)
@example(np.zeros((3, 4), np.uint8))
@example(np.ones((1, 1), np.uint8))
@example(np.ones((3, 17), np.uint8))
def test_crop_png_and_bitmap_are_the_mask(painted: np.ndarray) -> None:
    assert_same(painted)


def test_network_masks() -> None:
    rng = np.random.default_rng(7)
    for kind in range(4):
        for mask in rle(stress(rng, kind, 5, 28), scattered(rng, 5, 3, 150, 100), 100, 130):
            assert_same(decode(mask))


def test_crops_are_tight_and_never_without_a_pixel() -> None:
    painted = np.zeros((30, 40), np.uint8)
    painted[7:9, 5:20] = 1
    x, y, pixels = crop(encoded(painted))
    assert (x, y, pixels.shape) == (5, 7, (2, 15))
    assert crop(encoded(np.zeros((30, 40), np.uint8))).pixels.tolist() == [[False]]


@settings(max_examples=100, deadline=None)
@given(pictures)
def test_spans_are_the_mask(painted: np.ndarray) -> None:
    again = np.zeros_like(painted)
    found = spans(encoded(painted))
    for column, top, bottom in zip(*found, strict=True):
        assert top < bottom
        assert not again[top:bottom, column].any()
        again[top:bottom, column] = 1
    assert (again == painted).all()
    places = found.column * (painted.shape[0] + 1) + found.top
    assert (np.diff(places) > 0).all()
