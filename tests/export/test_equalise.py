"""Channels of like range: the graph computes what it did, and no channel is left in a corner of the range."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.equalise import Wiring, chains, equalise, streams

CHANNELS = 6


def graph(activation: str = "Clip", tapped: bool = False, low: float = 0.0) -> onnx.ModelProto:
    """1x1 convolution, activation, 3x3 depthwise, activation, 1x1 convolution: a block of MobileNetV2's, whose channels
    differ in range by a factor of a hundred. `tapped`: an output shows what is between the first two.
    """
    rng = np.random.default_rng(0)
    loud = np.geomspace(0.02, 2, CHANNELS).astype(np.float32)
    values = {
        "a.weight": rng.normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32) * loud[:, None, None, None],
        "a.bias": rng.normal(size=CHANNELS).astype(np.float32) * loud,
        "b.weight": rng.normal(size=(CHANNELS, 1, 3, 3)).astype(np.float32),
        "c.weight": rng.normal(size=(4, CHANNELS, 1, 1)).astype(np.float32),
        "low": np.float32(low),
        "high": np.float32(6),
    }
    bounds = ["low", "high"] if activation == "Clip" else []
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["a"]),
        helper.make_node(activation, ["a", *bounds], ["one"]),
        helper.make_node("Conv", ["one", "b.weight"], ["b"], group=CHANNELS, pads=[1, 1, 1, 1]),
        helper.make_node(activation, ["b", *bounds], ["two"]),
        helper.make_node("Conv", ["two", "c.weight"], ["y"]),
    ]
    shapes = {"x": ["B", 3, 8, 8], "y": ["B", 4, 8, 8], "one": ["B", CHANNELS, 8, 8]}
    ports = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    outputs = [ports["y"], ports["one"]] if tapped else [ports["y"]]
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    made = helper.make_graph(nodes, "g", [ports["x"]], outputs, kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(1, 3, 8, 8)).astype(np.float32) for _ in range(5)]


def run(made: onnx.ModelProto, picture: np.ndarray, name: str = "y") -> np.ndarray:
    watched = onnx.ModelProto()
    watched.CopyFrom(made)
    if name not in [output.name for output in made.graph.output]:
        watched.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"x": picture})[0])


@pytest.mark.parametrize("activation", ["Clip", "Relu"])
def test_channels_come_to_like_range_and_the_answer_stays(activation: str) -> None:
    before, items = graph(activation), pictures()
    kept = before.SerializeToString()
    after = equalise(before, items, lambda item: {"x": item})
    assert before.SerializeToString() == kept
    for name in ("one", "two"):
        old, new = (np.max([run(g, item, name).max((0, 2, 3)) for item in items], 0) for g in (before, after))
        assert new.max() / new.min() < old.max() / old.min() / 3
        assert new.max() <= old.max() + 1e-6  # or the range that all share would grow
    for item in items:
        np.testing.assert_allclose(run(after, item), run(before, item), atol=1e-4)


def test_eight_bits_with_one_scale_for_all_channels_keep_the_quiet_ones() -> None:
    before, items = graph(), pictures()

    def worst(made: onnx.ModelProto) -> float:
        """Of the channels: the largest error as a share of the channel's largest value."""
        values = np.concatenate([run(made, item, "one") for item in items])
        step = values.max() / 255
        lost = np.abs(np.round(values / step) * step - values).max((0, 2, 3))
        return float((lost / values.max((0, 2, 3))).max())

    assert worst(before) > 0.1
    assert worst(equalise(before, items, lambda item: {"x": item})) < 0.01


def test_what_another_layer_or_an_output_reads_is_left_alone() -> None:
    assert [chain.value for chain in chains(Wiring(graph()))] == ["one", "two"]
    assert [chain.value for chain in chains(Wiring(graph(tapped=True)))] == ["two"]
    assert chains(Wiring(graph(low=-1.0))) == []  # a factor would move the lower bound
    shared = graph()
    shared.graph.node[4].input[1] = "a.weight"
    assert [chain.value for chain in chains(Wiring(shared))] == []


def narrow(also: str = "") -> onnx.ModelProto:
    """Two 1x1 convolutions of which the second adds to the first, read by two others: MobileNetV2's narrow layers. Most
    of each channel is its mean. `also`: what reads the sum beside them.
    """
    rng = np.random.default_rng(0)
    values = {
        f"{name}.weight": rng.normal(size=(CHANNELS, CHANNELS, 1, 1)).astype(np.float32) for name in ("b", "c", "d")
    }
    values["a.weight"] = rng.normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32) * 0.2
    values |= {f"{name}.bias": 5 * rng.normal(size=CHANNELS).astype(np.float32) for name in ("a", "b", "c", "d")}
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["first"]),
        helper.make_node("Conv", ["first", "c.weight", "c.bias"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("Conv", ["positive", "b.weight", "b.bias"], ["second"]),
        helper.make_node("Add", ["first", "second"], ["sum"]),
        helper.make_node("Conv", ["sum", "d.weight", "d.bias"], ["y"]),
    ]
    if also:
        nodes.append(helper.make_node(also, ["sum"], ["beside"]))
    shapes = {"x": ["B", 3, 8, 8], "y": ["B", CHANNELS, 8, 8]}
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    kept = [numpy_helper.from_array(value, name) for name, value in values.items()]
    made = helper.make_graph(nodes, "g", ports[:1], ports[1:], kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_means_go_where_no_activation_stands_between() -> None:
    before, items = narrow(), pictures()
    after = equalise(before, items, lambda item: {"x": item})
    for name in ("first", "second", "sum"):
        old, new = (np.concatenate([run(g, item, name) for item in items]) for g in (before, after))
        assert np.abs(old.mean((0, 2, 3))).max() > 1
        np.testing.assert_allclose(new.mean((0, 2, 3)), 0, atol=1e-4)
    for item in items:
        np.testing.assert_allclose(run(after, item), run(before, item), atol=1e-3)


def test_a_sum_that_something_else_reads_is_left_alone() -> None:
    assert [list(stream.values) for stream in streams(Wiring(narrow()))] == [["first", "second", "sum"]]
    assert streams(Wiring(narrow(also="Relu"))) == []
    padded = narrow()
    padded.graph.node[5].attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))  # its border knows no mean
    assert streams(Wiring(padded)) == []
