"""What OpenVINO may round to bfloat16: what passes between the layers of the network, and nothing of a box.

Under INFERENCE_PRECISION_HINT=bf16 its CPU plugin takes every convolution, matrix product and Interpolate for a layer,
which reads and writes bfloat16, and rounds all other float tensors, too, unless they lie between the last layer and an
output of the graph. So it rounds the boxes that RoIAlign reads to eight bits, steps of four pixels at 800, and deltas,
logits, heatmaps and biases. `prepare` changes the graph, not its values, so that none of this happens. C channels.

Some layers stand no rounding at all: MobileNetV2's first ones carry channels whose mean is many times their spread, and
eight bits of the mean leave little of the spread. The hint knows no exceptions, so `divided` cuts the graph in two.
"""

import numpy as np
import openvino
from openvino import opset15 as op

LARGEST = float(np.finfo(np.float32).max)
PRODUCTS = {"Convolution", "ConvolutionBackpropData", "GroupConvolution", "MatMul"}
ENDS = {"Convolution", "FullyConnected", "MatMul", "ShapeOf"}  # the plugin's names; a layer sums in float32
EXACT = {"Output", "ROIAlign", "ROIPooling"}  # what must read exact values; its RoIPool cannot, which is noticed


def prepare(model: openvino.Model) -> None:
    """Readies `model` for compilation under the hint."""
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in PRODUCTS:
            # A bias right behind a layer would be rounded, and so would the sum. Behind this Clamp, which changes
            # nothing, it is a step of its own: fused all the same, and exact at the end of the graph.
            _move_readers(node.output(0), op.clamp(node.output(0), -LARGEST, LARGEST))
        elif kind == "ROIAlign":
            model.add_results([op.result(_first_row(node.output(0)))])
        elif kind == "Interpolate" and _is_doubled_output(node):
            _move_readers(node.output(0), _doubled(node.input_value(0)))
    model.validate_nodes_and_infer_types()


def divided(model: openvino.Model, until: str) -> tuple[openvino.Model, openvino.Model]:
    """What makes the tensor `until`, by its name in the ONNX graph, and the rest, which takes it as an input.

    Raises KeyError where the graph has no such tensor."""
    first, rest = model, model.clone()
    made, taken = (_output(half, until) for half in (first, rest))
    offered = op.parameter(taken.get_partial_shape(), taken.get_element_type(), name=until)
    offered.output(0).set_names({until})
    for port in taken.get_target_inputs():
        port.replace_source_output(offered.output(0))
    rest.add_parameters([offered])
    made.set_names({until})
    for result in first.get_results():
        first.remove_result(result)
    first.add_results([op.result(made)])
    return first, rest


def _output(model: openvino.Model, name: str) -> openvino.Output:
    outputs = (output for node in model.get_ordered_ops() for output in node.outputs())
    if (found := next((output for output in outputs if name in output.get_names()), None)) is None:
        raise KeyError(name)
    return found


def rounded(compiled: openvino.CompiledModel) -> list[str]:
    """The compiled graph's nodes that should be exact and are not: between a layer and an output or what pools RoIs."""
    nodes = compiled.get_runtime_model().get_ordered_ops()
    waiting = [node for node in nodes if _told(node, "layerType") in EXACT]
    seen, found = {node.get_friendly_name() for node in waiting}, []
    while waiting:
        node = waiting.pop()
        if "bf16" in (_told(node, "runtimePrecision") + _told(node, "outputPrecisions")).lower():
            found.append(node.get_friendly_name())
        for port in node.inputs():
            source = port.get_source_output().get_node()
            name = source.get_friendly_name()
            if name not in seen and _told(source, "layerType") not in ENDS:
                seen.add(name)
                waiting.append(source)
    return sorted(found)


def _told(node: openvino.Node, key: str) -> str:
    return str(node.get_rt_info()[key].value)


def _move_readers(output: openvino.Output, node: openvino.Node) -> None:
    """From `output` to `node`, which may read it, too."""
    for port in output.get_target_inputs():
        if port.get_node().get_friendly_name() != node.get_friendly_name():
            port.replace_source_output(node.output(0))
    names = output.get_names()
    output.set_names(set())
    node.output(0).set_names(names)


def _first_row(pooled: openvino.Output) -> openvino.Node:
    """As an output of the graph, it puts all that leads to RoIAlign between a layer and an output."""
    start, stop, step, axis = (op.constant(np.array([value], np.int64)) for value in (0, 1, 1, 0))
    return op.slice(pooled, start, stop, step, axis)


def _is_doubled_output(node: openvino.Node) -> bool:
    """Bilinear doubling at the end of the graph."""
    readers = {port.get_node().get_type_name() for port in node.output(0).get_target_inputs()}
    attributes = node.get_attributes()
    bilinear = attributes["mode"] == "linear_onnx" and attributes["coordinate_transformation_mode"] == "half_pixel"
    small, large = (
        [side.get_max_length() for side in list(shape)[2:]]
        for shape in (node.get_input_partial_shape(0), node.get_output_partial_shape(0))
    )
    return readers == {"Result"} and bilinear and large == [2 * side for side in small]


def _doubled(maps: openvino.Output) -> openvino.Node:
    """The same as a transposed convolution with two taps a side, on maps (N, C, h, w) whose borders are repeated."""
    channels = maps.get_partial_shape()[1].get_length()
    taps = np.array([0.25, 0.75, 0.75, 0.25], np.float32)
    kernel = np.broadcast_to(np.outer(taps, taps), (channels, 1, 1, 4, 4))
    border = op.constant(np.array([0, 0, 1, 1], np.int64))
    return op.group_convolution_backprop_data(
        op.pad(maps, border, border, "edge"), op.constant(kernel), [2, 2], None, [3, 3], [3, 3], [1, 1]
    )
