"""The checkpoint: a directory with `config.json` and `model.safetensors`. No pickle; optimiser state lives elsewhere.

`config.json`: format, architecture and options (a name of the zoo and its keyword arguments; `ranks`, which layers are
of low rank, goes with every architecture), classes without a background, keypoints, the rules for
canvas and proposals, provenance (free text about where the weights came from).
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch

from models.lowrank import narrow
from models.network import Network
from models.zoo import MODELS

FORMAT = 1


class CheckpointError(ValueError):
    """The directory is not a checkpoint that this version reads; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Keypoints:
    """names (J), skeleton as pairs of 0-based indices, flips: the permutation that swaps left and right."""

    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...]
    flips: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CanvasRule:
    """How a picture is resized for this model: see "Frames" in docs/architecture.md."""

    short_side: int = 800
    long_side: int = 1333
    multiple: int = 32
    antialias: bool = False


@dataclass(frozen=True, slots=True)
class ProposalRule:
    """Which boxes a network that takes proposals is trained on, and looks into where nobody gives it any."""

    method: Literal["selective_search", "sliding_window"] = "selective_search"
    mode: Literal["fast", "quality"] = "fast"
    max_proposals: int = 2000
    width: int = 500  # of the picture that selective search looks at


@dataclass(frozen=True, slots=True)
class Spec:
    """All that is needed to build a model and to prepare its input."""

    architecture: str
    classes: tuple[str, ...]
    keypoints: Keypoints | None = None
    canvas: CanvasRule = CanvasRule()
    options: dict[str, Any] = field(default_factory=dict)
    proposals: ProposalRule | None = None


def build(spec: Spec) -> Network:
    """A new, randomly initialised model. Raises CheckpointError where the zoo has no such model or option."""
    if spec.architecture not in MODELS:
        raise CheckpointError(f"unknown architecture {spec.architecture!r}; the zoo has {', '.join(MODELS)}")
    joints = len(spec.keypoints.names) if spec.keypoints else 0
    options = {name: value for name, value in spec.options.items() if name != "ranks"}
    try:
        model = MODELS[spec.architecture](num_classes=len(spec.classes), num_keypoints=joints, **options)
        narrow(model, spec.options.get("ranks", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{spec.architecture} does not take these options: {error}") from error
    if model.takes_proposals != (spec.proposals is not None):
        needs = "needs" if model.takes_proposals else "takes no"
        raise CheckpointError(f"{spec.architecture} {needs} proposals: see the spec's rule for them")
    return model


def save(directory: str | Path, model: Network, spec: Spec, provenance: dict[str, Any] | None = None) -> None:
    """Writes the checkpoint; each file is written aside, then renamed, the weights before the config."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / "model.safetensors.part"
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, weights)
    os.replace(weights, directory / "model.safetensors")
    config = {"format": FORMAT, **asdict(spec), "provenance": provenance or {}}
    text = directory / "config.json.part"
    text.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(text, directory / "config.json")


def read_config(directory: str | Path) -> dict[str, Any]:
    """The checked content of `config.json`."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no config.json, so it is not a checkpoint of limner")
    try:
        config = json.loads(path.read_text())
        version = int(config["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's config: {error}") from error
    if version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, this limner reads up to {FORMAT}: update limner")
    return config


def read_spec(directory: str | Path) -> Spec:
    """The Spec of a checkpoint."""
    config = read_config(directory)
    try:
        joints = config["keypoints"]
        keypoints = joints and Keypoints(
            tuple(joints["names"]), tuple((a, b) for a, b in joints["skeleton"]), tuple(joints["flips"])
        )
        canvas = CanvasRule(**config["canvas"])
        rule = config.get("proposals")  # younger than the first checkpoints
        proposals = ProposalRule(**rule) if rule else None
        return Spec(config["architecture"], tuple(config["classes"]), keypoints, canvas, config["options"], proposals)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json is incomplete: {error!r}") from error


def load(directory: str | Path) -> tuple[Network, Spec]:
    """The model, in evaluation mode on the CPU, and its Spec."""
    spec = read_spec(directory)
    model = build(spec)
    path = Path(directory) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} does not hold the weights of {spec.architecture}: {error}") from error
    return model.eval(), spec


COCO_PERSON = Keypoints(
    names=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
        "right_ankle",
    ),
    skeleton=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    flips=(0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15),
)  # fmt: skip
"""The 17 joints of COCO's person."""
