"""One ONNX graph in eight bits: NNCF puts QuantizeLinear and DequantizeLinear around the network's layers, and here
some of the layers are given back to float32.

Only what lies between the pixels and the pyramid, and the layers of the heads, is quantised; anchors, boxes, NMS and
RoIAlign are named as off limits, so their float32 arithmetic is left as it was.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx

LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
BETWEEN = {"Add", "Relu", "Clip", "MaxPool", "Resize"}  # of a trunk: what may be computed between layers in eight bits
# Of all outputs those that are no features.
ANSWERS = {"count", "boxes", "scores", "labels", "probabilities", "heatmaps"}


def quantize(path: Path, out: Path, items: Sequence[Any], feed: Callable[[Any], dict[str, Any]]) -> None:
    """Static, symmetric, one scale for each channel of the weights; `feed` gives the inputs that belong to an item."""
    nncf: Any = importlib.import_module("nncf")  # an extra, which checkers need not find

    nncf.set_log_level(logging.ERROR)
    graph = onnx.load(path)
    scope = nncf.IgnoredScope(names=sorted(off_limits(graph)), validate=False)
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        made = nncf.quantize(
            graph,
            nncf.Dataset(items, feed),
            subset_size=len(items),
            ignored_scope=scope,
            preset=nncf.QuantizationPreset.PERFORMANCE,
        )
    onnx.save(made, out)


def off_limits(graph: onnx.ModelProto) -> set[str]:
    """The nodes that stay in float32 whatever happens."""
    trunk = _before(graph, {output.name for output in graph.graph.output} - ANSWERS)
    return {
        node.name
        for node in graph.graph.node
        if node.op_type not in LAYERS and not (node.name in trunk and node.op_type in BETWEEN)
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
