"""`limner export aoti --device cpu`: compiled by the machine's C++ compiler, certified, and served by the engine."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from export import aoti_build, to_aoti, toolchain
from export.half import prepared
from export.to_onnx import provenance, write_bundle
from export.verify import write_golden
from models import checkpoint
from models.kernels import KernelError
from service.aoti import ops as served
from service.aoti import runner
from service.bundle import Bundle
from service.engines import open_engine, verify_golden
from service.engines.plans import Kernel
from service.images import Canvas
from tests.models import tiny

NAME = "person_mobilenetv2_fpn"
BUNDLE = Path(__file__).parents[2] / "bundles" / "person" / "1"


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model's checkpoint, and the bundle that was made of it."""
    model, spec = tiny.make(NAME)
    checkpoint.save(tmp_path / "checkpoint", model, spec)
    out = tmp_path / "tiny" / "1"
    out.mkdir(parents=True)
    write_bundle(model, spec, out, ("tiny", "1"), provenance(tmp_path / "checkpoint"))
    images, _ = tiny.pictures((96, 160), [(96, 160)])
    write_golden(model, out, [Canvas(images[0].numpy(), (96, 160), (96, 160))])
    return tmp_path / "checkpoint", out


@pytest.mark.slow  # two minutes of g++
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_packages_are_made_certified_and_served(bundle: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    source, out = bundle
    sizes = ["--batch", "1", "3", "--rois", "4", "16", "--canvas", "96x160"]
    assert to_aoti.main([str(source), "--out", str(out), "--device", "cpu", *sizes]) == 0, capsys.readouterr().err
    read = Bundle.read(out)
    files = {each.file for each in read.manifest.artifacts if each.runtime == "aoti"}
    folder = "aoti.cpu.float32"
    assert files == {
        f"{folder}/{name}"
        for name in ("detect.96x160.pt2", "golden.npz", "keypoints.pt2", "masks.pt2", "packages.json")
    }
    (certificate,) = (each for each in read.manifest.parity["engines"] if each["engine"] == "aoti")
    assert certificate["unmatched"] == 0
    assert certificate["box_px"]["worst"] < 0.05
    opened = open_engine(read, "aoti", precision="auto")
    assert verify_golden(opened.engine, read).num_matched > 0
    opened.engine.close()


def test_the_ops_of_a_stage_are_renamed_and_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = []
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package", lambda program, package_path: compiled.append(program)
    )
    model = prepared(tiny.make(NAME)[0], "bfloat16").to(memory_format=torch.channels_last)
    module = aoti_build.stages(model)["detect"]
    calls = aoti_build.compile_stage(module, aoti_build.detect_example((96, 160), 4, "cpu"), tmp_path / "detect.pt2")
    (program,) = compiled
    names = [str(node.target) for node in program.graph.nodes if "limner" in str(node.target)]
    assert names == [f"limner_served.{name}.default" for name in ("nms", "roi_align", "nms")]
    rules, pooler = model.rules, model.box_pooler
    assert set(calls) == {
        served.nms_key(model.rpn.nms_iou, -0.5, rules.pre_nms),
        served.nms_key(rules.nms_iou, rules.score_floor, rules.num_proposals),
        served.roi_align_key(torch.bfloat16, True, 4, 16, 7, pooler.sampling, pooler.aligned, pooler.canonical),
    }
    # Nothing may be brought to the device in the middle of a run: a CUDA graph could not hold it.
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("lift_fresh" in name or "_local_scalar" in name for name in targets)


def test_machine_code_is_written_for_this_gpu_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(served, "_offered", {})
    numbers = (torch.float16, True, 4, 256, 14, 2, False, 224)
    calls = {
        served.nms_key(0.5, 0.05, 1000): ("nms", 0.5, 0.05, 1000, 100),
        served.roi_align_key(*numbers): ("roi_align", *numbers),
    }
    try:
        found = aoti_build.write_kernels(calls, tmp_path)
    except KernelError as error:
        pytest.skip(str(error))
    described = {key: Kernel.model_validate(each).model_dump() for key, each in found.items()}
    runner.Packages(tmp_path, {}, {}, [1], [1], described).offer_kernels()
    assert served._offered.keys() == calls.keys()
    assert all(code.cubin.startswith(b"\x7fELF") for code in served._offered.values())
    nms, align = (served._offered[key] for key in calls)
    assert set(nms.threads) == {"limner_nms_groups", "limner_nms_merge"}
    assert (set(align.threads), align.slices) == ({"limner_roi_align"}, 4)


def test_the_linker_finds_a_driver_that_came_without_the_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "libcuda.so.1"
    driver.write_bytes(b"a driver")
    monkeypatch.setattr(toolchain, "_loaded_driver", lambda: str(driver))
    monkeypatch.setenv("LIBRARY_PATH", "/somewhere")
    with toolchain.for_cuda():
        first, ours = os.environ["LIBRARY_PATH"].split(":")
        assert first == "/somewhere"
        assert (Path(ours) / "libcuda.so").read_bytes() == b"a driver"
    assert os.environ["LIBRARY_PATH"] == "/somewhere"
    assert not Path(ours).exists()


def test_cudas_headers_may_be_among_the_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "nvidia" / "cu13" / "include" / "cuda.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setattr(toolchain, "_loaded_driver", lambda: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda _name: None)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _name: spec)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with toolchain.for_cuda():
        found = os.environ.get("CUDA_HOME")
        assert found == str(tmp_path / "nvidia" / "cu13") or Path("/usr/local/cuda/include/cuda.h").is_file()
    assert "CUDA_HOME" not in os.environ
    monkeypatch.setenv("CUDA_HOME", "/own")
    with toolchain.for_cuda():
        assert os.environ["CUDA_HOME"] == "/own"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cpu", "--precision", "fp16"], "fp16 is for GPUs"),
        (["--device", "cpu", "--batch", "0"], "sizes are 1 at least"),
        (["--device", "cpu", "--allow", "box_px"], "expected NAME=NUMBER"),
        pytest.param([], "--device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_wrong_use_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert to_aoti.main([str(BUNDLE), *arguments]) == 2
    assert told in capsys.readouterr().err
