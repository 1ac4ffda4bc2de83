import io

import numpy as np
import PIL.Image
import pytest

from service.bundle import Keypoints
from service.detector import Detections
from service.draw import COLOURS, draw, encode
from service.masks import rle
from tests.service.test_masks import blobs

JOINTS = Keypoints(names=["a", "b", "c"], skeleton=[(0, 1), (1, 2)], flips=[0, 1, 2])
GREY = 90


def plain(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def one(height: int, width: int, box: list[float], mask: bool = False, points: list[list[float]] | None = None):
    boxes = np.array([box], np.float32)
    masks = rle(np.ones((1, 28, 28), np.float32), boxes, height, width) if mask else None
    keypoints = None if points is None else np.array([points], np.float32)
    return Detections(height, width, boxes, np.array([0.9], np.float32), np.array([0]), masks, keypoints)


def changed(drawn: np.ndarray) -> np.ndarray:
    return (drawn != GREY).any(axis=2)


def test_a_mask_is_painted_in_its_pixels_and_the_given_picture_is_left_alone():
    image = plain(300, 400)
    drawn = draw(image, one(300, 400, [100, 100, 200, 200], mask=True), ["thing"], None)
    assert (image == GREY).all()
    expected = GREY + (np.array(COLOURS[0]) - GREY) * 112 / 255
    assert np.abs(drawn[150, 150] - expected).max() <= 1
    assert (drawn[110:190, 110:190] == drawn[150, 150]).all()
    assert not changed(drawn)[205:, :].any()


def test_a_box_is_a_frame_on_its_own_pixels():
    drawn = draw(plain(300, 400), one(300, 400, [100, 100, 200, 200]), ["thing"], None)
    assert (drawn[150, 100] == COLOURS[0]).all()
    assert (drawn[150, 199] == COLOURS[0]).all()
    assert (drawn[199, 150] == COLOURS[0]).all()
    assert (drawn[150, 99] == GREY).all()
    assert (drawn[150, 200] == GREY).all()
    assert (drawn[150, 150] == GREY).all()


def test_skeletons_join_the_joints_that_are_seen():
    points = [[40, 40, 0.9], [140, 40, 0.9], [140, 140, 0.01]]
    marks = changed(draw(plain(300, 300), one(300, 300, [0, 200, 50, 299], points=points), ["x"], JOINTS))
    assert marks[39:41, 60:120].any(axis=0).all()
    assert not marks[60:135, 130:150].any()


@pytest.mark.parametrize(
    "box", [[0, 0, 60, 40], [340, 0, 400, 300], [-5, 290, 20, 300], [0, 0, 400, 300], [3, 3, 3, 3]]
)
def test_labels_stay_in_the_picture(box):
    drawn = draw(plain(300, 400), one(300, 400, box), ["a rather long label"], None)
    filled = (drawn == COLOURS[0]).all(axis=2).sum()
    assert filled > 12 * 60, "the label's background is to be seen"


def test_no_label_covers_another():
    def of(count: int) -> np.ndarray:
        boxes = np.repeat(np.array([[100, 100, 180, 160]], np.float32), count, axis=0)
        found = Detections(300, 400, boxes, np.linspace(0.9, 0.5, count), np.zeros(count, int), None, None)
        return draw(plain(300, 400), found, ["thing"], None)

    alone = (of(1)[:100] == COLOURS[0]).all(axis=2)
    many = of(5)
    assert alone.sum() > 12 * 30
    assert ((many[:100] == COLOURS[0]).all(axis=2) == alone).all()
    assert (many[160:] == COLOURS[1]).all(axis=2).sum() > 12 * 30, "the second one's is below"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 90), (90, 2), (64, 96), (1200, 1600)])
def test_pictures_of_any_size(height, width):
    rng = np.random.default_rng(9)
    boxes = np.sort(rng.uniform(0, 1, (40, 2, 2)), axis=1).reshape(40, 4) * np.tile([width, height], 2)
    boxes = boxes.astype(np.float32)
    masks = rle(blobs(rng, 40), boxes, height, width)
    points = rng.uniform(-2, max(height, width) + 2, (40, 3, 3)).astype(np.float32)
    many = Detections(height, width, boxes, np.linspace(1, 0, 40), np.zeros(40, int), masks, points)
    assert draw(plain(height, width), many, ["thing"], JOINTS).shape == (height, width, 3)


def test_lines_and_letters_grow_with_the_picture():
    shares = []
    for scale in (1, 2, 4):
        height, width = 600 * scale, 800 * scale
        box = [100.0 * scale, 100.0 * scale, 300.0 * scale, 300.0 * scale]
        shares.append(changed(draw(plain(height, width), one(height, width, box), ["thing"], None)).mean())
    assert max(shares) < 1.25 * min(shares)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_encoded(kind):
    image = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    read = PIL.Image.open(io.BytesIO(encode(image, kind)))
    assert (read.format, read.size) == (kind, (30, 20))
    if kind == "PNG":
        assert (np.asarray(read) == image).all()
