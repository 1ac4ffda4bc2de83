"""AP: the ends of the scale, the two evaluators, partial labels, and the path that serves."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks

from models import checkpoint
from models.checkpoint import COCO_PERSON
from service.detector import Detections
from training.data import read_json
from training.engine import torch_detector
from training.evaluate import evaluate, main, predict, score


class Oracle:
    """A detector that knows the answers; `noise` moves them."""

    def __init__(self, content, noise=0.0, found=True):
        joints = SimpleNamespace(names=list(COCO_PERSON.names))
        self.bundle = SimpleNamespace(
            manifest=SimpleNamespace(classes=["bag", "person"], keypoints=joints), has_masks=True, has_keypoints=True
        )
        self.content, self.noise, self.found = content, noise, found
        self.rng = np.random.default_rng(0)
        self.images = iter(content["images"])

    def detect_images(self, images, wants):
        assert wants.confidence == 0
        return [self._answer(next(self.images)) for _ in images]

    def _answer(self, image):
        truth = [a for a in self.content["annotations"] if a["image_id"] == image["id"]] if self.found else []
        count, size = len(truth), (image["height"], image["width"])
        boxes = np.array([a["bbox"] for a in truth], np.float32).reshape(count, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [coco_masks.merge(coco_masks.frPyObjects(a["segmentation"], *size)) for a in truth]
        points = np.array([a["keypoints"] for a in truth], np.float32).reshape(count, 17, 3) + (0.5, 0.5, 0)
        boxes, points = (x + self.noise * self.rng.normal(size=x.shape) for x in (boxes, points))
        scores = self.rng.uniform(0.1, 1, count)
        return Detections(*size, boxes, scores, np.ones(count, np.int64), masks, points)


@pytest.fixture
def source(make_data):
    return make_data(count=6, objects=2)


def run(source, reference=False, content=None, **more):
    content = content or read_json(source.annotations)
    results, seen = predict(Oracle(content, **more), source.images, content)
    return score(results, seen, Oracle(content), reference)


@pytest.mark.parametrize("reference", [False, True])
def test_perfect_answers_score_one(source, reference):
    scores = run(source, reference)
    assert {kind: numbers["AP"] for kind, numbers in scores.items()} == {"bbox": 1.0, "segm": 1.0, "keypoints": 1.0}


@pytest.mark.parametrize("reference", [False, True])
def test_no_answers_score_zero(source, reference):
    scores = run(source, reference, found=False)
    assert {numbers["AP"] for numbers in scores.values()} == {0.0}


def test_no_truth_and_no_answers(make_data):
    source = make_data(objects=0)
    assert run(source)["bbox"]["AP"] == -1


@pytest.mark.parametrize("noise", [0.5, 2.0, 6.0])
def test_the_fast_evaluator_agrees_with_the_reference(source, noise):
    fast, reference = run(source, noise=noise), run(source, True, noise=noise)
    assert fast.keys() == reference.keys()
    for kind in fast:
        assert fast[kind] == pytest.approx(reference[kind], abs=1e-9)
    assert 0 < fast["bbox"]["AP"] < 1


def test_crowds_and_ignored_regions_cost_nothing(source):
    content = read_json(source.annotations)
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][1]["ignore"] = 1
    for reference in (False, True):
        assert run(source, reference, content)["bbox"]["AP"] == 1.0


def test_poses_ranked_by_their_joints_too(source):
    """Two poses for each person, the wrong one with the surer box and unsure joints: COCO's own order puts it first."""
    content = read_json(source.annotations)
    good, seen = predict(Oracle(content), source.images, content)
    bad = [{**r, "keypoints": [x + 500 for x in r["keypoints"]], "score": 1.0, "joint_score": 0.01} for r in good]
    good = [{**r, "score": 0.9, "joint_score": 0.8} for r in good]
    found = score(bad + good, seen, Oracle(content), False)["keypoints"]
    assert found["AP"] < 0.6
    assert found["AP_by_joints"] == 1.0


def test_keypoints_count_only_where_they_are_labelled(source):
    content = read_json(source.annotations)
    truth = copy.deepcopy(content)
    truth["images"][0]["keypoints_labelled"] = False
    for annotation in truth["annotations"]:
        if annotation["image_id"] == truth["images"][0]["id"]:
            annotation |= {"keypoints": [0] * 51, "num_keypoints": 0}
    results, _ = predict(Oracle(content), source.images, content)
    assert score(results, truth, Oracle(content), False)["keypoints"]["AP"] == 1.0


def test_masks_count_only_where_all_are_labelled(source):
    content = read_json(source.annotations)
    truth = copy.deepcopy(content)
    del truth["annotations"][0]["segmentation"]
    results, _ = predict(Oracle(content), source.images, content)
    scores = score(results, truth, Oracle(content), False)
    assert scores["segm"]["AP"] == 1.0


def test_masks_are_resampled_as_asked(source):
    asked = []

    class Asked(Oracle):
        def detect_images(self, images, wants):
            asked.append(wants.mask_interpolation)
            return super().detect_images(images, wants)

    content = read_json(source.annotations)
    for given in ((), ("bicubic",)):
        predict(Asked(content), source.images, content, *given)
    assert asked == ["bilinear", "bicubic"]


def test_a_checkpoint_through_the_served_path(source, tiny, tmp_path, capsys):
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "model", checkpoint.build(tiny.spec()), tiny.spec())
    argv = [str(tmp_path / "model"), "--images", str(source.images), "--annotations", str(source.annotations)]
    assert main([*argv, "--json", "--limit", "3"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"bbox", "segm", "keypoints", "data"}
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("bbox")


def test_the_torch_engine_serves_a_batch_like_single_pictures(source, tiny):
    torch.manual_seed(0)
    spec = tiny.spec()
    detector = torch_detector(checkpoint.build(spec), spec)
    assert evaluate(detector, source.images, source.annotations)["bbox"]["AP"] >= 0
    assert detector.bundle.has_masks
    assert detector.bundle.has_keypoints


def test_clear_messages(source, tmp_path, capsys):
    argv = ["--images", str(source.images), "--annotations", str(source.annotations)]
    assert main([str(tmp_path / "none"), *argv]) == 2
    error = capsys.readouterr().err
    assert "holds no config.json" in error
    assert error.count("\n") == 1
