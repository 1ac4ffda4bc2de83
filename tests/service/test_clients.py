"""Answers for other programs, read with their own code where it installs."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from service import clients
from service.answers import Found
from service.bundle import Keypoints, Manifest
from service.detector import Detections
from service.masks import Rle, decode, rle
from service.wire import Options
from tests.service.test_http_doc import BLOCKS
from tests.service.test_masks import blobs, encoded

HEIGHT, WIDTH = 90, 120
HOLED = np.pad(np.pad(np.zeros((20, 20), np.uint8), 10, constant_values=1), 25)[: HEIGHT - 5]
PARTS = np.zeros((HEIGHT, WIDTH), np.uint8)
PARTS[3:9, 3:9] = PARTS[40:80, 20:50] = 1
EMPTY, FULL = np.zeros((HEIGHT, WIDTH), np.uint8), np.ones((HEIGHT, WIDTH), np.uint8)
DOT = EMPTY.copy()
DOT[-1, -1] = 1

pictures = hn.arrays(np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 1))


def found(masks: list[Rle] | None, asked: dict[str, Any] | None = None) -> Found:
    number = 3 if masks is None else len(masks)
    boxes = np.linspace([3.3, 4.4, 60.5, 70.6], [40, 20, 119, 88], number).astype(np.float32)
    points = np.stack([boxes[:, :2] + 2.25, boxes[:, 2:] - 3.5], axis=1)
    scores = np.broadcast_to(np.array([[0.8], [0.02]], np.float32), (number, 2, 1))
    detections = Detections(
        HEIGHT,
        WIDTH,
        boxes,
        np.linspace(0.95, 0.5, number).astype(np.float32),
        np.arange(number) % 2,
        masks,
        np.concatenate([points, scores], axis=2),
    )
    joints = Keypoints(names=["nose", "tail"], skeleton=[(0, 1)], flips=[0, 1])
    manifest = Manifest.model_construct(name="pets", version="2", classes=["cat", "dog"], keypoints=joints)
    return Found(manifest, detections, Options.model_validate(asked or {}), {"decode": 1.0, "detect": 40.0}, 0.0)


def network_masks() -> list[Rle]:
    boxes = np.array([[3.3, 4.4, 60.5, 70.6], [40, 20, 119, 88], [0, 0, 120, 90]], np.float32)
    return rle(blobs(np.random.default_rng(8), 3), boxes, HEIGHT, WIDTH)


def full(picture: np.ndarray) -> Rle:
    painted = EMPTY.copy()
    painted[: picture.shape[0], : picture.shape[1]] = picture[:, :WIDTH]
    return encoded(painted)


class TestRoboflow:
    def test_supervision_reads_boxes_classes_and_exact_masks(self) -> None:
        supervision = pytest.importorskip(
            "supervision", reason='supervision is not installed: pip install -e ".[clients]"'
        )
        masks = [*network_masks(), full(HOLED), encoded(PARTS), encoded(EMPTY), encoded(FULL), encoded(DOT)]
        given_to = found(masks)
        read = supervision.Detections.from_inference(json.loads(clients.to_roboflow(given_to)))
        np.testing.assert_allclose(read.xyxy, given_to.detections.boxes, atol=0.011)
        np.testing.assert_allclose(read.confidence, given_to.detections.scores, atol=1e-4)
        assert read.class_id.tolist() == given_to.detections.labels.tolist()
        assert read.data["class_name"].tolist() == ["cat", "dog"] * 4
        assert (read.mask == np.stack([decode(mask) for mask in masks])).all()

    def test_points_alone_are_the_largest_part(self) -> None:
        supervision = pytest.importorskip(
            "supervision", reason='supervision is not installed: pip install -e ".[clients]"'
        )
        masks = [*network_masks(), encoded(PARTS), encoded(EMPTY), encoded(FULL), encoded(DOT)]
        answer = json.loads(clients.to_roboflow(found(masks, {"masks": "polygon"})))
        assert all("rle" not in row for row in answer["predictions"])
        read = supervision.Detections.from_inference(answer)
        largest = PARTS.copy()
        largest[:10] = 0
        expected = [*(decode(mask) for mask in network_masks()), largest, EMPTY, FULL, DOT]
        assert (read.mask == np.stack(expected)).all()

    def test_supervision_reads_keypoints(self) -> None:
        supervision = pytest.importorskip(
            "supervision", reason='supervision is not installed: pip install -e ".[clients]"'
        )
        given_to = found(None)
        read = supervision.KeyPoints.from_inference(json.loads(clients.to_roboflow(given_to)))
        assert given_to.detections.keypoints is not None
        np.testing.assert_allclose(read.xy, given_to.detections.keypoints[..., :2], atol=0.011)
        np.testing.assert_allclose(read.keypoint_confidence, given_to.detections.keypoints[..., 2], atol=1e-4)

    def test_tolerance_thins_the_points(self) -> None:
        exact, less = (
            json.loads(clients.to_roboflow(found(network_masks(), {"polygon_tolerance": tolerance})))["predictions"]
            for tolerance in (0, 2)
        )
        assert all(3 <= len(b["points"]) < len(a["points"]) for a, b in zip(exact, less, strict=True))


def brush_module() -> Any:
    reason = 'label-studio-sdk is not installed: pip install -e ".[clients]"'
    return pytest.importorskip("label_studio_sdk.converter.brush", reason=reason)


def unpacked(codes: Any) -> np.ndarray:
    """@thi.ng/rle-pack, read here: the tests of the format itself need no package."""
    bits = "".join(f"{code:08b}" for code in codes)
    at = 0

    def read(size: int) -> int:
        nonlocal at
        at += size
        return int(bits[at - size : at], 2)

    number, word, sizes = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    values = np.zeros(number, np.uint8)
    place = 0
    while place < number:
        assert read(1) == 1
        end = place + 1 + read(sizes[read(2)])
        values[place:end] = read(word)
        place = end
    assert len(bits) - at < 8
    return values


class TestLabelStudio:
    @settings(max_examples=150, deadline=None)
    @given(pictures)
    def test_brush_is_the_mask_in_four_channels(self, painted: np.ndarray) -> None:
        values = unpacked(clients.brush(encoded(painted))).reshape(*painted.shape, 4)
        assert (values == painted[..., None] * 255).all()

    def test_label_studio_decodes_the_brush(self) -> None:
        brush = brush_module()
        wide = np.zeros((300, 400), np.uint8)  # runs above 2 ** 16 values
        wide[200:, 100:] = 1
        for mask in [*network_masks(), encoded(PARTS), encoded(EMPTY), encoded(FULL), encoded(DOT), encoded(wide)]:
            decoded = brush.decode_rle(clients.brush(mask).tolist()).reshape(*mask["size"], 4)
            assert (decoded == decode(mask)[..., None] * 255).all()

    def test_the_documented_configuration_accepts_the_prediction(self) -> None:
        reason = 'label-studio-sdk is not installed: pip install -e ".[clients]"'
        interface = pytest.importorskip("label_studio_sdk.label_interface", reason=reason)
        config = next(code for kind, code in BLOCKS if kind == "xml")
        for ours, theirs in (("person", "cat"), ("left_eye", "tail")):
            config = config.replace(f'<Label value="{ours}"/>', f'<Label value="{theirs}"/><Label value="dog"/>')
        checked = interface.LabelInterface(config)
        (prediction,) = json.loads(clients.to_labelstudio(found(network_masks())))["predictions"]
        assert checked.validate_prediction(prediction), checked.validate_prediction(prediction, return_errors=True)
        assert prediction["model_version"] == "pets 2"

    def test_positions_are_per_cent(self) -> None:
        given_to = found(None)
        (prediction,) = json.loads(clients.to_labelstudio(given_to))["predictions"]
        boxes = [region for region in prediction["result"] if region["type"] == "rectanglelabels"]
        points = [region for region in prediction["result"] if region["type"] == "keypointlabels"]
        assert [region["value"]["keypointlabels"] for region in points] == [["nose"]] * 3  # tails are not seen
        for region, box in zip(boxes, given_to.detections.boxes, strict=True):
            value = region["value"]
            x, y = value["x"] * WIDTH / 100, value["y"] * HEIGHT / 100
            corner = x + value["width"] * WIDTH / 100, y + value["height"] * HEIGHT / 100
            np.testing.assert_allclose([x, y, *corner], box, atol=0.02)
        assert [point["parentID"] for point in points] == [region["id"] for region in boxes]


def cvat_pixels(mask: list[int]) -> np.ndarray:
    """As CVAT's functions fill it (`serverless`, to_cvat_mask), the other way round."""
    left, top, right, bottom = mask[-4:]
    painted = EMPTY.copy()
    painted[top : bottom + 1, left : right + 1] = np.reshape(mask[:-4], (bottom - top + 1, right - left + 1))
    return painted


class TestCvat:
    def test_masks_and_polygons(self) -> None:
        masks = [*network_masks(), encoded(PARTS), encoded(FULL), encoded(DOT)]
        shapes = [shape for shape in json.loads(clients.to_cvat(found(masks))) if shape["type"] != "skeleton"]
        for shape, mask in zip(shapes, masks, strict=True):
            assert shape["type"] == "mask"
            assert (cvat_pixels(shape["mask"]) == decode(mask)).all()
            assert len(shape["points"]) >= 6
        assert [shape["label"] for shape in shapes] == ["cat", "dog"] * 3
        assert [float(shape["confidence"]) for shape in shapes][0] == 0.95
        assert all(isinstance(shape["confidence"], str) for shape in shapes)

    def test_without_masks_shapes_are_rectangles(self) -> None:
        for masks in (None, [encoded(EMPTY)] * 3):
            shapes = json.loads(clients.to_cvat(found(masks)))
            assert [shape["type"] for shape in shapes] == ["rectangle", "skeleton"] * 3
            assert shapes[0]["points"] == [3.3, 4.4, 60.5, 70.6]

    def test_skeletons(self) -> None:
        skeleton = json.loads(clients.to_cvat(found(None)))[1]
        assert skeleton["label"] == "cat_skeleton"
        assert [(element["label"], element["outside"]) for element in skeleton["elements"]] == [
            ("nose", 0),
            ("tail", 1),
        ]
        assert skeleton["elements"][0]["points"] == [5.55, 6.65]
