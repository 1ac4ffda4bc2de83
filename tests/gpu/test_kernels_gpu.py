"""`make gpu-check`: the project's CUDA kernels, through the two ops, against the eager CPU form: equal to the bit.

Bit for bit because the kernels are compiled without contraction and keep the CPU's order of operations.
"""

import warnings
from threading import Thread

import pytest
import torch
from torch import Tensor

from models.ops import nms, roi_align, roi_pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMNER_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(autouse=True)
def _kernels_or_nothing() -> None:
    """The ops warn and go on without kernels; here that is a failure."""
    warnings.simplefilter("error")


def crowd(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Overlapping boxes, some without area; scores in steps of 1/64, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 600
    sides = (torch.randn(*shape, 2, generator=generator) * 0.7 + 4).exp()
    sides *= torch.rand(*shape, 1, generator=generator) > 0.02
    scores = torch.randint(0, 65, shape, generator=generator) / 64
    return torch.cat((low, low + sides), dim=-1), scores


def some_rois(seed: int, number: int) -> Tensor:
    """RoIs of two images: small and large, past the borders, without area, inside out."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(number, 2, generator=generator) * 300 - 60
    sides = (torch.randn(number, 2, generator=generator) * 1.3 + 3.7).exp()
    sides[:5] = 0
    sides[5:10, 0] *= -0.5
    image = torch.randint(0, 2, (number, 1), generator=generator).float()
    rois = torch.cat((image, low, low + sides), dim=1)
    return torch.cat((rois, torch.tensor([[0.0, 0, 0, 112, 112], [1, 0, 0, 224, 224], [0, 0, 0, 448, 448]])))


def maps(dtype: torch.dtype, order: torch.memory_format, channels: int = 70) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, channels, 64 >> i, 72 >> i) for i in range(4)]
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=order) for shape in shapes]


def on_device(levels: list[Tensor]) -> list[Tensor]:
    return [level.cuda() for level in levels]


@pytest.mark.parametrize(("iou", "threshold"), [(0.5, 0.1), (0.7, -0.5), (0.3, 0.5), (0.5, 2.0)])
@pytest.mark.parametrize(
    ("images", "groups", "size", "keep"),
    [(1, 1, 1, 5), (2, 5, 1000, 1000), (1, 80, 1000, 100), (3, 2, 65, 300), (1, 1, 4096, 4096)],
)
def test_nms_is_the_cpus(images: int, groups: int, size: int, keep: int, iou: float, threshold: float) -> None:
    boxes, scores = crowd(size, images, groups, size)
    index, count = nms(boxes.cuda(), scores.cuda(), iou, threshold, keep)
    wanted_index, wanted_count = nms(boxes, scores, iou, threshold, keep)
    assert count.tolist() == wanted_count.tolist()
    assert torch.equal(index.cpu(), wanted_index)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "sampling", "aligned", "canonical"), [(7, 2, False, 224), (14, 2, True, 112), (7, 0, True, 56)]
)
def test_roi_align_is_the_cpus(
    size: int, sampling: int, aligned: bool, canonical: int, dtype: torch.dtype, order: torch.memory_format
) -> None:
    levels, rois = maps(dtype, order), some_rois(2, 200)
    found = roi_align(on_device(levels), rois.cuda(), size, sampling, aligned, canonical)
    wanted = roi_align(levels, rois, size, sampling, aligned, canonical)
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(found.cpu(), wanted)
    else:  # the CPU adds in the features' own precision
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found.cpu().float(), wanted.float(), atol=8 * step, rtol=8 * step)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_roi_pool_is_the_cpus(dtype: torch.dtype, order: torch.memory_format) -> None:
    feature, rois = maps(dtype, order)[0], some_rois(4, 200)
    found = roi_pool([feature.cuda()], rois.cuda(), 7, 224, 8)
    assert torch.equal(found.cpu(), roi_pool([feature], rois, 7, 224, 8))


def test_the_gradient_of_roi_pool_passes_through_the_kernel() -> None:
    here = maps(torch.float32, torch.contiguous_format, 5)[0].requires_grad_()
    there = here.detach().cuda().requires_grad_()
    rois = some_rois(5, 50)
    weight = torch.randn(len(rois), 5, 7, 7)
    (roi_pool([here], rois, 7, 224, 8) * weight).sum().backward()
    (roi_pool([there], rois.cuda(), 7, 224, 8) * weight.cuda()).sum().backward()
    assert here.grad is not None
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), here.grad, atol=1e-3, rtol=1e-3)


def test_the_gradient_passes_through_the_kernel() -> None:
    here = [level.requires_grad_() for level in maps(torch.float32, torch.contiguous_format, 5)]
    there = [level.detach().cuda().requires_grad_() for level in here]
    rois = some_rois(3, 50)
    weight = torch.randn(len(rois), 5, 7, 7)
    (roi_align(here, rois, 7, 2, False, 112) * weight).sum().backward()
    (roi_align(there, rois.cuda(), 7, 2, False, 112) * weight.cuda()).sum().backward()
    for one, other in zip(here, there, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad.cpu(), one.grad, atol=1e-3, rtol=1e-3)


def both(levels: list[Tensor], rois: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (*nms(boxes, scores, 0.5, 0.2, 100), roi_align(levels, rois, 7, 2, False, 224))


def test_a_cuda_graph_captures_and_replays_both() -> None:
    levels, rois, (boxes, scores) = maps(torch.float16, torch.channels_last), some_rois(4, 60), crowd(4, 2, 5, 300)
    static = (on_device(levels), rois.cuda(), boxes.cuda(), scores.cuda())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads
        both(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = both(*static)
    levels = [level.float() for level in levels]
    for seed in (5, 6):
        rois, (boxes, scores) = some_rois(seed, 60), crowd(seed, 2, 5, 300)
        for target, new in zip(static[1:], (rois, boxes, scores), strict=True):
            target.copy_(new)
        graph.replay()
        wanted = both(levels, rois, boxes, scores)
        assert torch.equal(outputs[0].cpu(), wanted[0])
        assert torch.equal(outputs[1].cpu(), wanted[1])
        torch.testing.assert_close(outputs[2].cpu().float(), wanted[2], atol=0.01, rtol=0.01)


def test_nothing_waits_for_the_device() -> None:
    levels, rois, (boxes, scores) = maps(torch.float32, torch.channels_last), some_rois(4, 60), crowd(4, 2, 5, 300)
    static = (on_device(levels), rois.cuda(), boxes.cuda(), scores.cuda())
    both(*static)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_and_another_thread() -> None:
    levels, rois, (boxes, scores) = maps(torch.float32, torch.channels_last), some_rois(4, 60), crowd(4, 2, 5, 300)
    wanted, found = both(levels, rois, boxes, scores), []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = both(on_device(levels), rois.cuda(), boxes.cuda(), scores.cuda())
            found.extend(result.cpu() for result in results)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
