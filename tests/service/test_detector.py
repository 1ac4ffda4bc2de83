import time

import numpy as np
import pytest

from service.bundle import Bundle
from service.detector import Detector, Wants
from service.encoded import Encoded, Given
from service.errors import BrokenImage, ServiceError
from service.images import DecodeLimits, decode, fit
from tests.service.toy import J, ToyEngine, picture
from tests.service.toy import encoded as as_file


@pytest.fixture
def detector(bundles, engine) -> Detector:
    return Detector(Bundle.read(bundles / "toy" / "1"), engine)


def test_heads_run_once_on_the_union_of_what_is_wanted(detector, engine: ToyEngine):
    canvases = [fit(picture(red=red), detector.bundle.manifest.canvas) for red in (250, 250, 0, 250)]
    wants = [
        Wants(confidence=0.5),  # 3 detections, both heads
        Wants(confidence=0.0, masks="none"),  # 4, keypoints alone
        Wants(confidence=0.0),  # finds nothing
        Wants(confidence=0.0, max_detections=1, keypoints=False),  # 1, masks alone
    ]
    raws = detector.run(canvases, wants)
    assert engine.batches == [4]
    assert engine.rois == {"masks": [3 + 1], "keypoints": [3 + 4]}
    assert [len(raw.scores) for raw in raws] == [3, 4, 0, 1]
    found = [detector.finish(raw) for raw in raws]
    assert [None if one.masks is None else len(one.masks) for one in found] == [3, None, 0, 1]
    assert [None if one.keypoints is None else one.keypoints.shape for one in found] == [
        (3, J, 3),
        (4, J, 3),
        (0, J, 3),
        None,
    ]


def encoded(data: bytes) -> Given:
    return Encoded(data, DecodeLimits(), (64, 96), (64, 96), (64, 96))


def test_pictures_may_come_encoded_and_one_that_is_broken_fails_alone(detector, engine: ToyEngine):
    file, canvas = as_file(picture(), "JPEG"), fit(picture(seed=1), detector.bundle.manifest.canvas)
    wants = [Wants(), Wants(max_detections=1), Wants(max_detections=2)]
    first, broken, last = detector.answer([encoded(file), encoded(file[:300]), canvas], wants)
    assert engine.batches == [2]
    assert isinstance(broken, BrokenImage)
    assert not isinstance(first, ServiceError)
    assert not isinstance(last, ServiceError)
    decoded = fit(decode(file, DecodeLimits()), detector.bundle.manifest.canvas)
    (alone,) = detector.run([decoded], [wants[0]])
    assert (first.boxes_canvas == alone.boxes_canvas).all()
    assert len(last.scores) == 2
    assert {"decode", "fit"} < first.timings_ms.keys()
    assert "decode" not in last.timings_ms


def test_without_any_picture_left_nothing_runs(detector, engine: ToyEngine):
    (broken,) = detector.answer([encoded(b"no picture")], [Wants()])
    assert isinstance(broken, ServiceError)
    assert engine.batches == []


def test_nothing_wanted_runs_no_head(detector, engine: ToyEngine):
    detector.detect_image(picture(), Wants(masks="none", keypoints=False))
    detector.detect_image(picture(red=0), Wants())
    assert engine.rois == {"masks": [], "keypoints": []}


def test_canvas_becomes_image_per_axis(detector):
    image = picture(135, 199)  # on the canvas 64 x 94, so both axes round differently
    canvas = fit(image, detector.bundle.manifest.canvas)
    assert canvas.size == (64, 94)
    found = detector.detect_image(image, Wants(confidence=0.0))
    np.testing.assert_allclose(found.boxes[0], [0, 0, 99.5, 67.5], rtol=1e-6)
    np.testing.assert_allclose(found.boxes[1], [49.75, 33.75, 199, 135], rtol=1e-6)
    assert found.masks is not None
    assert found.masks[0]["size"] == [135, 199]
    assert found.keypoints is not None
    # Heatmap cell (row 10, column 20) of the first box's 56 x 56, at its centre.
    x, y = found.keypoints[0, 0, :2]
    assert abs(x - 20.5 / 56 * 99.5) < 2
    assert abs(y - 10.5 / 56 * 67.5) < 2


def test_images_of_many_shapes_come_back_in_order(detector, engine: ToyEngine):
    shapes = [(64, 96), (96, 64), (64, 96), (50, 50), (96, 64)]
    images = [picture(*shape, seed=index) for index, shape in enumerate(shapes)]
    found = detector.detect_images(images)
    assert [(one.height, one.width) for one in found] == shapes
    assert sorted(engine.batches) == [1, 2, 2]
    assert detector.detect_images([]) == []


def test_canvases_of_several_shapes_are_padded_to_one(detector, engine: ToyEngine):
    shapes = [(64, 96), (96, 64), (50, 50)]
    canvases = [fit(picture(*shape, seed=index), detector.bundle.manifest.canvas) for index, shape in enumerate(shapes)]
    assert len({canvas.shape for canvas in canvases}) > 1
    wants = Wants(confidence=0.0, masks="none", keypoints=False)
    together = [detector.finish(raw) for raw in detector.run(canvases, [wants] * 3)]
    assert engine.batches == [3]
    for canvas, found in zip(canvases, together, strict=True):
        alone = detector.finish(detector.run([canvas], [wants])[0])
        np.testing.assert_array_equal(found.boxes, alone.boxes)
        np.testing.assert_array_equal(found.scores, alone.scores)


def test_a_head_without_time_is_left_out_where_that_is_allowed(detector, engine: ToyEngine):
    canvas = fit(picture(), detector.bundle.manifest.canvas)
    now = time.monotonic()
    patient = Wants(deadline_s=now + 60, allow_partial=True)
    assert detector.run([canvas], [patient])[0].partial == ()
    assert set(detector._roi_ms) == {"masks", "keypoints"}
    detector._roi_ms["masks"] = 50_000.0  # a RoI
    hurried = [patient, Wants(deadline_s=now + 60), Wants(deadline_s=now + 60, allow_partial=True, masks="none")]
    raws = detector.run([canvas] * 3, hurried)
    assert [raw.partial for raw in raws] == [("masks",), (), ()]
    found = [detector.finish(raw) for raw in raws]
    assert [one.masks is None for one in found] == [True, False, True]
    assert all(one.keypoints is not None for one in found)
    assert found[0].partial == ("masks",)
    assert engine.rois["masks"] == [3, 3], "once for the first batch, then for the one that insists"
    # What was measured is forgotten bit by bit, so that one slow batch does not shut the head out for ever.
    assert detector._roi_ms["masks"] < 45_000
