"""Which packages are taken, and what is said of those that are not. Nothing is compiled here, as in tests/export."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from service.bundle import Artifact, Bundle, file_sha256, write_manifest
from service.engines import Opened, open_engine, plans
from service.engines.aoti import AotiEngine, _told
from service.errors import BundleError, EngineFailed, EngineOutOfMemory, EngineUnavailable
from service.loading import Warming, open_bundle
from tests.service.toy import ToyEngine, write_bundle

HERE = torch.backends.cpu.get_cpu_capability()


def add_packages(directory: Path, gpu: str = "cpu", precision: str = "float32", **changed: object) -> Bundle:
    folder = directory / f"aoti.{gpu}.{precision}"
    folder.mkdir()
    described = {
        "precision": precision, "gpu": gpu, "gpu_name": HERE, "torch": torch.__version__, "batches": [1], "rois": [4],
        "detect": [{"canvas": [64, 96], "file": "detect.pt2"}], "golden": "golden.npz",
        "heads": {"masks": "masks.pt2", "keypoints": "keypoints.pt2"}, **changed,
    }  # fmt: skip
    path = folder / plans.PACKAGES
    path.write_text(json.dumps(described))
    listed = Artifact(
        file=f"{folder.name}/{path.name}", stage=None, sha256=file_sha256(path), runtime="aoti", precision=precision
    )
    manifest = Bundle.read(directory).manifest
    write_manifest(directory, manifest.model_copy(update={"artifacts": [*manifest.artifacts, listed]}))
    return Bundle.read(directory)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"torch": "2.0.0"}, "made with torch 2.0.0, here is"),
        ({"gpu_name": "NEON"}, "for processors with NEON, this one has"),
        pytest.param(
            {"gpu": "sm90"},
            "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"precision": "bfloat16"}, "no float32 AOTInductor packages"),
    ],
)
def test_packages_for_something_else_are_refused(tmp_path: Path, changed: dict[str, str], told: str) -> None:
    bundle = add_packages(write_bundle(tmp_path), **changed)  # type: ignore[arg-type]
    with pytest.raises(EngineUnavailable, match=told):
        open_engine(bundle, "aoti", precision="float32")


def test_auto_leaves_packages_for_the_processor_alone(tmp_path: Path) -> None:
    opened = open_engine(add_packages(write_bundle(tmp_path)), "auto", threads=1)
    assert opened.engine.name != "aoti"
    assert "not aoti: the bundle has no float32 AOTInductor packages for a GPU" in opened.reason
    opened.engine.close()


def test_the_fastest_precision_that_is_here_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_bundle(tmp_path)
    for precision in ("float32", "bfloat16"):
        bundle = add_packages(directory, precision=precision)
    monkeypatch.setattr(AotiEngine, "__init__", lambda self, _bundle, packages, _where: setattr(self, "made", packages))
    assert open_engine(bundle, "aoti", precision="auto").engine.made.precision == "bfloat16"  # type: ignore[attr-defined]
    assert open_engine(bundle, "aoti", precision="float32").engine.made.precision == "float32"  # type: ignore[attr-defined]


def test_a_head_that_is_missing_or_a_file_that_is_wrong(tmp_path: Path) -> None:
    bundle = add_packages(write_bundle(tmp_path), heads={"masks": "masks.pt2"})
    with pytest.raises(BundleError, match="lacks keypoints"):
        open_engine(bundle, "aoti")
    (bundle.directory / "aoti.cpu.float32" / plans.PACKAGES).write_text("{}")
    with pytest.raises(BundleError, match="make the packages again with limner export aoti"):
        open_engine(bundle, "aoti")


def test_warming_leaves_out_what_no_canvas_holds(tmp_path: Path) -> None:
    """A bundle with packages for landscapes alone loads, and serves those."""
    seen = set()

    class Fixed(ToyEngine):
        canvases = ((64, 96),)

        def detect(self, images, sizes):
            seen.add(images.shape[1:3])
            return super().detect(images, sizes)

    bundle = Bundle.read(write_bundle(tmp_path))
    open_bundle(bundle, lambda _bundle: Opened(Fixed(), "toy"), Warming(), lambda: False).detector.close()
    assert (64, 96) in seen
    assert all(height <= 64 and width <= 96 for height, width in seen)


def test_errors_of_torch_become_the_services() -> None:
    with pytest.raises(EngineOutOfMemory), _told("detect failed"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with pytest.raises(EngineFailed, match="detect failed: run_func_"), _told("detect failed"):
        raise RuntimeError("run_func_(...) API call failed")
