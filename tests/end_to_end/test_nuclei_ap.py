"""The bundles to try, on the microscope pictures that they were not trained on: AP through the service's own detector.

The pictures are not part of the repository: the tests skip where ../shared is absent.
"""

import tarfile
from pathlib import Path

import pytest

from service.bundle import Bundle
from service.detector import Detector
from service.engines import open_engine
from training.evaluate import evaluate

ROOT = Path(__file__).parents[2]
PACK = ROOT.parent / "shared/data/nuclei.tar.gz"


@pytest.mark.parametrize("name", ["nuclei", "nuclei-retinanet"])
def test_together_they_are_small_and_whole(name: str) -> None:
    bundle = Bundle.read(ROOT / "more-bundles" / name / "1")
    assert bundle.manifest.classes == ["nucleus"]
    assert bundle.has_masks == (name == "nuclei")
    assert sum(path.stat().st_size for path in (ROOT / "more-bundles").rglob("*") if path.is_file()) < 10e6


@pytest.mark.slow
@pytest.mark.skipif(not PACK.is_file(), reason="needs ../shared/data/nuclei.tar.gz")
@pytest.mark.parametrize("name", ["nuclei", "nuclei-retinanet"])
def test_ap_is_what_the_manifest_says(name: str, tmp_path: Path) -> None:
    with tarfile.open(PACK) as archive:
        archive.extractall(tmp_path, filter="data")
    annotations = next(tmp_path.rglob("instances_val.json"))
    bundle = Bundle.read(ROOT / "more-bundles" / name / "1")
    scores = evaluate(
        Detector(bundle, open_engine(bundle, "auto").engine), annotations.parents[1] / "images", annotations
    )
    for kind in ("bbox", "segm") if bundle.has_masks else ("bbox",):
        assert scores[kind]["AP"] == pytest.approx(bundle.manifest.ap[kind]["AP"], abs=0.002)
