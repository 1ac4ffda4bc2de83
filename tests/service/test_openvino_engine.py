from pathlib import Path

import numpy as np
import pytest

from service.bundle import Bundle
from service.engines import open_engine

openvino = pytest.importorskip("openvino")
engine = pytest.importorskip("service.engines.openvino")

from tests.service.test_rounding import CORE, PERSON, answer, needs_bfloat16  # noqa: E402


def test_biases_in_eight_bits_are_added_by_the_convolutions():
    file = Bundle.read(PERSON).stage_file("detect", "int8")
    steps, answers = [], []
    for folded in (False, True):
        model = CORE.read_model(file)
        ops = [node for node in model.get_ordered_ops() if node.get_type_name() == "Add"]
        biases = {
            node.get_friendly_name() for node in ops if node.input_value(0).get_node().get_type_name() == "Convolution"
        }
        if folded:
            engine.fold_biases(model)
        compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
        nodes = compiled.get_runtime_model().get_ordered_ops()
        steps.append(biases & {n.get_friendly_name() for n in nodes if n.get_rt_info()["layerType"].value == "Eltwise"})
        answers.append(answer(compiled, "detect"))
    assert len(steps[0]) > len(steps[1]) == 0
    for name, value in answers[0].items():
        np.testing.assert_allclose(answers[1][name], value, rtol=1e-6, atol=1e-6 * np.abs(value).max(), err_msg=name)


@needs_bfloat16
@pytest.mark.parametrize(("capabilities", "rewritten"), [([], True), (["FP16"], False)])
def test_transforms_rows_where_products_are_dear(bundles: Path, monkeypatch, capabilities, rewritten):
    """A processor with AMX, by what OpenVINO tells of it, multiplies faster than it transforms."""
    found = []
    monkeypatch.setattr(engine, "_capabilities", lambda core: ["BF16", "WINOGRAD", *capabilities])
    monkeypatch.setattr(engine.winograd_rows, "rewrite", lambda model, multiple: found.append(multiple))
    bundle = Bundle.read(bundles / "toy" / "1")
    open_engine(bundle, "openvino", threads=1, precision="bfloat16").engine.close()
    assert set(found) == ({bundle.manifest.canvas.multiple} if rewritten else set())
