"""The stages compiled by AOTInductor: torch and the models, nothing of bundles.

`detect` is one package a canvas, a head one for all of them; the batch and the number of RoIs stay open in each, within
what was asked for. Weights and feature maps are channels-last. Our two ops stay calls inside a package, by the names of
`service/aoti/ops.py`; on a GPU their machine code is written beside the packages. B images, N RoIs.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export import toolchain
from models import kernels
from models.network import Network
from models.servable import MEAN, STD, DetectStage, KeypointStage, MaskStage, normalise
from service.aoti import ops as served

Shape = tuple[int, int]
SERVED = {
    torch.ops.limner.nms.default: torch.ops.limner_served.nms.default,
    torch.ops.limner.roi_align.default: torch.ops.limner_served.roi_align.default,
}


@dataclass(frozen=True, slots=True)
class Built:
    """File names in the folder: of `detect` by canvas, of each head, and of the machine code by its op's key."""

    detect: dict[Shape, str]
    heads: dict[str, str]
    kernels: dict[str, dict[str, Any]]


def build(
    model: Network,
    canvases: Sequence[Shape],
    max_batch: int,
    max_rois: int,
    device: str,
    folder: Path,
    say: Callable[[str], None] = lambda _text: None,
) -> Built:
    """`model` is one that `export.half.prepared` gave; `device` is cpu or cuda. Writes into `folder`."""
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    detect, heads, calls = {}, {}, {}
    with nullcontext() if device == "cpu" else toolchain.for_cuda():
        for stage, module in stages(model).items():
            for canvas in canvases if stage == "detect" else [None]:
                file = f"detect.{canvas[0]}x{canvas[1]}.pt2" if canvas else f"{stage}.pt2"
                say(f"compiling {file}")
                example = (
                    detect_example(canvas, max_batch, device)
                    if canvas
                    else head_example(model, stage, canvases, max_batch, max_rois, device)
                )
                calls |= compile_stage(module, example, folder / file)
                if canvas:
                    detect[canvas] = file
                else:
                    heads[stage] = file
    return Built(detect, heads, write_kernels(calls, folder) if device != "cpu" else {})


class Detect(DetectStage):
    """The stage, with the constants of normalisation among its buffers."""

    constants: Tensor

    def __init__(self, model: Network) -> None:
        super().__init__(model)
        device = next(model.parameters()).device
        self.register_buffer("constants", torch.tensor((MEAN, STD), device=device), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        count, boxes, scores, labels, features = self.model(normalise(images, sizes, self.constants), sizes)
        return count, boxes, scores, labels, *features


def stages(model: Network) -> dict[str, nn.Module]:
    """By name. In `detect` the constants are on the device already: a CUDA graph may not bring them there."""
    found: dict[str, nn.Module] = {"detect": Detect(model)}
    if model.mask_head is not None:
        found["masks"] = MaskStage(model)
    if model.keypoint_head is not None:
        found["keypoints"] = KeypointStage(model)
    return found


def detect_example(canvas: Shape, max_batch: int, device: str) -> tuple[tuple[Tensor, ...], Any]:
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))  # traced with two: one may be taken for a constant
    images = torch.randint(0, 256, (2, *canvas, 3), dtype=torch.uint8, device=device)
    sizes = torch.tensor([canvas, (canvas[0] - 8, canvas[1] - 8)], device=device)
    return (images, sizes), ({0: batch}, {0: batch})


def head_example(
    model: Network, stage: str, canvases: Sequence[Shape], max_batch: int, max_rois: int, device: str
) -> tuple[tuple[Tensor, ...], Any]:
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))
    num = torch.export.Dim("rois", min=1, max=max(3, max_rois))
    tall, wide = (max(canvas[axis] for canvas in canvases) // 32 for axis in (0, 1))
    h, w = (torch.export.Dim(name, min=1, max=max(9, most)) for name, most in (("h", tall), ("w", wide)))
    dtype = next(parameter.dtype for parameter in model.backbone.parameters())
    strides = [1 << int(name[1:]) for name in model.backbone.levels]  # p2 is a quarter of the canvas
    levels: list[Tensor] = [
        torch.randn(2, model.backbone.width, 192 // stride, 256 // stride, device=device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for stride in strides
    ]
    level_shapes: list[Any] = [
        {0: batch, 2: 32 // stride * h if stride < 32 else h, 3: 32 // stride * w if stride < 32 else w}
        for stride in strides
    ]
    rois = torch.tensor([[0.0, 8, 8, 100, 120], [1, 20, 30, 60, 80], [1, 0, 0, 250, 190]], device=device)
    example, dynamic = [*levels, rois], [*level_shapes, {0: num}]
    if stage == "masks":
        example, dynamic = [*example, torch.zeros(3, dtype=torch.int64, device=device)], [*dynamic, {0: num}]
    return tuple(example), (tuple(dynamic),)  # a stage takes them one by one: one argument of torch's, a tuple


Calls = dict[str, tuple[Any, ...]]


def compile_stage(module: nn.Module, example: tuple[tuple[Tensor, ...], Any], file: Path) -> Calls:
    """Writes one package; returns what our ops are called with in it, by key."""
    inputs, dynamic = example
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        program = torch.export.export(module.eval().requires_grad_(False), inputs, dynamic_shapes=dynamic, strict=False)
        calls: Calls = {}
        for node in program.graph.nodes:
            if node.target is torch.ops.limner.roi_pool.default:
                raise ValueError("a package cannot hold RoIPool: give the model RoIAlign (option pooler: align)")
            if node.target in SERVED:
                node.target = SERVED[node.target]
                key, call = _call_of(node)
                calls[key] = call
        program.graph_module.recompile()
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return calls


def _call_of(node: torch.fx.Node) -> tuple[str, tuple[Any, ...]]:
    arguments: Any = node.args
    if node.target is torch.ops.limner_served.nms.default:
        scores, iou, threshold, keep = arguments[1].meta["val"], *arguments[2:]
        size = int(scores.shape[2])
        return served.nms_key(iou, threshold, size), ("nms", iou, threshold, size, keep)
    features = [each.meta["val"] for each in arguments[0]]
    last, channels, dtype = served.channels_last(features), int(features[0].shape[1]), features[0].dtype
    numbers = (dtype, last, len(features), channels, *arguments[2:])
    return served.roi_align_key(*numbers), ("roi_align", *numbers)


def write_kernels(calls: Calls, folder: Path) -> dict[str, dict[str, Any]]:
    """Machine code of every call for this machine's GPU, and how `service.aoti.ops.Code` is made of it again."""
    major, minor = torch.cuda.get_device_capability()
    found = {}
    for index, (key, code) in enumerate(codes(calls, f"sm_{major}{minor}")):
        file = f"{key.partition(' ')[0]}{index}.cubin"
        (folder / file).write_bytes(code.cubin)
        found[key] = {"file": file, "threads": dict(code.threads), "slices": code.slices}
    return found


def codes(calls: Calls, arch: str) -> Iterator[tuple[str, served.Code]]:
    for key, (op, *arguments) in sorted(calls.items()):
        if op == "nms":
            iou, threshold, size, keep = arguments
            launches = [kernels.nms_launch(1, 1, size, keep), kernels.nms_merge_launch(1, 1, size, keep)]
            defines = kernels.nms_defines(iou, threshold, size)
        else:
            dtype, last, levels, channels, size = arguments[:5]
            launches = [kernels.roi_align_launch(1, 1, channels, [(1, 1)] * levels, size, dtype, last)]
            defines = kernels.roi_align_defines(*arguments)
        cubin = kernels.compile_cubin(op, arch, defines)
        yield key, served.Code(cubin, {each.kernel: each.block[0] for each in launches}, launches[0].grid[1])
