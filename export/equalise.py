"""Channels of like range around 0, for eight bits: an activation has one scale for all its channels (Nagel et al. 2019,
"Data-Free Quantization Through Weight Equalization and Bias Correction", sections 4.1 and 4.2; here as measured).

Between a layer and those that read it, a channel may be made larger by a factor that the readers' weights take back.
The graph computes what it did, within the ranges that were measured: a channel that is clipped at 6 and never came near
is clipped at what it reached, as eight bits would clip it. Where no activation stands between, as behind the narrow
layers of MobileNetV2, a channel's mean is taken away, too, and comes back with the biases of the readers. C channels.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper

Array = npt.NDArray[Any]
Feed = Callable[[Any], dict[str, Any]]
ROOM = 1.1  # over the largest value measured
LARGEST = 32.0  # no factor is larger: a channel that hardly ever speaks need not fill the range


class Chain(NamedTuple):
    """A convolution, the value (B, C, h, w) behind its activation, the convolution that alone reads it."""

    maker: onnx.NodeProto
    value: str
    reader: onnx.NodeProto
    ceiling: float  # of the activation; infinite for a ReLU


class Stream(NamedTuple):
    """Convolutions whose outputs pass to 1x1 convolutions as they are or added up; each value (B, C, h, w) with the
    outputs of which it is the sum.
    """

    makers: list[onnx.NodeProto]
    values: dict[str, tuple[str, ...]]
    readers: list[onnx.NodeProto]


class Range(NamedTuple):
    """Of each channel (C,) over all items."""

    low: Array
    high: Array
    mean: Array


def equalise(graph: onnx.ModelProto, items: Sequence[Any], feed: Feed) -> onnx.ModelProto:
    """A copy of `graph` whose activations have channels of like range on these items; `feed` gives an item's inputs."""
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    wiring = Wiring(made)
    found, flowing = chains(wiring), streams(wiring)
    names = [chain.value for chain in found] + [name for stream in flowing for name in stream.values]
    if not names:
        return made
    ranges = _ranges(graph, names, items, feed)
    for stream in flowing:
        _centre(stream, wiring, ranges)
    for chain in found:
        _level(chain, wiring, ranges[chain.value].high)
    return made


class Wiring:
    """Who makes and who reads a value, and which weights a layer has to itself."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self.nodes = list(graph.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {tensor.name: tensor for tensor in graph.graph.initializer}
        self.outputs = {output.name for output in graph.graph.output}

    def alone(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a value, if nothing else does."""
        found = self.readers[name]
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def is_free(self, node: onnx.NodeProto) -> bool:
        """A convolution whose weights and bias nothing else reads."""
        own = all(name in self.constants and len(self.readers[name]) == 1 for name in node.input[1:])
        return node.op_type == "Conv" and own

    def is_point(self, node: onnx.NodeProto) -> bool:
        """A free 1x1 convolution with a bias and without padding: what is added to its input, it adds to its output."""
        free = self.is_free(node) and len(node.input) == 3 and _integer(node, "group") == 1
        pads = next((list(each.ints) for each in node.attribute if each.name == "pads"), [])
        return free and not any(pads) and list(self.constants[node.input[1]].dims[2:]) == [1, 1]

    def is_depthwise(self, conv: onnx.NodeProto) -> bool:
        """Each channel has weights, and so a scale, of its own."""
        return _integer(conv, "group") > 1 and list(self.constants[conv.input[1]].dims[:2]) == [
            _integer(conv, "group"),
            1,
        ]

    def scale(self, name: str, factors: Array, axis: int) -> None:
        values = numpy_helper.to_array(self.constants[name]).astype(np.float64)
        self._store(name, values * factors.reshape([-1 if each == axis else 1 for each in range(values.ndim)]))

    def add(self, name: str, more: Array) -> None:
        self._store(name, numpy_helper.to_array(self.constants[name]).astype(np.float64) + more)

    def matrix(self, conv: onnx.NodeProto) -> Array:
        """The weights (out, C) of a 1x1 convolution."""
        values = numpy_helper.to_array(self.constants[conv.input[1]]).astype(np.float64)
        return values.reshape(values.shape[:2])

    def _store(self, name: str, values: Array) -> None:
        self.constants[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))


def chains(wiring: Wiring) -> list[Chain]:
    """In the graph's order."""
    found = []
    for maker in wiring.nodes:
        activation = wiring.alone(maker.output[0]) if wiring.is_free(maker) else None
        if activation is None or activation.op_type not in ("Relu", "Clip"):
            continue
        reader, ceiling = wiring.alone(activation.output[0]), _ceiling(activation, wiring.constants)
        if reader is None or ceiling is None or not wiring.is_free(reader):
            continue
        if _integer(reader, "group") == 1 or wiring.is_depthwise(reader):
            found.append(Chain(maker, activation.output[0], reader, ceiling))
    return found


def streams(wiring: Wiring) -> list[Stream]:
    """In the graph's order."""
    found, seen = [], set()
    for node in wiring.nodes:
        if node.op_type != "Conv" or node.output[0] in seen:
            continue
        stream = _stream(node, wiring)
        if stream is not None:
            seen.update(stream.values)
            found.append(stream)
    return found


def _stream(first: onnx.NodeProto, wiring: Wiring) -> Stream | None:
    """What `first` passes into; None where something else reads it or adds to it."""
    makers, readers, members, waiting = [], [], set(), [first.output[0]]
    while waiting:
        value = waiting.pop()
        if value in members:
            continue
        members.add(value)
        maker = wiring.makers.get(value)
        if maker is None or value in wiring.outputs:
            return None
        if maker.op_type == "Add":
            waiting += maker.input
        elif wiring.is_free(maker) and len(maker.input) == 3:
            makers.append(maker)
        else:
            return None
        for reader in wiring.readers[value]:
            if reader.op_type == "Add":
                waiting.append(reader.output[0])
            elif wiring.is_point(reader):
                readers.append(reader)
            else:
                return None
    values: dict[str, tuple[str, ...]] = {}
    for node in wiring.nodes:  # in this order what is added comes before its sum
        name = node.output[0]
        if name in members:
            is_sum = node.op_type == "Add"
            values[name] = tuple(each for given in node.input for each in values[given]) if is_sum else (name,)
    return Stream(makers, values, readers) if readers else None


def _centre(stream: Stream, wiring: Wiring, ranges: dict[str, Range]) -> None:
    """Takes each maker's means away, so that all sums have means of 0, and gives the channels like range."""
    means = {name: sum(ranges[part].mean for part in parts) for name, parts in stream.values.items()}
    reached = [np.maximum(ranges[name].high - mean, mean - ranges[name].low) for name, mean in means.items()]
    spread = np.maximum(np.max(reached, 0), 1e-6)
    factors = _shared(np.clip(spread.max() / spread, 1, LARGEST))
    for reader in stream.readers:
        wiring.add(reader.input[2], wiring.matrix(reader) @ means[reader.input[0]])
        wiring.scale(reader.input[1], 1 / factors, 1)
    for maker in stream.makers:
        wiring.add(maker.input[2], -ranges[maker.output[0]].mean)
        for name in maker.input[1:]:
            wiring.scale(name, factors, 0)


def _level(chain: Chain, wiring: Wiring, largest: Array) -> None:
    reached = ROOM * np.maximum(largest, 1e-6)
    factors = np.clip(min(chain.ceiling, float(reached.max())) / reached, 1, LARGEST)
    depthwise = wiring.is_depthwise(chain.reader)
    factors = factors if depthwise else _shared(factors)
    for name in chain.maker.input[1:]:
        wiring.scale(name, factors, 0)
    wiring.scale(chain.reader.input[1], 1 / factors, 0 if depthwise else 1)


def _shared(factors: Array) -> Array:
    """Half of it, in octaves: what the activations gain, weights that have one scale for all they read lose."""
    return np.sqrt(factors)


def _ceiling(activation: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> float | None:
    """None where it is not from 0 to a known bound: then factors would change what it computes."""
    if activation.op_type == "Relu":
        return float("inf")
    bounds = [constants[name] for name in activation.input[1:3] if name in constants]
    if len(bounds) < 2:
        return None
    low, high = (float(numpy_helper.to_array(bound)) for bound in bounds)
    return high if low == 0 else None


def _integer(node: onnx.NodeProto, name: str) -> int:
    return next((each.i for each in node.attribute if each.name == name), 1)


def _ranges(graph: onnx.ModelProto, names: Sequence[str], items: Sequence[Any], feed: Feed) -> dict[str, Range]:
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, list[Range]] = defaultdict(list)
    for item in items:
        for name, values in zip(names, session.run(list(names), feed(item)), strict=True):
            maps = np.asarray(values)
            found[name].append(Range(maps.min((0, 2, 3)), maps.max((0, 2, 3)), maps.mean((0, 2, 3), dtype=np.float64)))
    return {name: _together(each) for name, each in found.items()}


def _together(each: Sequence[Range]) -> Range:
    low, high, mean = (np.stack(part) for part in zip(*each, strict=True))
    return Range(low.min(0), high.max(0), mean.mean(0))
