"""One ONNX graph in eight bits: NNCF puts QuantizeLinear and DequantizeLinear around the network's layers, and here
some of the layers are given back to float32.

Only what lies between the pixels and the pyramid, and the layers of the heads, is quantised; anchors, boxes, NMS and
RoIAlign are named as off limits, so their float32 arithmetic is left as it was.
"""

import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
NEXT_TO_NOTHING = 1e-12  # as a bias
BETWEEN = {"Add", "Relu", "Clip", "MaxPool", "Resize"}  # of a trunk: what may be computed between layers in eight bits
FEATURES = re.compile(r"[cp]\d+")  # what outputs that are features are called
LAST = {"model.box_head.classes.weight", "model.box_head.deltas.weight"}
DOUBLE = "twice_as_high_and_wide"
MOVES = {"Concat", "Gather", "Reshape"}


def quantize(graph: onnx.ModelProto, items: Sequence[Any], feed: Callable[[Any], dict[str, Any]]) -> onnx.ModelProto:
    """Static, symmetric, one scale for each channel of the weights; `feed` gives the inputs that belong to an item."""
    nncf: Any = importlib.import_module("nncf")  # an extra, which checkers need not find

    nncf.set_log_level(logging.ERROR)
    given = onnx.ModelProto()
    given.CopyFrom(graph)  # which NNCF may change
    scope = nncf.IgnoredScope(names=sorted(off_limits(graph)), validate=False)
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        return nncf.quantize(
            given,
            nncf.Dataset(items, feed),
            subset_size=len(items),
            ignored_scope=scope,
            preset=nncf.QuantizationPreset.PERFORMANCE,
        )


def sized(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that reads the shapes of the pyramid's levels off the levels alone.

    Else OpenVINO turns what is in eight bits on the way to them back into float32, only to ask for its shape. By
    contract a level is twice as high and wide as the next, so it is enlarged by 2 rather than to a shape.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    makers = {output: node for node in made.graph.node for output in node.output}
    of_level: dict[str, str] = {}
    for level in _levels(made):
        conv = _first(makers, level, "Conv")
        summed = conv and makers.get(conv.input[0])
        for value in (conv.input[0], *summed.input) if conv and summed else ():
            of_level[value] = level
    trunk = _before(made, _levels(made))
    for node in made.graph.node:
        if node.op_type == "Resize" and node.name in trunk and len(node.input) == 4:
            node.input[2], node.input[3] = DOUBLE, ""
        elif node.op_type == "Shape" and node.input[0] in of_level and _attribute(node, "start") >= 2:
            node.input[0] = of_level[node.input[0]]
    if any(DOUBLE in node.input for node in made.graph.node):
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), DOUBLE))
    _prune(made)
    _order(made)
    return made


def _levels(graph: onnx.ModelProto) -> set[str]:
    return {output.name for output in graph.graph.output if FEATURES.fullmatch(output.name)}


def _first(makers: dict[str, onnx.NodeProto], name: str, kind: str) -> onnx.NodeProto | None:
    """The node of this kind that a value comes from through others of one input that counts."""
    node = makers.get(name)
    while node is not None and node.op_type != kind:
        node = makers.get(node.input[0])
    return node


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((each.i for each in node.attribute if each.name == name), 0)


def _order(graph: onnx.ModelProto) -> None:
    """Each node behind what makes its inputs, else as they were."""
    made = {output for node in graph.graph.node for output in node.output}
    waiting, sorted_nodes = list(graph.graph.node), []
    while waiting:
        left = []
        for node in waiting:
            if made.isdisjoint(node.input):
                made.difference_update(node.output)
                sorted_nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            else:
                left.append(node)
        waiting = left
    del graph.graph.node[:]
    graph.graph.node.extend(sorted_nodes)


def off_limits(graph: onnx.ModelProto) -> set[str]:
    """The nodes that stay in float32 whatever happens.

    Among them are the box head's last layers, a third of a percent of the arithmetic, which place every box. In eight
    bits OpenVINO 2026.4 fails on some of them: it takes a scale for each column through the reshape into classes.
    """
    trunk = _before(graph, _levels(graph))
    return {
        node.name
        for node in graph.graph.node
        if not LAST.isdisjoint(node.input)
        or (node.op_type not in LAYERS and not (node.name in trunk and node.op_type in BETWEEN))
    }


def groups(graph: onnx.ModelProto) -> dict[str, list[str]]:
    """The layers' nodes by part of the model, such as backbone.trunk.4 or rpn.head.deltas; sums go along."""
    makers = {output: node for node in graph.graph.node for output in node.output}
    off = off_limits(graph)
    found: dict[str, list[str]] = {}
    for node in graph.graph.node:
        if node.name not in off and (name := _part(node, makers)):
            found.setdefault(name, []).append(node.name)
    return found


def release(quantized: onnx.ModelProto, original: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of `quantized` in which these nodes read what they read in `original`: values, weights and biases."""
    made = onnx.ModelProto()
    made.CopyFrom(quantized)
    before = {node.name: node for node in original.graph.node}
    weights = {weight.name: weight for weight in original.graph.initializer}
    wanted = set(names)
    ours = {weight.name: weight for weight in made.graph.initializer}
    for node in made.graph.node:
        if node.name not in wanted:
            continue
        for index, name in enumerate(before[node.name].input):
            node.input[index] = name
            if name in weights and name in ours:
                ours[name].CopyFrom(weights[name])
            elif name in weights:
                made.graph.initializer.append(weights[name])
                ours[name] = made.graph.initializer[-1]
    _prune(made)
    return made


def is_quantized(graph: onnx.ModelProto) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in graph.graph.node)


def _before(graph: onnx.ModelProto, names: set[str]) -> set[str]:
    """The names of all nodes that lead to these values."""
    makers = {output: node for node in graph.graph.node for output in node.output}
    seen: set[str] = set()
    waiting = [name for name in names if name in makers]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.name not in seen:
            seen.add(node.name)
            waiting += node.input
    return seen


def _part(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    """By its weights' name, or that of the layer before it; of at most three levels."""
    while node.op_type not in LAYERS:
        before = [makers[name] for name in node.input if name in makers]
        if not before:
            return ""
        node = before[0]
    weights = next((name for name in node.input[1:] if name.endswith(".weight")), "")
    return ".".join(weights.removeprefix("model.").split(".")[:-1][:3])


def _prune(graph: onnx.ModelProto) -> None:
    """Takes out what no output needs any more."""
    needed = _before(graph, {output.name for output in graph.graph.output})
    kept = [node for node in graph.graph.node if node.name in needed]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    weights = [weight for weight in graph.graph.initializer if weight.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(weights)


def quantize_early(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what is only joined, picked and reshaped on its way to a layer is in eight bits before that.

    The numbers stay the same, and a quarter of the bytes is moved: RoIAlign's outputs, of the levels put in order.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    makers = {output: node for node in made.graph.node for output in node.output}
    readers: dict[str, list[Any]] = {output.name: [output] for output in made.graph.output}
    for node in made.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for down in [node for node in made.graph.node if node.op_type == "QuantizeLinear"]:
        sources = _moved_from(down, down.input[0], makers, readers)
        if sources == [(down, down.input[0])]:
            continue
        (up,) = readers[down.output[0]]
        for reader in readers[up.output[0]]:
            _read(reader, up.output[0], down.input[0])
        pairs = {source: _pair(down, up, source) for _, source in sources}
        for mover, source in sources:
            _read(mover, source, pairs[source][1].output[0])
        made.graph.node.extend(node for pair in pairs.values() for node in pair)
    _prune(made)
    _order(made)
    return made


def biased(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every convolution in eight bits has a bias, if of next to nothing.

    OpenVINO 2026.4 gets those wrong that have none, where ONNX Runtime does not: of a ResNet-50 with norms behind its
    convolutions 36 of 49 detections were lost.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    makers = {output: node for node in made.graph.node for output in node.output}
    sides = {weight.name: weight.dims for weight in made.graph.initializer}
    for node in made.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.input) > 2 or node.input[1] not in makers:
            continue
        weight = node.input[1]
        while weight in makers:
            weight = makers[weight].input[0]
        channels = sides[weight][0] if node.op_type == "Conv" else sides[weight][1] * (_attribute(node, "group") or 1)
        bias = numpy_helper.from_array(np.full(channels, NEXT_TO_NOTHING, np.float32), f"{node.name}/bias")
        made.graph.initializer.append(bias)
        node.input.append(bias.name)
    return made


def _moved_from(
    reader: onnx.NodeProto, name: str, makers: dict[str, onnx.NodeProto], readers: dict[str, list[Any]]
) -> list[tuple[onnx.NodeProto, str]]:
    """The values that come to `name` by being moved alone, where nothing else reads them on the way; each with the node
    that reads it.
    """
    maker = makers.get(name)
    if maker is None or len(readers[name]) != 1 or maker.op_type not in MOVES:
        return [(reader, name)]
    moved = maker.input if maker.op_type == "Concat" else maker.input[:1]
    return [found for each in moved for found in _moved_from(maker, each, makers, readers)]


def _read(node: onnx.NodeProto, name: str, instead: str) -> None:
    for index, each in enumerate(node.input):
        if each == name:
            node.input[index] = instead


def _pair(down: onnx.NodeProto, up: onnx.NodeProto, source: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """To eight bits and back, with the scale of `down` and `up`, of another value."""
    pair = onnx.NodeProto(), onnx.NodeProto()
    names = source, f"{source}/eight_bits", f"{source}/rounded"
    for made, like, (read, given) in zip(pair, (down, up), zip(names, names[1:], strict=False), strict=True):
        made.CopyFrom(like)
        made.name, made.input[0], made.output[0] = given, read, given
    return pair
