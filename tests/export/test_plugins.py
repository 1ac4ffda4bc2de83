"""The TensorRT plugins as far as they go without TensorRT's libraries: what its decorators check, what they declare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export import stub_tensorrt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict:
    if why := stub_tensorrt.missing():
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("stubs")
    stub_tensorrt.make(directory)
    path = os.pathsep.join([str(directory), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("plugins_under_stubs.py"))]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_tensorrt_takes_both_plugins(told: dict) -> None:
    assert told["attributes"] == {
        "limner::Nms": ["iou", "threshold", "keep"],
        "limner::PyramidRoiAlign": ["size", "sampling", "aligned", "canonical"],
    }


def test_outputs_are_of_fixed_rank_and_type(told: dict) -> None:
    assert told["nms"] == [["INT32", 2], ["INT32", 1]]
    assert told["roi_align"] == [["HALF", 4]]


def test_coordinates_and_scores_are_float32_whatever_the_features_are(told: dict) -> None:
    assert told["nms_types"] == [["FLOAT", "FLOAT", "INT32", "INT32"]]
    assert told["roi_align_types"] == [["FLOAT", *[kind] * 5] for kind in ("FLOAT", "HALF", "BF16")]


def test_thresholds_and_types_are_compiled_in_and_sizes_are_passed(told: dict) -> None:
    assert told["asked"] == [
        ["nms", "sm_90", {"IOU": "0.5f", "THRESHOLD": "0.05f"}],
        ["roi_align", "sm_90", {"ELEMENT": "float16", "SIZE": 7, "SAMPLING": 2, "ALIGNED": 0, "CANONICAL": 224}],
    ]
    assert told["built"] == [["nms", ".version 9.0", 3], ["roi_align", ".version 9.0", 10]]


def test_the_bindings_have_what_export_and_engine_use(told: dict) -> None:
    assert all(told["has"]), told
