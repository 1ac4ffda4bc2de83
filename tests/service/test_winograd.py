import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
winograd = pytest.importorskip("service.engines.winograd")

from openvino import opset15 as op  # noqa: E402

CORE = openvino.Core()


def convolution(maps, weights, bias):
    found = op.convolution(maps, op.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    return op.add(found, op.constant(bias[:, None, None]))


def graph(channels: int, width: int) -> "openvino.Model":
    """p2 made by a convolution and read by another, as a pyramid and its proposals do."""
    rng = np.random.default_rng(0)
    make, read = (
        (rng.standard_normal((o, i, 3, 3), dtype=np.float32) / 30, rng.standard_normal(o, dtype=np.float32))
        for o, i in ((width, channels), (width, width))
    )
    maps = op.parameter([-1, channels, -1, -1], np.float32, name="maps")
    level = convolution(maps, *make)
    level.output(0).set_names({"p2"})
    hidden = op.relu(convolution(level, *read))
    hidden.output(0).set_names({"hidden"})
    return openvino.Model([op.result(level), op.result(hidden)], [maps])


def run(model: "openvino.Model", maps: np.ndarray) -> list[np.ndarray]:
    compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    found = compiled(maps)
    return [found[name] for name in ("p2", "hidden")]


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 4, 4), (3, 20, 8), (1, 12, 4)])
def test_equals_the_direct_sum(shape):
    images, height, width = shape
    maps = np.random.default_rng(1).standard_normal((images, 160, height, width), dtype=np.float32)
    rewritten = graph(160, 128)
    assert winograd.rewrite(rewritten) == 2
    for found, wanted in zip(run(rewritten, maps), run(graph(160, 128), maps), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_leaves_narrow_convolutions_alone():
    assert winograd.rewrite(graph(96, 64)) == 0
