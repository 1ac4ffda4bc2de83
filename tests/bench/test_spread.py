"""Resampled AP: with every picture counted once it is COCO's own, and counted twice is what two copies score."""

import copy

import numpy as np
import pytest

from bench import spread
from training.evaluate import score

SIZE = 200


@pytest.fixture
def truth() -> dict:
    rng = np.random.default_rng(0)
    boxes = [(image, rng.uniform(0, 150, 2), rng.uniform(10, 50, 2)) for image in range(1, 7) for _ in range(9)]
    return {
        "images": [{"id": image, "height": SIZE, "width": SIZE} for image in range(1, 7)],
        "categories": [{"id": 1, "name": "nucleus"}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": 1, "bbox": [*at, *side], "area": side.prod(), "iscrowd": 0}
            for number, (image, at, side) in enumerate(boxes, start=1)
        ],
    }


def found(truth: dict, noise: float, seed: int = 1) -> list[dict]:
    rng = np.random.default_rng(seed)
    kept = [each for each in truth["annotations"] if rng.random() < 0.8]
    return [
        {
            "image_id": each["image_id"],
            "category_id": 1,
            "bbox": list(np.array(each["bbox"]) + noise * rng.normal(size=4)),
            "score": rng.random(),
        }
        for each in kept
    ]


class Bundle:
    has_masks = has_keypoints = False


class Detector:
    bundle = Bundle()


@pytest.mark.parametrize("noise", [0.0, 2.0, 6.0])
def test_all_pictures_once_is_cocos_ap(truth: dict, noise: float) -> None:
    results = found(truth, noise)
    expected = score(results, copy.deepcopy(truth), Detector(), reference=True)["bbox"]["AP"]
    assert spread.average_precision(spread.verdicts(results, truth, "bbox")) == pytest.approx(expected, abs=1e-9)


def test_a_picture_that_is_drawn_twice_counts_twice(truth: dict) -> None:
    results = found(truth, 3.0)
    weights = np.array([2.0, 0, 1, 1, 3, 1])
    drawn = {**truth, "images": [], "annotations": []}
    copies = []
    for image, times in zip(truth["images"], weights.astype(int), strict=True):
        for turn in range(times):
            new = 100 * (turn + 1) + image["id"]
            drawn["images"].append({**image, "id": new})
            mine = [each for each in truth["annotations"] if each["image_id"] == image["id"]]
            drawn["annotations"] += [{**each, "image_id": new, "id": new * 1000 + each["id"]} for each in mine]
            copies += [{**each, "image_id": new} for each in results if each["image_id"] == image["id"]]
    expected = spread.average_precision(spread.verdicts(copies, drawn, "bbox"))
    assert spread.average_precision(spread.verdicts(results, truth, "bbox"), weights) == pytest.approx(
        expected, abs=0.01
    )


def test_the_interval_of_a_difference(truth: dict, tmp_path) -> None:
    good, bad = (spread.verdicts(found(truth, noise), truth, "bbox") for noise in (1.0, 6.0))
    low, high = spread.difference(good, bad, resamplings=200)
    gap = spread.average_precision(good) - spread.average_precision(bad)
    assert 0 < low < gap < high
    assert spread.difference(good, good, resamplings=20) == (0.0, 0.0)
    spread.save(tmp_path / "good.npz", good)
    assert spread.difference(spread.load(tmp_path / "good.npz"), good, resamplings=20) == (0.0, 0.0)


def test_crowds_and_many_classes_are_refused(truth: dict) -> None:
    truth["annotations"][0]["iscrowd"] = 1
    with pytest.raises(ValueError, match="one class without crowds"):
        spread.verdicts([], truth, "bbox")
