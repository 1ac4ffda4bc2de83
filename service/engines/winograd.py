"""Wide 3x3 convolutions on the finest pyramid levels by Winograd's algorithm F(4x4, 3x3): a quarter of the products.

OpenVINO's float32 convolutions run at the processor's peak, and 45 % of the arithmetic of Mask R-CNN on ResNet-50 is in
the 3x3 convolutions that make p2 and p3 and in those by which the region proposals read them. A tile of 6x6 cells, 4x4
of them its own, is transformed, multiplied with the transformed weights, and transformed back (Lavin and Gray 2016,
section 4.1). This differs from the direct sum by some 1e-6 of the largest value, as does a sum in another order.
B images, C and O channels, T tiles.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset15 as op

LEVELS = ("p2", "p3")  # their sides are multiples of 4, since those of a canvas are multiples of 32
MIN_CHANNELS = 128  # below, the transforms cost what the products save
TILE, OWN = 6, 4
NEIGHBOURS = ((0, 0), (0, 1), (1, 0), (1, 1))  # down, right
BANDS = 2  # the transformed tiles are 2.25 times the maps: they are made half by half, to save memory
END = 2**31 - 1
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))  # and infinity; these five keep the numbers close to 1


def rewrite(model: openvino.Model) -> int:
    """Replaces what can be replaced in a `detect` graph; returns how many convolutions that were."""
    replaced = 0
    for name in LEVELS:
        level = next((port for port in model.outputs if name in port.names), None)
        if level is None:
            continue
        output = level.get_node().input_value(0)
        readers = [port.get_node() for port in output.get_target_inputs()]
        for node in [_maker(output), *readers]:
            if _is_wide(node):
                faster = _convolution(node.input_value(0), node.input_value(1).get_node().get_data())
                for port in node.output(0).get_target_inputs():
                    port.replace_source_output(faster.output(0))
                replaced += 1
    model.validate_nodes_and_infer_types()
    return replaced


def _maker(output: openvino.Output) -> openvino.Node:
    """The convolution that an output comes from, behind its bias."""
    node = output.get_node()
    while node.get_type_name() in ("Add", "Multiply", "Relu"):
        node = node.input_value(0).get_node()
    return node


def _is_wide(node: openvino.Node) -> bool:
    if node.get_type_name() != "Convolution" or node.input_value(1).get_node().get_type_name() != "Constant":
        return False
    attributes, weights = node.get_attributes(), node.get_input_shape(1)
    ones = all(list(attributes[name]) == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    return ones and list(weights[2:]) == [3, 3] and min(weights[:2]) >= MIN_CHANNELS


def _convolution(maps: openvino.Output, weights: npt.NDArray[Any]) -> openvino.Node:
    """maps (B, C, h, w), weights (O, C, 3, 3) -> (B, O, h, w), cells outside the maps being 0."""
    width, channels = weights.shape[:2]
    gather, expand, scatter = _transforms()
    expanded = np.einsum("ia,jb,ocab->ijco", expand, expand, weights.astype(np.float64))
    factors = op.constant(expanded.reshape(TILE * TILE, channels, width).astype(np.float32))
    cells = op.transpose(maps, _ints(0, 2, 3, 1))
    images, height, length = (op.gather(op.shape_of(cells), _ints(axis), _ints(0)) for axis in range(3))
    rows, columns = op.divide(height, _ints(OWN)), op.divide(length, _ints(OWN))
    places = _places(cells, _shape(images, op.add(rows, _ints(1)), OWN, op.add(columns, _ints(1)), OWN, channels))
    bands = []
    for band in range(BANDS):
        first, last = (op.divide(op.multiply(rows, _ints(edge)), _ints(BANDS)) for edge in (band, band + 1))
        tiles = op.matmul(_both_ways(gather, _order()), _tiles(places, first, last), False, False)
        tiles = op.reshape(tiles, _ints(TILE * TILE, -1, channels), False)
        products = op.reshape(op.matmul(tiles, factors, False, False), _ints(TILE * TILE, -1), False)
        found = op.matmul(_both_ways(scatter), products, False, False)  # (16, T * O)
        found = op.reshape(found, _shape(OWN, OWN, images, op.subtract(last, first), columns, width), False)
        found = op.transpose(found, _ints(2, 3, 0, 4, 1, 5))
        bands.append(op.reshape(found, _shape(images, -1, length, width), False))
    return _channels_last(op.transpose(op.concat(bands, 1), _ints(0, 3, 1, 2)), width)


def _places(cells: openvino.Node, grid: openvino.Node) -> openvino.Node:
    """cells (B, h, w, C), in squares of 4x4, of which one more than they fill a side -> (4, 4, B, rows, columns, C)."""
    begin, end = _ints(0, 1, 1, 0), _ints(0, TILE - OWN + 1, TILE - OWN + 1, 0)
    padded = op.pad(cells, begin, end, "constant", arg_pad_value=op.constant(np.float32(0)))
    return op.transpose(op.reshape(padded, grid, False), _ints(2, 4, 0, 1, 3, 5))


def _tiles(places: openvino.Node, first: openvino.Node, last: openvino.Node) -> openvino.Node:
    """The places (36, T * C) of the tiles of rows `first` to `last`, in the order of `_order`.

    A tile is a square and the first two rows and columns of the next ones: four slices.
    """
    parts = []
    for down, right in NEIGHBOURS:
        tall, wide = (OWN, TILE - OWN)[down], (OWN, TILE - OWN)[right]
        starts = _shape(0, 0, op.add(first, _ints(down)), right)
        ends = _shape(tall, wide, op.add(last, _ints(down)), END if right else -1)
        part = op.slice(places, starts, ends, _ints(1, 1, 1, 1), _ints(0, 1, 3, 4))
        parts.append(op.reshape(part, _ints(tall * wide, -1), False))
    return op.concat(parts, 0)


def _order() -> list[int]:
    """The place in a 6x6 tile, counted row by row, of each row of `_tiles`."""
    return [
        (y + OWN * down) * TILE + x + OWN * right
        for down, right in NEIGHBOURS
        for y in range((OWN, TILE - OWN)[down])
        for x in range((OWN, TILE - OWN)[right])
    ]


def _both_ways(transform: npt.NDArray[np.float64], order: list[int] | None = None) -> openvino.Node:
    matrix = np.kron(transform, transform)
    return op.constant((matrix if order is None else matrix[:, order]).astype(np.float32))


def _transforms() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of 6 cells, of 3 weights, and of 6 products to 4 sums: Toom and Cook's, transposed.

    Polynomials of degree 3 and 2 are multiplied by their values at six points; a correlation is that map's transpose.
    """
    gather = np.linalg.inv(_values(TILE)).T
    largest = np.abs(gather).max(1, keepdims=True)
    return gather / largest, _values(3) * largest, _values(OWN).T


def _values(terms: int) -> npt.NDArray[np.float64]:
    """(6, terms): the powers of each point; at infinity only the highest counts."""
    values = np.zeros((TILE, terms))
    values[:-1] = np.array(POINTS)[:, None] ** np.arange(terms)
    values[-1, -1] = 1
    return values


def _channels_last(maps: openvino.Node, width: int) -> openvino.Node:
    """A depthwise convolution that changes nothing: behind it the plugin keeps the channels last, as its convolutions
    and RoIAlign want them (on channels first its RoIAlign takes ten times as long), and it adds the bias in passing.
    """
    ones = op.constant(np.ones((width, 1, 1, 1, 1), np.float32))
    return op.group_convolution(maps, ones, [1, 1], [0, 0], [0, 0], [1, 1])


def _ints(*values: int) -> openvino.Node:
    return op.constant(np.array(values, np.int64))


def _shape(*sides: int | openvino.Node) -> openvino.Node:
    return op.concat([_ints(side) if isinstance(side, int) else side for side in sides], 0)
