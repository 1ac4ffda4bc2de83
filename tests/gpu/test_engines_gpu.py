"""`make gpu-check`: the engines on a GPU against the torch model on the CPU, with a tolerance for each precision.

AOTInductor's packages run through their runner alone, which needs torch alone; what needs a bundle is skipped where
its packages are missing.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("safetensors")

import torch
import torchvision

from models.regions import Predictions, RegionNetwork
from models.servable import normalise
from service.aoti import devices, runner
from tests.gpu import packages
from tests.models import tiny

# The tests themselves can be tried where there is no GPU, but for what only a GPU has: in float32, slowly.
TRIED_ON_CPU = "LIMNER_GPU_TESTS_ON_CPU" in os.environ
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not TRIED_ON_CPU, reason="no CUDA device"),
]
DEVICE = "cpu" if TRIED_ON_CPU else "cuda"
ROOT = Path(__file__).parents[2]


class Tolerance(NamedTuple):
    """box in pixels, score, probability of a mask, heatmap as a fraction of the largest; how many may be missed."""

    box: float
    score: float
    mask: float
    heatmap: float
    missed: int


# Random weights put scores close together: in half precision the last detections of a picture may be others.
TOLERANCES = {
    "float32": Tolerance(0.05, 1e-3, 2e-3, 2e-3, 1),
    "float16": Tolerance(0.5, 0.02, 0.05, 0.02, 2),
    "bfloat16": Tolerance(4.0, 0.1, 0.2, 0.1, 4),
}
if TRIED_ON_CPU:
    del TOLERANCES["float16"], TOLERANCES["bfloat16"]


class Built(NamedTuple):
    engine: runner.Runner
    model: RegionNetwork
    precision: str


@pytest.fixture(scope="module")
def model() -> RegionNetwork:
    return packages.model()


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory):
    """Every precision is compiled at once; a test waits for its own."""
    found = {}
    for precision in TOLERANCES:
        folder = tmp_path_factory.mktemp(precision)
        command = [sys.executable, "-m", "tests.gpu.packages", precision, str(folder), DEVICE]
        found[precision] = (
            folder,
            subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
            ),
        )
    yield found
    for _, process in found.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=list(TOLERANCES))
def built(request: pytest.FixtureRequest, model: RegionNetwork, builds: dict[str, Any]):
    folder, process = builds[request.param]
    _, told = process.communicate(timeout=400)
    assert process.returncode == 0, told[-3000:]
    device = devices.Cuda(warn=pytest.fail) if DEVICE == "cuda" else devices.Cpu()  # a run that is no graph fails here
    engine = runner.Runner(packages.read(folder), device)
    yield Built(engine, model, request.param)
    engine.close()


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = [(96, 160), (90, 150), (60, 130), (96, 100)][:count]
    images, there = tiny.pictures(packages.CANVAS, sizes)
    return images.numpy(), there.numpy()


@torch.no_grad()
def reference(model: RegionNetwork, images: np.ndarray, sizes: np.ndarray) -> Predictions:
    there = torch.from_numpy(sizes)
    return model(normalise(torch.from_numpy(images), there), there)


def compare(wanted: Predictions, found: Any, tolerance: Tolerance) -> None:
    matched = 0
    for image, count in enumerate(wanted.count.tolist()):
        boxes, scores = wanted.boxes[image, :count], wanted.scores[image, :count]
        number = int(found.count[image])
        theirs, their_scores = (torch.from_numpy(each[image, :number]) for each in (found.boxes, found.scores))
        overlap = torchvision.ops.box_iou(boxes, theirs)
        best = overlap.amax(1) > 0.5
        partner = overlap.argmax(1)[best]
        assert int((~best).sum()) <= tolerance.missed
        assert (boxes[best] - theirs[partner]).abs().quantile(0.95) <= tolerance.box
        assert (scores[best] - their_scores[partner]).abs().quantile(0.95) <= tolerance.score
        matched += len(partner)
    assert matched >= 3 * len(wanted.count)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_detections_agree(built: Built, count: int) -> None:
    images, sizes = pictures(count)
    compare(reference(built.model, images, sizes), built.engine.detect(images, sizes), TOLERANCES[built.precision])


@torch.no_grad()
def test_heads_agree_on_the_same_rois(built: Built) -> None:
    images, sizes = pictures(3)
    wanted, found = reference(built.model, images, sizes), built.engine.detect(images, sizes)
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 60, (40, 2))
    rois = np.concatenate([rng.integers(0, 3, (40, 1)), low, low + rng.uniform(8, 60, (40, 2))], 1).astype(np.float32)
    labels, there = np.zeros(40, np.int64), torch.from_numpy(rois)
    tolerance = TOLERANCES[built.precision]
    masks = built.model.mask_probabilities(wanted.features, there, torch.from_numpy(labels)).numpy()
    assert np.abs(built.engine.head("masks", found.features, rois, labels) - masks).max() <= tolerance.mask
    maps = built.model.keypoint_heatmaps(wanted.features, there).numpy()
    gap = np.abs(built.engine.head("keypoints", found.features, rois, None) - maps).max()
    assert gap <= tolerance.heatmap * np.abs(maps).max()


@pytest.mark.skipif(TRIED_ON_CPU, reason="there are no graphs on a CPU")
def test_every_work_is_a_graph(built: Built) -> None:
    built.engine.detect(*pictures(1))
    works = built.engine._works.values()
    assert works
    assert all(isinstance(work, devices.Recorded) and work.graph is not None for work in works)


def test_a_picture_alone_and_among_others(built: Built) -> None:
    images, sizes = pictures(4)
    together = built.engine.detect(images, sizes)
    alone = built.engine.detect(images[1:2], sizes[1:2])
    tolerance = TOLERANCES[built.precision]
    count = int(alone.count[0])
    overlap = torchvision.ops.box_iou(*(torch.from_numpy(each) for each in (alone.boxes[0, :count], together.boxes[1])))
    assert int((overlap.amax(1) <= 0.5).sum()) <= tolerance.missed


def test_features_outlive_the_next_detect(built: Built) -> None:
    images, sizes = pictures(4)
    rois = np.array([[0, 8, 8, 90, 80]], np.float32)
    first = built.engine.detect(images[:1], sizes[:1])
    before = built.engine.head("masks", first.features, rois, np.zeros(1, np.int64))
    others = [built.engine.detect(images[1:], sizes[1:]) for _ in range(2)]
    after = built.engine.head("masks", first.features, rois, np.zeros(1, np.int64))
    np.testing.assert_array_equal(before, after)
    assert len(others) == 2


@pytest.mark.skipif(TRIED_ON_CPU, reason="it is the GPU's memory")
def test_memory_is_stable_over_a_thousand_batches(built: Built) -> None:
    if built.precision != "float16":
        pytest.skip("one precision is enough")
    images, sizes = pictures(4)
    rng = np.random.default_rng(1)
    held = []
    for turn in range(1000):
        count = int(rng.integers(1, 5))
        found = built.engine.detect(images[:count], sizes[:count])
        number = int(rng.integers(1, 40))
        rois = np.tile(np.array([[0, 8, 8, 90, 80]], np.float32), (number, 1))
        built.engine.head("masks", found.features, rois, np.zeros(number, np.int64))
        built.engine.head("keypoints", found.features, rois, None)
        del found
        if turn in (100, 999):
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]))
    (allocated, reserved, free), (allocated_last, reserved_last, free_last) = held
    assert (allocated_last, reserved_last) == (allocated, reserved)
    assert free - free_last < 32 << 20  # of all that use the GPU


# --- with a bundle ---


def missing(*modules: str) -> pytest.MarkDecorator:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


bundles = missing("pydantic", "structlog", "onnx", "onnxscript", "onnxruntime", "PIL")


@pytest.fixture
def person(tmp_path: Path) -> Path:
    source = ROOT / "bundles" / "person" / "1"
    if not source.is_dir():
        pytest.skip("the person bundle is not in this checkout")
    shutil.copytree(source, tmp_path / "person" / "1")
    return tmp_path / "person" / "1"


def added_and_served(export: Callable[[list[str]], int], directory: Path, choice: Any) -> None:
    from service.bundle import Bundle
    from service.engines import open_engine, verify_golden

    sizes = ["--batch", "1", "4", "--rois", "8", "32", "--canvas", "landscape", "--precision", "fp16"]
    assert export([str(directory), *sizes, "--max-pictures", "2"]) == 0
    bundle = Bundle.read(directory)
    opened = open_engine(bundle, choice, precision="auto")
    try:
        assert opened.engine.precision == "float16"
        assert verify_golden(opened.engine, bundle).num_matched > 0
    finally:
        opened.engine.close()


@bundles
def test_packages_are_added_to_a_bundle_and_served(person: Path) -> None:
    from export import to_aoti

    added_and_served(to_aoti.main, person, "aoti")


@bundles
@missing("tensorrt", "cuda")
def test_plans_are_added_to_a_bundle_and_served(person: Path) -> None:
    from export import to_trt

    added_and_served(to_trt.main, person, "tensorrt")


@bundles
def test_onnx_runtime_on_cuda_agrees_with_the_golden_outputs(person: Path) -> None:
    from service.bundle import Bundle
    from service.engines import verify_golden
    from service.engines.onnx import OnnxEngine, refuse_without_cuda
    from service.errors import EngineUnavailable

    try:
        refuse_without_cuda()
    except EngineUnavailable as error:
        pytest.skip(error.detail)
    bundle = Bundle.read(person)
    engine = OnnxEngine(bundle, device="cuda")
    agreement = verify_golden(engine, bundle)
    assert agreement.num_matched > 0
