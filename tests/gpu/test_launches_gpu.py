"""`make gpu-check`: the kernels as artifacts bring them and engines launch them, against references in float64.

The machine code is compiled for this GPU and handed to `service.aoti.ops`, which knows its launch ABI and nothing else:
input pointers, int32 numbers, output pointers, as TensorRT launches the same sources.
"""

import pytest
import torch
import torchvision
from torch import Tensor

from export.aoti_build import codes
from models import ops as eager
from service.aoti import ops as served
from tests.gpu.test_kernels_gpu import crowd, maps, some_rois

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMNER_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


def offer(call: tuple, key: str) -> None:
    major, minor = torch.cuda.get_device_capability()
    served.offer(dict(codes({key: call}, f"sm_{major}{minor}")))


def greedy(boxes: Tensor, scores: Tensor, iou: float, threshold: float, keep: int) -> list[int]:
    """Of one image (G, N): by score, then index; overlaps in float64. Fails where one is too close to call."""
    kept = []
    for group in range(len(scores)):
        order = [i for i in scores[group].sort(descending=True, stable=True).indices if scores[group, i] > threshold]
        overlap = torchvision.ops.box_iou(boxes[group].double(), boxes[group].double()).nan_to_num(0.0)
        assert not ((overlap - iou).abs() < 1e-6).any(), "the case itself is in doubt"
        survivors: list[int] = []
        for index in map(int, order):
            if not any(overlap[index, other] > iou for other in survivors):
                survivors.append(index)
        kept += [(-float(scores[group, i]), group * scores.shape[1] + i) for i in survivors]
    return [index for _, index in sorted(kept)[:keep]]


@pytest.mark.parametrize(("groups", "size", "keep"), [(5, 300, 200), (80, 50, 100), (1, 700, 1000)])
def test_nms_against_float64(groups: int, size: int, keep: int) -> None:
    boxes, scores = crowd(7, 2, groups, size)
    offer(("nms", 0.55, 0.3, size, keep), served.nms_key(0.55, 0.3, size))
    index, count = torch.ops.limner_served.nms(boxes.cuda(), scores.cuda(), 0.55, 0.3, keep)
    for image in range(2):
        wanted = greedy(boxes[image], scores[image], 0.55, 0.3, keep)
        assert int(count[image]) == len(wanted)
        assert index[image, : len(wanted)].tolist() == wanted
        assert not index[image, len(wanted) :].any()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "aligned", "canonical"), [(7, False, 224), (14, True, 112)])
def test_roi_align_against_float64(
    size: int, aligned: bool, canonical: int, dtype: torch.dtype, order: torch.memory_format
) -> None:
    levels, rois = maps(dtype, order, 72), some_rois(2, 150)
    rois = rois[(rois[:, 3] >= rois[:, 1]) & (rois[:, 4] >= rois[:, 2])]
    last = order == torch.channels_last
    numbers = (dtype, last, 4, 72, size, 2, aligned, canonical)
    offer(("roi_align", *numbers), served.roi_align_key(*numbers))
    there = [level.cuda() for level in levels]
    found = torch.ops.limner_served.roi_align(there, rois.cuda(), size, 2, aligned, canonical)
    chosen = eager.roi_levels(rois, 4, canonical)
    wanted = torch.zeros(len(rois), 72, size, size, dtype=torch.float64)
    for level, features in enumerate(levels):
        mine = (chosen == level).nonzero().flatten()
        exact = features.double().contiguous(), rois[mine].double()
        wanted[mine] = torchvision.ops.roi_align(*exact, size, 1 / (4 << level), 2, aligned)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=order)
    tolerance = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu().double(), wanted, atol=tolerance, rtol=tolerance)


def test_no_rois_is_no_launch() -> None:
    numbers = (torch.float16, True, 4, 72, 7, 2, False, 224)
    offer(("roi_align", *numbers), served.roi_align_key(*numbers))
    levels = [level.cuda() for level in maps(torch.float16, torch.channels_last, 72)]
    found = torch.ops.limner_served.roi_align(levels, torch.zeros(0, 5, device="cuda"), 7, 2, False, 224)
    assert found.shape == (0, 72, 7, 7)
