"""Trunks: what their maps are called and how large they are, ImageNet weights into every part, what can be frozen."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models import checkpoint
from models.backbones import read_trunk
from models.network import Network
from models.regions import RegionNetwork
from tests.models import tiny


def build(name: str) -> Network:
    return checkpoint.build(tiny.SPECS[name])


@pytest.mark.parametrize("name", ["faster_rcnn_r50_fpn", "mask_rcnn_r50_c4", "faster_rcnn_vgg16",
                                  "faster_rcnn_alexnet", "retinanet_r50_fpn", "retinanet_mobilenetv2_fpn"])  # fmt: skip
def test_a_maps_name_says_its_stride(name: str) -> None:
    with torch.device("meta"):
        backbone = build(name).backbone
        maps = backbone(torch.zeros(1, 3, 96, 160))
    assert len(maps) == {"p2": 5, "p3": 5, "c4": 1}[backbone.levels[0]]
    for level, found in zip(backbone.levels, maps, strict=False):
        stride = 1 << int(level[1:])
        assert found.shape == (1, backbone.width, 96 // stride, 160 // stride)


@pytest.mark.parametrize(
    ("name", "levels", "maps"),
    [("mask_rcnn_mobilenetv2_fpn", ("p2", "p3", "p4"), 4), ("retinanet_mobilenetv2_fpn", ("p3", "p4"), 4)],
)
def test_a_light_trunk_can_end_at_stride_16(name: str, levels: tuple[str, ...], maps: int, tmp_path: Path) -> None:
    def built(last: int, sizes: list[int]) -> Network:
        spec = tiny.SPECS[name]
        return checkpoint.build(replace(spec, options={**spec.options, "last": last, "sizes": sizes})).eval()

    sizes = [8, 16, 32, 64]
    short, whole = built(4, sizes).backbone, built(5, [*sizes, 128]).backbone
    assert short.levels == levels
    pictures = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        found = short(pictures)
    assert [tuple(each.shape[2:]) for each in found] == [
        (-(-96 // (1 << n)), -(-160 // (1 << n))) for n in range(int(levels[0][1]), int(levels[0][1]) + maps)
    ]
    weights = saved(torchvision.models.mobilenet_v2(weights=None), tmp_path / "m.pth")
    for backbone in (whole, short):
        read_trunk(weights, [backbone.trunk], [])
    with torch.no_grad():
        torch.testing.assert_close(short.trunk(pictures)["p4"], whole.trunk(pictures)["p4"])
    size = {backbone: sum(p.numel() for p in backbone.trunk.parameters()) for backbone in (whole, short)}
    assert size[short] < 0.35 * size[whole]
    assert "14" not in short.layers
    with pytest.raises(checkpoint.CheckpointError, match="last is 3"):
        built(3, sizes[:3])
    with pytest.raises(checkpoint.CheckpointError, match="sizes has 4 entries; with last 5 there are 5 levels"):
        built(5, sizes)


def test_alexnet_cells_are_centred_at_multiples_of_16() -> None:
    """What moves a cell's value most lies there; the padding alone could put it anywhere."""
    trunk = build("faster_rcnn_alexnet").backbone.trunk
    with torch.no_grad():
        for layer in trunk:
            if isinstance(layer, nn.Conv2d):
                layer.weight.fill_(1.0)
                nn.init.zeros_(layer.bias)
    pictures = torch.ones(1, 3, 256, 256, requires_grad=True)
    smooth = nn.Sequential(*[nn.AvgPool2d(3, 2, 1) if isinstance(m, nn.MaxPool2d) else m for m in trunk])
    smooth(pictures)[0, 0, 8, 9].backward()
    assert pictures.grad is not None
    weights = pictures.grad[0, 0]
    places = torch.arange(256.0) + 0.5
    centre = [float((weights.sum(axis) * places).sum() / weights.sum()) for axis in (1, 0)]
    assert centre == pytest.approx([16 * 8 + 0.5, 16 * 9 + 0.5], abs=1e-2)


def saved(network: nn.Module, path: Path, **more: Tensor) -> Path:
    torch.save({**network.state_dict(), **more}, path)
    return path


def classifier(side: int, fc: int = 64, width: int = 512) -> dict[str, Tensor]:
    return {
        "classifier.0.weight": torch.randn(fc, width * side**2), "classifier.0.bias": torch.randn(fc),
        "classifier.3.weight": torch.randn(fc, fc), "classifier.3.bias": torch.randn(fc),
        "classifier.6.weight": torch.randn(10, fc), "classifier.6.bias": torch.randn(10),
    }  # fmt: skip


def test_vgg16_brings_its_fully_connected_layers(tmp_path: Path) -> None:
    theirs = nn.ModuleDict({"features": torchvision.models.vgg16(weights=None, init_weights=False).features})
    dense = classifier(7)
    model = build("faster_rcnn_vgg16")
    assert isinstance(model, RegionNetwork)
    path = saved(theirs, tmp_path / "vgg16.pth", **dense)
    read_trunk(path, model.classifier_trunk(), model.classifier_layers())
    assert torch.equal(model.backbone.trunk.get_parameter("28.weight"), theirs.get_parameter("features.28.weight"))
    assert torch.equal(model.box_head.get_parameter("fcs.0.weight"), dense["classifier.0.weight"])
    assert torch.equal(model.box_head.get_parameter("fcs.1.bias"), dense["classifier.3.bias"])
    narrow = saved(theirs, tmp_path / "narrow.pth", **classifier(7, fc=32))
    read_trunk(narrow, model.classifier_trunk(), model.classifier_layers())  # of another width: left as they were
    assert torch.equal(model.box_head.get_parameter("fcs.0.weight"), dense["classifier.0.weight"])


@pytest.mark.parametrize("name", ["mask_rcnn_r50_c4", "mask_rcnn_r50_fpn", "retinanet_r50_fpn"])
def test_a_resnet_goes_into_trunk_and_regions(name: str, tmp_path: Path) -> None:
    theirs, model = torchvision.models.resnet18(weights=None), build(name)
    path = saved(theirs, tmp_path / "resnet18.pth")
    read_trunk(path, model.classifier_trunk(), model.classifier_layers())
    last = "region_trunk" if name.endswith("c4") else "backbone.trunk"
    for mine, its in ((f"{last}.layer4.1.conv2.weight", "layer4.1.conv2.weight"), ("backbone.trunk.conv1.weight",) * 2):
        assert torch.equal(model.state_dict()[mine], theirs.state_dict()[its.removeprefix("backbone.trunk.")])


def test_mobilenetv2_is_folded_for_the_light_retinanet(tmp_path: Path) -> None:
    theirs, model = torchvision.models.mobilenet_v2(weights=None).eval(), build("retinanet_mobilenetv2_fpn").eval()
    read_trunk(saved(theirs, tmp_path / "m.pth"), model.classifier_trunk(), [])
    pictures = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.trunk(pictures)["p5"], theirs.features[:18](pictures))


def test_weights_of_another_trunk_are_refused(tmp_path: Path) -> None:
    path = saved(torchvision.models.resnet34(weights=None), tmp_path / "r34.pth")
    model = build("mask_rcnn_r50_c4")
    with pytest.raises(ValueError, match=r"r34\.pth does not fit this trunk: \d+ tensors differ, first layer1\.2"):
        read_trunk(path, model.classifier_trunk(), [])
    alexnet = saved(torchvision.models.alexnet(weights=None).features, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not fit this trunk"):
        read_trunk(alexnet, build("faster_rcnn_vgg16").classifier_trunk(), [])


@pytest.mark.parametrize(
    ("name", "layer", "frozen", "learns"),
    [
        ("faster_rcnn_vgg16", "conv2_1", "backbone.trunk.2.weight", "backbone.trunk.5.weight"),
        ("faster_rcnn_vgg16", "conv3_1", "backbone.trunk.7.weight", "backbone.trunk.10.weight"),
        ("faster_rcnn_vgg16", "fc6", "backbone.trunk.28.weight", "box_head.fcs.0.weight"),
        ("faster_rcnn_vgg16", "fc7", "box_head.fcs.0.weight", "box_head.fcs.1.weight"),
        ("faster_rcnn_alexnet", "conv3", "backbone.trunk.3.weight", "backbone.trunk.6.weight"),
        ("mask_rcnn_r50_c4", "layer4", "backbone.trunk.layer3.1.conv2.weight", "region_trunk.layer4.0.conv1.weight"),
        ("mask_rcnn_r50_fpn", "layer2", "backbone.trunk.layer1.0.conv1.weight", "backbone.trunk.layer2.0.conv1.weight"),
        ("retinanet_r50_fpn", "fpn", "backbone.trunk.layer4.0.conv1.weight", "backbone.fpn.extra_blocks.p6.weight"),
    ],
)
def test_what_lies_before_a_layer(name: str, layer: str, frozen: str, learns: str) -> None:
    with torch.device("meta"):
        model = build(name)
    before = model.before(layer)
    names = [each for each, _ in model.named_parameters()]
    assert {frozen, learns} <= set(names)
    still = {each for each in names if each.startswith(before)}
    assert frozen in still
    assert learns not in still
    assert not any(each.startswith(("rpn.", "detector.", "mask_head.")) for each in still)
    with pytest.raises(ValueError, match=f"no layer 'conv9'; it has .*{layer}"):
        model.before("conv9")
