"""A TensorRT graph on the CPU: ONNX Runtime between the custom nodes, the torch ops in their place."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.utils import Extractor

import models.ops  # noqa: F401 - registers the custom ops
from export.trt_graphs import DOMAIN, MAP_ROI_POOL, MERGE, NMS, cut


def run(path: Path, offered: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    graph = onnx.load(path)
    whole, values = cut(graph), dict(offered)
    inputs = [value.name for value in whole.graph.input]
    for node in graph.graph.node:
        if node.domain == DOMAIN:
            if node.op_type == MERGE:
                continue  # done with its groups, which is one op for torch
            wanted = [name for name in node.input if name not in values]
            values |= _standard(whole, [name for name in inputs if name in values], wanted, values)
            values |= _custom(graph, node, values)
    names = [value.name for value in graph.graph.output]
    return {**_standard(whole, inputs, [n for n in names if n not in values], values), **values}


def _standard(whole: onnx.ModelProto, inputs: list[str], wanted: list[str], values: dict[str, Any]) -> dict[str, Any]:
    if not wanted:
        return {}
    part = Extractor(whole).extract_model(inputs, wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    used = {port.name: values[port.name] for port in session.get_inputs()}
    return dict(zip(wanted, session.run(wanted, used), strict=True))


def _custom(graph: onnx.ModelProto, node: onnx.NodeProto, values: dict[str, Any]) -> dict[str, Any]:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    tensors = [torch.from_numpy(np.array(values[name])) for name in node.input]
    assert (attributes["plugin_namespace"], attributes["plugin_version"], attributes["aot"]) == (b"limner", b"1", 1)
    if node.op_type == NMS:
        more = (attributes[name] for name in ("iou", "threshold", "keep"))
        assert tensors[1].shape[2] == attributes["size"]
        found = [each.to(torch.int32) for each in torch.ops.limner.nms(*tensors, *more)]
        node = next(each for each in graph.graph.node if each.op_type == MERGE and each.input[0] == node.output[0])
    else:
        names = ["size", "sampling", "aligned", "canonical", "stride"]
        op = torch.ops.limner.roi_align
        if node.op_type == MAP_ROI_POOL:
            names, op = ["size", "canonical", "stride"], torch.ops.limner.roi_pool
        assert tensors[0].shape[1] == attributes["channels"]
        found = [op(tensors[:-1], tensors[-1], *(attributes[name] for name in names))]
    return {name: value.numpy() for name, value in zip(node.output, found, strict=True)}
