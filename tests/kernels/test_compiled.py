"""The CUDA kernels as NVRTC compiles them: parameters in the order that launches pass them, resources within bounds.

Needs libnvrtc (the `kernels` extra, or torch with CUDA), no GPU.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from models import kernels
from models.kernels import nvrtc

ARCHITECTURES = ("80", "90", "120")
SIDES = [(200, 336), (100, 168), (50, 84), (25, 42)]
POINTER, INT = "u64", "u32"


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    try:
        nvrtc._library()
    except kernels.KernelError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvrtc.CACHE, str(tmp_path_factory.getbasetemp() / "kernels"))


ROI = {
    "float": (torch.float32, False),
    "half": (torch.float16, False),
    "half, channels last": (torch.float16, True),
    "bfloat16, channels last": (torch.bfloat16, True),
}
SOURCES: dict[str, tuple[str, dict]] = {"nms": ("nms", kernels.nms_defines(0.7, -0.5, 4096))} | {
    f"{kernel} {name}": (kernel, make(*form))
    for name, form in ROI.items()
    for kernel, make in {
        "roi_align": lambda *form: kernels.roi_align_defines(*form, 4, 256, 14, 2, False, 224),
        "roi_pool": lambda *form: kernels.roi_pool_defines(*form, 4, 256, 7, 224),
    }.items()
}
sources = pytest.mark.parametrize("case", SOURCES)


def parameters(text: str, kernel: str) -> list[str]:
    entry = re.search(rf"\.entry {kernel}\s*\((.*?)\)", text, re.DOTALL)
    assert entry is not None
    return re.findall(r"\.param \.(\w+)", entry[1])


def expected(launch: kernels.Launch, inputs: int, outputs: int) -> list[str]:
    return [POINTER] * inputs + [INT] * len(launch.extras) + [POINTER] * outputs


@sources
@pytest.mark.parametrize("number", ARCHITECTURES)
def test_ptx_of_every_architecture(case: str, number: str) -> None:
    ptx = kernels.compile_ptx(SOURCES[case][0], f"compute_{number}", SOURCES[case][1])
    assert f".target sm_{number}" in ptx.text
    assert ".address_size 64" in ptx.text
    assert not re.search(r"\bfma\.", re.sub(r"//.*", "", ptx.text)), "a fused multiply-add is one rounding, not two"
    if nvrtc._library()[1] <= (13, 0):
        assert ptx.isa <= (9, 0)


def test_parameters_of_nms() -> None:
    ptx = kernels.compile_ptx("nms", "compute_90", SOURCES["nms"][1])
    assert set(ptx.kernels) == {"limner_nms_groups", "limner_nms_merge"}
    first, second = kernels.nms_launch(2, 5, 1000, 300), kernels.nms_merge_launch(2, 5, 1000, 300)
    assert parameters(ptx.text, first.kernel) == expected(first, inputs=2, outputs=3)
    assert parameters(ptx.text, second.kernel) == expected(second, inputs=3, outputs=2)
    for launch in (first, second):
        threads = f".maxntid {launch.block[0]}"
        assert threads in ptx.text or launch.block[0] < 1024  # defines above are of 4096 boxes


@pytest.mark.parametrize("kernel", ["roi_align", "roi_pool"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_parameters_of_a_pyramid(kernel: str, levels: int) -> None:
    make = {
        "roi_align": lambda: kernels.roi_align_defines(torch.float16, True, levels, 64, 7, 2, True, 224),
        "roi_pool": lambda: kernels.roi_pool_defines(torch.float16, True, levels, 64, 7, 224),
    }[kernel]
    shape = {"roi_align": kernels.roi_align_launch, "roi_pool": kernels.roi_pool_launch}[kernel]
    launch = shape(100, 2, 64, [(50, 60)] * levels, 7, torch.float16, True)
    ptx = kernels.compile_ptx(kernel, "compute_90", make())
    assert ptx.kernels == (launch.kernel,)
    assert parameters(ptx.text, launch.kernel) == expected(launch, inputs=levels + 1, outputs=1)


@pytest.mark.parametrize("kernel", ["roi_align", "roi_pool"])
def test_channels_last_loads_sixteen_bytes(kernel: str) -> None:
    text = kernels.compile_ptx(kernel, "compute_90", SOURCES[f"{kernel} half, channels last"][1]).text
    assert re.search(r"ld\.global(\.nc)?\.v(4\.[bu]32|2\.[bu]64|8\.[bu]16)", text), "no vector load"


@sources
def test_registers_spills_and_shared_memory(case: str, tmp_path: Path) -> None:
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas is not installed: it is in the CUDA toolkit")
    (tmp_path / "kernel.ptx").write_text(kernels.compile_ptx(*[SOURCES[case][0], "compute_90", SOURCES[case][1]]).text)
    command = [ptxas, "-v", "-arch=sm_90", "-o", str(tmp_path / "kernel.cubin"), str(tmp_path / "kernel.ptx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    report = done.stdout + done.stderr
    if "Unsupported .version" in report:
        pytest.skip("this ptxas is older than this NVRTC")
    assert done.returncode == 0, report
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert spills
    assert set(spills) == {"0"}, report
    # A block must find its registers: 64 K a multiprocessor.
    assert max(registers) * int(SOURCES[case][1]["THREADS"]) <= 65536, report
    assert all(int(n) <= 48 << 10 for n in re.findall(r"(\d+) bytes smem", report)), report


def test_machine_code_is_made_too() -> None:
    assert kernels.compile_cubin("nms", "sm_90", SOURCES["nms"][1])[:4] == b"\x7fELF"


def test_a_result_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvrtc.CACHE, str(tmp_path / "new"))
    monkeypatch.setattr(nvrtc, "_memory", {})
    first = kernels.compile_ptx("roi_pool", "compute_90", SOURCES["roi_pool float"][1])
    (stored,) = (tmp_path / "new").iterdir()
    monkeypatch.setattr(nvrtc, "_memory", {})
    monkeypatch.setattr(nvrtc, "_run", None)  # nothing is compiled again
    assert kernels.compile_ptx("roi_pool", "compute_90", SOURCES["roi_pool float"][1]) == first
    assert stored.suffix == ".ptx"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv(nvrtc.CACHE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(nvrtc, "_memory", {})
    assert kernels.compile_ptx("roi_pool", "compute_90", SOURCES["roi_pool float"][1]).kernels == ("limner_roi_pool",)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(kernels.KernelError, match="there are nms, roi_align, roi_pool"):
        kernels.compile_ptx("other", "compute_90", {})
    with pytest.raises(kernels.KernelError, match="CAPACITY"):  # the compiler's own words
        kernels.compile_ptx("nms", "compute_90", {})
