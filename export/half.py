"""A model as a TensorRT plan computes it: BatchNorms folded, layers in half precision, boxes and scores in float32.

TensorRT 11 types strongly: what the graph says is what runs, so the precision is decided here. Half are the weights and
activations of the trunk, the pyramid, the RPN's head and the heads; float32 are normalisation, anchors, RoIs, box
arithmetic, softmax, sigmoid and NMS (which the networks ask for themselves, wherever they say `.float()`), the layers
that a network calls exact (the box head's last two), and what interpolates heatmaps.
"""

import copy
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.network import Network

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PlanPrecision = Literal["float32", "float16", "bfloat16"]
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
LARGEST_HALF = 65504.0


class Rounded(nn.Module):
    """A layer or network between two casts; None leaves a side as it is."""

    def __init__(self, inner: nn.Module, reads: torch.dtype | None, gives: torch.dtype | None) -> None:
        super().__init__()
        self.inner, self.reads, self.gives = inner, reads, gives

    def forward(self, values: Tensor) -> Any:
        given = self.inner(values if self.reads is None else values.to(self.reads))
        return given if self.gives is None else given.to(self.gives)


def prepared(model: Network, precision: PlanPrecision) -> Network:
    """A copy in evaluation mode with its norms folded, in this precision. ValueError where float16 cannot hold it."""
    model = fold_norms(copy.deepcopy(model).eval().requires_grad_(False))
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return model
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LAYERS):
            _check_range(name, layer, dtype)
            layer.to(dtype)
        elif isinstance(layer, nn.GroupNorm):  # not folded: its sums follow the picture
            model.set_submodule(name, Rounded(layer, torch.float32, dtype))
    # fp32 islands that the networks do not ask for by themselves:
    for name in model.exact:
        model.set_submodule(name, Rounded(model.get_submodule(name).float(), torch.float32, None))
    if model.keypoint_head is not None:  # its maps are doubled by interpolation, whose steps decide a joint's cell
        upsample = model.keypoint_head.upsample
        model.keypoint_head.upsample = Rounded(upsample, None, torch.float32)  # type: ignore[assignment]
        model.keypoint_head.upsample.out_channels = upsample.out_channels
    backbone = model.backbone
    model.backbone = Rounded(backbone, dtype, None)  # type: ignore[assignment]
    model.backbone.width, model.backbone.levels = backbone.width, backbone.levels
    return model


def _check_range(name: str, layer: nn.Module, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        largest = max((float(p.abs().max()) for p in layer.parameters() if p.numel()), default=0.0)
        if not largest < LARGEST_HALF:
            raise ValueError(f"{name} has a weight of {largest:g}, float16 ends at {LARGEST_HALF:g}: use bfloat16")


def fold_norms(model: Network) -> Network:
    """Every norm into the convolution before it, in place, computed in float64: half weights are rounded once, not
    twice. ValueError where a norm follows something else.
    """
    for parent, before, after in folding(model):
        conv, norm = parent._modules[before], parent._modules[after]
        assert isinstance(conv, nn.Conv2d)
        assert norm is not None
        parent._modules[before] = _folded(conv, norm)
        parent._modules[after] = nn.Identity()
    if left := [name for name, module in model.named_modules() if isinstance(module, NORMS)]:
        raise ValueError(f"{left[0]} does not follow a convolution and cannot be folded")
    return model


def folding(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Where a norm follows a convolution: their parent, and both names in it."""
    return [
        (parent, before, after)
        for parent in model.modules()
        for before, after in pairwise(parent._modules)
        if isinstance(parent._modules[before], nn.Conv2d) and isinstance(parent._modules[after], NORMS)
    ]


def _folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    weight, bias, mean, variance = (
        torch.as_tensor(getattr(norm, name)).detach().double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / torch.sqrt(variance + norm.eps)  # type: ignore[operator]
    before = torch.zeros_like(mean) if conv.bias is None else conv.bias.detach().double()
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter((conv.weight.detach().double() * scale[:, None, None, None]).float(), False)
    folded.bias = nn.Parameter((bias + (before - mean) * scale).float(), False)
    return folded
