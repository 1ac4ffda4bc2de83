"""What a teacher adds, with a teacher made of numbers."""

import json

import numpy as np
from PIL import Image

from models.checkpoint import COCO_PERSON
from training.data import read_json, read_source
from training.teacher import add_people, decode, nested, pairwise_iou, suppress


class FakeTeacher:
    def __init__(self, boxes, scores):
        self.answer = np.array(boxes, np.float32), np.array(scores, np.float32)

    def persons(self, picture: Image.Image, floor: float):
        keep = self.answer[1] >= floor
        return self.answer[0][keep], self.answer[1][keep]


def test_only_what_is_new_is_added(make_data):
    def one_box(content):
        content["annotations"][0]["bbox"] = [10, 10, 20, 40]

    source = make_data(count=1, objects=1, change=one_box)
    content = read_json(source.annotations)
    boxes = [[11, 10, 30, 50], [40, 10, 60, 50], [0, 60, 30, 90], [10, 10, 30, 25], [45, 60, 60, 90]]
    teacher = FakeTeacher(boxes, [0.9, 0.8, 0.2, 0.9, 0.1])
    # known; new and sure; new and doubtful; half of a known one; too doubtful
    assert add_people(content, source.images, teacher, threshold=0.35) == (1, 2)
    added = content["annotations"][1:]
    assert [a["bbox"] for a in added] == [[40, 10, 20, 40], [0, 60, 30, 30], [10, 10, 20, 15]]
    assert [a.get("ignore", 0) for a in added] == [0, 1, 1]
    assert all(a["source"] == "teacher" and "segmentation" not in a for a in added)
    source.annotations.write_text(json.dumps(content))
    item = read_source(source, ("person",), COCO_PERSON)[0]
    assert (len(item.boxes), len(item.ignore)) == (2, 2)
    assert item.has_keypoints.tolist() == [True, False]


def test_decoding_puts_cells_on_the_grid():
    cells = sum((64 // stride) ** 2 for stride in (8, 16, 32))
    raw = np.zeros((cells, 85), np.float32)
    raw[:, 4:6] = 0.5
    centres, sizes, scores = decode(raw, 64)
    np.testing.assert_array_equal(centres[:9], [[8 * x, 0] for x in range(8)] + [[0, 8]])
    assert sizes[0].tolist() == [8, 8]
    assert sizes[-1].tolist() == [32, 32]
    assert scores[0] == 0.25


def test_boxes_against_boxes():
    a = np.array([[0, 0, 10, 10]], np.float32)
    b = np.array([[5, 0, 15, 10], [20, 20, 30, 30]], np.float32)
    np.testing.assert_allclose(pairwise_iou(a, b), [[1 / 3, 0]])
    assert suppress(np.concatenate([a, a + 1, b]), np.array([0.5, 0.9, 0.3, 0.2]), 0.5) == [1, 2, 3]
    assert nested(np.array([2, 2, 4, 4], np.float32), a)
    assert not nested(b[0], a)
    assert not nested(b[0], np.zeros((0, 4), np.float32))
