"""Every pooler in every export target: standard ONNX under both runtimes, and TensorRT's graph with our plugins."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

from export import lowering, trt_graphs
from models.pooling import Pooler, RoIAlign, RoIPool, SpatialPyramid, Warp
from tests.export import cut_runner

STRIDES: list[tuple[Pooler, tuple[int, ...]]] = [
    (RoIAlign(7), (4, 8, 16, 32)),
    (RoIPool(7), (4, 8, 16, 32)),
    (RoIAlign(14, aligned=True, stride=16), (16,)),
    (RoIPool(7, stride=16), (16,)),
    (SpatialPyramid(), (16,)),
    (Warp(32, 4), (1,)),
]
CASES = [pytest.param(*each, id=f"{type(each[0]).__name__}-{len(each[1])}") for each in STRIDES]


class Pooling(nn.Module):
    def __init__(self, pooler: Pooler) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, *given: Tensor) -> Tensor:
        *features, rois = given
        return self.pooler(features, rois)


def inputs(strides: tuple[int, ...], height: int, width: int, images: int, count: int) -> list[Tensor]:
    """Maps of a canvas, and RoIs of every size, some of which lie on edges of cells."""
    generator = torch.Generator().manual_seed(count)
    maps = [torch.randn(images, 3, height // s, width // s, generator=generator) for s in strides]
    low = torch.rand(count, 2, generator=generator) * torch.tensor([width - 2.0, height - 2.0])
    low[::4] = (low[::4] / 8).round() * 8
    high = torch.minimum(low + 1 + torch.rand(count, 2, generator=generator) ** 2 * 300, torch.tensor([width, height]))
    return [*maps, torch.cat((torch.arange(count)[:, None] % images, low, high), dim=1)]


def save(pooler: Pooler, strides: tuple[int, ...], table: dict[Callable, Callable], path: Path) -> None:
    batch, num = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("rois", min=1, max=4096)
    h, w = torch.export.Dim("h", min=2, max=64), torch.export.Dim("w", min=2, max=64)
    shapes = [{0: batch, 2: 32 // s * h if s < 32 else h, 3: 32 // s * w if s < 32 else w} for s in strides]
    names = [*(f"map{i}" for i in range(len(strides))), "rois"]
    program = torch.onnx.export(
        Pooling(pooler).eval(), tuple(inputs(strides, 96, 128, 2, 5)), dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes=((*shapes, {0: num}),), input_names=names, output_names=["pooled"],
        custom_translation_table=table,
    )  # fmt: skip
    assert program is not None
    program.save(path)


@pytest.mark.parametrize(("pooler", "strides"), CASES)
def test_standard_onnx(pooler: Pooler, strides: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "pooling.onnx"
    save(pooler, strides, lowering.TABLE, path)
    assert {opset.domain for opset in onnx.load(path).opset_import} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for canvas in ((96, 128, 2, 5), (224, 192, 3, 80), (64, 320, 1, 1)):
        given = inputs(strides, *canvas)
        wanted = Pooling(pooler)(*given).numpy()
        offered = {port.name: each.numpy() for port, each in zip(session.get_inputs(), given, strict=True)}
        np.testing.assert_allclose(session.run(None, offered)[0], wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(compiled(offered)["pooled"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pooler", "strides"), [case for case in CASES if case.id != "RoIPool-4"])
def test_tensorrt(pooler: Pooler, strides: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "pooling.onnx"
    save(pooler, strides, trt_graphs.TABLE, path)
    assert trt_graphs.problems(onnx.load(path)) == []
    given = inputs(strides, 160, 96, 3, 40)
    names = [*(f"map{i}" for i in range(len(strides))), "rois"]
    found = cut_runner.run(path, dict(zip(names, (each.numpy() for each in given), strict=True)))
    np.testing.assert_allclose(found["pooled"], Pooling(pooler)(*given).numpy(), rtol=0, atol=1e-5)


def test_tensorrt_has_no_plugin_for_roi_pool_on_a_pyramid(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="RoIs of 4 maps: there are plugins for"):
        save(RoIPool(7), (4, 8, 16, 32), trt_graphs.TABLE, tmp_path / "pooling.onnx")
