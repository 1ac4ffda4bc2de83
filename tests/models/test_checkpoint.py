"""Checkpoints: every model of the zoo bit for bit, and in words what is wrong with those that cannot be read."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import checkpoint
from models.checkpoint import CheckpointError, Spec
from models.zoo import MODELS
from tests.models import classics, tiny


def test_the_tiny_models_are_the_whole_zoo() -> None:
    assert tiny.SPECS.keys() | classics.SPECS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", [*tiny.EACH, "spp_net_mobilenetv2", "overfeat_mobilenetv2"])
def test_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, spec = (classics if name in classics.SPECS else tiny).make(name)
    checkpoint.save(tmp_path / "a", model.to(memory_format=torch.channels_last), spec, {"note": "tests", "step": 3})
    loaded, read = checkpoint.load(tmp_path / "a")
    assert read == spec
    assert checkpoint.read_config(tmp_path / "a")["provenance"] == {"note": "tests", "step": 3}
    assert not loaded.training
    state, other = model.state_dict(), loaded.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)
    assert loaded.rules == model.rules
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_with_its_defaults(name: str) -> None:
    with torch.device("meta"):
        rule = classics.SPECS[name].proposals if name in classics.SPECS else None
        model = checkpoint.build(Spec(name, ("person",), checkpoint.COCO_PERSON, proposals=rule))
    assert (model.mask_head is not None) == ("mask" in name or "person" in name)
    assert (model.keypoint_head is not None) == ("keypoint" in name or "person" in name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, spec = tiny.make("person_mobilenetv2_fpn")
    directory = tmp_path_factory.mktemp("saved") / "person"
    checkpoint.save(directory, model, spec)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `saved` whose config has these values instead."""

    def make(**values: Any) -> Path:
        config = json.loads((saved / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
        (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
        return tmp_path

    return make


def test_the_config_is_plain(saved: Path) -> None:
    spec = tiny.SPECS["person_mobilenetv2_fpn"]
    config = json.loads((saved / "config.json").read_text())
    assert config.pop("provenance") == {}
    assert config.pop("format") == checkpoint.FORMAT
    assert config == json.loads(json.dumps(asdict(spec)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, r"format 2, this limner reads up to 1: update limner"),
        ({"format": "new"}, r"not a checkpoint's config"),
        ({"architecture": "yolo"}, r"unknown architecture 'yolo'; the zoo has faster_rcnn_r50_fpn"),
        ({"architecture": "faster_rcnn_r50_fpn"}, r"does not take these options"),
        ({"architecture": "keypoint_rcnn_r50_fpn", "options": {}}, r"does not hold the weights of keypoint_rcnn"),
        ({"options": {"width": 24}}, r"does not hold the weights of person_mobilenetv2_fpn"),
        ({"options": {"colour": 1}}, r"does not take these options.*colour"),
        ({"classes": ["a", "b"]}, r"does not hold the weights"),
        ({"canvas": {"short_side": 1, "sideways": 2}}, r"incomplete.*sideways"),
        ({"keypoints": {"names": []}}, r"incomplete.*skeleton"),
    ],
)
def test_a_wrong_config_in_words(copy: Callable[..., Path], values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(copy(**values))


@pytest.mark.parametrize("text", ["", "[1]", "3", "{}", '{"format": null}', "{"])
def test_a_broken_config_in_words(copy: Callable[..., Path], text: str) -> None:
    directory = copy()
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not a checkpoint's config"):
        checkpoint.load(directory)


@pytest.mark.parametrize("missing", ["classes", "keypoints", "canvas", "options", "architecture"])
def test_an_incomplete_config_in_words(copy: Callable[..., Path], missing: str) -> None:
    directory = copy()
    config = json.loads((directory / "config.json").read_text())
    del config[missing]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"incomplete.*{missing}"):
        checkpoint.load(directory)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights_in_words(copy: Callable[..., Path], kept: int) -> None:
    directory = copy()
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold the weights"):
        checkpoint.load(directory)


def test_missing_files_in_words(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        checkpoint.load(directory)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        checkpoint.load(directory / "elsewhere")


def test_wrong_values_of_options_in_words() -> None:
    spec = tiny.SPECS["faster_rcnn_r50_fpn"]
    for options, message in (({"depth": "resnet1"}, "resnet18, resnet34"), ({"norm": "none"}, "'frozen' or 'batch'")):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.build(replace(spec, options=options))


def test_a_save_over_another_leaves_no_pieces(copy: Callable[..., Path]) -> None:
    directory = copy()
    model, spec = tiny.make("person_mobilenetv2_fpn", seed=1)
    checkpoint.save(directory, model, spec)
    loaded, _ = checkpoint.load(directory)
    assert torch.equal(loaded.box_head.classes.weight, model.box_head.classes.weight)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
