"""OverFeat's graph on canvases whose sides at a scale are, and are not, multiples of the trunk's stride."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from models.overfeat import OverFeat
from tests.models.classics import make


class Looking(nn.Module):
    def __init__(self, model: OverFeat) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model._look(images)


@torch.no_grad()
def test_windows_of_any_canvas(tmp_path: Path) -> None:
    model, _ = make("overfeat_mobilenetv2", scales=[20])
    assert isinstance(model, OverFeat)
    looking = Looking(model).requires_grad_(False)
    h, w = torch.export.Dim("h", min=2, max=64), torch.export.Dim("w", min=2, max=64)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64), 2: 32 * h, 3: 32 * w},)
    images = torch.randn(2, 3, 192, 256, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        looking, (images,), dynamo=True, opset_version=20, verbose=False, dynamic_shapes=shapes, input_names=["images"]
    )
    assert program is not None
    program.save(tmp_path / "looking.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "looking.onnx"), providers=["CPUExecutionProvider"])
    for height, width in ((64, 96), (96, 128), (128, 256)):  # at 20 / 32: 40 x 60, 60 x 80 and 80 x 160
        given = images[:1, :, :height, :width].contiguous()
        for found, wanted in zip(session.run(None, {"images": given.numpy()}), looking(given), strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-3)
