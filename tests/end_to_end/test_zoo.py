"""Every name of the zoo at tiny size, the whole way and by the commands: trained, evaluated, exported with its
certificate, served. What is answered is what the torch model finds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from starlette.testclient import TestClient

import training.evaluate
from export import to_onnx, verify
from models import checkpoint
from models.checkpoint import COCO_PERSON
from models.zoo import MODELS
from service.app import create_app
from service.detector import Detections, Wants
from service.settings import Settings
from tests.end_to_end.test_train_to_serve import ready
from tests.models import classics, tiny
from tests.training.conftest import DataMaker
from training import svm, train
from training.compose import Augmentation
from training.data import Source
from training.engine import torch_detector
from training.recipes import RECIPES, Recipe

SPECS = {**tiny.SPECS, **classics.SPECS}
# One that takes proposals; the person model has a test of its own. All others come with make test-all.
QUICK = {"fast_rcnn_mobilenetv2"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
CLASSES = ("person", "ball")
GIVEN = [[0.0, 0.0, 40.0, 50.0], [10.0, 10.0, 60.0, 60.0]]
WANTS = Wants(confidence=0.06)


def small(name: str) -> Recipe:
    """The recipe of that name on the narrow model and small canvas of the other tests, for two gentle steps."""
    recipe, spec = RECIPES[name](), SPECS[name]
    return dataclasses.replace(
        recipe,
        classes=CLASSES[: len(spec.classes)],
        keypoints=COCO_PERSON if recipe.keypoints else None,
        canvas=spec.canvas,
        options=spec.options,
        proposals=spec.proposals,
        augmentation=Augmentation(),
        steps=2,
        batch_size=2,
        warmup_steps=0,
        base_lr=1e-5,
        ema_decay=0.0,
    )


@pytest.mark.parametrize("name", NAMES)
def test_trains_is_evaluated_exports_and_serves(
    name: str, make_data: DataMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small(name)
    monkeypatch.setitem(RECIPES, name, lambda: recipe)
    # The paper's is for thousands of objects. With 1, machines that learned four dull pictures have margins of 15 on
    # the export's, where float32's sigmoid gives two that are a tenth apart one score: either box may then be kept.
    monkeypatch.setattr(svm, "COST", 0.1)
    monkeypatch.setattr(verify, "BATCHES", (2,))  # the certificate has tests of its own
    monkeypatch.setattr(verify, "MOST_PROPOSALS", 16)
    data = make_data(count=4, objects=1, change=two_classes if len(recipe.classes) > 1 else lambda content: None)
    result = trained(name, recipe, data, tmp_path)

    capsys.readouterr()
    argv = [str(result), "--images", str(data.images), "--annotations", str(data.annotations), "--json"]
    assert training.evaluate.main([*argv, "--cache", str(tmp_path / "cache")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {"AP", "AP50", "VOC", "VOC07"} <= scores["bbox"].keys()

    bundle = tmp_path / "bundles" / name / "1"
    assert to_onnx.main([str(result), "--out", str(bundle), "--engines", "onnx", "openvino"]) == 0
    for engine in ("onnx", "openvino"):
        assert compared(result, bundle.parents[1], engine, data) >= 2


def two_classes(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 8, "name": "ball"})
    for annotation in content["annotations"][::2]:
        annotation["category_id"] = 8


def trained(name: str, recipe: Recipe, data: Source, out: Path) -> Path:
    """From a random model that finds much, and of it unequal things; the checkpoint to use."""
    torch.manual_seed(0)
    model = checkpoint.build(recipe.spec()).eval()
    if name in classics.SPECS:
        classics.spread(model)
    else:
        tiny.spread(model, *tiny.margin_and_contrast(name))
    checkpoint.save(out / "start", model, recipe.spec())
    argv = [name, "--data", f"toy={data.images}:{data.annotations}", "--out", str(out / "runs"), "--device", "cpu"]
    assert train.main([*argv, "--init", str(out / "start"), "--workers", "0", "--threads", "2"]) == 0
    result = out / "runs" / ("fitted" if recipe.fits_machines else "last")
    config = checkpoint.read_config(result)
    assert config["provenance"]["step"] == recipe.steps
    assert config["options"].get("is_fitted", False) == recipe.fits_machines
    return result


def compared(result: Path, bundles: Path, engine: str, data: Source) -> int:
    """How many detections over HTTP were those of the checkpoint."""
    model, spec = checkpoint.load(result)
    reference = torch_detector(model, spec)
    total = 0
    with TestClient(create_app(Settings(bundles=bundles, engine=engine, warm_seconds=0))) as client:
        ready(client)
        for path in sorted(data.images.iterdir()):
            answer = client.post("/detect", params={"confidence": WANTS.confidence}, content=path.read_bytes())
            pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
            total += same(answer, reference.detect_image(pixels, WANTS), spec)
        if spec.proposals:
            params = {"confidence": WANTS.confidence, "proposals": json.dumps(GIVEN)}
            answer = client.post("/detect", params=params, content=path.read_bytes())
            canvas = reference.fit(pixels, np.array(GIVEN, np.float32))
            total += same(answer, reference.finish(reference.run([canvas], [WANTS])[0]), spec)
    return total


def same(answer: Any, wanted: Detections, spec: checkpoint.Spec) -> int:
    assert answer.status_code == 200, answer.text
    rows = answer.json()["detections"]
    labels = np.array([spec.classes.index(row["label"]) for row in rows], np.int64)
    boxes = np.array([row["box"] for row in rows]).reshape(-1, 4)
    # Where a pooler gives two RoIs the same cells, their scores are equal and either may come first.
    pairs = verify.match(wanted.boxes, wanted.labels, boxes, labels)
    assert len(rows) == len(wanted.boxes) == len(pairs)
    for ours, theirs in pairs:
        assert rows[theirs]["score"] == pytest.approx(wanted.scores[ours], abs=1e-3)
        np.testing.assert_allclose(boxes[theirs], wanted.boxes[ours], atol=0.06)
        assert ("mask" in rows[theirs]) == (wanted.masks is not None)
        assert ("keypoints" in rows[theirs]) == (wanted.keypoints is not None)
    return len(rows)
