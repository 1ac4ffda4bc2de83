"""Geometry of the augmentations: labels stay on the things they label."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.checkpoint import COCO_PERSON
from service.images import fit
from training.augment import MIN_VISIBLE, Placement, blank, cut_out, mirror, paste, place
from training.compose import Augmentation, Composer
from training.data import read_picture, read_source

FLIPS = list(COCO_PERSON.flips)


@pytest.fixture
def items(make_data):
    return read_source(make_data(count=4, objects=2), ("person",), COCO_PERSON)


def test_mirror_is_an_involution_and_swaps_sides():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 50, (3, 4)).astype(np.float32)
    keypoints = rng.uniform(0, 100, (3, 17, 3)).astype(np.float32)
    keypoints[..., 2] = 2
    once = mirror(boxes, keypoints, 100, FLIPS)
    twice = mirror(*once, 100, FLIPS)
    np.testing.assert_allclose(twice[0], boxes, atol=1e-4)
    np.testing.assert_allclose(twice[1], keypoints, atol=1e-4)
    left, right = COCO_PERSON.names.index("left_wrist"), COCO_PERSON.names.index("right_wrist")
    np.testing.assert_allclose(once[1][:, left, 0], 100 - keypoints[:, right, 0])


def test_mirror_leaves_unlabelled_joints_at_zero():
    _, keypoints = mirror(np.zeros((1, 4), np.float32), np.zeros((1, 17, 3), np.float32), 100, FLIPS)
    assert not keypoints.any()


def test_an_identity_placement_changes_nothing(items):
    item = items[0]
    sample = blank(item.height, item.width, 17)
    window = (0, 0, item.height, item.width)
    place(sample, item, read_picture(item), Placement(item.height, item.width, 0, 0, window), FLIPS)
    np.testing.assert_array_equal(sample.image, np.asarray(read_picture(item)))
    np.testing.assert_allclose(sample.objects.boxes, item.boxes, atol=1e-4)
    np.testing.assert_allclose(sample.objects.keypoints, item.keypoints)


def test_a_plain_sample_is_what_the_service_sees(items, tiny):
    composer = Composer(items, {"toy": 1}, tiny.canvas, FLIPS, Augmentation(flip=0.0))
    for index, item in enumerate(items):
        sample = composer.sample(index, np.random.default_rng(0), None)
        served = fit(np.asarray(read_picture(item)), tiny.canvas)
        assert sample.size == served.size
        np.testing.assert_array_equal(sample.image, served.pixels[: served.size[0], : served.size[1]])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), mosaic=st.booleans(), portrait=st.booleans())
def test_labels_agree_with_each_other_whatever_is_done(items, tiny, seed, mosaic, portrait):
    settings_ = Augmentation(jitter=1.0, scales=(0.3, 2.0), mosaic=float(mosaic), copy_paste=0.7)
    composer = Composer(items, {"toy": 1}, tiny.canvas, FLIPS, settings_)
    canvas = (96, 64) if portrait else (64, 96)
    sample = composer.sample(seed % len(items), np.random.default_rng(seed), canvas)
    objects = sample.objects
    assert sample.image.shape == (*canvas, 3)
    assert (objects.boxes[:, :2] >= 0).all()
    assert (objects.boxes[:, 2:] <= (canvas[1], canvas[0])).all()
    assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
    for box, mask, keypoints in zip(objects.boxes, objects.masks, objects.keypoints, strict=True):
        assert mask is not None, "every figure here has a mask, and keeps it while it is kept"
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(box - tight).max() <= 1.5, (box, tight)
        labelled = keypoints[keypoints[:, 2] > 0]
        assert (labelled[:, :2] >= 0).all()
        assert (labelled[:, 0] < canvas[1]).all()
        assert (labelled[:, 1] < canvas[0]).all()
    stacked = sum(mask.astype(int) for mask in objects.masks) if objects.masks else 0
    if not mosaic and len(objects.masks) > len(items[0].boxes):
        assert np.max(stacked) <= 2, "a pasted figure overlaps no mask; only the two original ones may overlap"


def test_what_is_mostly_cut_off_becomes_an_ignore_region(items):
    item = items[0]
    x1, y1, x2, y2 = item.boxes[0]
    cut = int(x1 + 0.15 * (x2 - x1))  # a narrow strip of the first figure stays
    sample = blank(item.height, item.width, 17)
    place(sample, item, read_picture(item), Placement(item.height, item.width, 0, 0, (0, 0, item.height, cut)), FLIPS)
    assert len(sample.objects.ignore) >= 1
    assert (sample.objects.ignore[:, 2] <= cut).all()


def test_pasting_hides_what_is_behind(items):
    item = items[0]
    sample = blank(96, 64, 17)
    picture = read_picture(item)
    place(sample, item, picture, Placement(96, 64, 0, 0, (0, 0, 96, 64)), FLIPS)
    before = sample.objects
    cutout = cut_out(item, 1, picture, 1.0, flip=False, flips=FLIPS)
    top, left = np.floor(item.boxes[0, 1::-1]).astype(int)
    paste(sample, cutout, int(top), int(left))
    pasted = sample.objects.masks[-1]
    assert pasted is not None
    assert pasted.any()
    for mask, keypoints in zip(sample.objects.masks[:-1], sample.objects.keypoints[:-1], strict=True):
        assert mask is not None
        assert not (mask & pasted).any()
        for x, y, v in keypoints:
            assert v == 0 or v == (1 if pasted[int(y), int(x)] else 2)
    lost = len(before.boxes) + 1 - len(sample.objects.boxes)
    assert len(sample.objects.ignore) <= lost, "a figure of which nothing is left leaves no region"
    # A copy far outside adds nothing and paints nothing.
    image = sample.image.copy()
    paste(sample, cutout, 95, 63)
    np.testing.assert_array_equal(sample.image, image)


def test_a_cutout_keeps_its_joints_in_place(items):
    item = items[0]
    cutout = cut_out(item, 0, read_picture(item), 2.0, flip=False, flips=FLIPS)
    for x, y, v in cutout.keypoints:
        assert v == 2
        assert cutout.alpha[int(y), int(x)] > 0
    assert 0 < MIN_VISIBLE < 1
    assert Image.fromarray(cutout.pixels).size == cutout.alpha.shape[::-1]
