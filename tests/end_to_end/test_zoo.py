"""Each system before the region proposal network, at tiny size, the whole way: trained by the command, exported by the
command, served. What is answered is what the torch model finds."""

import dataclasses
import io
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
from models.checkpoint import CanvasRule, ProposalRule
from service.app import create_app
from service.detector import Wants
from service.settings import Settings
from tests.end_to_end.test_train_to_serve import ready
from tests.models import classics
from tests.training.conftest import DataMaker
from training import svm, train
from training.engine import torch_detector
from training.recipes import RECIPES, Recipe

# Fast R-CNN always; the other kinds of it, and OverFeat, with make test-all.
SYSTEMS = [
    "fast_rcnn_mobilenetv2",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("r_cnn_mobilenetv2", "spp_net_mobilenetv2", "overfeat_mobilenetv2")
    ),
]


def tiny(name: str) -> Recipe:
    recipe = RECIPES[name]()
    sizes: dict[str, Any] = {"hidden": 32, "scales": [32, 20]} if name.startswith("overfeat") else {"fc": 32}
    return dataclasses.replace(
        recipe,
        classes=("person",),
        canvas=CanvasRule(short_side=64, long_side=96, antialias=True),
        options={**sizes, "max_detections": 20},
        proposals=recipe.proposals and ProposalRule("sliding_window", max_proposals=80),
        steps=12,
        warmup_steps=2,
        base_lr=1e-3,
        ema_decay=0.0,
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_trains_exports_and_serves(
    name: str, make_data: DataMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(name)
    monkeypatch.setitem(RECIPES, "tiny", lambda: recipe)
    monkeypatch.setattr(svm, "COST", 1.0)  # the paper's is for thousands of objects
    data = make_data(count=4, objects=1, masks=False, keypoints=False)
    runs, bundles = tmp_path / "runs", tmp_path / "bundles"
    torch.manual_seed(0)
    model, spec = checkpoint.build(recipe.spec()).eval(), recipe.spec()
    classics.spread(model)
    checkpoint.save(tmp_path / "start", model, spec)
    argv = ["tiny", "--data", f"toy={data.images}:{data.annotations}", "--out", str(runs), "--device", "cpu"]
    argv += [
        "--init",
        str(tmp_path / "start"),
        "--workers",
        "0",
        "--threads",
        "2",
        "--eval",
        f"{data.images}:{data.annotations}",
    ]
    assert train.main(argv) == 0
    result = runs / ("fitted" if recipe.fits_machines else "last")
    assert checkpoint.read_config(result)["provenance"]["step"] == recipe.steps
    model, spec = checkpoint.load(result)
    assert spec.options.get("is_fitted", False) == recipe.fits_machines

    capsys.readouterr()
    argv = [str(result), "--images", str(data.images), "--annotations", str(data.annotations), "--json"]
    assert training.evaluate.main([*argv, "--cache", str(tmp_path / "cache")]) == 0
    scores = json.loads(capsys.readouterr().out)["bbox"]
    assert {"AP", "AP50", "VOC", "VOC07"} <= scores.keys()

    monkeypatch.setattr(verify, "BATCHES", (2,))  # the certificate has tests of its own
    argv = [str(result), "--out", str(bundles / "tiny" / "1"), "--engines", "onnx", "openvino"]
    assert to_onnx.main(argv) == 0
    reference, wants = torch_detector(model, spec), Wants(confidence=0.05)
    total = 0
    for engine in ("onnx", "openvino"):
        with TestClient(create_app(Settings(bundles=bundles, engine=engine, warm_seconds=0))) as client:
            ready(client)
            for path in sorted(data.images.iterdir()):
                pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
                stream = io.BytesIO()
                PIL.Image.fromarray(pixels).save(stream, "PNG")
                answer = client.post("/detect?confidence=0.05", content=stream.getvalue())
                assert answer.status_code == 200, answer.text
                wanted = reference.detect_image(pixels, wants)
                total += same(answer.json()["detections"], wanted.boxes, wanted.scores)
            if recipe.proposals:
                given = {"proposals": "[[0, 0, 40, 50], [10, 10, 60, 60]]", "confidence": "0.05"}
                answer = client.post("/detect", params=given, content=stream.getvalue())
                canvas = reference.fit(pixels, np.array([[0, 0, 40, 50], [10, 10, 60, 60]], np.float32))
                wanted = reference.finish(reference.run([canvas], [wants])[0])
                total += same(answer.json()["detections"], wanted.boxes, wanted.scores)
    assert total > 0, "nothing was compared"


def same(rows: list[dict[str, Any]], boxes: np.ndarray, scores: np.ndarray) -> int:
    assert len(rows) == len(boxes)
    np.testing.assert_allclose([row["score"] for row in rows], scores, atol=1e-3)
    np.testing.assert_allclose(np.array([row["box"] for row in rows]).reshape(-1, 4), boxes, atol=0.06)
    return len(rows)
