import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
winograd = pytest.importorskip("service.engines.winograd")

from openvino import opset15 as op  # noqa: E402

CORE = openvino.Core()


def convolution(maps, weights, bias):
    found = op.convolution(maps, op.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    return op.add(found, op.constant(bias[:, None, None]))


def graph(channels: int, width: int, level: str = "p2") -> "openvino.Model":
    """A level made by a convolution and read by another, and that by two narrow ones, as proposals read a pyramid."""
    rng = np.random.default_rng(0)
    make, read = (
        (rng.standard_normal((o, i, 3, 3), dtype=np.float32) / 30, rng.standard_normal(o, dtype=np.float32))
        for o, i in ((width, channels), (width, width))
    )
    maps = op.parameter([-1, channels, -1, -1], np.float32, name="maps")
    made = convolution(maps, *make)
    made.output(0).set_names({level})
    hidden = op.relu(convolution(made, *read))
    outputs = [made]
    for name, narrow in (("scores", 3), ("deltas", 12)):
        weights = op.constant(rng.standard_normal((narrow, width, 1, 1), dtype=np.float32) / 10)
        outputs.append(op.convolution(hidden, weights, [1, 1], [0, 0], [0, 0], [1, 1]))
        outputs[-1].output(0).set_names({name})
    return openvino.Model([op.result(each) for each in outputs], [maps])


def run(model: "openvino.Model", maps: np.ndarray) -> dict[str, np.ndarray]:
    compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return {port.any_name: value for port, value in compiled(maps).items()}


def assert_same(model: "openvino.Model", direct: "openvino.Model", maps: np.ndarray) -> None:
    found, wanted = run(model, maps), run(direct, maps)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=3e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 4, 4), (3, 20, 8), (1, 12, 4), (2, 7, 13), (1, 1, 1)])
@pytest.mark.parametrize("level", ["p2", "p5"])
def test_equals_the_direct_sum(shape, level):
    images, height, width = shape
    maps = np.random.default_rng(1).standard_normal((images, 192, height, width), dtype=np.float32)
    rewritten = graph(192, 256, level)
    assert winograd.rewrite(rewritten) == 2
    assert_same(rewritten, graph(192, 256, level), maps)


def test_no_images_have_no_sums():
    """A batch of no RoIs goes through the heads."""
    maps = np.zeros((0, 192, 14, 14), np.float32)
    rewritten = graph(192, 192, "hidden")
    assert winograd.rewrite(rewritten) == 2
    assert run(rewritten, maps)["hidden"].shape == (0, 192, 14, 14)


@pytest.mark.parametrize(
    ("channels", "level", "replaced"), [(128, "p3", 2), (128, "p4", 0), (512, "p2", 0), (64, "p2", 0)]
)
def test_takes_what_it_makes_faster(channels, level, replaced):
    assert winograd.rewrite(graph(channels, channels, level)) == replaced


def test_leaves_other_convolutions_alone():
    """With steps of two cells, and without a border."""
    maps = op.parameter([-1, 256, -1, -1], np.float32)
    weights = op.constant(np.ones((256, 256, 3, 3), np.float32))
    strided = op.convolution(maps, weights, [2, 2], [1, 1], [1, 1], [1, 1])
    bare = op.convolution(maps, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    assert winograd.rewrite(openvino.Model([op.result(strided), op.result(bare)], [maps])) == 0
