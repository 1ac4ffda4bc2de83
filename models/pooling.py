"""How a RoI becomes an array of fixed size: four poolers behind one call, and all that a head needs to know of them.

    pooler(features, rois) -> (N, C, *shape);   pooler.cells == prod(shape)

features: maps (B, C, H / s, W / s), of strides `stride`, twice `stride`, ...; for `Warp` the normalised pictures
themselves. rois (N, 5): batch index, then xyxy on the canvas. A RoI of no area or past the border pools something
finite. Every shape follows from those of the inputs, so each of them exports as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models import ops

FPN_STRIDE, FPN_SIDE = 4, 224  # of p2; of a RoI that is pooled from p4 (FPN equation 1)


class Pooler(Protocol):
    @property
    def cells(self) -> int:
        """Values of one channel of one RoI."""
        ...

    def __call__(self, features: Sequence[Tensor], rois: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class RoIAlign:
    """Mask R-CNN section 3: the mean of points between cells, nothing rounded. (N, C, size, size).

    `sampling` points a bin and axis (0: as many as there are cells); `aligned`: half a cell's shift (Detectron2).
    `canonical`: the side, in canvas pixels, of a RoI that is pooled from a pyramid's third level.
    """

    size: int = 7
    sampling: int = 2
    aligned: bool = False
    canonical: int = FPN_SIDE
    stride: int = FPN_STRIDE

    @property
    def cells(self) -> int:
        return self.size**2

    def __call__(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        return ops.roi_align(features, rois, self.size, self.sampling, self.aligned, self.canonical, self.stride)


@dataclass(frozen=True, slots=True)
class RoIPool:
    """Fast R-CNN section 2.1: the largest value of each bin of whole cells. (N, C, size, size)."""

    size: int = 7
    canonical: int = FPN_SIDE
    stride: int = FPN_STRIDE

    @property
    def cells(self) -> int:
        return self.size**2

    def __call__(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        return ops.roi_pool(features, rois, self.size, self.canonical, self.stride)


@dataclass(frozen=True, slots=True)
class SpatialPyramid:
    """SPP-net section 2.2: the largest value of each bin of grids of 1, 2, 3 and 6 a side. (N, C, 50).

    A RoI is the cells whose centres, at multiples of `stride`, lie inside it (SPP-net appendix A: left is
    floor(x / stride) + 1, right is ceil(x / stride) - 1). One that holds none is the cell before its left or top edge.
    """

    grids: tuple[int, ...] = (1, 2, 3, 6)
    stride: int = 16

    @property
    def cells(self) -> int:
        return sum(grid**2 for grid in self.grids)

    def __call__(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        last = torch.ceil(rois[:, 3:] / self.stride) - 1
        first = torch.minimum(torch.floor(rois[:, 1:3] / self.stride) + 1, last)
        inside = torch.cat((rois[:, :1], torch.cat((first, last), dim=1).clamp(min=0) * self.stride), dim=1)
        pooled = [ops.roi_pool(features, inside, grid, FPN_SIDE, self.stride).flatten(2) for grid in self.grids]
        return torch.cat(pooled, dim=2)


@dataclass(frozen=True, slots=True)
class Warp:
    """R-CNN appendix A: the pixels of a RoI and some around it, stretched to a square. (N, 3, size, size).

    The RoI itself fills all but `context` pixels at each border of the square, whatever its own size and shape. Sampled
    at one point a pixel, without antialiasing. What lies outside the picture is 0, the mean of what was normalised.
    """

    size: int = 227
    context: int = 16

    @property
    def cells(self) -> int:
        return self.size**2

    def __call__(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        margin = (rois[:, 3:] - rois[:, 1:3]) * (self.context / (self.size - 2 * self.context))
        around = torch.cat((rois[:, :1], rois[:, 1:3] - margin, rois[:, 3:] + margin), dim=1)
        return ops.roi_align(features, around, self.size, 1, True, FPN_SIDE, 1)
