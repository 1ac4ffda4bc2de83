"""Viola and Jones's detector as a bundle that the service answers with."""

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from export import to_cascade
from service.app import create_app
from service.bundle import MANIFEST, Bundle
from service.engines import open_engine, verify_golden
from service.errors import BundleError, EngineMismatch, EngineUnavailable
from service.proposals import opencv
from service.settings import Settings
from tests.end_to_end.test_train_to_serve import ready

PICTURES = Path(__file__).parents[1] / "pictures"
FACE = (170, 65, 270, 170)  # of tests/pictures/astronaut.jpg, in its own pixels, roughly


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        opencv("the test", "CascadeClassifier")
    except EngineUnavailable as error:
        pytest.skip(error.detail)
    root = tmp_path_factory.mktemp("bundles")
    assert to_cascade.main(["--out", str(root / "faces" / "1"), "--pictures", str(PICTURES)]) == 0
    return root


def test_the_service_finds_the_face(bundles: Path) -> None:
    with TestClient(create_app(Settings(bundles=bundles, engine="onnx", warm_seconds=0))) as client:
        ready(client)
        photo = (PICTURES / "astronaut.jpg").read_bytes()
        answer = client.post("/detect", content=photo).json()
        best = answer["detections"][0]
        assert best["label"] == "face"
        assert best["score"] > 0.8
        x1, y1, x2, y2 = best["box"]
        size = answer["image"]["width"] / 512
        assert abs((x1 + x2) / 2 - size * (FACE[0] + FACE[2]) / 2) < 30 * size
        assert abs((y1 + y2) / 2 - size * (FACE[1] + FACE[3]) / 2) < 30 * size
        fewer = client.post("/detect?confidence=0.8", content=photo).json()["detections"]
        assert len(fewer) < len(client.post("/detect?confidence=0.1", content=photo).json()["detections"])
        assert client.get("/models/faces").json()["engine"]["name"] == "cascade"


def test_another_cascade_than_the_golden_outputs_are_of_is_refused(bundles: Path, tmp_path: Path) -> None:
    import shutil

    import cv2

    copy = tmp_path / "faces" / "1"
    shutil.copytree(bundles / "faces" / "1", copy)
    shutil.copy(Path(cv2.data.haarcascades) / "haarcascade_eye.xml", copy / "cascade.xml")
    with pytest.raises(BundleError, match="differs from the manifest's sha256"):
        Bundle.read(copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["artifacts"][0]["sha256"] = to_cascade.file_sha256(copy / "cascade.xml")
    (copy / MANIFEST).write_text(json.dumps(manifest))
    bundle = Bundle.read(copy)
    with pytest.raises(EngineMismatch):
        verify_golden(open_engine(bundle, "auto").engine, bundle)
    (copy / "cascade.xml").write_text("<opencv_storage></opencv_storage>")
    with pytest.raises(BundleError, match="cascade"):
        open_engine(bundle, "auto")


def test_an_unknown_cascade_is_told_the_known_ones(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert to_cascade.main(["--cascade", "haarcascade_nose", "--out", str(bundles / "noses" / "1")]) == 2
    assert "haarcascade_frontalface_default" in capsys.readouterr().err
    assert not (bundles / "noses" / "1").exists()
