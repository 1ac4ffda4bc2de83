"""Proposals: what is searched for, what a request brings, and how both reach the network."""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import proposals
from service.bundle import MANIFEST, Bundle, ProposalRule
from service.client import Client
from service.detector import Detector, Wants
from service.engines import Detected, verify_golden
from service.errors import BundleError, EngineUnavailable
from service.proposals import Cache, propose, sliding_windows
from tests.service.test_client import Through
from tests.service.toy import D, ToyEngine, encoded, picture, write_bundle

WINDOWS = ProposalRule(method="sliding_window", max_proposals=6)


class Looking(ToyEngine):
    """Answers with the boxes that it was given, the first ones best; remembers what those were."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[np.ndarray] = []

    def detect(self, images: np.ndarray, sizes: np.ndarray, *proposals: np.ndarray) -> Detected:
        found = super().detect(images, sizes)
        if not proposals:
            return found
        (boxes,) = proposals
        self.given.append(boxes)
        rows = np.zeros((len(images), D, 4), np.float32)
        rows[:, : boxes.shape[1]] = boxes[:, :D]
        count = ((rows[..., 2] - rows[..., 0]) > 0).sum(1)
        valid = np.arange(D) < count[:, None]
        scores = np.where(valid, np.linspace(0.9, 0.6, D, dtype=np.float32), 0)
        return Detected(count, rows, scores, np.where(valid, 0, -1), found.features)


def looking_bundle(root: Path) -> Path:
    """The toy's bundle as one that takes proposals."""
    directory = write_bundle(root, heads=())
    manifest = json.loads((directory / MANIFEST).read_text())
    port = {"name": "proposals", "dtype": "float32", "shape": ["B", "R", 4], "frame": "canvas"}
    manifest["stages"]["detect"]["inputs"].append(port)
    manifest["proposals"] = WINDOWS.model_dump()
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with np.load(directory / "golden.npz") as archive:
        golden = dict(archive)
    boxes = np.array([[[0, 0, 30, 30], [5, 5, 60, 40]], [[1, 2, 20, 30], [0, 0, 0, 0]]], np.float32)
    found = Looking().detect(golden["images"], golden["sizes"], boxes)
    rows = {name: getattr(found, name) for name in ("count", "boxes", "scores", "labels")}
    np.savez(directory / "golden.npz", **golden | rows, proposals=boxes)
    return directory


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    looking_bundle(root)
    write_bundle(root, name="with-own-boxes", heads=())
    return root


@pytest.fixture
def engine() -> Looking:
    return Looking()


@pytest.fixture
def looking(serve: Any, engine: Looking) -> Iterator[Any]:
    with serve(default_model="toy") as client:
        engine.given.clear()
        yield client


IMAGE = picture(135, 199)  # on the canvas 64 x 94
PNG = encoded(IMAGE)


def boxes_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["box"] for row in answer.json()["detections"]])


def test_given_boxes_reach_the_canvas_and_come_back_in_image_pixels(looking, engine):
    boxes = [[10.5, 20, 110, 120], [-5, 3, 400, 90]]
    text = json.dumps(boxes)
    query = looking.post("/detect", params={"proposals": text}, content=PNG)
    form = looking.post("/detect", files={"image": PNG}, data={"proposals": text})
    body = {"image": base64.b64encode(PNG).decode(), "proposals": boxes}
    for answer in (query, form, looking.post("/detect", json=body)):
        np.testing.assert_allclose(boxes_of(answer), [[10.5, 20, 110, 120], [0, 3, 199, 90]], atol=0.01)
    scale = np.tile([94 / 199, 64 / 135], 2)
    np.testing.assert_allclose(engine.given[0][0, 0], np.array(boxes[0]) * scale, rtol=1e-5)


def test_the_service_searches_where_none_are_given(looking, engine):
    assert looking.get("/models/toy").json()["proposals"] == WINDOWS.model_dump()
    assert looking.get("/models/with-own-boxes").json()["proposals"] is None
    all_of_them = boxes_of(looking.post("/detect", content=PNG))
    np.testing.assert_allclose(all_of_them, propose(IMAGE, WINDOWS)[:D], atol=0.01)
    assert engine.given[0].shape == (1, 6, 4)
    looking.post("/detect?max_proposals=3", content=PNG)
    assert engine.given[1].shape == (1, 3, 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"proposals": "[[0, 0, 5]]"}, "at least 4 items"),
        ({"proposals": "[[0, 0, 5, 5]"}, "expected JSON such as"),
        ({"proposals": "[]"}, "at least 1 item"),
        ({"proposals": "[[5, 0, 5, 5]]"}, "box 0 has no area"),
        ({"proposals": "[[0, 0, 5, 5], [200, 0, 210, 5]]"}, "proposals[1] = [200.0, 0.0, 210.0, 5.0] lies outside"),
        ({"proposals": json.dumps([[0, 0, 5, 5]] * 7)}, "takes at most 6"),
        ({"proposals": "[[0, 0, 5, 5]]", "max_proposals": "3"}, "give one of them"),
        ({"max_proposals": "7"}, "takes at most 6"),
        ({"max_proposals": "0"}, "greater than or equal to 1"),
    ],
)
def test_bad_proposals_are_refused(looking, engine, options, told):
    answer = looking.post("/detect", params=options, content=PNG)
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert not engine.given


def test_other_models_refuse_them(looking):
    for options in ({"proposals": "[[0, 0, 5, 5]]"}, {"max_proposals": "3"}):
        options["model"] = "with-own-boxes"
        answer = looking.post("/detect", params=options, content=PNG)
        assert answer.status_code == 422
        assert "finds its own boxes" in answer.json()["detail"]


def test_several_pictures_share_no_proposals(looking, engine):
    files = [("image", PNG), ("image", PNG)]
    answer = looking.post("/detect", files=files, data={"proposals": "[[0, 0, 5, 5]]"})
    assert answer.status_code == 422
    assert "of one picture" in answer.json()["detail"]
    answer = looking.post("/detect", files=files)
    assert [len(each["detections"]) for each in answer.json()["results"]] == [D, D]


def test_the_client_sends_thousands(looking):
    ours = Client("http://testserver", transport=Through(looking))
    found = ours.detect(PNG, proposals=[(1, 2, 30, 40), (5, 5, 60.5, 50)], confidence=0.1)
    np.testing.assert_allclose([each.box for each in found.detections], [[1, 2, 30, 40], [5, 5, 60.5, 50]], atol=0.01)


def test_a_batch_is_padded_with_boxes_without_area(bundles, engine):
    detector = Detector(Bundle.read(bundles / "toy" / "1"), engine)
    one = detector.fit(IMAGE, np.array([[0, 0, 50, 50]], np.float32))
    many = detector.fit(IMAGE)
    wants = Wants(confidence=0.1)
    raws = detector.run([one, many], [wants, wants])
    assert engine.given[-1].shape == (2, 6, 4)
    assert not engine.given[-1][0, 1:].any()
    assert [len(raw.scores) for raw in raws] == [1, D]


def test_golden_proposals_are_checked(tmp_path):
    bundle = Bundle.read(looking_bundle(tmp_path))
    assert verify_golden(Looking(), bundle).num_matched == 3
    with np.load(bundle.directory / "golden.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != "proposals"}
    np.savez(bundle.directory / "golden.npz", **arrays)
    with pytest.raises(BundleError, match="lacks proposals"):
        bundle.golden()


def test_a_manifest_without_the_rule_is_refused(tmp_path):
    directory = looking_bundle(tmp_path)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["proposals"] = None
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="'proposals' and the rule for it go together"):
        Bundle.read(directory)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (375, 500), (20, 300), (10, 7), (1, 1)])
def test_sliding_windows_cover_the_picture(height, width):
    boxes = sliding_windows(height, width)
    assert boxes.dtype == np.float32
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= np.array([width, height]) + 1e-3).all()
    assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()
    for point in np.random.default_rng(0).uniform([0, 0], [width, height], (50, 2)):
        assert ((boxes[:, :2] <= point + 1e-3) & (boxes[:, 2:] >= point - 1e-3)).all(1).any()


@pytest.fixture
def opencv():
    try:
        return proposals.opencv("the test", "ximgproc")
    except EngineUnavailable as error:
        pytest.skip(error.detail)


def scene() -> np.ndarray:
    """Three flat figures on a flat ground."""
    image = np.full((90, 120, 3), 120, np.uint8)
    image[10:40, 10:50] = (220, 40, 40)
    image[50:80, 60:110] = (30, 60, 200)
    image[15:35, 80:100] = (240, 230, 60)
    return image


@pytest.mark.parametrize("mode", ["fast", "quality"])
def test_selective_search_finds_figures_and_always_the_same(opencv, mode):
    rule = ProposalRule(mode=mode, width=120, max_proposals=50)
    boxes = propose(scene(), rule)
    for truth in ([10, 10, 50, 40], [60, 50, 110, 80], [80, 15, 100, 35]):
        low, high = np.maximum(boxes[:, :2], truth[:2]), np.minimum(boxes[:, 2:], truth[2:])
        both = np.clip(high - low, 0, None).prod(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + np.prod(np.subtract(truth[2:], truth[:2])) - both
        assert (both / areas).max() > 0.8
    np.testing.assert_array_equal(boxes, propose(scene(), rule))
    np.testing.assert_array_equal(boxes[:5], propose(scene(), rule, 5))


def test_boxes_are_in_pixels_of_the_whole_picture(opencv):
    large = scene().repeat(3, axis=0).repeat(3, axis=1)
    ours = propose(large, ProposalRule(width=120))
    np.testing.assert_allclose(ours, propose(scene(), ProposalRule(width=120)) * 3)


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'limner\[proposals\]'"):
        propose(scene(), ProposalRule())


def test_the_cache_answers_without_a_search(tmp_path, monkeypatch):
    cache, rule = Cache(tmp_path / "cache"), ProposalRule(method="sliding_window")
    wanted = propose(IMAGE, rule)
    fewer = ProposalRule(method="sliding_window", max_proposals=5)
    np.testing.assert_array_equal(cache(IMAGE, fewer), wanted[:5])
    monkeypatch.setattr(proposals, "propose", lambda *_: pytest.fail("searched again"))
    np.testing.assert_array_equal(cache(IMAGE, rule), wanted)
    np.testing.assert_array_equal(cache(IMAGE, fewer, 7), wanted[:7])
    monkeypatch.undo()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])  # half copied
    np.testing.assert_array_equal(cache(IMAGE, rule), wanted)
    cache(IMAGE[:, ::-1], rule)
    assert len(list((tmp_path / "cache").iterdir())) == 2
