"""The runner of packages over the toy's stages: on a device that is as lazy as a GPU may be, and on the processor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from service.aoti import devices, runner
from service.errors import EngineFailed, EngineOutOfMemory
from tests.service.lazy_device import LazyDevice

CANVASES = [(64, 96), (96, 64)]


def detect(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    """count, boxes, scores, labels and a pyramid that tells one picture from another."""
    planes = images.permute(0, 3, 1, 2).float()
    levels = [
        torch.nn.functional.avg_pool2d(planes, 4 << i).contiguous(memory_format=torch.channels_last) for i in range(4)
    ]
    best = planes.flatten(1).mean(1)
    count = sizes.sum(1)
    boxes = best[:, None, None] + torch.arange(8.0).reshape(2, 4)
    return count, boxes, best[:, None] - torch.arange(2.0), sizes.flip(1), *levels


def masks(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, rois: Tensor, labels: Tensor) -> Tensor:
    means = p2.mean((1, 2, 3)) + p5.mean((1, 2, 3))
    return (means[rois[:, 0].long()] + rois[:, 1] + 1000 * labels)[:, None, None].expand(-1, 28, 28).contiguous()


class Toy(runner.Runner):
    def _load(self, file: str) -> Any:
        return {"detect": detect, "masks": masks}[file]


def toy(device: devices.Cpu) -> Toy:
    files = dict.fromkeys(CANVASES, "detect"), {"masks": "masks"}
    return Toy(runner.Packages(Path(), *files, batches=[1, 4], rois=[4, 16], kernels={}), device)


DEVICES = {
    "lazy": LazyDevice,
    "hasty compute": lambda: LazyDevice("compute"),
    "hasty copies": lambda: LazyDevice("copies"),
    "cpu": devices.Cpu,
}


@pytest.fixture(params=list(DEVICES))
def engine(request: pytest.FixtureRequest) -> Toy:
    return toy(DEVICES[request.param]())


def batch(count: int, shape: tuple[int, int] = (64, 96), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape, 3), dtype=np.uint8)
    return images, np.array([[shape[0], shape[1] - index] for index in range(count)], np.int64)


def wanted(images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    return [each.numpy() for each in detect(torch.from_numpy(images), torch.from_numpy(sizes))]


def check(engine: Toy, images: np.ndarray, sizes: np.ndarray, found: runner.Found) -> None:
    for one, other in zip(found[:4], wanted(images, sizes)[:4], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def rois_of(number: int, images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rois = np.concatenate([rng.integers(0, images, (number, 1)), rng.uniform(0, 50, (number, 4))], 1)
    return rois.astype(np.float32), rng.integers(0, 3, number)


def check_masks(engine: Toy, features: runner.Features, images: np.ndarray, number: int) -> None:
    rois, labels = rois_of(number, len(images), number)
    levels = detect(torch.from_numpy(images), torch.zeros(len(images), 2, dtype=torch.int64))[4:]
    expected = masks(*levels, torch.from_numpy(rois), torch.from_numpy(labels)).numpy()
    np.testing.assert_allclose(engine.head("masks", features, rois, labels), expected, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("shape", CANVASES)
def test_any_number_of_pictures_and_rois(engine: Toy, count: int, shape: tuple[int, int]) -> None:
    for turn in range(3):
        images, sizes = batch(count, shape, turn)
        found = engine.detect(images, sizes)
        check(engine, images, sizes, found)
        for number in (1, 5, 16, 50):
            check_masks(engine, found.features, images, number)


def test_features_outlive_the_next_detect(engine: Toy) -> None:
    first, second = batch(2, seed=1), batch(4, (96, 64), seed=2)
    kept, other = engine.detect(*first), engine.detect(*second)
    check_masks(engine, kept.features, first[0], 20)
    check_masks(engine, other.features, second[0], 20)
    check_masks(engine, kept.features, first[0], 7)


def test_a_lane_is_used_again_once_its_features_are_dropped() -> None:
    engine = toy(LazyDevice())
    for turn in range(5):
        images, sizes = batch(2, seed=turn)
        found = engine.detect(images, sizes)
        check_masks(engine, found.features, images, 3)
        del found
    assert len(engine._free) == 1


def test_each_shape_is_recorded_once() -> None:
    device = LazyDevice()
    engine = toy(device)
    for count in (1, 3, 4, 2, 1):
        engine.detect(*batch(count))
    assert device.recorded == [(1, 64, 96, 3), (4, 64, 96, 3)]


def test_a_smaller_canvas_is_padded_and_what_is_too_large_refused(engine: Toy) -> None:
    images, sizes = batch(1, (32, 64))
    found = engine.detect(images, sizes)
    assert found.count[0] == sizes.sum()
    with pytest.raises(EngineFailed, match="128x128"):
        engine.detect(*batch(1, (128, 128)))
    with pytest.raises(EngineOutOfMemory, match="4 pictures at once, not 5"):
        engine.detect(*batch(5))


def test_after_closing_nothing_is_held(engine: Toy) -> None:
    engine.detect(*batch(1))
    engine.close()
    engine.close()
    assert not engine._works
