"""The whole way at tiny size: train, export, serve. What is answered is what the torch model finds."""

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as coco_masks
from starlette.testclient import TestClient

import training.evaluate
from export import to_onnx, verify
from models import checkpoint
from service.app import create_app
from service.detector import Wants
from service.settings import Settings
from tests.models import tiny
from tests.training.conftest import DataMaker, tiny_recipe
from training import train
from training.data import Source
from training.engine import torch_detector
from training.recipes import RECIPES, Recipe


class Trained(NamedTuple):
    data: Source
    checkpoint: Path
    bundles: Path


@pytest.fixture
def trained(make_data: DataMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Eighty steps from a random model that finds too much, and the bundle of what they made."""
    recipe = quick_recipe()
    monkeypatch.setitem(RECIPES, "tiny", lambda: recipe)
    torch.manual_seed(0)
    spec = recipe.spec()
    model = checkpoint.build(spec).eval()
    tiny.spread(model)
    checkpoint.save(tmp_path / "start", model, spec)
    data = make_data(count=4, objects=1)
    runs, bundles = tmp_path / "runs", tmp_path / "bundles"
    argv = ["tiny", "--data", f"toy={data.images}:{data.annotations}", "--out", str(runs), "--init"]
    argv += [str(tmp_path / "start"), "--device", "cpu", "--workers", "0", "--threads", "2"]
    assert train.main(argv) == 0
    last = runs / "last"
    assert checkpoint.read_config(last)["provenance"]["step"] == recipe.steps
    monkeypatch.setattr(verify, "BATCHES", (2,))  # the certificate has tests of its own
    argv = [str(last), "--out", str(bundles / "tiny" / "1"), "--engines", "onnx", "openvino"]
    assert to_onnx.main(argv) == 0
    return Trained(data, last, bundles)


def quick_recipe() -> Recipe:
    """Learns its few pictures by heart."""
    recipe = tiny_recipe()
    plain = replace(recipe.augmentation, mosaic=0.0, copy_paste=0.0, scales=(1.0, 1.0), jitter=0.0)
    return replace(
        recipe, steps=80, base_lr=2e-3, warmup_steps=5, frozen=(), freeze_until="", ema_decay=0.0, augmentation=plain
    )


def test_from_training_to_an_answer_over_http(trained: Trained) -> None:
    model, spec = checkpoint.load(trained.checkpoint)
    reference = torch_detector(model, spec)
    for engine in ("onnx", "openvino"):
        app = create_app(Settings(bundles=trained.bundles, engine=engine))
        with TestClient(app) as client:
            ready(client)
            for path in sorted(trained.data.images.iterdir()):
                pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
                stream = io.BytesIO()
                PIL.Image.fromarray(pixels).save(stream, "PNG")
                answer = client.post("/detect?confidence=0.2", content=stream.getvalue())
                assert answer.status_code == 200, answer.text
                compare(answer.json(), reference.detect_image(pixels, Wants(confidence=0.2)), spec.classes)
    # And the numbers of the two, each measured on its own serving path.
    wanted = training.evaluate.evaluate(reference, trained.data.images, trained.data.annotations)
    assert wanted["bbox"]["AP"] > 0.2
    assert wanted["segm"]["AP"] > 0.2
    for engine in ("onnx", "openvino"):
        detector = training.evaluate.open_detector(trained.bundles / "tiny" / "1", engine, 2, "cpu")
        found = training.evaluate.evaluate(detector, trained.data.images, trained.data.annotations)
        assert found.keys() == wanted.keys() == {"bbox", "segm", "keypoints"}
        for kind, numbers in wanted.items():
            assert found[kind] == pytest.approx(numbers, abs=0.002)


def ready(client: TestClient) -> None:
    end = time.monotonic() + 60
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < end, client.get("/readyz").text
        time.sleep(0.05)


def compare(answer: dict[str, Any], wanted: Any, classes: tuple[str, ...]) -> None:
    rows = answer["detections"]
    assert (answer["image"]["height"], answer["image"]["width"]) == (wanted.height, wanted.width)
    assert len(rows) == len(wanted.boxes) >= 1
    assert [row["label"] for row in rows] == [classes[label] for label in wanted.labels]
    np.testing.assert_allclose([row["score"] for row in rows], wanted.scores, atol=1e-3)
    np.testing.assert_allclose([row["box"] for row in rows], wanted.boxes, atol=0.06)
    for row, mask in zip(rows, wanted.masks, strict=True):
        found, truth = (coco_masks.decode({"size": m["size"], "counts": m["counts"]}) for m in (row["mask"], mask))
        assert (found != truth).sum() <= 0.01 * truth.size
    points = np.array([row["keypoints"] for row in rows])
    gaps = np.hypot(*(points - wanted.keypoints)[..., :2].transpose(2, 0, 1))
    assert np.quantile(gaps, 0.95) < 0.1  # of two equal peaks either may win
    np.testing.assert_allclose(points[..., 2], wanted.keypoints[..., 2], atol=1e-3)
