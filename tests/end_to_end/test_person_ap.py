"""The bundled person model on the COCO photos it was not trained on: AP through the service's own detector.

The photos are not part of the repository: the tests skip where ../shared is absent.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from service.bundle import Bundle
from service.detector import PASTE, Detector
from service.engines import open_engine
from training.evaluate import evaluate

ROOT = Path(__file__).parents[2]
PACK = ROOT.parent / "shared/data/coco.tar.gz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACK.is_file(), reason="needs ../shared/data/coco.tar.gz"),
]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    with tarfile.open(PACK) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.rglob("person_keypoints_dev.json")).parent.parent


@pytest.fixture(scope="module")
def detector() -> Detector:
    bundle = Bundle.read(ROOT / "bundles/person/1")
    return Detector(bundle, open_engine(bundle, "auto").engine)


def test_ap_is_what_the_manifest_says_and_enough(coco: Path, detector: Detector) -> None:
    scores = evaluate(detector, coco / "images", coco / "annotations/person_keypoints_dev.json")
    told = detector.bundle.manifest.ap
    for kind, least in (("bbox", 0.24), ("segm", 0.18), ("keypoints", 0.10)):
        assert scores[kind]["AP"] == pytest.approx(told[kind]["AP"], abs=0.002)
        assert scores[kind]["AP"] >= least


def test_masks_lose_nothing_against_a_raster(coco: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask AP of the closed form against the same masks pasted by torch's grid_sample, as Detectron2 does it."""
    annotations = coco / "annotations/person_keypoints_dev.json"
    closed = evaluate(detector, coco / "images", annotations)["segm"]["AP"]
    pasted = []

    def paste(*arguments: object, **more: object) -> list[dict]:
        pasted.append(None)
        return grid_sample_rle(*arguments, **more)

    monkeypatch.setitem(PASTE, "bilinear", paste)
    raster = evaluate(detector, coco / "images", annotations)["segm"]["AP"]
    assert len(pasted) > 50, "the raster was not asked"
    print(f"mask AP: closed form {closed:.5f}, raster {raster:.5f}")
    assert closed == pytest.approx(raster, abs=5e-4)


def grid_sample_rle(
    probabilities: np.ndarray, boxes: np.ndarray, height: int, width: int, *_: object, **__: object
) -> list[dict]:
    import torch
    from pycocotools import mask as coco_masks

    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    codes = []
    for values, (x1, y1, x2, y2) in zip(torch.from_numpy(probabilities), boxes.tolist(), strict=True):
        gx, gy = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(gx, gy, indexing="xy"), dim=-1)
        pasted = torch.nn.functional.grid_sample(values[None, None], grid[None], align_corners=False)[0, 0]
        code = coco_masks.encode(np.asfortranarray((pasted >= 0.5).numpy().astype(np.uint8)))
        codes.append({"size": [height, width], "counts": code["counts"].decode()})
    return codes
