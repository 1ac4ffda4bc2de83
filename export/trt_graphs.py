"""The three stages as TensorRT takes them: fixed canvases, a dynamic batch, and our custom ops kept as nodes.

    limner::NmsGroups        boxes (B, G, N, 4), scores (B, G, N) -> kept (B, G, M) int32, their scores, how many (B, G)
    limner::NmsMerge         those three -> indices (B, keep) int32, count (B,) int32
    limner::PyramidRoiAlign  p2.. (B, C, h, w), rois (R, 5) -> pooled (R, C, size, size), of the features' type
    limner::ShortPyramidRoiAlign             the same of p2 to p4
    limner::MapRoiAlign, limner::MapRoiPool  the same of a trunk's one map, or of the pictures themselves

Everything else is standard ONNX that TensorRT 10.13 and newer import, of a size that follows from the batch alone.
`problems` is the list of what it would refuse; `cut` gives the graph between the custom nodes.
"""

import io
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema, get_schema, register_schema
from onnxscript import opset20
from onnxscript.values import Opset
from torch import nn

from export.to_onnx import OPSET, head_example, stage_modules, strip_traces
from models.kernels.launch import round_down
from models.network import Network
from service.bundle import CanvasRule, StageName

DOMAIN = "limner"
NMS, MERGE = "NmsGroups", "NmsMerge"
ROI_ALIGN, SHORT_ROI_ALIGN = "PyramidRoiAlign", "ShortPyramidRoiAlign"
MAP_ROI_ALIGN, MAP_ROI_POOL = "MapRoiAlign", "MapRoiPool"
NUM_MAPS = {ROI_ALIGN: 4, SHORT_ROI_ALIGN: 3, MAP_ROI_ALIGN: 1, MAP_ROI_POOL: 1}  # a plugin's signature fixes them
# TensorRT's parser looks a plugin up by these; `aot` asks for the ahead-of-time implementation.
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
MAX_TOP_K = 3840  # ITopKLayer's
# What NVIDIA's importer takes without a plugin, as far as these networks use it (onnx-tensorrt, docs/operators.md).
STANDARD = frozenset(
    "Add And Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose Div Equal Exp Expand Flatten"
    " Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity InstanceNormalization"
    " Less LessOrEqual Log MatMul Max MaxPool Min Mod Mul Neg Not Or Pad Range ReduceMax ReduceMean"
    " ReduceMin ReduceSum Relu Reshape Resize Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tile TopK"
    " Transpose Unsqueeze Where".split()
)
FLOAT, INT64, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32
TYPES: dict[str, int] = {"float32": FLOAT, "float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
op: Any = opset20


def register() -> Opset:
    """Makes the custom nodes known to onnx, once in a process."""
    form, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    marks = [OpSchema.Attribute("plugin_namespace", kinds.STRING, ""), OpSchema.Attribute("aot", kinds.INT, "")]
    marks.append(OpSchema.Attribute("plugin_version", kinds.STRING, ""))
    cut_off = [OpSchema.Attribute("iou", kinds.FLOAT, ""), OpSchema.Attribute("threshold", kinds.FLOAT, "")]
    sizes = [OpSchema.Attribute("size", kinds.INT, ""), OpSchema.Attribute("keep", kinds.INT, "")]
    pooling = ("size", "canonical", "stride", "channels")
    pooling_of = {name: pooling if name == MAP_ROI_POOL else (*pooling, "sampling", "aligned") for name in NUM_MAPS}
    thinned = [("kept", "tensor(int32)"), ("kept_scores", "tensor(float)"), ("kept_count", "tensor(int32)")]
    schemas = (
        OpSchema(
            NMS, DOMAIN, 1,
            inputs=[form("boxes", "tensor(float)"), form("scores", "tensor(float)")],
            outputs=[form(*each) for each in thinned],
            attributes=[*cut_off, *sizes, *marks],
        ),
        OpSchema(
            MERGE, DOMAIN, 1,
            inputs=[form(*each) for each in thinned],
            outputs=[form("indices", "tensor(int32)"), form("count", "tensor(int32)")],
            attributes=[*cut_off, *sizes, *marks],
        ),
        *(
            OpSchema(
                name, DOMAIN, 1,
                inputs=[*(form(f"map{index}", "T") for index in range(maps)), form("rois", "tensor(float)")],
                outputs=[form("pooled", "T")],
                type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
                attributes=[*(OpSchema.Attribute(number, kinds.INT, "") for number in pooling_of[name]), *marks],
            )
            for name, maps in NUM_MAPS.items()
        ),
    )  # fmt: skip
    for schema in schemas:
        try:
            get_schema(schema.name, 1, DOMAIN)
        except onnx.defs.SchemaError:
            register_schema(schema)
    return Opset(DOMAIN, 1)


ours: Any = register()


def nms(boxes: Any, scores: Any, iou: float, threshold: float, keep: int) -> Any:
    """Attributes are float32: the IoU is rounded down here, for a float32 exceeds it exactly if it exceeds that."""
    more = {"iou": round_down(iou), "threshold": threshold, "size": _known(scores, 2), "keep": keep, **PLUGIN}
    indices, count = ours.NmsMerge(*ours.NmsGroups(boxes, scores, **more), **more)
    return op.Cast(indices, to=INT64), op.Cast(count, to=INT64)


def roi_align(
    features: Sequence[Any], rois: Any, size: int, sampling: int, aligned: bool, canonical: int, stride: int = 4
) -> Any:
    more = {"sampling": sampling, "aligned": int(aligned)}
    return _pooled((ROI_ALIGN, SHORT_ROI_ALIGN, MAP_ROI_ALIGN), features, rois, size, canonical, stride, **more)


def roi_pool(features: Sequence[Any], rois: Any, size: int, canonical: int, stride: int = 4) -> Any:
    return _pooled((MAP_ROI_POOL,), features, rois, size, canonical, stride)


def _pooled(
    nodes: Sequence[str], features: Sequence[Any], rois: Any, size: int, canonical: int, stride: int, **more: int
) -> Any:
    node = next((name for name in nodes if NUM_MAPS[name] == len(features)), None)
    if node is None:
        raise ValueError(f"RoIs of {len(features)} maps: there are plugins for {[NUM_MAPS[name] for name in nodes]}")
    more |= {"size": size, "canonical": canonical, "stride": stride, "channels": _known(features[0], 1)}
    return getattr(ours, node)(*features, rois, **more, **PLUGIN)


def _known(value: Any, axis: int) -> int:
    """A size that a kernel is compiled for."""
    size = value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"axis {axis} of {value.name} is {size}: TensorRT's kernels need it fixed")
    return size


TABLE = {
    torch.ops.limner.nms.default: nms,
    torch.ops.limner.roi_align.default: roi_align,
    torch.ops.limner.roi_pool.default: roi_pool,
}


@dataclass(frozen=True, slots=True, order=True)
class FixedCanvas:
    """A shape that plans are made for."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def canvases(rule: CanvasRule, wanted: Sequence[str]) -> list[FixedCanvas]:
    """Names (landscape, portrait, square) and shapes like 384x512 -> shapes, the largest that the rule makes of a kind.

    ValueError where one is no shape, or not a multiple of what the network's strides need.
    """
    short, long = (-(-side // rule.multiple) * rule.multiple for side in (rule.short_side, rule.long_side))
    named = {"landscape": (short, long), "portrait": (long, short), "square": (short, short)}
    found = []
    for text in wanted:
        height, width = named.get(text) or _sides(text)
        if height % 32 or width % 32 or min(height, width) < 64:
            raise ValueError(f"--canvas {text}: both sides must be multiples of 32, and 64 at least")
        found.append(FixedCanvas(height, width))
    return sorted(set(found), key=lambda each: (each.height * each.width, each))


def _sides(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--canvas {text}: expected landscape, portrait, square or a shape like 384x512") from None
    return height, width


def save_stages(
    model: Network, shapes: Sequence[FixedCanvas], max_batch: int, max_rois: int, directory: Path
) -> dict[tuple[StageName, FixedCanvas | None], Path]:
    """Writes detect.<canvas>.onnx and one graph a head, which takes the pyramid of any canvas.

    `model` is one that `export.half.prepared` gave.
    """
    files: dict[tuple[StageName, FixedCanvas | None], Path] = {}
    for stage, (module, inputs, outputs) in stage_modules(model).items():
        names = [port.name for port in inputs], [port.name for port in outputs]
        for canvas in shapes if stage == "detect" else [None]:
            path = directory / (f"{stage}.{canvas}.onnx" if canvas else f"{stage}.onnx")
            example, dynamic = (
                _detect_example(canvas, max_batch)
                if canvas
                else _head_example(model, stage, shapes, max_batch, max_rois)
            )
            _save(module, example, dynamic, names, path)
            files[stage, canvas] = path
    return files


def _save(module: nn.Module, example: Any, dynamic: Any, names: tuple[list[str], list[str]], path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, opset_version=OPSET, dynamic_shapes=dynamic, input_names=names[0],
            output_names=names[1], custom_translation_table=TABLE,
        )  # fmt: skip
    assert program is not None
    program.save(path, external_data=False)
    strip_traces(path)


def _detect_example(canvas: FixedCanvas, max_batch: int) -> tuple[Any, Any]:
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))  # traced with two: one may be taken for a constant
    sizes = torch.tensor([[canvas.height, canvas.width], [canvas.height - 8, canvas.width - 8]])
    images = torch.randint(0, 256, (2, canvas.height, canvas.width, 3), dtype=torch.uint8)
    return (images, sizes), ({0: batch}, {0: batch})


def _head_example(
    model: Network, stage: str, shapes: Sequence[FixedCanvas], max_batch: int, max_rois: int
) -> tuple[Any, Any]:
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))
    num = torch.export.Dim("rois", min=1, max=max(3, max_rois))
    tall, wide = (max(getattr(shape, side) for shape in shapes) // 32 for side in ("height", "width"))
    h, w = (torch.export.Dim(name, min=1, max=max(9, most)) for name, most in (("h", tall), ("w", wide)))
    return head_example(model, stage, (batch, h, w, num))


def problems(graph: onnx.ModelProto) -> list[str]:
    """What TensorRT would refuse, in words; empty where nothing is known against this graph."""
    onnx.checker.check_model(graph)
    told, constants = [], _constants(graph)
    types = value_types(graph)
    for node in graph.graph.node:
        if node.domain == DOMAIN:
            told += [f"{node.name}: {name!r} must be float32" for name in exact_inputs(node) if types[name] != FLOAT]
        elif node.domain not in ("", "ai.onnx") or node.op_type not in STANDARD:
            told.append(f"{node.name}: TensorRT's parser does not take {node.domain or 'ai.onnx'}::{node.op_type} here")
        elif node.op_type == "TopK":
            k = constants.get(node.input[1])
            if k is None:
                told.append(f"{node.name}: the size of a TopK must be a constant")
            elif int(k.flat[0]) > MAX_TOP_K:
                told.append(f"{node.name}: TopK of {int(k.flat[0])}, TensorRT ends at {MAX_TOP_K}")
    return told


def exact_inputs(node: onnx.NodeProto) -> list[str]:
    """The inputs of a custom node that hold coordinates or scores."""
    return {NMS: list(node.input), MERGE: [node.input[1]]}.get(node.op_type, [node.input[-1]])


def value_types(graph: onnx.ModelProto) -> dict[str, int]:
    """Element type of each named value (onnx.TensorProto's numbers)."""
    inferred = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    holders = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in holders}
    types |= {tensor.name: tensor.data_type for tensor in inferred.graph.initializer}
    # What follows a custom node has no inferred type; the exporter wrote it down, or it is the node's own rule.
    for node in inferred.graph.node:
        if node.domain == DOMAIN:
            pooled = [types.get(node.input[0], FLOAT)]
            given = {NMS: [INT32, FLOAT, INT32], MERGE: [INT32, INT32]}.get(node.op_type, pooled)
            types |= dict(zip(node.output, given, strict=True))
    return types


def _constants(graph: onnx.ModelProto) -> dict[str, Any]:
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = onnx.numpy_helper.to_array(attribute.t)
    return found


def cut(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without its custom nodes: what they give becomes an input, what they read an output.

    For parsers and runtimes that do not know the nodes.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(graph)
    types = value_types(graph)
    shapes = {v.name: v for v in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output)}
    inputs = {value.name for value in graph.graph.input} | {tensor.name for tensor in graph.graph.initializer}
    ours_alone = _between_custom_nodes(graph)
    outputs = {value.name for value in graph.graph.output}
    kept = [node for node in graph.graph.node if node.domain != DOMAIN]
    for node in graph.graph.node:
        if node.domain != DOMAIN:
            continue
        for name in node.input:
            if name not in inputs | outputs | ours_alone:
                whole.graph.output.append(_described(name, types[name], shapes.get(name)))
                outputs.add(name)
        for name, shape in zip(node.output, _shapes_given(node), strict=True):
            if name not in ours_alone:
                whole.graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], shape))
    del whole.graph.node[:]
    whole.graph.node.extend(kept)
    return whole


def _between_custom_nodes(graph: onnx.ModelProto) -> set[str]:
    """What one custom node gives and only custom nodes read."""
    given = {name for node in graph.graph.node if node.domain == DOMAIN for name in node.output}
    read = {name for node in graph.graph.node if node.domain != DOMAIN for name in node.input}
    return given - read - {value.name for value in graph.graph.output}


def _described(name: str, kind: int, known: onnx.ValueInfoProto | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind, known and _dims(known))


def _shapes_given(node: onnx.NodeProto) -> list[list[Any]]:
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == NMS:
        return [["batch", None, min(sizes["size"], sizes["keep"])]] * 2 + [["batch", None]]
    if node.op_type == MERGE:
        return [["batch", sizes["keep"]], ["batch"]]
    return [["pooled", sizes["channels"], sizes["size"], sizes["size"]]]


def _dims(value: onnx.ValueInfoProto) -> list[Any]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in dims]


def plan_of(graph: onnx.ModelProto) -> str:
    """One line for --dry-run: how many nodes of which kind."""
    counts = Counter(node.op_type for node in graph.graph.node if node.domain != DOMAIN)
    layers = sum(counts[kind] for kind in ("Conv", "ConvTranspose", "Gemm", "MatMul"))
    plugins = Counter(node.op_type for node in graph.graph.node if node.domain == DOMAIN)
    told = ", ".join(f"{number} {DOMAIN}::{name}" for name, number in sorted(plugins.items())) or "none"
    return f"{sum(counts.values())} standard nodes ({layers} layers with weights), plugins: {told}"
