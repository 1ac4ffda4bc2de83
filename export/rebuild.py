"""A model from a checkpoint, or back from a bundle: its graphs hold the weights under the names of the state dict.

A bundle made by `limner export onnx` says how to build its model (architecture and options in its provenance) and can
be held to its own golden outputs, so a model built from it is either the one that was exported or refused.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from export.half import folding
from export.verify import TorchReference
from models import checkpoint
from models.checkpoint import CheckpointError, Keypoints, Spec
from models.network import Network
from service.bundle import MANIFEST, Bundle

Array = npt.NDArray[Any]
PREFIX = "model."  # the stages hold the network under this name
GOLDEN_BOX_PX, GOLDEN_SCORE = 0.05, 1e-3


def load(source: Path) -> tuple[Network, Spec]:
    """Of a checkpoint's or a bundle's directory. CheckpointError or BundleError says what to give instead."""
    if (source / MANIFEST).is_file():
        return from_bundle(Bundle.read(source))
    return checkpoint.load(source)


def from_bundle(bundle: Bundle) -> tuple[Network, Spec]:
    """The model whose weights the bundle's graphs hold, ready to be saved as a checkpoint; held to the bundle's golden
    outputs. Where the graphs hold norms within convolutions, the norms only add what the convolutions no longer do.
    """
    spec = _spec(bundle)
    model = checkpoint.build(spec).eval()
    state = _unfolded(_weights(bundle), model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in wanted.items():  # export leaves a bias of zeros out; if it was another, the golden outputs tell
        if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in state:
            state.setdefault(name, torch.zeros_like(tensor))
    if missing := sorted(wanted.keys() - state.keys()):
        raise CheckpointError(
            f"the graphs of {bundle.directory} do not hold {len(missing)} of the model's tensors, first {missing[0]}: "
            "give the checkpoint that the bundle was made from"
        )
    try:
        model.load_state_dict({**model.state_dict(), **{name: state[name] for name in wanted}})
    except RuntimeError as error:
        raise CheckpointError(f"the graphs of {bundle.directory} are of another model: {error}") from error
    _hold_to_golden(model.eval(), bundle)
    return model, spec


def _spec(bundle: Bundle) -> Spec:
    manifest, provenance = bundle.manifest, bundle.manifest.provenance
    options = provenance.get("options")
    if options is None:  # a bundle made before options were written down: trained here, so its recipe has them
        options = ((provenance.get("training") or {}).get("recipe") or {}).get("options")
    if options is None or "architecture" not in provenance:
        raise CheckpointError(f"{bundle.directory} does not say how its model was built: give its checkpoint")
    joints = manifest.keypoints and Keypoints(
        tuple(manifest.keypoints.names), tuple(manifest.keypoints.skeleton), tuple(manifest.keypoints.flips)
    )
    rule = checkpoint.CanvasRule(
        **{each.name: getattr(manifest.canvas, each.name) for each in fields(checkpoint.CanvasRule)}
    )
    return Spec(provenance["architecture"], tuple(manifest.classes), joints, rule, options)


def _weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    found: dict[str, Array] = {}
    for stage in bundle.manifest.stages:
        graph = onnx.load(bundle.stage_file(stage)).graph
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        found |= {n.removeprefix(PREFIX): values for n, values in constants.items() if n.startswith(PREFIX)}
        for node in graph.node:
            if node.op_type == "Conv" and node.input[1].startswith(PREFIX):
                layer = node.input[1].removeprefix(PREFIX).removesuffix("weight")
                found |= {f"{layer}{kind}": values for kind, values in _folded(node, graph, constants).items()}
    return {name: torch.from_numpy(np.array(values)) for name, values in found.items()}


def _folded(conv: onnx.NodeProto, graph: onnx.GraphProto, constants: dict[str, Array]) -> dict[str, Array]:
    """Weight and bias of a convolution together with the norm behind it, which the exporter has written as a scale and
    a shift per channel, or folded already (then the bias has a name of its own).
    """
    weight = constants[conv.input[1]]
    values, shift = conv.output[0], constants[conv.input[2]] if len(conv.input) > 2 else None
    for kind in ("Mul", "Add"):
        reader = [node for node in graph.node if values in node.input]
        other = [n for n in reader[0].input if n != values and n in constants] if len(reader) == 1 else []
        if not other or reader[0].op_type != kind or constants[other[0]].size != len(weight):
            break
        constant = constants[other[0]].reshape(-1)
        if kind == "Mul":
            weight = weight * constant[:, None, None, None]
            shift = None if shift is None else shift * constant
        else:
            shift = constant if shift is None else shift + constant
        values = reader[0].output[0]
    return {"weight": weight} if shift is None else {"weight": weight, "bias": shift}


def _unfolded(state: dict[str, torch.Tensor], model: Network) -> dict[str, torch.Tensor]:
    """The state for norms that stand behind convolutions, which have the norms' scale and shift within them."""
    names = {module: name for name, module in model.named_modules()}
    found = dict(state)
    for parent, conv, norm in folding(model):
        before, after = (f"{names[parent]}.{each}".removeprefix(".") for each in (conv, norm))
        shift = state.get(f"{before}.bias")
        if shift is None:
            continue  # then a tensor is missing, and is told of
        layer: Any = parent.get_submodule(norm)
        found[f"{before}.bias"] = torch.zeros_like(shift)  # which few of these convolutions have
        found |= {
            f"{after}.weight": torch.ones_like(shift),
            f"{after}.bias": shift,
            f"{after}.running_mean": torch.zeros_like(shift),
            f"{after}.running_var": torch.full_like(shift, 1 - layer.eps),
        }
    return found


def _hold_to_golden(model: Network, bundle: Bundle) -> None:
    golden: dict[str, Any] = bundle.golden()
    found = TorchReference(model).detect(golden["images"], golden["sizes"])
    same = np.array_equal(found.count.numpy(), golden["count"]) and np.array_equal(found.labels, golden["labels"])
    gaps = (
        np.abs(found.boxes.numpy() - golden["boxes"]).max(initial=0),
        np.abs(found.scores.numpy() - golden["scores"]).max(initial=0),
    )
    if not same or not gaps[0] <= GOLDEN_BOX_PX or not gaps[1] <= GOLDEN_SCORE:
        raise CheckpointError(
            f"the model rebuilt from {bundle.directory} does not give the bundle's golden outputs (boxes differ by "
            f"{gaps[0]:.3g} px, scores by {gaps[1]:.3g}): give the checkpoint that the bundle was made from"
        )
