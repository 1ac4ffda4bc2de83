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


def test_tensorrt_takes_the_plugins(told: dict) -> None:
    assert told["attributes"] == {
        "limner::NmsGroups": ["iou", "threshold", "size", "keep"],
        "limner::NmsMerge": ["iou", "threshold", "size", "keep"],
        "limner::PyramidRoiAlign": ["size", "sampling", "aligned", "canonical", "stride", "channels"],
        "limner::ShortPyramidRoiAlign": ["size", "sampling", "aligned", "canonical", "stride", "channels"],
        "limner::MapRoiAlign": ["size", "sampling", "aligned", "canonical", "stride", "channels"],
        "limner::MapRoiPool": ["size", "canonical", "stride", "channels"],
    }


def test_outputs_are_of_fixed_rank_and_type(told: dict) -> None:
    assert told["nms"] == [["INT32", 3], ["FLOAT", 3], ["INT32", 2]]
    assert told["merged"] == [["INT32", 2], ["INT32", 1]]
    assert told["roi_align"] == told["short"] == [["HALF", 4]]
    assert told["on_map"] == [["HALF", 4], ["HALF", 4]]


def test_coordinates_and_scores_are_float32_whatever_the_features_are(told: dict) -> None:
    assert told["nms_types"] == [["FLOAT", "FLOAT", "INT32", "FLOAT", "INT32"]]
    assert told["roi_align_types"] == [[*[kind] * 4, "FLOAT", kind] for kind in ("FLOAT", "HALF", "BF16")]
    assert told["short_types"] == [[*[kind] * 3, "FLOAT", kind] for kind in ("FLOAT", "HALF", "BF16")]
    assert told["map_types"] == told["pool_types"] == [[kind, "FLOAT", kind] for kind in ("FLOAT", "HALF", "BF16")]


def test_kernels_take_as_many_pointers_and_numbers_as_tensorrt_passes(told: dict) -> None:
    """Inputs and outputs, then the launch's numbers: kernel, pointers and numbers in its PTX, numbers in the launch."""
    assert told["built"] == [
        ["limner_nms_groups", 5, 2, 2], ["limner_nms_merge", 5, 3, 3], ["limner_roi_align", 6, 10, 10],
        ["limner_roi_align", 5, 8, 8], ["limner_roi_align", 3, 4, 4], ["limner_roi_pool", 3, 4, 4],
    ]  # fmt: skip


def test_the_bindings_have_what_export_and_engine_use(told: dict) -> None:
    assert all(told["has"]), told
