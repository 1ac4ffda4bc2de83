import json
import os

import numpy as np
import pytest

from service.bundle import Bundle, CanvasRule
from service.errors import BundleError
from tests.service.toy import write_bundle


def rewrite(directory, **changes):
    path = directory / "manifest.json"
    document = json.loads(path.read_text())
    for dotted, value in changes.items():
        target = document
        *parents, last = dotted.split("__")
        for parent in parents:
            target = target[int(parent)] if parent.isdigit() else target[parent]
        target[last] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 2}, "has format 2, this limner reads up to 1: install a newer limner"),
        ({"format": 0}, "never existed"),
        ({"format": "x"}, "not a manifest"),
        ({"classes": []}, "classes"),
        ({"classes": ["a", "a"]}, "same name"),
        ({"name": "../evil"}, "name"),
        ({"surprise": 1}, "surprise"),
        ({"keypoints": None}, "keypoint names go together"),
        ({"keypoints__flips": [0, 0]}, "permutation"),
        ({"keypoints__skeleton": [[0, 2]]}, "skeleton"),
        ({"stages__detect__file": "other.onnx"}, "does not list"),
        ({"limits__max_canvas_pixels": 100}, "max_canvas_pixels is 100"),
        ({"artifacts__0__sha256": "0" * 64}, "differs from the manifest's sha256"),
        ({"artifacts__0__file": "../../../secret", "stages__detect__file": "../../../secret"}, "outside the bundle"),
        ({"artifacts__0__file": "gone.onnx", "stages__detect__file": "gone.onnx"}, "is missing"),
    ],
)
def test_a_wrong_manifest_is_refused_in_words(tmp_path, changes, told):
    directory = write_bundle(tmp_path / "in")
    (tmp_path / "secret").write_text("x")
    rewrite(directory, **changes)
    with pytest.raises(BundleError, match=told):
        Bundle.read(directory)


def test_links_do_not_lead_outside(tmp_path):
    directory = write_bundle(tmp_path / "in")
    outside = tmp_path / "outside.onnx"
    (directory / "detect.onnx").rename(outside)
    os.symlink(outside, directory / "detect.onnx")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.read(directory)


def test_missing_or_torn_manifest(tmp_path):
    with pytest.raises(BundleError, match="is missing"):
        Bundle.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "na')
    with pytest.raises(BundleError, match="not a manifest"):
        Bundle.read(tmp_path)


def test_golden_refuses_pickle_absence_and_gaps(tmp_path):
    directory = write_bundle(tmp_path)
    bundle = Bundle.read(directory)
    assert bundle.golden()["images"].dtype == np.uint8
    path = directory / "golden.npz"
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.golden()
    np.savez(path, images=np.zeros(1))
    with pytest.raises(BundleError, match="lacks boxes, count, heatmaps"):
        bundle.golden()
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.golden()
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        bundle.golden()


def test_largest_canvas():
    assert CanvasRule(short_side=800, long_side=1333).max_pixels() == 800 * 1344
