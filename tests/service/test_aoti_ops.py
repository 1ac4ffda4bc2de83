"""The ops as packages call them: the same function as `limner::nms` and `limner::roi_align`, to the bit.

On a CPU directly; on a GPU by the launches, which run the kernels' own sources here (tests/kernels/emulator.py).
"""

import platform
from collections.abc import Sequence

import pytest

pytest.importorskip("torchvision")

import torch
from torch import Tensor

from export.aoti_build import codes
from models import ops as eager
from models.kernels import Launch, nms_defines, roi_align_defines
from service.aoti import ops as served
from tests.kernels.emulator import emulated
from tests.kernels.test_kernels import pyramid, random_boxes, rois

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torchvision fuses operations here")


def crowd(images: int, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Scores in steps of 1/8: many are equal."""
    generator = torch.Generator().manual_seed(size)
    return random_boxes(size, images, groups, size), torch.randint(
        0, 9, (images, groups, size), generator=generator
    ) / 8


@pytest.mark.parametrize(("groups", "size", "keep"), [(1, 1, 3), (5, 80, 60), (3, 200, 700)])
def test_nms_is_the_models(groups: int, size: int, keep: int) -> None:
    boxes, scores = crowd(2, groups, size)
    scores[1] = -1.0  # nothing in the second picture
    wanted = eager.nms(boxes, scores, 0.5, 0.2, keep)
    for one, other in zip(torch.ops.limner_served.nms(boxes, scores, 0.5, 0.2, keep), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_is_the_models(dtype: torch.dtype, last: bool, aligned: bool) -> None:
    maps, regions = pyramid(dtype, last, 8), rois(1)
    regions = regions[(regions[:, 3] >= regions[:, 1]) & (regions[:, 4] >= regions[:, 2])]
    found = torch.ops.limner_served.roi_align(maps, regions, 7, 2, aligned, 112)
    wanted = eager.roi_align(maps, regions, 7, 2, aligned, 112)
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()


class Emulated:
    """Stands for machine code that was offered: only for the call that it was made for."""

    def __init__(self, call: tuple[object, ...], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("models.kernels.compile_cubin", lambda op, arch, defines: b"code")
        ((self.key, self.code),) = codes({key: call}, "sm_90")
        op, *arguments = call
        defines = nms_defines(*arguments[:3]) if op == "nms" else roi_align_defines(*arguments)
        self.run = emulated(str(op), defines)

    def __call__(self, key: str, _device: int | None) -> tuple[served.Code, served.Launch]:
        assert key == self.key
        return self.code, self.launch

    def launch(
        self, kernel: str, grid: served.Grid, threads: int, extras: Sequence[int], inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:  # fmt: skip
        for output in outputs:
            output.fill_(77)
        self.run(Launch(kernel, grid, (threads, 1, 1), 0, tuple(extras)), inputs, outputs)


@x86
@pytest.mark.parametrize(("groups", "size", "keep"), [(5, 80, 60), (3, 70, 700)])
def test_nms_is_launched_as_the_kernels_want_it(groups: int, size: int, keep: int, monkeypatch) -> None:
    boxes, scores = crowd(2, groups, size)
    code = Emulated(("nms", 0.5, 0.2, size, keep), served.nms_key(0.5, 0.2, size), monkeypatch)
    found = served.launch_nms(code, boxes, scores, 0.5, 0.2, keep)
    for one, other in zip(found, eager.nms(boxes, scores, 0.5, 0.2, keep), strict=True):
        assert torch.equal(one, other)


@x86
@pytest.mark.parametrize(
    ("dtype", "last", "channels", "size"), [(torch.float16, True, 16, 7), (torch.float32, False, 50, 14)]
)
def test_roi_align_is_launched_as_the_kernel_wants_it(
    dtype: torch.dtype, last: bool, channels: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, regions = pyramid(dtype, last, channels), rois(2)
    numbers = (dtype, last, 4, channels, size, 2, True, 224)
    code = Emulated(("roi_align", *numbers), served.roi_align_key(*numbers), monkeypatch)
    found = served.launch_roi_align(code, maps, regions, size, 2, True, 224)
    wanted = eager.roi_align(maps, regions, size, 2, True, 224)
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()


def test_a_kernel_that_no_artifact_brought_is_said_so() -> None:
    with pytest.raises(served.KernelMissing, match="limner export aoti"):
        served._loaded("nms 0.5 0.25 12345", 0)


def test_the_first_offer_of_a_key_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "_offered", {})
    served.offer({"nms": served.Code(b"one", {"k": 64})})
    served.offer({"nms": served.Code(b"two", {"k": 64}), "other": served.Code(b"three", {"k": 32})})
    assert {key: code.cubin for key, code in served._offered.items()} == {"nms": b"one", "other": b"three"}
