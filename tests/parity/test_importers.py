"""Importing: published (frozen) norms, the names of the first release, what is refused, and the command."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

from models import checkpoint
from models.checkpoint import CheckpointError
from models.importers import from_torchvision, main
from tests.parity.test_torchvision import canvas

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return detector("maskrcnn_resnet50_fpn").state_dict()


def detector(name: str, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    make = getattr(torchvision.models.detection, name)
    return make(weights=None, weights_backbone=None, num_classes=num_classes).eval()


@torch.no_grad()
def published() -> nn.Module:
    """As torchvision builds its published v1 detectors: frozen norms, epsilon 0. The variances are so small that the
    usual epsilon would show."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    model = FasterRCNN(backbone, num_classes=3).eval()
    overwrite_eps(model, 0.0)
    for module in backbone.body.modules():
        if isinstance(module, nn.Conv2d):
            module.weight *= 1e-2
        if isinstance(module, FrozenBatchNorm2d):
            module.register_forward_pre_hook(
                lambda norm, inputs: (
                    (
                        norm.running_mean.copy_(inputs[0].mean((0, 2, 3))),
                        norm.running_var.copy_(inputs[0].var((0, 2, 3))),
                        norm.weight.uniform_(0.3, 0.6),
                    )
                    and None
                )
            )
    backbone(canvas(128, 128, 1)[0])
    for module in backbone.body.modules():
        module._forward_pre_hooks.clear()
    return model


@torch.no_grad()
def test_frozen_norms_get_torchvisions_epsilon() -> None:
    theirs = published()
    state = theirs.state_dict()
    assert not any(name.endswith("num_batches_tracked") for name in state)
    images, _ = canvas(96, 128, 1)
    wanted = list(theirs.backbone(images).values())
    ours, spec = from_torchvision(state)
    assert (spec.options["norm"], spec.options["norm_eps"]) == ("frozen", 0.0)
    for feature, truth in zip(ours.backbone(images), wanted, strict=True):
        assert torch.equal(feature, truth)
    other, spec = from_torchvision(state, norm_eps=1e-5)
    assert spec.options["norm_eps"] == 1e-5
    assert (other.backbone(images)[0] - wanted[0]).abs().max() > 1e-3 * wanted[0].std()


def test_unfrozen_norms_keep_their_epsilon(state: State) -> None:
    _, spec = from_torchvision(state)
    assert (spec.options["norm"], spec.options["norm_eps"]) == ("batch", 1e-5)


def test_names_of_the_first_release(state: State) -> None:
    """The files that torchvision still serves for its v1 detectors."""
    old = {}
    for name, tensor in state.items():
        for new, first in (
            ("rpn.head.conv.0.0.", "rpn.head.conv."),
            *((f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
            *((f"inner_blocks.{i}.0.", f"inner_blocks.{i}.") for i in range(4)),
            *((f"layer_blocks.{i}.0.", f"layer_blocks.{i}.") for i in range(4)),
        ):
            name = name.replace(new, first)
        old[name] = tensor
    changed = old.keys() - state.keys()
    assert {"rpn.head.conv.weight", "roi_heads.mask_head.mask_fcn1.weight"} <= changed
    assert len(changed) == 2 * (1 + 4 + 4 + 4)
    wanted, spec = from_torchvision(state)
    found, old_spec = from_torchvision(old)
    assert old_spec == spec
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())


def test_background_channels_are_dropped_where_they_mean_nothing(state: State) -> None:
    model, _ = from_torchvision(state)
    assert model.box_head.classes.weight.shape[0] == 3  # the background is a class among others here
    assert torch.equal(model.box_head.deltas.weight, state["roi_heads.box_predictor.bbox_pred.weight"][4:])
    assert model.mask_head is not None
    logits = state["roi_heads.mask_predictor.mask_fcn_logits.weight"]
    assert torch.equal(model.mask_head.logits.weight, logits[1:])


def test_classes() -> None:
    """The published models have COCO's 90 ids, of which ten name nothing; a bundle's names must be distinct."""
    coco = detector("fasterrcnn_resnet50_fpn", 91).state_dict()
    _, spec = from_torchvision(coco)
    assert len(spec.classes) == len(set(spec.classes)) == 90
    assert (spec.classes[0], spec.classes[16], spec.classes[89]) == ("person", "cat", "toothbrush")
    _, spec = from_torchvision(coco, [f"c{i}" for i in range(90)])
    assert spec.classes[89] == "c89"
    with pytest.raises(CheckpointError, match="2 class names are given, the weights have 90 classes"):
        from_torchvision(coco, ["a", "b"])


def other_detector() -> State:
    model = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
    return model.state_dict()


def narrow(state: State) -> State:
    name = "roi_heads.box_head.fc6.weight"
    return {**state, name: state[name][:100]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "not the state dict of a torchvision R-CNN"),
        (lambda _: torchvision.models.resnet18(weights=None).state_dict(), "not the state dict"),
        (lambda _: other_detector(), "not the state dict"),
        (lambda state: {"model": state}, "not the state dict"),
        (narrow, r"do not fit mask_rcnn_r50_fpn.*size mismatch"),
        (lambda state: {**state, "extra.weight": torch.ones(1)}, "1 tensors, first extra.weight"),
        (lambda state: {k: v for k, v in state.items() if k != "backbone.body.conv1.weight"}, "trunk.conv1.weight"),
        (lambda state: {**state, "backbone.body.layer3.6.conv1.weight": torch.ones(1)}, "layer3.6"),
    ],
    ids=["empty", "resnet", "fcos", "wrapped", "narrow", "extra", "missing", "deeper"],
)
def test_a_foreign_state_dict_is_refused_in_words(state: State, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        from_torchvision(change(state))


def test_the_command_writes_a_checkpoint(state: State, tmp_path, capsys) -> None:
    torch.save(state, tmp_path / "weights.pth")
    out = tmp_path / "mask_rcnn"
    assert main([str(tmp_path / "weights.pth"), "--out", str(out), "--classes", "cat", "dog"]) == 0
    assert "mask_rcnn_r50_fpn, 2 classes" in capsys.readouterr().out
    model, spec = checkpoint.load(out)
    wanted, wanted_spec = from_torchvision(state, ("cat", "dog"))
    assert spec == replace(wanted_spec, classes=("cat", "dog"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    assert checkpoint.read_config(out)["provenance"] == {"imported_from": "torchvision weights.pth"}


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, [1, 2], {"a": torch.ones(1)}, None])
def test_the_command_refuses_other_files_in_one_line(content, tmp_path, capsys) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(str(path))
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
