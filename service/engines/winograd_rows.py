"""The 3x3 convolutions at a pyramid's fine levels by Winograd's algorithm across the rows: half of the products.

In bfloat16 the processor multiplies twice as fast as in float32 but reads its memory no faster, so the algorithm of
winograd.py, whose tiles are twice the maps and more, loses there. Here a tile is six rows of one column, four of them
its own. Depthwise convolutions transform it, six convolutions of 1x3 cells over a quarter of the rows each make the
products, and four sums of these give the rows. The plugin does all of this with the channels last, so nothing is turned
around, and the inputs of the products are in bfloat16, their sums in float32 where they leave the graph.

From 256 to 256 channels on 200 x 272 cells this takes 97 ms instead of 145 (two cores of Zen 4). On maps of noise its
error is 0.5 % of the values (root mean square), that of the direct sum in bfloat16 0.2 %. B images, C and O channels.
"""

import numpy as np
import openvino
from openvino import opset15 as op

from service.bundle import stride_of
from service.engines.winograd import FINE, OWN, POINTS, adds_bias, around, is_convolution, transforms

MIN_CHANNELS = 128  # below, the transforms cost what the products save
_, NEAR, _, FAR, _ = POINTS[OWN]  # 0, and two with their negatives


def rewrite(model: openvino.Model, multiple: int) -> int:
    """Replaces what can be replaced in a graph; returns how many 3x3 convolutions that were.

    Of the levels of which every canvas has whole tiles, its sides being multiples of `multiple`: to cut the rows beyond
    the maps off costs a third of the gain."""
    levels = [level for level in FINE if multiple % (OWN * stride_of(level)) == 0]
    chosen = {name for level in levels for name in around(model, level)}
    factors: dict[str, list[openvino.Node]] = {}  # several levels share the weights of that name
    replaced = 0
    for node in model.get_ordered_ops():
        if node.get_friendly_name() in chosen and is_convolution(node, 3) and _is_wide(node):
            weights = node.input_value(1).get_node()
            key = weights.get_friendly_name()
            if key not in factors:
                factors[key] = _factors(weights)
            _replace(node, factors[key])
            replaced += 1
    model.validate_nodes_and_infer_types()
    return replaced


def _is_wide(node: openvino.Node) -> bool:
    return all(channels >= MIN_CHANNELS for channels in node.get_input_shape(1)[:2])


def _factors(weights: openvino.Node) -> list[openvino.Node]:
    """(O, C, 3, 3) -> six of (O, C, 1, 3)"""
    expanded = np.einsum("pa,ocab->pocb", transforms(OWN).weights, weights.get_data().astype(np.float64))
    return [op.constant(each[:, :, None].astype(np.float32)) for each in expanded]


def _replace(node: openvino.Node, factors: list[openvino.Node]) -> None:
    """The convolution, and what follows at each cell: before the rows are laid together, that costs no further pass."""
    products = [
        op.convolution(tiles, weights, [1, 1], [0, 1], [0, 1], [1, 1])
        for tiles, weights in zip(_tiles(node.input_value(0)), factors, strict=True)
    ]
    rows, last = [_sum(products, row) for row in range(OWN)], node
    if (bias := _only_reader(last)) is not None and adds_bias(bias):
        rows, last = [op.add(row, bias.input_value(1)) for row in rows], bias
    if (rectifier := _only_reader(last)) is not None and rectifier.get_type_name() == "Relu":
        rows, last = [op.relu(row) for row in rows], rectifier
    found = op.shuffle_channels(op.concat(rows, 2), 2, OWN)
    names = last.output(0).get_names()
    last.output(0).set_names(set())
    found.output(0).set_names(names)
    for port in last.output(0).get_target_inputs():
        port.replace_source_output(found.output(0))


def _only_reader(node: openvino.Node) -> openvino.Node | None:
    readers = [port.get_node() for port in node.output(0).get_target_inputs()]
    return readers[0] if len(readers) == 1 else None


def _tiles(maps: openvino.Output) -> list[openvino.Node]:
    """(B, C, h, w) -> six of (B, C, h / 4, w), rows outside the maps being 0."""
    channels = maps.get_partial_shape()[1].get_length()
    found = []
    for taps in transforms(OWN).cells.astype(np.float32):
        kernel = np.broadcast_to(taps[:, None], (channels, 1, 1, OWN + 2, 1))
        found.append(op.group_convolution(maps, op.constant(kernel), [OWN, 1], [1, 0], [1, 0], [1, 1]))
    return found


def _sum(products: list[openvino.Node], row: int) -> openvino.Node:
    """Of a tile's own rows this one, (B, O, h / 4, w): the products times the powers of their points, of which two and
    two differ only in sign. One chain, so that the plugin makes one loop of it.
    """
    zero, near, minus_near, far, minus_far, infinity = products
    signed = op.subtract if row % 2 else op.add
    found = signed(far, minus_far)
    if row:
        found = op.multiply(found, op.constant(np.float32((FAR / NEAR) ** row)))
    found = signed(op.add(found, near), minus_near)
    if row:
        found = op.multiply(found, op.constant(np.float32(NEAR**row)))
    ends = {0: zero, OWN - 1: infinity}
    return op.add(found, ends[row]) if row in ends else found
