"""The TensorRT engine against a device that is as lazy as a real one may be; and the choices that need no device."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from service.bundle import Artifact, Bundle, file_sha256, write_manifest
from service.engines import Engine, open_engine, plans, verify_golden
from service.errors import BundleError, EngineFailed, EngineOutOfMemory, EngineUnavailable
from tests.service import fake_gpu
from tests.service.toy import FLOOR, ToyEngine, picture, write_bundle

CANVASES = [(64, 96), (96, 64)]
BATCHES, ROIS = [1, 4], [4, 16]


def add_plans(directory: Path, precision: str = "float32", gpu: str = "sm90", version: str = fake_gpu.VERSION) -> None:
    """What `limner export trt` adds to a bundle, in the fake's own format."""
    folder = directory / f"{gpu}.{precision}"
    folder.mkdir()
    detect = []
    for canvas in CANVASES:
        file = f"detect.{canvas[0]}x{canvas[1]}.plan"
        fake_gpu.write_plan(folder / file, directory / "detect.onnx", canvas, BATCHES, max(BATCHES))
        detect.append({"canvas": canvas, "file": file})
    for head in ("masks", "keypoints"):
        fake_gpu.write_plan(folder / f"{head}.plan", directory / f"{head}.onnx", None, ROIS, max(BATCHES))
    (folder / "golden.npz").write_bytes((directory / "golden.npz").read_bytes())
    described = {
        "precision": precision, "gpu": gpu, "gpu_name": "fake", "tensorrt": version, "batches": BATCHES, "rois": ROIS,
        "detect": detect, "heads": {"masks": "masks.plan", "keypoints": "keypoints.plan"}, "golden": "golden.npz",
    }  # fmt: skip
    (folder / plans.PLANS).write_text(json.dumps(described))
    manifest = Bundle.read(directory).manifest
    added = [
        Artifact(
            file=f"{folder.name}/{path.name}", stage=None, sha256=file_sha256(path), runtime="tensorrt",
            runtime_version=version, precision=precision, gpu=gpu,
        )
        for path in sorted(folder.iterdir())
    ]  # fmt: skip
    write_manifest(directory, manifest.model_copy(update={"artifacts": [*manifest.artifacts, *added]}))


@dataclass
class Rig:
    machine: fake_gpu.Machine
    bundle: Bundle
    engine: Engine


def install(monkeypatch: pytest.MonkeyPatch, machine: fake_gpu.Machine) -> None:
    for name, module in machine.modules().items():
        module.__spec__ = sys.__spec__  # importlib asks for one
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "service.engines.tensorrt", raising=False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = write_bundle(tmp_path)
    add_plans(made)
    return made


def open_rig(monkeypatch: pytest.MonkeyPatch, directory: Path, machine: fake_gpu.Machine | None = None) -> Rig:
    machine = machine or fake_gpu.Machine()
    install(monkeypatch, machine)
    bundle = Bundle.read(directory)
    opened = open_engine(bundle, "auto", precision="auto")
    assert opened.engine.name == "tensorrt", opened.reason
    return Rig(machine, bundle, opened.engine)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Rig:
    return open_rig(monkeypatch, directory)


def batch(count: int, shape: tuple[int, int] = (64, 96), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([picture(*shape, red=250 - 40 * index, seed=seed + index) for index in range(count)])
    return images, np.array([[shape[0], shape[1] - index] for index in range(count)], np.int64)


def rois_of(count: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    rois = np.zeros((count, 5), np.float32)
    rois[:, 0] = np.arange(count) % num_images
    rois[:, 1:] = [4, 4, 40, 50]
    return rois, np.arange(count, dtype=np.int64) % 2


def test_golden_outputs(rig: Rig) -> None:
    agreement = verify_golden(rig.engine, rig.bundle)
    assert agreement.num_matched > 0
    assert agreement.num_unmatched == 0
    assert rig.engine.precision == "float32"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", CANVASES)
def test_a_batch_runs_in_the_bucket_that_holds_it(rig: Rig, count, shape) -> None:
    images, sizes = batch(count, shape)
    want, found = ToyEngine().detect(images, sizes), rig.engine.detect(images, sizes)
    assert found.count.shape == (count,)
    for name in ("count", "boxes", "scores", "labels"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), atol=1e-4)
    assert {rows for _, rows in rig.machine.runs} == {1 if count == 1 else 4}


@pytest.mark.parametrize("count", [1, 4, 5, 16, 17, 53])
def test_rois_run_in_padded_buckets_and_come_back_in_order(rig: Rig, count) -> None:
    images, sizes = batch(3)
    toy = ToyEngine()
    want, found = toy.detect(images, sizes), rig.engine.detect(images, sizes)
    rois, labels = rois_of(count, 3)
    np.testing.assert_allclose(
        rig.engine.masks(found.features, rois, labels), toy.masks(want.features, rois, labels), atol=1e-4
    )
    maps = rig.engine.keypoints(found.features, rois)
    np.testing.assert_allclose(maps, toy.keypoints(want.features, rois), atol=1e-4)
    assert {rows for name, rows in rig.machine.runs if name == "masks"} <= set(ROIS)


def test_graphs_are_recorded_once_and_contexts_keep_their_shape(rig: Rig) -> None:
    images, sizes = batch(2)
    rois, labels = rois_of(3, 2)
    for _ in range(4):
        found = rig.engine.detect(images, sizes)
        rig.engine.masks(found.features, rois, labels)
        del found
    assert len(rig.machine.contexts) == 2
    assert rig.machine.calls.count("cudaGraphInstantiate") == 2
    assert rig.machine.calls.count("cudaGraphLaunch") == 8
    assert all(context.shapes_set == len(context.engine.inputs) for context in rig.machine.contexts)
    allocated = rig.machine.calls.count("cudaMalloc")
    rig.engine.detect(images, sizes)
    assert rig.machine.calls.count("cudaMalloc") == allocated, "nothing is allocated once it runs"


def test_features_stay_while_they_are_held(rig: Rig) -> None:
    (first, sizes), (second, _) = batch(2), batch(2, seed=2)
    toy = ToyEngine()
    rois, labels = rois_of(4, 2)
    want = toy.masks(toy.detect(first, sizes).features, rois, labels)
    held = rig.engine.detect(first, sizes)
    lanes = rig.machine.calls.count("cudaMalloc")
    for _ in range(3):
        rig.engine.detect(second, sizes)
    assert rig.machine.calls.count("cudaMalloc") == lanes + 1, "one more lane, then it is used again"
    np.testing.assert_allclose(rig.engine.masks(held.features, rois, labels), want, atol=1e-4)


def test_pictures_go_up_one_by_one_before_the_run_and_results_come_down_behind_it(rig: Rig) -> None:
    images, sizes = batch(3)
    rig.engine.detect(images, sizes)
    rig.machine.calls.clear()
    rig.engine.detect(images, sizes)
    copies = ["cudaMemcpyAsync"]
    order = ["cudaEventRecord", "cudaStreamWaitEvent"]
    assert [name for name in rig.machine.calls if name != "cudaSetDevice"] == [
        "cudaStreamSynchronize", *copies * 4, *order, "cudaGraphLaunch", *order, *copies * 4, "cudaStreamSynchronize",
    ]  # fmt: skip


def test_a_smaller_canvas_is_padded_and_a_larger_one_refused(rig: Rig) -> None:
    images, sizes = batch(2, (32, 64))
    found = rig.engine.detect(images, sizes)
    np.testing.assert_allclose(found.boxes, ToyEngine().detect(images, sizes).boxes, atol=1e-4)
    with pytest.raises(EngineFailed, match=r"64x128, there are 64x96, 96x64: .* --canvas 64x128"):
        rig.engine.detect(*batch(1, (64, 128)))


def test_a_batch_that_is_too_large_is_halved_by_whoever_sent_it(rig: Rig) -> None:
    assert rig.engine.max_batch == 4  # type: ignore[attr-defined]
    with pytest.raises(EngineOutOfMemory, match="4 pictures at once, not 5"):
        rig.engine.detect(*batch(5))
    assert rig.engine.detect(*batch(4)).count.shape == (4,)


def test_memory_that_runs_out_is_said_so_and_what_was_taken_is_freed(monkeypatch, directory) -> None:
    machine = fake_gpu.Machine(memory=100_000)
    install(monkeypatch, machine)
    with pytest.raises(EngineOutOfMemory, match="cudaMalloc"):
        open_engine(Bundle.read(directory), "tensorrt")
    assert not machine.blocks


def test_a_failed_run_gives_its_lane_back(rig: Rig, monkeypatch) -> None:
    images, sizes = batch(1)
    rig.engine.detect(images, sizes)
    lanes = rig.machine.calls.count("cudaMalloc")
    with monkeypatch.context() as broken:
        runtime = sys.modules["cuda.bindings.runtime"]
        broken.setattr(runtime, "cudaGraphLaunch", lambda *_: (fake_gpu.Status.cudaErrorIllegalAddress,))
        with pytest.raises(EngineFailed, match="cudaErrorIllegalAddress"):
            rig.engine.detect(images, sizes)
    assert rig.engine.detect(images, sizes).scores.max() > FLOOR
    assert rig.machine.calls.count("cudaMalloc") == lanes


def test_without_graphs_the_results_are_the_same(monkeypatch, directory) -> None:
    rig = open_rig(monkeypatch, directory, fake_gpu.Machine(captures=False))
    verify_golden(rig.engine, rig.bundle)
    verify_golden(rig.engine, rig.bundle)
    assert "cudaGraphLaunch" not in rig.machine.calls


def test_close_frees_everything(rig: Rig) -> None:
    verify_golden(rig.engine, rig.bundle)
    rig.engine.close()
    assert not rig.machine.blocks
    assert not rig.machine.streams


@pytest.mark.parametrize(
    ("plans_for", "machine", "asked", "reason"),
    [
        ({"gpu": "sm80"}, fake_gpu.Machine(), "auto", "the TensorRT plans are for sm80, this GPU is sm90"),
        ({"version": "10.16.1.11"}, fake_gpu.Machine(), "auto", "made with TensorRT 10.16.1.11, here is 11.4.0.106"),
        ({"precision": "float16"}, fake_gpu.Machine(), "float32", "no float32 TensorRT plans"),
        (None, fake_gpu.Machine(), "auto", "no TensorRT plans"),
    ],
)
def test_auto_takes_another_engine_and_says_why(monkeypatch, tmp_path, plans_for, machine, asked, reason) -> None:
    directory = write_bundle(tmp_path)
    if plans_for is not None:
        add_plans(directory, **plans_for)
    install(monkeypatch, machine)
    opened = open_engine(Bundle.read(directory), "auto", precision=asked)
    assert opened.engine.name != "tensorrt"
    assert reason in opened.reason
    with pytest.raises(EngineUnavailable, match="TensorRT"):
        open_engine(Bundle.read(directory), "tensorrt", precision=asked)


def test_without_driver_or_library_auto_goes_on(monkeypatch, directory) -> None:
    bundle = Bundle.read(directory)
    machine = fake_gpu.Machine()
    install(monkeypatch, machine)
    runtime = sys.modules["cuda.bindings.runtime"]
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (fake_gpu.Status.cudaErrorIllegalAddress, None))
    assert "no CUDA driver" in open_engine(bundle, "auto", precision="auto").reason
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "cuda-python is not installed" in open_engine(bundle, "auto", precision="auto").reason


def test_a_plan_that_does_not_load_is_no_reason_to_serve_from_elsewhere_unsaid(monkeypatch, directory) -> None:
    folder = directory / "sm90.float32"
    (folder / "masks.plan").write_bytes(b"of another TensorRT")
    bundle = Bundle(directory, Bundle.read.__func__(Bundle, write_bundle(directory / "other")).manifest)  # type: ignore[attr-defined]
    manifest = bundle.manifest.model_copy(
        update={
            "artifacts": [
                Artifact(
                    file=f"sm90.float32/{plans.PLANS}", stage=None, sha256=file_sha256(folder / plans.PLANS),
                    runtime="tensorrt", precision="float32",
                )
            ]
        }
    )  # fmt: skip
    install(monkeypatch, fake_gpu.Machine())
    with pytest.raises(EngineUnavailable, match=r"masks\.plan does not load here"):
        open_engine(Bundle(directory, manifest), "tensorrt")
    (folder / plans.PLANS).write_text("{}")
    with pytest.raises(BundleError, match="make the plans again"):
        open_engine(Bundle(directory, manifest), "tensorrt")


def test_layout_and_compute_capability() -> None:
    assert plans.layout({"a": 1, "b": 256, "c": 300}) == ({"a": 0, "b": 256, "c": 512}, 1024)
    assert plans.compute_capability("sm90") == (9, 0)
    assert plans.compute_capability("sm120") == (12, 0)
