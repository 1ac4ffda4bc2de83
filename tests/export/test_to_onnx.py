"""`limner export onnx` from the checkpoint to the published bundle: certificate, refusals, and nothing half done."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import PIL.Image
import pytest
import torch

from export import to_onnx, verify
from models import checkpoint
from models.regions import RegionNetwork
from service.bundle import Bundle
from service.engines import open_engine, rounding, verify_golden
from service.images import Canvas
from tests.models import tiny

NAME = "person_mobilenetv2_fpn"
ENGINES = ["--engines", "onnx", "openvino"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "best"
    checkpoint.save(directory, *tiny.make(NAME), {"step": 7})
    return directory


@pytest.fixture(scope="module")
def published(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "person" / "1"
    assert to_onnx.main([str(trained), "--out", str(out), *ENGINES]) == 0
    return out


@pytest.fixture
def quick(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes most of an export's time, and comparing many pictures; these tests are about what surrounds it."""

    def copy(_module: torch.nn.Module, stage: str, _inputs: list[str], _outputs: list[str], path: Path) -> None:
        shutil.copy(published / f"{stage}.onnx", path)

    synthetic = to_onnx.synthetic
    monkeypatch.setattr(to_onnx, "save_graph", copy)
    monkeypatch.setattr(to_onnx, "synthetic", lambda _count: synthetic(1))
    monkeypatch.setattr(verify, "BATCHES", (2,))


def changed(trained: Path, directory: Path, change: Callable[[RegionNetwork], None]) -> Path:
    model, spec = checkpoint.load(trained)
    with torch.no_grad():
        change(model)
    checkpoint.save(directory, model, spec)
    return directory


def test_the_bundle_is_what_the_service_accepts(published: Path) -> None:
    bundle = Bundle.read(published)
    for choice in ("onnx", "openvino"):
        engine = open_engine(bundle, choice).engine
        agreement = verify_golden(engine, bundle)
        engine.close()
        assert agreement.num_matched >= 5
        assert agreement.num_unmatched == 0
        assert agreement.box_px < 0.05
        assert agreement.mask is not None
        assert agreement.mask < 1e-3
    assert sorted(path.name for path in published.iterdir()) == [
        "detect.onnx", "golden.npz", "keypoints.onnx", "manifest.json", "masks.onnx",
    ]  # fmt: skip
    assert [path.name for path in published.parent.iterdir()] == ["1"]


def test_the_manifest_says_what_was_compared_and_where_it_came_from(published: Path) -> None:
    manifest = Bundle.read(published).manifest
    spec = tiny.SPECS[NAME]
    assert (manifest.name, manifest.version) == ("person", "1")
    assert tuple(manifest.classes) == spec.classes
    assert manifest.keypoints is not None
    assert tuple(manifest.keypoints.names) == tiny.JOINTS.names
    assert (manifest.canvas.short_side, manifest.canvas.long_side) == (spec.canvas.short_side, spec.canvas.long_side)
    assert manifest.limits.max_detections == spec.options["max_detections"]
    assert manifest.provenance["training"] == {"step": 7}
    for certificate in manifest.parity["engines"]:
        assert certificate["matched"] >= 20
        assert certificate["unmatched"] == 0
        assert certificate["box_px"]["worst"] < 0.05
        assert certificate["score"]["worst"] < 1e-4
    assert [certificate["engine"] for certificate in manifest.parity["engines"]] == ["onnx", "openvino"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.box_head.deltas.bias.add_(0.1), r"box_px differs by \d"),
        (lambda model: model.box_head.classes.bias[1].add_(0.02), r"score differs by 0\.00\d"),
        (lambda model: model.box_head.classes.bias[0].add_(9.0), r"\d+ detections have no counterpart"),
        (lambda model: model.mask_head.logits.bias.add_(1.0), r"mask IoU is 0\.\d+, at least 0\.99"),
        (lambda model: model.keypoint_head.upsample.weight.mul_(-1), r"keypoint_px differs by \d+"),
    ],
    ids=["boxes", "scores", "nothing found", "masks", "keypoints"],
)
def test_a_model_that_disagrees_is_refused_by_how_much(trained: Path, tmp_path: Path, capsys, change, message) -> None:
    other = changed(trained, tmp_path / "checkpoint", change)
    out = tmp_path / "bundles" / "person" / "1"
    assert to_onnx.main([str(other), "--out", str(out), "--engines", "onnx"]) == 1
    error = capsys.readouterr().err
    assert "person under onnx (float32) strays from the torch model" in error
    assert re.search(message, error), error
    assert list(out.parent.iterdir()) == []


def test_where_bfloat16_is_refused_the_first_layers_stay_in_float32(published: Path, monkeypatch) -> None:
    bundle, asked = Bundle.read(published), []

    def certify(_model, bundle: Bundle, _canvases, choice: str, precision: str) -> dict[str, str]:
        asked.append(bundle.manifest.compression)
        if not (bundle.manifest.compression and allows):
            raise verify.ParityError("too far")
        return {"engine": choice, "precision": precision}

    monkeypatch.setattr(verify, "certify", certify)
    model, allows = tiny.make(NAME)[0], True
    divided, certificate = to_onnx._certified(model, bundle, [], "openvino", "bfloat16")
    assert certificate == {"engine": "openvino", "precision": "bfloat16"}
    until = divided.manifest.compression["bfloat16"]["float32_until"]
    assert asked == [{}, {"bfloat16": {"float32_until": until}}]
    first, _ = rounding.divided(openvino.Core().read_model(published / "detect.onnx"), until)
    height, width = 128, 192
    images, sizes = np.zeros((1, height, width, 3), np.uint8), np.array([[height, width]])
    found = openvino.compile_model(first, "CPU")({"images": images, "sizes": sizes})[0]
    assert found.shape == (1, 24, height // 4, width // 4)  # what the finest level is made from, in MobileNetV2
    allows = False
    for precision in ("bfloat16", "float32"):
        with pytest.raises(verify.ParityError):
            to_onnx._certified(model, bundle, [], "openvino", precision)


@pytest.mark.usefixtures("quick")
def test_a_graph_altered_on_its_way_is_refused(trained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    write = to_onnx.write_bundle

    def tamper(model, spec, directory: Path, *more):
        manifest = write(model, spec, directory, *more)
        graph = directory / "masks.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
        return manifest

    monkeypatch.setattr(to_onnx, "write_bundle", tamper)
    out = tmp_path / "person" / "1"
    assert to_onnx.main([str(trained), "--out", str(out), *ENGINES]) == 2
    assert "masks.onnx differs from the manifest's sha256" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_an_export_over_a_bundle_replaces_it_whole_or_not_at_all(trained: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "person" / "1"
    command = [str(trained), "--out", str(out), "--engines", "onnx"]
    assert to_onnx.main(command) == 0
    first = (out / "manifest.json").read_bytes()
    (out / "left.txt").write_text("of the old one")
    assert to_onnx.main([*command[:-1], "openvino"]) == 0
    assert not (out / "left.txt").exists()
    assert Bundle.read(out).manifest.parity["engines"][0]["engine"] == "openvino"
    assert (out / "manifest.json").read_bytes() != first
    second = (out / "manifest.json").read_bytes()
    other = changed(trained, tmp_path / "other", lambda model: model.box_head.deltas.bias.add_(0.1))
    assert to_onnx.main([str(other), *command[1:]]) == 1
    assert (out / "manifest.json").read_bytes() == second
    assert [path.name for path in out.parent.iterdir()] == ["1"]
    capsys.readouterr()


@pytest.mark.usefixtures("quick")
def test_the_golden_picture_is_the_one_asked_for(trained: Path, tmp_path: Path) -> None:
    """Its pixels go wherever the bundle goes."""
    picture = to_onnx.synthetic(1)[0][::-1]
    PIL.Image.fromarray(picture).save(tmp_path / "mine.png")
    out = tmp_path / "person" / "1"
    assert (
        to_onnx.main([str(trained), "--out", str(out), "--golden", str(tmp_path / "mine.png"), "--engines", "onnx"])
        == 0
    )
    bundle = Bundle.read(out)
    np.testing.assert_array_equal(bundle.golden()["images"][0], verify.canvases_of([picture], bundle)[0].pixels)


@pytest.mark.usefixtures("quick")
def test_wrong_arguments_in_one_line(trained: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "person" / "1")]
    for argv, message in (
        ([str(tmp_path / "none"), *out], "holds no config.json"),
        ([str(trained), *out, "--pictures", str(tmp_path / "empty")], "no .jpg, .png or .webp"),
        ([str(trained), *out, "--golden", str(tmp_path / "none.png")], "none.png"),
        ([str(trained), *out, "--engines", "tensorflow"], "'tensorflow'"),
        (
            [str(trained), "--out", str(tmp_path / "person" / ".hidden")],
            "'.hidden' cannot be a model's name or version",
        ),
    ):
        assert to_onnx.main(argv) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "person" / "1").exists()


def test_detections_are_matched_by_class_and_overlap() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    labels = np.array([0, 1, 0])
    assert sorted(verify.match(boxes, labels, boxes[::-1], labels[::-1])) == [(0, 2), (1, 1), (2, 0)]
    assert verify.match(boxes[:1], labels[:1], boxes[1:2], labels[1:2]) == []
    assert verify.match(boxes[:1], labels[:1], boxes[:1] + 6, labels[:1]) == []
    assert len(verify.match(boxes[:1].repeat(2, 0), labels[[0, 0]], boxes[:1], labels[:1])) == 1


def test_beside_each_picture_is_a_blank_one_with_nothing_to_find() -> None:
    boxes = np.array([[0.0, 0, 40, 50], [10, 10, 60, 60]], np.float32)
    canvas = Canvas(np.zeros((64, 96, 3), np.uint8), (64, 90), (64, 90), boxes)
    images, sizes, proposals = verify._batch(verify._groups([canvas], 2)[0])
    assert (images[0] == 0).all()
    assert (images[1] == 117).all()
    assert sizes.tolist() == [[64, 90], [64, 90]]
    np.testing.assert_array_equal(proposals[0], boxes)
    assert not proposals[1].any(), "rows without area are padding"
