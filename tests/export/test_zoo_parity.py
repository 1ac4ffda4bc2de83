"""One bundle of each zoo model, at tiny size, against torch: any batch, two canvases, also with nothing to find.

Then it gets its certificate and answers over HTTP what evaluation finds. That each trains is in test_networks.py.
"""

import io
from dataclasses import replace

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from starlette.testclient import TestClient

from export import verify
from export.to_onnx import certify, write_bundle
from export.verify import TorchReference
from models.network import Predictions
from service.app import create_app
from service.bundle import Bundle
from service.detector import Wants
from service.engines import Detected, Engine, open_engine
from service.images import fit
from service.settings import Settings
from tests.models.tiny import SLOW, VARIANTS, blank, make, pictures, stacked
from tests.service.toy import wait_until
from training.engine import torch_detector

CANVASES = ((96, 128), (160, 96))


# Slow to export, or made of parts that another one here has: mask_keypoint_rcnn_r50_fpn has both heads.
LATER = SLOW | {"mask_rcnn_r50_c4", "retinanet_r50_fpn_v2", "mask_rcnn_r50_fpn", "keypoint_rcnn_r50_fpn"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in VARIANTS]


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    model, spec = make(request.param)
    directory = tmp_path_factory.mktemp("bundles") / request.param / "1"
    directory.mkdir(parents=True)
    write_bundle(model, spec, directory, (request.param, "1"), {})
    return model, Bundle.read(directory), spec


def test_only_standard_operators(exported) -> None:
    _, bundle, _ = exported
    for artifact in bundle.manifest.artifacts:
        graph = onnx.load(bundle.directory / artifact.file)
        onnx.checker.check_model(graph)
        assert {opset.domain for opset in graph.opset_import} <= {"", "ai.onnx"}


@pytest.mark.parametrize("choice", ["onnx", "openvino"])
def test_agrees_with_torch(exported, choice) -> None:
    model, bundle, _ = exported
    engine = open_engine(bundle, choice).engine
    total = 0
    for canvas in CANVASES:
        height, width = canvas
        sizes = [(height, width), (height - 10, width), (height, width - 30), (height - 33, width - 5)]
        images = stacked(pictures(canvas, sizes), blank(canvas))
        for chosen in ([0], [1, 4], [3, 4, 2, 0, 1]):
            total += compare(TorchReference(model), engine, images[0][chosen].numpy(), images[1][chosen].numpy())
    engine.close()
    assert total > 20, "nothing was compared"


def compare(reference: TorchReference, engine: Engine, images: np.ndarray, sizes: np.ndarray) -> int:
    wanted, found = reference.detect(images, sizes), engine.detect(images, sizes)
    np.testing.assert_array_equal(found.count, wanted.count.numpy())
    assert bool((np.diff(found.scores, axis=1) <= 0).all())
    found = in_order_of(wanted, found)
    np.testing.assert_array_equal(found.labels, wanted.labels.numpy())
    np.testing.assert_allclose(found.boxes, wanted.boxes.numpy(), atol=0.05, rtol=0)
    np.testing.assert_allclose(found.scores, wanted.scores.numpy(), atol=1e-4, rtol=0)
    heads = reference.heads(wanted)
    valid = np.arange(found.boxes.shape[1]) < found.count[:, None]
    image = np.broadcast_to(np.arange(len(images))[:, None], valid.shape)[valid]
    rois = np.concatenate([image[:, None], found.boxes[valid]], axis=1).astype(np.float32)
    if "probabilities" in heads:
        masks = engine.masks(found.features, rois, found.labels[valid])
        np.testing.assert_allclose(masks, heads["probabilities"], atol=1e-3, rtol=0)
    if "heatmaps" in heads:
        maps = engine.keypoints(found.features, rois)
        np.testing.assert_allclose(maps, heads["heatmaps"], atol=1e-2, rtol=0)
    return int(found.count.sum())


def in_order_of(wanted: Predictions, found: Detected) -> Detected:
    """Equal scores come in any order, and RoIPool gives the same ones to RoIs of the same cells."""
    order = np.broadcast_to(np.arange(found.boxes.shape[1]), found.scores.shape).copy()
    for image, count in enumerate(found.count.tolist()):
        theirs = wanted.boxes[image, :count].numpy(), wanted.labels[image, :count].numpy()
        pairs = verify.match(*theirs, found.boxes[image, :count], found.labels[image, :count])
        assert len(pairs) == count
        order[image, [row for row, _ in pairs]] = [column for _, column in pairs]
    rows = np.arange(len(order))[:, None]
    numbers = (each[rows, order] for each in (found.boxes, found.scores, found.labels))
    return Detected(found.count, *numbers, features=found.features)


@torch.no_grad()
def test_a_blank_picture_has_no_detections(exported) -> None:
    """So that the batches above do hold a picture with none."""
    model, bundle, _ = exported
    if bundle.name == "retinanet_r50_fpn_v2":
        pytest.skip("GroupNorm stretches what little there is in a blank picture")
    images, sizes = blank(CANVASES[0])
    assert int(TorchReference(model).detect(images.numpy(), sizes.numpy()).count.sum()) == 0


def test_it_is_certified_and_serves_what_is_evaluated(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bundle, spec = exported
    images = pictures((120, 150), [(120, 150), (120, 150)], seed=3)[0].numpy()
    monkeypatch.setattr(verify, "BATCHES", (2,))
    manifest = certify(model, bundle.directory, list(images), "tests", [("onnx", "float32")])
    assert manifest.parity["engines"][0]["matched"] > 4
    detector = torch_detector(model, spec)
    canvas = fit(images[0], bundle.manifest.canvas)
    wanted = detector.finish(detector.run([canvas], [replace(Wants(), confidence=0.06)])[0])
    stream = io.BytesIO()
    PIL.Image.fromarray(images[0]).save(stream, "PNG")
    settings = Settings(bundles=bundle.directory.parents[1], engine="onnx", warm_seconds=0)
    with TestClient(create_app(settings)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, 60)
        answer = client.post("/detect?confidence=0.06", content=stream.getvalue())
    assert answer.status_code == 200, answer.text
    found = answer.json()["detections"]
    assert [spec.classes.index(each["label"]) for each in found] == wanted.labels.tolist()
    np.testing.assert_allclose([each["score"] for each in found], wanted.scores, atol=1e-3)
    assert len(found) >= 3
    assert all(("mask" in each) == (model.mask_head is not None) for each in found)
    assert all(("keypoints" in each) == (model.keypoint_head is not None) for each in found)
