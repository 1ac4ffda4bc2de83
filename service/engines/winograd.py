"""Wide 3x3 convolutions by Winograd's algorithm: a quarter or a fifth of the products.

OpenVINO's float32 convolutions run at the processor's peak, and more than half of the arithmetic of Mask R-CNN on
ResNet-50 is in 3x3 convolutions of 256 channels: those that make the pyramid, those by which the region proposals read
it, the third group of the trunk, the masks. A tile of 6x6 cells, 4x4 of them its own, is transformed, multiplied with
the transformed weights, and transformed back (Lavin and Gray 2016, section 4.1), on large maps one of 8x8, 6x6 of them
its own. This differs from the direct sum by 3e-7 of the largest value, or 1e-6 (root mean square; at most 2e-6, 2e-5).

The algorithm works with channels last ("cells" below), the graph around it with channels first, and turning one into
the other costs as much as a transform. So what follows from one such convolution to the next, or to a narrow 1x1
convolution, stays as cells. B images, C and O channels, T tiles.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset15 as op

FINE = ("p2", "p3")
MIN_CHANNELS, MIN_FINE = 192, 128  # below, the transforms cost what the products save: sooner on large maps
MAX_CHANNELS = 256  # above, reading four times the weights does, as wider ones work on small maps
NARROW = 8  # a 1x1 convolution to so many times fewer channels takes less time than turning its input around
BANDS = 2  # the transformed tiles are twice the maps: those of the large are made half by half, to save memory
OWN, OWN_LARGE = 4, 6
POINTS = {  # and infinity; these keep the numbers close to 1
    OWN: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5)),
    OWN_LARGE: (0.0, 0.6, -0.6, 1.0, -1.0, 1 / 0.6, -1 / 0.6),
}


def rewrite(model: openvino.Model) -> int:
    """Replaces what can be replaced in a graph; returns how many 3x3 convolutions that were."""
    rewriter = _Rewriter({name for level in FINE for name in around(model, level)})
    for node in model.get_ordered_ops():
        rewriter.replace(node)
    for result in model.get_results():
        rewriter.part(result)
    model.validate_nodes_and_infer_types()
    return rewriter.replaced


class _Rewriter:
    def __init__(self, large: set[str]) -> None:
        self.replaced = 0
        self._large = large
        self._cells: dict[str, openvino.Node] = {}  # (B, h, w, O), by the name of what gives them with channels first
        self._factors: dict[tuple[str, int], openvino.Node] = {}  # several levels share the weights of that name

    def replace(self, node: openvino.Node) -> None:
        """The nodes must come in the order of their arguments."""
        large = node.get_friendly_name() in self._large
        if is_convolution(node, 3) and _is_wide(node, MIN_FINE if large else MIN_CHANNELS):
            own, bands = (OWN_LARGE, BANDS) if large else (OWN, 1)
            factors = self._factors_of(node.input_value(1).get_node(), own)
            cells = _convolution(self._as_cells(node.input_value(0)), factors, own, bands)
            found = _kept_last(_channels_first(cells))
            self.replaced += 1
        elif is_convolution(node, 1) and self._is_derived(node.input_value(0)) and _is_narrow(node):
            weights = node.input_value(1).get_node().get_data()[:, :, 0, 0]
            cells = op.matmul(self._as_cells(node.input_value(0)), op.constant(weights), False, True)
            found = _channels_first(cells)
        else:
            return
        self._cells[found.get_friendly_name()] = cells
        found.output(0).set_names(node.output(0).get_names())
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(found.output(0))

    def part(self, result: openvino.Node) -> None:
        """Has an output made from cells, not from what is kept with the channels last for the others that read it."""
        maps = result.input_value(0)
        if not self._is_derived(maps):
            return
        found, names = _channels_first(self._as_cells(maps)), maps.get_names()
        maps.set_names(set())
        found.output(0).set_names(names)
        kept = _kept_last(found)
        for port in maps.get_target_inputs():
            port.replace_source_output((found if port.get_node() == result else kept).output(0))

    def _is_derived(self, maps: openvino.Output) -> bool:
        """Whether these maps are cells to which a bias and a rectifier came, at most."""
        node = maps.get_node()
        while node.get_friendly_name() not in self._cells:
            if not (node.get_type_name() == "Relu" or adds_bias(node)):
                return False
            node = node.input_value(0).get_node()
        return True

    def _as_cells(self, maps: openvino.Output) -> openvino.Node:
        """maps (B, C, h, w) -> cells (B, h, w, C)."""
        node = maps.get_node()
        if not self._is_derived(maps):
            return _channels_last(maps)
        if node.get_friendly_name() not in self._cells:
            before = self._as_cells(node.input_value(0))
            if node.get_type_name() == "Relu":
                cells = op.relu(before)
            else:
                cells = op.add(before, op.constant(node.input_value(1).get_node().get_data().reshape(-1)))
            self._cells[node.get_friendly_name()] = cells
        return self._cells[node.get_friendly_name()]

    def _factors_of(self, weights: openvino.Node, own: int) -> openvino.Node:
        """(O, C, 3, 3) -> (36 or 64, C, O)"""
        key = weights.get_friendly_name(), own
        if key not in self._factors:
            expand = transforms(own).weights
            expanded = np.einsum("ia,jb,ocab->ijco", expand, expand, weights.get_data().astype(np.float64))
            self._factors[key] = op.constant(expanded.reshape(-1, *expanded.shape[2:]).astype(np.float32))
        return self._factors[key]


def around(model: openvino.Model, level: str) -> set[str]:
    """The convolution that makes this level of a pyramid, behind its bias, and what reads it."""
    output = next((port.get_node().input_value(0) for port in model.outputs if level in port.names), None)
    if output is None:
        return set()
    maker = output.get_node()
    while maker.get_type_name() in ("Add", "Multiply", "Relu"):
        maker = maker.input_value(0).get_node()
    return {node.get_friendly_name() for node in (maker, *(port.get_node() for port in output.get_target_inputs()))}


def is_convolution(node: openvino.Node, kernel: int) -> bool:
    """Square, of constant weights, one step at a time, with sums as many as cells."""
    if node.get_type_name() != "Convolution" or node.input_value(1).get_node().get_type_name() != "Constant":
        return False
    attributes, around = node.get_attributes(), [kernel // 2] * 2
    one_by_one = all(list(attributes[name]) == [1, 1] for name in ("strides", "dilations"))
    as_many = all(list(attributes[name]) == around for name in ("pads_begin", "pads_end"))
    return one_by_one and as_many and list(node.get_input_shape(1)[2:]) == [kernel, kernel]


def _is_wide(node: openvino.Node, least: int) -> bool:
    return all(least <= channels <= MAX_CHANNELS for channels in node.get_input_shape(1)[:2])


def _is_narrow(node: openvino.Node) -> bool:
    width, channels = node.get_input_shape(1)[:2]
    return width * NARROW <= channels


def adds_bias(node: openvino.Node) -> bool:
    """One number a channel, (O, 1, 1) or (1, O, 1, 1)."""
    if node.get_type_name() != "Add" or node.input_value(1).get_node().get_type_name() != "Constant":
        return False
    shape = list(node.get_input_shape(1))
    return len(shape) in (3, 4) and shape[-2:] == [1, 1] and shape[:-3] in ([], [1])


def _convolution(cells: openvino.Node, factors: openvino.Node, own: int, bands: int) -> openvino.Node:
    """cells (B, h, w, C), factors (P, C, O) for P places of a tile -> (B, h, w, O), cells outside the maps being 0."""
    number, channels, width = factors.get_output_shape(0)
    grid, matrices = _Grid(cells, channels, own), transforms(own)
    parts = []
    for first, last in grid.bands(bands):
        tiles = op.reshape(op.gather(grid.padded, grid.places(first, last), _ints(0)), _ints(number, -1), False)
        tiles = op.matmul(_both_ways(matrices.cells), tiles, False, False)
        products = op.matmul(op.reshape(tiles, _ints(number, -1, channels), False), factors, False, False)
        sums = op.matmul(_both_ways(matrices.products), op.reshape(products, _ints(number, -1), False), False, False)
        rows = op.subtract(last, first)
        sums = op.reshape(sums, _shape(own, own, grid.images, rows, grid.columns, width), False)
        sides = (op.multiply(count, _ints(own)) for count in (rows, grid.columns))
        parts.append(op.reshape(op.transpose(sums, _ints(2, 3, 0, 4, 1, 5)), _shape(grid.images, *sides, width), False))
    found = op.concat(parts, 1) if bands > 1 else parts[0]
    return op.slice(found, _ints(0, 0), _shape(grid.height, grid.length), _ints(1, 1), _ints(1, 2))


class _Grid:
    """Tiles over cells (B, h, w, C) with a border of zeros, wide enough for whole tiles, which share two cells."""

    def __init__(self, cells: openvino.Node, channels: int, own: int) -> None:
        self._own = own
        self.images, self.height, self.length = _sides(cells)
        self.rows, self.columns = (
            op.divide(op.add(side, _ints(own - 1)), _ints(own)) for side in (self.height, self.length)
        )
        self._tall, self._wide = (
            op.add(op.multiply(count, _ints(own)), _ints(2)) for count in (self.rows, self.columns)
        )
        down, right = (
            op.subtract(op.subtract(padded, side), _ints(1))
            for padded, side in ((self._tall, self.height), (self._wide, self.length))
        )
        # Of three axes: of four the plugin makes maps with channels first again.
        lines = op.reshape(cells, _shape(self.images, self.height, op.multiply(self.length, _ints(channels))), False)
        end = _shape(0, down, op.multiply(right, _ints(channels)))
        zero = op.constant(np.float32(0))
        self.padded = op.reshape(
            op.pad(lines, _ints(0, 1, channels), end, "constant", arg_pad_value=zero), _ints(-1, channels), False
        )

    def bands(self, number: int) -> list[tuple[openvino.Node, openvino.Node]]:
        """The first row of tiles of each, and the one after its last."""
        edges = [op.divide(op.multiply(self.rows, _ints(edge)), _ints(number)) for edge in range(number + 1)]
        return list(zip(edges[:-1], edges[1:], strict=True))

    def places(self, first: openvino.Node, last: openvino.Node) -> openvino.Node:
        """(P, B, rows, columns): where in `padded` the cells of the tiles of rows `first` to `last` are."""
        y, x = (op.constant(each.reshape(-1, 1, 1, 1)) for each in np.indices((self._own + 2,) * 2, np.int64))
        image = _range(_ints(0), self.images, (-1, 1, 1))
        row = op.add(op.multiply(_range(first, last, (-1, 1)), _ints(self._own)), y)
        column = op.add(op.multiply(_range(_ints(0), self.columns, (-1,)), _ints(self._own)), x)
        row = op.add(op.multiply(image, self._tall), row)
        return op.convert(op.add(op.multiply(row, self._wide), column), "i32")


def _range(start: openvino.Node, stop: openvino.Node, shape: tuple[int, ...]) -> openvino.Node:
    start, stop = (op.squeeze(edge, _ints(0)) for edge in (start, stop))
    return op.reshape(op.range(start, stop, op.constant(np.int64(1)), "i64"), _ints(*shape), False)


def _sides(cells: openvino.Node) -> list[openvino.Node]:
    """B, h, w"""
    shape = op.shape_of(cells)
    return [op.gather(shape, _ints(axis), _ints(0)) for axis in range(3)]


class _Transforms(NamedTuple):
    """Along a side: of a tile's cells (n, n), of three weights (n, 3), and of the products to sums (n - 2, n)."""

    cells: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    products: npt.NDArray[np.float64]


def transforms(own: int) -> _Transforms:
    """Toom and Cook's, transposed.

    Polynomials are multiplied by their values at as many points as the product has terms; a correlation is that map's
    transpose.
    """
    gather = np.linalg.inv(_values(own, own + 2)).T
    largest = np.abs(gather).max(1, keepdims=True)
    return _Transforms(gather / largest, _values(own, 3) * largest, _values(own, own).T)


def _values(own: int, terms: int) -> npt.NDArray[np.float64]:
    """(own + 2, terms): the powers of each point; at infinity only the highest counts."""
    values = np.zeros((own + 2, terms))
    values[:-1] = np.array(POINTS[own])[:, None] ** np.arange(terms)
    values[-1, -1] = 1
    return values


def _both_ways(transform: npt.NDArray[np.float64]) -> openvino.Node:
    return op.constant(np.kron(transform, transform).astype(np.float32))


def _channels_last(maps: openvino.Output) -> openvino.Node:
    """(B, C, h, w) -> (B, h, w, C), by way of (B, C, h * w): turning four axes takes the plugin twice as long."""
    shape = op.shape_of(maps)
    images, channels, height, length = (op.gather(shape, _ints(axis), _ints(0)) for axis in range(4))
    turned = op.transpose(
        op.reshape(maps, _shape(images, channels, op.multiply(height, length)), False), _ints(0, 2, 1)
    )
    return op.reshape(turned, _shape(images, height, length, channels), False)


def _channels_first(cells: openvino.Node) -> openvino.Node:
    """(B, h, w, O) -> (B, O, h, w)"""
    return op.transpose(cells, _ints(0, 3, 1, 2))


def _kept_last(maps: openvino.Node) -> openvino.Node:
    """The same maps (B, O, h, w) by a depthwise convolution that changes nothing: behind it the plugin keeps the
    channels last in memory, as its convolutions and RoIAlign want them (on channels first its RoIAlign takes ten times
    as long), and it adds the bias in passing.
    """
    ones = op.constant(np.ones((maps.get_output_partial_shape(0)[1].get_length(), 1, 1, 1, 1), np.float32))
    return op.group_convolution(maps, ones, [1, 1], [0, 0], [0, 0], [1, 1])


def _ints(*values: int) -> openvino.Node:
    return op.constant(np.array(values, np.int64))


def _shape(*sides: int | openvino.Node) -> openvino.Node:
    return op.concat([_ints(side) if isinstance(side, int) else side for side in sides], 0)
