"""Weights of other projects as our checkpoints. torchvision's detectors: R-CNNs and RetinaNets on ResNet-50 with FPN.

    python -m models.importers maskrcnn_resnet50_fpn_coco.pth --out checkpoints/mask_rcnn

Background channels are dropped where a class's own values do not depend on them (box deltas, masks).
"""

import argparse
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models._meta import _COCO_CATEGORIES

from models.checkpoint import COCO_PERSON, CheckpointError, Keypoints, Spec, build, save
from models.network import Network

# torchvision's name -> ours. {a} and {b} are the places of a convolution and its norm in our stacks.
RENAMES: list[tuple[str, str]] = [
    (r"backbone\.body\.", "backbone.trunk."),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.convs.0.\1"),
    (r"rpn\.head\.conv\.(\d+)\.0\.", r"rpn.head.convs.{\1:conv}."),
    (r"rpn\.head\.cls_logits\.", "rpn.head.objectness."),
    (r"rpn\.head\.bbox_pred\.", "rpn.head.deltas."),
    (r"roi_heads\.box_head\.fc6\.", "box_head.fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "box_head.fcs.1."),
    (r"roi_heads\.box_head\.5\.(weight|bias)", r"box_head.fcs.0.\1"),
    (r"roi_heads\.box_head\.(\d+)\.0\.", r"box_head.convs.{\1:normed}."),
    (r"roi_heads\.box_head\.(\d+)\.1\.", r"box_head.convs.{\1:norm}."),
    (r"roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "box_head.deltas."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.logits."),
    (r"roi_heads\.keypoint_head\.(\d+)\.", r"keypoint_head.convs.\1."),
    (r"roi_heads\.keypoint_predictor\.kps_score_lowres\.", "keypoint_head.upsample."),
    (r"head\.classification_head\.cls_logits\.", "detector.head.classes."),
    (r"head\.regression_head\.bbox_reg\.", "detector.head.deltas."),
]
RETINA_RENAMES = {
    False: [
        # the first release numbered its layers as we do
        (r"head\.classification_head\.conv\.(\d+)\.(weight|bias)", r"detector.head.class_convs.\1.\2"),
        (r"head\.regression_head\.conv\.(\d+)\.(weight|bias)", r"detector.head.box_convs.\1.\2"),
        (r"head\.classification_head\.conv\.(\d+)\.0\.", r"detector.head.class_convs.{\1:conv}."),
        (r"head\.regression_head\.conv\.(\d+)\.0\.", r"detector.head.box_convs.{\1:conv}."),
    ],
    True: [
        (r"head\.classification_head\.conv\.(\d+)\.0\.", r"detector.head.class_convs.{\1:normed}."),
        (r"head\.classification_head\.conv\.(\d+)\.1\.", r"detector.head.class_convs.{\1:norm}."),
        (r"head\.regression_head\.conv\.(\d+)\.0\.", r"detector.head.box_convs.{\1:normed}."),
        (r"head\.regression_head\.conv\.(\d+)\.1\.", r"detector.head.box_convs.{\1:norm}."),
    ],
}
MASK_RENAMES = {
    False: [(r"roi_heads\.mask_head\.(\d+)\.0\.", r"mask_head.convs.{\1:conv}.")],
    True: [
        (r"roi_heads\.mask_head\.(\d+)\.0\.", r"mask_head.convs.{\1:normed}."),
        (r"roi_heads\.mask_head\.(\d+)\.1\.", r"mask_head.convs.{\1:norm}."),
    ],
}
RETINA_SCORES, RETINA_ANCHORS = "head.classification_head.cls_logits", 9
PLACES = {"conv": (2, 0), "normed": (3, 0), "norm": (3, 1)}  # block i stands at step * i + offset of our Sequential


def from_torchvision(
    state: dict[str, Tensor], classes: Sequence[str] | None = None, norm_eps: float | None = None
) -> tuple[Network, Spec]:
    """A model and its Spec from the state dict of `fasterrcnn_`, `maskrcnn_`, `keypointrcnn_` or
    `retinanet_resnet50_fpn`, or of the `_v2` models.

    classes: names without the background; COCO's where the number fits. A RetinaNet of as many channels as names has
    none for the background. norm_eps: torchvision overwrites it with 0.0
    for its published v1 weights (frozen norms), which is the default for those; unfrozen norms keep 1e-5.
    Raises CheckpointError where the state dict is none of these.
    """
    spec = _spec(state, classes, norm_eps)
    model = build(spec)
    try:
        renamed = _renamed(state, bool(spec.options["v2"]), len(spec.classes))
        missing, unexpected = model.load_state_dict(renamed, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"these weights do not fit {spec.architecture}: {error}") from error
    wrong = [name for name in [*missing, *unexpected] if not name.endswith("num_batches_tracked")]
    if wrong:
        raise CheckpointError(f"these weights do not fit {spec.architecture}: {len(wrong)} tensors, first {wrong[0]}")
    return model.eval(), spec


def _spec(state: dict[str, Tensor], classes: Sequence[str] | None, norm_eps: float | None) -> Spec:
    scores, dense = state.get("roi_heads.box_predictor.cls_score.weight"), state.get(f"{RETINA_SCORES}.weight")
    if (scores is None and dense is None) or "backbone.body.layer4.2.conv3.weight" not in state:
        raise CheckpointError(
            "this is not the state dict of a torchvision R-CNN or RetinaNet with a ResNet-50-FPN backbone"
        )
    if dense is not None:
        return _retina_spec(state, dense, classes, norm_eps)
    assert scores is not None
    has_masks = "roi_heads.mask_predictor.mask_fcn_logits.weight" in state
    joints = state.get("roi_heads.keypoint_predictor.kps_score_lowres.weight")
    name = (
        "keypoint_rcnn_r50_fpn" if joints is not None else "mask_rcnn_r50_fpn" if has_masks else "faster_rcnn_r50_fpn"
    )
    options = {**_norm(state, norm_eps), "v2": "rpn.head.conv.1.0.weight" in state}
    keypoints = _keypoints(joints.shape[1]) if joints is not None else None
    return Spec(name, _class_names(len(scores) - 1, classes, joints is not None), keypoints, options=options)


def _retina_spec(
    state: dict[str, Tensor], scores: Tensor, classes: Sequence[str] | None, norm_eps: float | None
) -> Spec:
    boxes = state.get("head.regression_head.bbox_reg.weight")
    if boxes is None or len(boxes) != 4 * RETINA_ANCHORS:  # FCOS has one
        raise CheckpointError(f"this is not the state dict of a RetinaNet of {RETINA_ANCHORS} anchors a cell")
    count = len(scores) // RETINA_ANCHORS
    has_background = classes is None or len(classes) != count
    options = {**_norm(state, norm_eps), "v2": "head.classification_head.conv.0.1.weight" in state}
    names = _class_names(count - 1 if has_background else count, classes, persons=False)
    return Spec("retinanet_r50_fpn", names, options=options)


def _norm(state: dict[str, Tensor], norm_eps: float | None) -> dict[str, Any]:
    norm = "batch" if any(key.endswith("num_batches_tracked") for key in state) else "frozen"
    return {"norm": norm, "norm_eps": norm_eps if norm_eps is not None else (1e-5 if norm == "batch" else 0.0)}


def _class_names(count: int, given: Sequence[str] | None, persons: bool) -> tuple[str, ...]:
    if given is not None:
        if len(given) != count:
            raise CheckpointError(f"{len(given)} class names are given, the weights have {count} classes")
        return tuple(given)
    if persons and count == 1:
        return ("person",)
    if count == len(_COCO_CATEGORIES) - 1:
        # COCO's ids have gaps, all of which torchvision calls N/A; the names of a bundle's classes are distinct.
        return tuple(f"unused_{i}" if name == "N/A" else name for i, name in enumerate(_COCO_CATEGORIES) if i)
    return tuple(f"class_{i}" for i in range(count))


def _keypoints(count: int) -> Keypoints:
    if count == len(COCO_PERSON.names):
        return COCO_PERSON
    return Keypoints(tuple(f"joint_{i}" for i in range(count)), (), tuple(range(count)))


def _renamed(state: dict[str, Tensor], v2: bool, num_classes: int) -> dict[str, Tensor]:
    renames = RENAMES + MASK_RENAMES[v2] + RETINA_RENAMES[v2]
    renamed = {}
    for name, tensor in state.items():
        # the first release's mask head numbered its layers from one
        name = re.sub(r"mask_fcn(\d+)\.", lambda found: f"{int(found[1]) - 1}.0.", name)
        renamed[_new_name(name, renames)] = tensor
    for name in ("box_head.deltas", "mask_head.logits"):
        drop = 4 if name == "box_head.deltas" else 1
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in renamed:
                renamed[part] = renamed[part][drop:].clone()
    for part in ("detector.head.classes.weight", "detector.head.classes.bias"):
        if part in renamed:  # by anchor, then class; the background's channel is the first, where there is one
            by_anchor = renamed[part].unflatten(0, (RETINA_ANCHORS, -1))
            renamed[part] = by_anchor[:, -num_classes:].flatten(0, 1).clone()
    return renamed


def _new_name(name: str, renames: list[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        found = re.match(pattern, name)
        if found:
            return re.sub(r"\{(\d+):(\w+)\}", _place, found.expand(replacement)) + name[found.end() :]
    return name


def _place(found: re.Match[str]) -> str:
    step, offset = PLACES[found[2]]
    return str(step * int(found[1]) + offset)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="models.importers", description="torchvision weights -> limner checkpoint")
    parser.add_argument("weights", type=Path, help="a state dict saved by torch.save (.pth)")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument("--classes", nargs="+", help="class names without the background (default: COCO's if 90)")
    parser.add_argument(
        "--norm-eps", type=float, help="epsilon of the norms (default: torchvision's for these weights)"
    )
    options = parser.parse_args(argv)
    try:
        spec = convert(options.weights, options.out, options.classes, options.norm_eps)
    except (CheckpointError, OSError) as error:
        print(f"{options.weights}: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {spec.architecture}, {len(spec.classes)} classes")
    return 0


def convert(weights: Path, out: Path, classes: Sequence[str] | None = None, norm_eps: float | None = None) -> Spec:
    """Writes the checkpoint of a file of torchvision's weights; raises CheckpointError or OSError."""
    model, spec = from_torchvision(_read(weights), classes, norm_eps)
    save(out, model, spec, {"imported_from": f"torchvision {weights.name}"})
    return spec


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError("this is not a state dict saved by torch.save, or only a part of one") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"this holds a {type(state).__name__}, not a state dict")
    return state


if __name__ == "__main__":
    sys.exit(main())
