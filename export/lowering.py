"""The custom ops as standard ONNX operators: a translation table for `torch.onnx.export`.

What depends on the data stays inside: NonMaxSuppression's list of survivors is scattered back over the dense scores and
cut to a fixed size by TopK; each level's RoiAlign or MaxRoiPool runs on its own RoIs, and one gather restores their
order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20
from onnxscript.onnx_types import TensorType

import models.ops  # noqa: F401 - registers the custom ops

op: Any = opset20  # its own annotations name ONNX types, which no checker can add or compare
FLOAT, INT = 1, 7  # onnx.TensorProto's


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _int(value: int) -> Any:
    return op.Constant(value_int=value)


def _float(value: float) -> Any:
    return op.Constant(value_float=float(value))


def nms(boxes: TensorType, scores: TensorType, iou: float, threshold: float, keep: int) -> Any:
    """boxes (B, G, N, 4), scores (B, G, N) -> indices (B, keep) into G * N, 0 past count; count (B,).

    A group becomes an image of its own for NonMaxSuppression, so no coordinate is shifted to keep groups apart (a shift
    costs the float32 boxes of the last of 90 classes some of their bits).
    """
    shape = op.Shape(scores)
    flat = op.Concat(op.Slice(shape, _ints(0), _ints(1), _ints(0)), _ints(-1), axis=0)  # B, G * N
    groups = op.Reshape(boxes, op.Concat(_ints(-1), op.Slice(shape, _ints(2), _ints(3), _ints(0)), _ints(4), axis=0))
    rows = op.Reshape(scores, op.Concat(_ints(-1), _ints(1), op.Slice(shape, _ints(2), _ints(3), _ints(0)), axis=0))
    kept = op.NonMaxSuppression(
        groups, rows, _ints(keep), op.Constant(value_floats=[iou]), op.Constant(value_floats=[threshold])
    )  # (survivors, 3): group, 0, box. The only size that depends on the data; it ends three lines below
    dense = op.Squeeze(rows, _ints(1))
    where = op.Gather(kept, _ints(0, 2), axis=1)
    nothing = op.Expand(_float(-2.0), op.Shape(dense))  # below every threshold in use; scores are -1 at least
    survivors = op.Reshape(op.ScatterND(nothing, where, op.GatherND(dense, where)), flat)
    best, index = op.TopK(survivors, _ints(keep))
    valid = op.Greater(best, _float(threshold))
    count = op.ReduceSum(op.Cast(valid, to=INT), _ints(1), keepdims=0)
    return op.Where(valid, index, _int(0)), count


def roi_align(
    features: Sequence[TensorType],
    rois: TensorType,
    size: int,
    sampling: int,
    aligned: bool,
    canonical: int,
    stride: int = 4,
) -> Any:
    """features p2.. (B, C, h, w), rois (R, 5) -> (R, C, size, size)."""

    def pool(feature: Any, mine: Any, scale: float) -> Any:
        return op.RoiAlign(
            feature,
            op.Slice(mine, _ints(1), _ints(5), _ints(1)),
            op.Cast(op.Squeeze(op.Slice(mine, _ints(0), _ints(1), _ints(1)), _ints(1)), to=INT),
            output_height=size,
            output_width=size,
            sampling_ratio=sampling,
            spatial_scale=scale,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        )

    return _by_level(features, rois, canonical, stride, pool)


def roi_pool(features: Sequence[TensorType], rois: TensorType, size: int, canonical: int, stride: int = 4) -> Any:
    """features p2.. (B, C, h, w), rois (R, 5) -> (R, C, size, size)."""

    def pool(feature: Any, mine: Any, scale: float) -> Any:
        return op.MaxRoiPool(feature, mine, pooled_shape=[size, size], spatial_scale=scale)

    return _by_level(features, rois, canonical, stride, pool)


def _by_level(
    features: Sequence[Any], rois: Any, canonical: int, stride: int, pool: Callable[[Any, Any, float], Any]
) -> Any:
    """`pool(feature, rois, scale)` on each level's own RoIs, in the order of `rois` again."""
    if len(features) == 1:
        return pool(features[0], rois, 1 / stride)
    x1, y1, x2, y2 = op.Split(op.Slice(rois, _ints(1), _ints(5), _ints(1)), axis=1, num_outputs=4)
    side = op.Sqrt(op.Mul(op.Sub(x2, x1), op.Sub(y2, y1)))
    # log2(0) is -inf and lands on the first level, as in the eager op; Max keeps runtimes without infinities safe.
    octaves = op.Div(op.Log(op.Max(op.Div(side, _float(canonical)), _float(1e-9))), _float(math.log(2)))
    level = op.Clip(op.Floor(op.Add(op.Add(_float(4), octaves), _float(1e-6))), _float(2), _float(1 + len(features)))
    level = op.Squeeze(level, _ints(1))
    pooled, taken = [], []
    for index, feature in enumerate(features):
        mine = op.Reshape(op.NonZero(op.Equal(level, _float(index + 2))), _ints(-1))
        pooled.append(pool(feature, op.Gather(rois, mine), 1 / (stride << index)))
        taken.append(mine)
    places = op.Concat(*taken, axis=0)
    order = op.Range(_int(0), op.Squeeze(op.Shape(places), _ints(0)), _int(1))
    back = op.ScatterElements(op.Mul(places, _int(0)), places, order, axis=0)
    return op.Gather(op.Concat(*pooled, axis=0), back, axis=0)


TABLE = {
    torch.ops.limner.nms.default: nms,
    torch.ops.limner.roi_align.default: roi_align,
    torch.ops.limner.roi_pool.default: roi_pool,
}
