"""Reading COCO files with partial labels, and the messages where they cannot be used."""

from pathlib import Path

import numpy as np
import pytest

from models.checkpoint import COCO_PERSON
from training.data import DataError, Source, rasterise, read_picture, read_source


def read(source):
    return read_source(source, ("person",), COCO_PERSON)


def test_boxes_masks_and_keypoints_arrive(make_data):
    items = read(make_data(count=2, objects=3))
    assert [item.boxes.shape for item in items] == [(3, 4), (3, 4)]
    assert all(item.has_keypoints.all() for item in items)
    assert all(segmentation is not None for item in items for segmentation in item.segmentations)
    assert read_picture(items[0]).size == (64, 96)


def test_coco_keypoints_are_pixel_indices(make_data):
    kept = []
    items = read(make_data(count=1, objects=1, change=lambda c: kept.append(c["annotations"][0]["keypoints"])))
    expected = np.reshape(kept[0], (17, 3)) + (0.5, 0.5, 0)
    np.testing.assert_allclose(items[0].keypoints[0], expected)


def test_joints_are_mapped_by_name(make_data):
    def reverse(content):
        content["categories"][0]["keypoints"].reverse()
        content["categories"][0]["keypoints"][0] = "tail"

    straight = read(make_data("a", count=1, objects=1))[0].keypoints[0]
    reversed_ = read(make_data("b", count=1, objects=1, change=reverse))[0].keypoints[0]
    np.testing.assert_array_equal(reversed_[:16], straight[::-1][:16])
    assert not reversed_[16].any(), "a joint that the file does not know has no label"


def test_an_unlabelled_picture_has_no_keypoints(make_data):
    def unlabelled(content):
        content["images"][0]["keypoints_labelled"] = False

    items = read(make_data(count=2, change=unlabelled))
    assert [bool(item.has_keypoints.any()) for item in items] == [False, True]


def test_other_categories_are_dropped_and_empty_pictures_kept(make_data):
    def bags(content):
        content["categories"].append({"id": 9, "name": "bag"})
        for annotation in content["annotations"][:2]:
            annotation["category_id"] = 9

    assert [len(item.boxes) for item in read(make_data(count=2, objects=2, change=bags))] == [0, 2]


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
def test_crowds_and_ignored_annotations_are_regions(make_data, flag):
    def mark(content):
        content["annotations"][0][flag] = 1

    item = read(make_data(count=1, objects=2, change=mark))[0]
    assert (len(item.boxes), len(item.ignore)) == (1, 1)


def test_a_degenerate_box_names_its_picture(make_data):
    def flatten(content):
        content["annotations"][0]["bbox"][2] = 0

    with pytest.raises(DataError, match=r"0\.png, annotation 1"):
        read(make_data(count=1, change=flatten))


def test_what_is_missing_is_named(make_data, tmp_path: Path):
    source = make_data(count=1)
    (source.images / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png"):
        read(source)
    with pytest.raises(DataError, match="no such annotation file"):
        read(Source("x", source.images, tmp_path / "none.json"))
    with pytest.raises(DataError, match="none of its categories"):
        read_source(source, ("cat",), None)


def test_sources_on_the_command_line():
    assert Source.parse("coco=a/b:c.json:2.5") == Source("coco", Path("a/b"), Path("c.json"), 2.5)
    for wrong in ("a:b", "x=a", "x=a:b:c", "x=a:b:0", "=a:b"):
        with pytest.raises(DataError):
            Source.parse(wrong)


def test_run_length_codes_and_polygons_rasterise_alike(make_data):
    item = read(make_data(count=1, objects=1))[0]
    polygon = item.segmentations[0]
    from pycocotools import mask as coco_masks

    small = rasterise(polygon, item.height, item.width, 1, 1)
    code = coco_masks.encode(np.asfortranarray(small))
    np.testing.assert_array_equal(rasterise(code, item.height, item.width, 1, 1), small)
    large = rasterise(polygon, 2 * item.height, 2 * item.width, 2, 2)
    resized = rasterise(code, 2 * item.height, 2 * item.width, 2, 2)
    assert (large != resized).mean() < 0.02
