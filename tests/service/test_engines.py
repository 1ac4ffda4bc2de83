import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from service.bundle import Bundle, write_manifest
from service.detector import Detector, Wants
from service.engines import golden_rois, open_engine, verify_golden
from service.errors import BundleError, EngineMismatch, EngineUnavailable
from tests.service.toy import ToyEngine, picture, write_bundle

ENGINES = ["onnx", pytest.param("openvino", marks=pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"))]  # fmt: skip


@pytest.mark.parametrize("choice", ENGINES)
def test_real_engines_agree_with_the_golden_outputs(bundles, choice):
    bundle = Bundle.read(bundles / "toy" / "1")
    opened = open_engine(bundle, choice, threads=1)
    agreement = verify_golden(opened.engine, bundle)
    assert agreement.num_matched == 7
    assert agreement.mask is not None
    assert agreement.mask < 1e-5
    assert opened.engine.name == choice
    opened.engine.close()


@pytest.mark.parametrize("choice", ENGINES)
def test_batch_equals_single(bundles, choice):
    bundle = Bundle.read(bundles / "toy" / "1")
    detector = Detector(bundle, open_engine(bundle, choice, threads=1).engine)
    images = [picture(64, 96, red=red, seed=red) for red in (250, 0, 120)]
    wants = Wants(confidence=0.2)
    together = detector.detect_images(images, wants)
    for image, one in zip(images, together, strict=True):
        alone = detector.detect_image(image, wants)
        np.testing.assert_allclose(alone.boxes, one.boxes, atol=1e-4)
        np.testing.assert_allclose(alone.scores, one.scores, atol=1e-6)
        np.testing.assert_allclose(alone.keypoints, one.keypoints, atol=1e-3)
        assert alone.masks == one.masks


@pytest.mark.parametrize("choice", ENGINES)
def test_features_outlive_the_next_detect(bundles, choice):
    """An engine may reuse its memory only once the features are dropped."""
    bundle = Bundle.read(bundles / "toy" / "1")
    engine = open_engine(bundle, choice, threads=1).engine
    golden = bundle.golden()
    rois, labels = golden_rois(golden)
    first = engine.detect(golden["images"], golden["sizes"])
    for _ in range(3):
        engine.detect(np.zeros_like(golden["images"]), golden["sizes"])
    np.testing.assert_allclose(engine.masks(first.features, rois, labels), golden["probabilities"], atol=1e-5)


def test_auto_says_why(bundles, monkeypatch):
    bundle = Bundle.read(bundles / "toy" / "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    opened = open_engine(bundle, "auto", threads=1)
    assert opened.engine.name == "onnx"
    assert opened.reason.startswith("auto: openvino is not installed; not tensorrt: the bundle has no")
    with pytest.raises(EngineUnavailable, match="LIMNER_ENGINE=auto"):
        open_engine(bundle, "openvino")
    with pytest.raises(EngineUnavailable, match="LIMNER_PRECISION"):
        open_engine(bundle, "auto", precision="bfloat16")


def test_a_broken_graph_is_a_bundle_error(tmp_path):
    directory = write_bundle(tmp_path)
    (directory / "detect.onnx").write_bytes(b"not a graph")
    bundle = Bundle(directory, Bundle.read(write_bundle(tmp_path, version="2")).manifest)
    for choice in ("onnx", "openvino"):
        if importlib.util.find_spec({"onnx": "onnxruntime"}.get(choice, choice)):
            with pytest.raises(BundleError, match="detect.onnx"):
                open_engine(bundle, choice)


class Straying(ToyEngine):
    """Differs from the golden outputs in one respect."""

    def __init__(self, **by: float) -> None:
        super().__init__()
        self.by = by

    def detect(self, images, sizes):
        found = super().detect(images, sizes)
        found.boxes[...] += self.by.get("box", 0)
        found.scores[...] += self.by.get("score", 0)
        found.labels[...] += int(self.by.get("label", 0))
        found.count[...] -= int(self.by.get("count", 0))
        return found

    def masks(self, features, rois, labels):
        return super().masks(features, rois, labels) + self.by.get("mask", 0)

    def keypoints(self, features, rois):
        return super().keypoints(features, rois) + self.by.get("heatmap", 0)


@pytest.mark.parametrize(
    ("by", "told"),
    [
        ({"box": 0.2}, "box_px differs by 0.2px, at most 0.05px"),
        ({"score": 0.01}, "score differs by 0.01"),
        ({"label": 1}, "no partner"),
        ({"count": 1}, "no partner"),
        ({"mask": 0.1}, "mask differs by 0.1"),
        ({"heatmap": 0.1}, "heatmap_fraction"),
        ({"mask": float("nan")}, "mask differs by nan"),
    ],
)
def test_the_golden_check_can_fail_and_says_by_how_much(bundles, by, told):
    bundle = Bundle.read(bundles / "toy" / "1")
    with pytest.raises(EngineMismatch, match=told):
        verify_golden(Straying(**by), bundle)
    verify_golden(Straying(box=0.01, score=1e-4, mask=1e-4), bundle)


def test_neighbours_of_equal_score_may_swap(bundles):
    bundle = Bundle.read(bundles / "toy" / "1")

    class Swapping(ToyEngine):
        def detect(self, images, sizes):
            found = super().detect(images, sizes)
            order = [1, 0, 2, 3]
            for name in ("boxes", "labels"):
                array = getattr(found, name)
                array[0] = array[0][order]
            found.scores[0] = found.scores[0][order]
            return found

    assert verify_golden(Swapping(), bundle).num_unmatched == 0


def test_a_detection_at_the_score_floor_may_come_or_go(tmp_path):
    directory = write_bundle(tmp_path)
    with np.load(directory / "golden.npz") as archive:
        golden = dict(archive)
    last = int(golden["count"][1]) - 1
    golden["scores"][1, last] = 0.0504  # the engine will not find it as close as this
    np.savez(directory / "golden.npz", **golden)
    bundle = Bundle.read(directory)

    class Losing(ToyEngine):
        def detect(self, images, sizes):
            found = super().detect(images, sizes)
            found.count[1] -= 1
            return found

    assert verify_golden(Losing(), bundle).num_unmatched == 0


def test_a_bundle_without_heads(tmp_path):
    bundle = Bundle.read(write_bundle(tmp_path, heads=()))
    engine = open_engine(bundle, "onnx", threads=1).engine
    agreement = verify_golden(engine, bundle)
    assert (agreement.mask, agreement.heatmap_fraction) == (None, None)
    found = Detector(bundle, engine).detect_image(picture())
    assert (found.masks, found.keypoints) == (None, None)


def test_manifest_round_trip(bundles, tmp_path):
    manifest = Bundle.read(bundles / "toy" / "1").manifest
    path = write_manifest(tmp_path, manifest)
    assert json.loads(path.read_text())["name"] == "toy"
    assert list(Path(tmp_path).iterdir()) == [path]


def test_auto_says_why_it_is_no_gpu(bundles):
    opened = open_engine(Bundle.read(bundles / "toy" / "1"), "auto", threads=1)
    for told in (
        "not tensorrt: the bundle has no",
        "not aoti: the bundle has no",
        "not onnx on CUDA: this onnxruntime",
    ):
        assert told in opened.reason
    opened.engine.close()


class OnCuda:
    """A session as one on a GPU would be asked, which runs on the CPU all the same."""

    def __init__(self, session, bound: list) -> None:
        self.session, self.bound = session, bound

    def __getattr__(self, name: str):
        return getattr(self.session, name)

    def io_binding(self):
        binding = self.session.io_binding()
        bind = binding.bind_output

        def bind_output(name: str, device: str) -> None:
            self.bound.append((name, device))
            bind(name, "cpu")

        binding.bind_output = bind_output
        return binding


@pytest.fixture
def cuda_sessions(monkeypatch) -> list:
    from service.engines import onnx

    bound, session = [], onnx._session
    monkeypatch.setattr(onnx.onnxruntime, "get_available_providers", lambda: [onnx.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnx.onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnx, "_num_gpus", lambda: 1)
    monkeypatch.setattr(
        onnx, "_session", lambda bundle, stage, threads, device: OnCuda(session(bundle, stage, threads, "cpu"), bound)
    )
    return bound


@pytest.mark.parametrize("choice", ["auto", "onnx"])
def test_onnx_runtime_on_a_gpu_keeps_the_features_there(bundles, cuda_sessions, choice):
    bundle = Bundle.read(bundles / "toy" / "1")
    opened = open_engine(bundle, choice, precision="auto")
    assert "CUDA" in opened.reason
    assert opened.split is None
    assert verify_golden(opened.engine, bundle).num_matched == 7
    assert dict(cuda_sessions) == {
        **dict.fromkeys(("p2", "p3", "p4", "p5"), "cuda"),
        **dict.fromkeys(("count", "boxes", "scores", "labels", "probabilities", "heatmaps"), "cpu"),
    }


@pytest.mark.parametrize(("count", "told"), [(None, "no NVIDIA driver"), (0, "no NVIDIA GPU")])
def test_onnx_runtime_without_a_gpu_says_so(bundles, cuda_sessions, monkeypatch, count, told):
    from service.engines import onnx

    monkeypatch.setattr(onnx, "_num_gpus", lambda: count)
    opened = open_engine(Bundle.read(bundles / "toy" / "1"), "onnx", threads=1)
    assert told in opened.reason
    assert opened.split is not None
