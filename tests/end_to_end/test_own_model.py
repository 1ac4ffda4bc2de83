"""torchvision's weights to an answer, as the README says it: one command exports, the other serves."""

from pathlib import Path

import PIL.Image
import pytest
import torch
from starlette.testclient import TestClient
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from export import to_onnx
from service.app import create_app
from service.settings import Settings
from tests.parity.test_torchvision import settle, spread
from tests.service.toy import wait_until

PICTURE = Path(__file__).parents[1] / "pictures" / "astronaut.jpg"


@torch.no_grad()
def find_nothing_in_blank(model: nn.Module) -> None:
    """Nor much elsewhere: what a certificate would find there are near-ties, which swap places."""
    classes = model.roi_heads.box_predictor.cls_score
    given: list[torch.Tensor] = []
    hook = classes.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    model([torch.full((3, 40, 640), 117 / 255)])
    hook.remove()
    classes.bias -= given[0].mean(0)
    classes.bias[0] += 21.0


@pytest.mark.slow
def test_a_file_of_torchvisions_weights_becomes_a_served_bundle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    settle(model)
    spread(model.eval(), background=0.0)
    find_nothing_in_blank(model)
    weights = tmp_path / "maskrcnn.pth"
    # As torchvision's own file: its norms were frozen.
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, weights)
    # A strip: under torchvision's own canvas rule, with a seventh of a usual photo's pixels to compute.
    strip = tmp_path / "photos" / "strip.png"
    strip.parent.mkdir()
    photo = PIL.Image.open(PICTURE)
    photo.crop((0, photo.height // 4, photo.width, photo.height // 4 + photo.width // 16)).save(strip)
    out = tmp_path / "bundles" / "mask" / "1"
    arguments = ["--out", str(out), "--pictures", str(strip.parent), "--engines", "onnx"]
    assert to_onnx.main([str(weights), *arguments]) == 0
    settings = Settings(bundles=tmp_path / "bundles", engine="onnx", warm_seconds=0)
    with TestClient(create_app(settings)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, 120)
        answer = client.post("/detect?confidence=0.05", content=strip.read_bytes())
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["model"] == {"name": "mask", "version": "1"}
    assert told["detections"]
    assert all(each["mask"]["size"] == [told["image"]["height"], told["image"]["width"]] for each in told["detections"])


def test_a_file_that_holds_no_weights_is_told_and_nothing_is_left(tmp_path: Path, capsys) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"nothing of the kind")
    out = tmp_path / "bundles" / "mask" / "1"
    assert to_onnx.main([str(weights), "--out", str(out), "--max-pictures", "1"]) == 2
    assert "not a state dict" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
