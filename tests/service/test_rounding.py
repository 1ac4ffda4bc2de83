"""What OpenVINO rounds under bfloat16, on the graphs of the person bundle."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.bundle import Bundle
from service.engines import open_engine, verify_golden
from service.errors import BundleError, EngineMismatch

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset15")
rounding = pytest.importorskip("service.engines.rounding")

PERSON = Path(__file__).parents[2] / "bundles" / "person" / "1"
STAGES = ("detect", "masks", "keypoints")
CORE = openvino.Core()
needs_bfloat16 = pytest.mark.skipif(
    "BF16" not in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this CPU has no bfloat16 instructions"
)


def compiled(stage: str, precision: str, prepared: bool) -> openvino.CompiledModel:
    model = CORE.read_model(PERSON / f"{stage}.onnx")
    if prepared:
        rounding.prepare(model)
    return CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1})


def example(stage: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if stage == "detect":
        coarse = rng.integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
        return {"images": coarse.repeat(8, 1).repeat(8, 2), "sizes": np.array([[96, 128], [80, 100]])}
    channels = Bundle.read(PERSON).manifest.stages["detect"].outputs[-1].shape[1]
    offered = {f"p{i}": rng.standard_normal((2, channels, 128 >> i, 192 >> i), dtype=np.float32) for i in range(2, 6)}
    rois = np.array([[0, 3.3, 5.1, 40.2, 60.7], [1, 0, 0, 190.9, 127.6], [1, 80.1, 33.3, 97.4, 52.5]], np.float32)
    return offered | {"rois": rois} | ({"labels": np.zeros(3, np.int64)} if stage == "masks" else {})


def answer(model: openvino.CompiledModel, stage: str) -> dict[str, np.ndarray]:
    names = {port.get_any_name() for port in model.inputs}
    found = model({name: value for name, value in example(stage).items() if name in names})
    return {port.get_any_name(): found[port] for port in model.outputs if port.names}


@needs_bfloat16
@pytest.mark.parametrize("stage", STAGES)
def test_layers_are_rounded_and_boxes_are_not(stage):
    assert rounding.rounded(compiled(stage, "bf16", prepared=False)), "the check sees nothing"
    model = compiled(stage, "bf16", prepared=True)
    assert rounding.rounded(model) == []
    kinds = Counter()
    for node in model.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kinds[info["layerType"].value, info["runtimePrecision"].value] += 1
    assert kinds["Convolution", "bf16"] > kinds["Convolution", "f32"] == 0
    assert kinds["ROIAlign", "f32"] > kinds["ROIAlign", "bf16"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_preparing_changes_no_value(stage):
    plain, prepared = (answer(compiled(stage, "f32", change), stage) for change in (False, True))
    assert plain.keys() == prepared.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(prepared[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


@needs_bfloat16
def test_it_is_closer_to_float32_than_the_hint_alone():
    """Biases and heatmaps, too: half the error remains, that of the layers themselves."""
    for stage, name in (("detect", "p2"), ("keypoints", "heatmaps")):
        exact = answer(compiled(stage, "f32", False), stage)[name]
        hinted, prepared = (
            float(np.sqrt(np.square(answer(compiled(stage, "bf16", change), stage)[name] - exact).mean()))
            for change in (False, True)
        )
        assert 0 < prepared < 0.8 * hinted


@needs_bfloat16
def test_the_person_bundle_meets_the_golden_check_in_bfloat16():
    """Its first layers stay in float32, as its manifest says: rounded, they alone move boxes by a dozen pixels."""
    bundle = Bundle.read(PERSON)
    bare = replace(bundle, manifest=bundle.manifest.model_copy(update={"compression": {}}))
    for each, agrees in ((bundle, True), (bare, False)):
        engine = open_engine(each, "openvino", threads=1, precision="bfloat16").engine
        try:
            with nullcontext() if agrees else pytest.raises(EngineMismatch):
                verify_golden(engine, each)
        finally:
            engine.close()


def test_a_divided_graph_gives_what_the_whole_one_gives():
    until = Bundle.read(PERSON).manifest.compression["bfloat16"]["float32_until"]
    whole = answer(compiled("detect", "f32", prepared=False), "detect")
    first, rest = (
        CORE.compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
        for part in rounding.divided(CORE.read_model(PERSON / "detect.onnx"), until)
    )
    offered = example("detect")
    offered |= {until: first(offered)[0]}
    found = rest(offered)
    names = {port.get_any_name() for port in rest.outputs if port.names}
    assert names == whole.keys()
    for port in rest.outputs:
        name = port.get_any_name()
        np.testing.assert_allclose(found[port], whole[name], rtol=1e-4, atol=1e-4 * np.abs(whole[name]).max())


def test_a_tensor_that_is_not_in_the_graph_is_told():
    bundle = Bundle.read(PERSON)
    compression = {"bfloat16": {"float32_until": "nothing"}}
    wrong = replace(bundle, manifest=bundle.manifest.model_copy(update={"compression": compression}))
    if "BF16" not in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16 instructions")
    with pytest.raises(BundleError, match="no tensor 'nothing'"):
        open_engine(wrong, "openvino", precision="bfloat16")


def pooled_by_roi_pool() -> openvino.Model:
    """RoIs that layers compute, RoIPool of a layer's map, and a layer behind it."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> openvino.Node:
        return op.constant(rng.standard_normal(shape).astype(np.float32))

    images, boxes = op.parameter([1, 3, 16, 16], np.float32, "images"), op.parameter([5, 8], np.float32, "boxes")
    features = op.relu(op.convolution(images, weights(4, 3, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]))
    corners = op.multiply(op.abs(op.matmul(boxes, weights(8, 4), False, False)), op.constant(np.float32(37.3)))
    rois = op.concat([op.constant(np.zeros((5, 1), np.float32)), corners], 1)
    pooled = op.roi_pooling(features, rois, [2, 2], 0.0625, "max")
    scores = op.matmul(op.reshape(pooled, op.constant(np.array([5, 16])), False), weights(16, 3), False, False)
    return openvino.Model([op.result(scores)], [images, boxes])


@needs_bfloat16
def test_that_roi_pool_rounds_its_rois_is_seen() -> None:
    """The plugin's RoIPool is itself a layer in bfloat16, its RoIs with it: the engine must refuse such a graph."""
    model = pooled_by_roi_pool()
    rounding.prepare(model)
    hint = {"INFERENCE_PRECISION_HINT": "bf16"}
    assert any("ROIPooling" in name for name in rounding.rounded(CORE.compile_model(model, "CPU", hint)))
