"""The lecture's rows on COCO: what is trained and measured once, how far a number can be trusted, and the page."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from bench import lecture_coco, lecture_coco_runs, lecture_drawing
from bench.lecture_coco_runs import Bench, resampled, with_classes
from models.checkpoint import CanvasRule, ProposalRule
from training import voc


def content(pictures: int, seed: int = 0) -> dict[str, Any]:
    """Two classes, up to three objects a picture, some of them ignored."""
    rng = np.random.default_rng(seed)
    annotations = [
        {"id": 1, "image_id": image, "category_id": int(rng.integers(1, 3)), "bbox": [10.0 * k, 5.0, 8.0, 9.0],
         "area": 72.0, "iscrowd": int(rng.random() < 0.2)}
        for image in range(pictures) for k in range(int(rng.integers(1, 4)))
    ]  # fmt: skip
    for number, each in enumerate(annotations, start=1):
        each["id"] = number
    images = [{"id": each, "file_name": f"{each}.png", "height": 48, "width": 64} for each in range(pictures)]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "kite"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections(truth: dict[str, Any], seed: int = 1) -> list[dict[str, Any]]:
    """Of every object one that is right or beside it, and of some a second one."""
    rng = np.random.default_rng(seed)
    return [
        {"image_id": each["image_id"], "category_id": each["category_id"], "score": float(rng.random()),
         "bbox": [each["bbox"][0] + (40 if rng.random() < 0.4 else 1), *each["bbox"][1:]]}
        for each in truth["annotations"] for _ in range(int(rng.integers(1, 3)))
    ]  # fmt: skip


def test_a_resampling_is_the_map_of_the_pictures_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lecture_coco_runs, "RESAMPLINGS", 4)
    truth = content(9)
    results = detections(truth)
    drawn = np.random.default_rng(0).multinomial(9, [1 / 9] * 9, 4)
    wanted = []
    for times in drawn:
        copies = [(image, copy) for image, count in enumerate(times) for copy in range(count)]
        again = {
            "categories": truth["categories"],
            "annotations": [
                {**each, "image_id": copy} for copy in copies for each in truth["annotations"]
                if each["image_id"] == copy[0]
            ],
        }  # fmt: skip
        found = [{**each, "image_id": copy} for copy in copies for each in results if each["image_id"] == copy[0]]
        wanted.append([voc.average_precisions(found, again)["area"].get(category, np.nan) for category in (1, 2)])
    told = resampled(results, truth)
    np.testing.assert_allclose(np.transpose([told["person"], told["kite"]]), wanted, atol=1e-9)
    assert len(set(told["person"])) > 1


def test_only_pictures_with_a_class_are_learned_from() -> None:
    kept = with_classes(content(9))
    persons = {each["image_id"] for each in content(9)["annotations"] if each["category_id"] == 1}
    assert {each["id"] for each in kept["images"]} == persons == {each["image_id"] for each in kept["annotations"]}
    assert len(persons) < 9


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """On four small pictures, one step, sliding windows."""
    truth, data = content(4), tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    (data / "images").mkdir()
    for name in ("train", "dev"):
        (data / "annotations" / f"instances_{name}.json").write_text(json.dumps(truth))
    for image in truth["images"]:
        noise = np.random.default_rng(image["id"]).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(data / "images" / image["file_name"])
    trunk = tmp_path / "trunk.pth"
    torch.save({f"features.{name}": value for name, value in  # as torchvision names them
                torchvision.models.mobilenet_v2(weights=None).features.state_dict().items()}, trunk)  # fmt: skip
    windows = ProposalRule("sliding_window", max_proposals=50)
    monkeypatch.setattr(lecture_coco_runs, "SEARCHED", windows)
    short = {
        name: dataclasses.replace(
            recipe, canvas=CanvasRule(64, 64), steps=1, warmup_steps=0, proposals=recipe.proposals and windows
        )
        for name, recipe in lecture_coco_runs.recipes().items()
    }
    monkeypatch.setattr(lecture_coco_runs, "recipes", lambda: short)
    torch.set_num_threads(1)
    return Bench(data, trunk, tmp_path / "cache")


def test_a_row_is_trained_and_measured_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lecture_coco_runs.row_4(bench)
    assert {path.name for path in (bench.cache / "runs").iterdir()} == {"fast", "fast_classes", "fast_stages"}
    first = {path: path.read_bytes() for path in bench.results.iterdir()}
    monkeypatch.setattr(lecture_coco_runs.train, "main", lambda *_: pytest.fail("trained again"))
    lecture_coco_runs.row_4(bench)
    assert {path: path.read_bytes() for path in bench.results.iterdir()} == first
    found = json.loads((bench.results / "fast.json").read_text())
    assert found["pictures"] == 4
    assert found["cpu_s"] > 0
    assert set(found["scores"]) >= {"VOC", "AP", "AP50"}
    first, second = (  # stages: the classifier stays as it was
        lecture_coco_runs.checkpoint.load(bench.trained(name) / "last")[0].state_dict()
        for name in ("fast_classes", "fast_stages")
    )
    changed = {name for name, value in first.items() if not torch.equal(value, second[name])}
    assert changed == {"box_head.deltas.weight", "box_head.deltas.bias"}


def test_boxes_that_stay_proposals(bench: Bench) -> None:
    model, spec = lecture_coco_runs.without_deltas(*lecture_coco_runs.checkpoint.load(bench.trained("fast") / "last"))
    boxes = torch.tensor([[[4.0, 4, 30, 40], [10, 8, 50, 60]]])
    with torch.no_grad():
        found = model(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]), boxes)
    distance = (found.boxes[0, : int(found.count[0]), None] - boxes).abs().amax(-1).amin(-1)
    assert int(found.count[0]) > 0
    assert float(distance.max()) < 1e-4


def test_recall_of_boxes_that_are_the_objects_is_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = np.array([[0, 5, 8, 14], [10, 5, 18, 14], [20, 5, 28, 14]], np.float32)
    monkeypatch.setattr(bench, "searched", lambda image, rule, count: boxes[:count])
    assert bench.recall(None) == {"recall": 1.0, "average": 1.0, "boxes": 3.0}
    assert bench.recall(1)["recall"] < 1.0
    more = bench.recall(None, dense=20)
    assert more["boxes"] == 23.0


def measured(voc: float) -> dict[str, Any]:
    return {
        "scores": {"VOC": voc, "AP": voc / 2}, "classes": {"person": 2 * voc},
        "resampled": {"person": [2 * voc - 0.02, 2 * voc + 0.02], "car": [0.0, 0.0]},
        "cpu_s": 120.0, "test_s": 0.25,
    }  # fmt: skip


def test_the_page_holds_the_rows_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lecture_drawing, "PLOTS", tmp_path / "plots")
    (tmp_path / "coco").mkdir()
    assert lecture_coco.sections(tmp_path) == []
    for number, name in enumerate(("fast", "fast_fc6", "fast_11", "fast_all", "faster")):
        (tmp_path / "coco" / f"{name}.json").write_text(json.dumps(measured(0.1 + number / 100)))
    (section,) = lecture_coco.sections(tmp_path)
    assert section.number == 3
    assert "| block 11 | 2.0 | 12.0 ± 1.0 | 24.0 ± 2.0 | +2.0 ± 0.0 | 6.0 |" in section.body
    assert "![" in section.body
    first = (tmp_path / "plots" / "layers.svg").read_bytes()
    lecture_coco.sections(tmp_path)
    assert (tmp_path / "plots" / "layers.svg").read_bytes() == first
    (tmp_path / "coco" / "seconds.json").write_text(json.dumps({"search": 0.6, "fast": 0.08, "faster": 0.1}))
    assert [each.number for each in lecture_coco.sections(tmp_path)] == [3, 6]
