"""INT8: which parts go back to float32, what the graphs and the manifest hold, what is refused, and what serves."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image

from export import quantize, quantized_graph, to_onnx, verify
from export.quantize import Verdict
from models import checkpoint
from service.bundle import INT8_GOLDEN, Artifact, Bundle, BundleError, file_sha256, write_manifest
from service.engines import open_engine, verify_golden
from service.errors import EngineMismatch, EngineUnavailable
from tests.models import tiny
from tests.service.toy import write_bundle

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
needs_nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="nncf: pip install -e '.[quantize]'")
PARTS = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.mark.parametrize(
    ("harmful", "kept"),
    [([], []), (["c"], ["c"]), (["f", "b"], ["b", "f"]), (["a", "d", "h"], ["a", "d", "h"])],
)
def test_the_harmful_parts_go_back_to_float32_and_no_others(harmful: list[str], kept: list[str]) -> None:
    """Each harmful part that is left in int8 costs; the others cost next to nothing."""

    def distance(released: Sequence[str]) -> float:
        return sum(1.0 for part in harmful if part not in released) + 0.01 * (len(PARTS) - len(released))

    def judge(released: Sequence[str]) -> Verdict:
        left = [part for part in harmful if part not in released]
        return Verdict(list(released), {}, failed=[f"{part} costs too much" for part in left])

    verdict = quantize.choose(PARTS, distance, judge)
    assert verdict.failed == []
    assert sorted(verdict.released) == kept


def test_where_half_of_the_parts_is_not_enough_it_says_what_failed() -> None:
    tried: list[int] = []

    def judge(released: Sequence[str]) -> Verdict:
        tried.append(len(released))
        return Verdict(list(released), {}, failed=["AP falls"])

    verdict = quantize.choose(PARTS, lambda released: 0.0, judge)
    assert verdict.failed == ["AP falls"]
    assert max(tried) == 4


def small_graphs() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Two matrix products with a Relu between; and the same in eight bits, with another bias, as NNCF leaves it."""
    rng = np.random.default_rng(0)
    weights = {f"model.{part}.weight": rng.normal(size=(4, 4)).astype(np.float32) for part in ("head.one", "head.two")}
    bias = {"model.head.one.bias": np.zeros(4, np.float32)}

    def graph(nodes: list[onnx.NodeProto], values: dict[str, np.ndarray]) -> onnx.ModelProto:
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 4]) for name in ("x", "y")]
        kept = [numpy_helper.from_array(value, name) for name, value in values.items()]
        made = helper.make_graph(nodes, "g", ports[:1], ports[1:], kept)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])

    one, two = weights
    original = [
        helper.make_node("Gemm", ["x", one, "model.head.one.bias"], ["hidden"], "first"),
        helper.make_node("Relu", ["hidden"], ["positive"], "relu"),
        helper.make_node("MatMul", ["positive", two], ["y"], "second"),
    ]
    changed, values = [], {"model.head.one.bias": np.full(4, 0.01, np.float32)}
    values |= {"scale": np.float32(0.1), "zero": np.uint8(128), "zero8": np.int8(0)}
    for name, source in (("x", "x"), ("positive", "positive")):
        changed.append(helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"q_{name}"], f"q_{name}"))
        changed.append(
            helper.make_node("DequantizeLinear", [f"q_{name}", "scale", "zero"], [f"dq_{name}"], f"d_{name}")
        )
    for name, value in weights.items():
        values[f"q_{name}"] = np.clip(np.round(value / 0.1), -128, 127).astype(np.int8)
        changed.append(
            helper.make_node("DequantizeLinear", [f"q_{name}", "scale", "zero8"], [f"dq_{name}"], f"d_{name}")
        )
    changed += [
        helper.make_node("Gemm", ["dq_x", f"dq_{one}", "model.head.one.bias"], ["hidden"], "first"),
        original[1],
        helper.make_node("MatMul", ["dq_positive", f"dq_{two}"], ["y"], "second"),
    ]
    order = [changed[i] for i in (0, 1, 4, 5, 6, 7, 2, 3, 8)]
    return graph(original, {**weights, **bias}), graph(order, values)


def run(graph: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(graph)
    rows = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    (answer,) = ReferenceEvaluator(graph).run(None, {"x": rows})
    return answer


def test_a_released_layer_is_the_original_with_its_bias() -> None:
    original, quantized = small_graphs()
    wanted, rounded = run(original), run(quantized)
    everything = quantized_graph.release(quantized, original, ["first", "second"])
    np.testing.assert_array_equal(run(everything), wanted)
    assert not quantized_graph.is_quantized(everything)
    partly = quantized_graph.release(quantized, original, ["first"])
    assert quantized_graph.is_quantized(partly)
    assert 0 < np.abs(run(partly) - wanted).max() < np.abs(rounded - wanted).max()
    np.testing.assert_array_equal(run(quantized), rounded)  # the one it came from is as it was


def moved_graph(shared: bool = False) -> onnx.ModelProto:
    """Two values joined, picked from and reshaped, then in eight bits into a product; `shared`: something else reads
    what is joined.
    """
    rng = np.random.default_rng(0)
    values = {
        "weight": rng.normal(size=(4, 2)).astype(np.float32),
        "rows": np.array([2, 0, 1, 3]),
        "shape": np.array([-1, 4]),
        "scale": np.float32(0.02),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["one"], "relu"),
        helper.make_node("Neg", ["x"], ["two"], "neg"),
        helper.make_node("Concat", ["one", "two"], ["joined"], "join", axis=0),
        helper.make_node("Gather", ["joined", "rows"], ["picked"], "pick", axis=0),
        helper.make_node("Reshape", ["picked", "shape"], ["flat"], "reshape"),
        helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "d"),
        helper.make_node("MatMul", ["dq", "weight"], ["y"], "product"),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [3, 4]), ("y", [4, 2]), ("joined", [6, 4]))
    ]
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    made = helper.make_graph(nodes, "g", ports[:1], ports[1:] if shared else ports[1:2], kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])


def test_what_is_only_moved_is_in_eight_bits_before_it_is_moved() -> None:
    before = moved_graph()
    after = quantized_graph.quantize_early(before)
    np.testing.assert_array_equal(run(after), run(before))
    makers = {output: node for node in after.graph.node for output in node.output}
    (join,) = (node for node in after.graph.node if node.op_type == "Concat")
    assert [makers[name].op_type for name in join.input] == ["DequantizeLinear"] * 2
    (product,) = (node for node in after.graph.node if node.op_type == "MatMul")
    assert makers[product.input[0]].op_type == "Reshape"
    shared = quantized_graph.quantize_early(moved_graph(shared=True))
    (down,) = (node for node in shared.graph.node if node.op_type == "QuantizeLinear")
    assert down.input[0] == "joined"


def test_every_convolution_in_eight_bits_has_a_bias() -> None:
    rng = np.random.default_rng(0)
    scale, zero = numpy_helper.from_array(np.float32(0.02), "scale"), numpy_helper.from_array(np.int8(0), "zero")
    weights = {"eight": (6, 4, 3, 3), "up": (6, 2, 2, 2)}
    kept = [numpy_helper.from_array(rng.integers(-9, 9, shape, np.int8), name) for name, shape in weights.items()]
    kept.append(numpy_helper.from_array(rng.normal(size=(4, 4, 1, 1)).astype(np.float32), "float"))
    nodes = [
        *(
            helper.make_node("DequantizeLinear", [name, "scale", "zero"], [f"{name}.w"], f"{name}.w")
            for name in weights
        ),
        helper.make_node("Conv", ["x", "eight.w"], ["a"], "first"),
        helper.make_node("ConvTranspose", ["a", "up.w"], ["b"], "second", group=2, strides=[2, 2]),
        helper.make_node("Conv", ["b", "float"], ["y"], "third"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4, "h", "w"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [*kept, scale, zero])
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    after = quantized_graph.biased(before)
    biases = {weight.name: list(weight.dims) for weight in after.graph.initializer if weight.name.endswith("/bias")}
    assert biases == {"first/bias": [6], "second/bias": [4]}
    assert [list(node.input[2:]) for node in after.graph.node if node.name == "third"] == [[]]
    pixels = {"x": rng.normal(size=(2, 4, 6, 5)).astype(np.float32)}
    wanted, found = (
        onnxruntime.InferenceSession(each.SerializeToString()).run(None, pixels)[0] for each in (before, after)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


def pyramid_graph() -> onnx.ModelProto:
    """The end of a pyramid as it is exported: p3 enlarged to the shape of the layer that it is added to, and that shape
    read again elsewhere.
    """
    rng = np.random.default_rng(0)
    values = {f"{name}.weight": rng.normal(size=(2, 2, 1, 1)).astype(np.float32) for name in ("inner", "outer", "top")}
    nodes = [
        helper.make_node("Conv", ["x", "inner.weight"], ["lateral"], "inner"),
        helper.make_node("MaxPool", ["x"], ["small"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["small", "top.weight"], ["p3"], "top"),
        helper.make_node("Shape", ["lateral"], ["size"], "size", start=2),
        helper.make_node("Shape", ["p3"], ["counts"], "counts", start=0, end=2),
        helper.make_node("Concat", ["counts", "size"], ["sizes"], "sizes", axis=0),
        helper.make_node(
            "Resize", ["p3", "", "", "sizes"], ["large"], "resize", mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
        helper.make_node("Add", ["lateral", "large"], ["sum"], "add"),
        helper.make_node("Conv", ["sum", "outer.weight"], ["p2"], "outer"),
        helper.make_node("Cast", ["size"], ["y"], "told", to=TensorProto.INT64),
    ]  # fmt: skip
    ports = {"x": ["B", 2, "h", "w"], "p2": ["B", 2, "h", "w"], "p3": ["B", 2, "g", "v"]}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports.items()]
    told = helper.make_tensor_value_info("y", TensorProto.INT64, [2])
    kept = [numpy_helper.from_array(value, name) for name, value in values.items()]
    made = helper.make_graph(nodes, "g", infos[:1], [*infos[1:], told], kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_shapes_are_read_off_the_pyramid_alone() -> None:
    before = pyramid_graph()
    after = quantized_graph.sized(before)
    onnx.checker.check_model(after, full_check=True)
    pixels = np.random.default_rng(1).normal(size=(2, 2, 8, 12)).astype(np.float32)
    wanted, found = (
        onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"x": pixels}) for graph in (before, after)
    )
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(one, other)
    read = {node.input[0] for node in after.graph.node if node.op_type == "Shape"}
    assert read == {"p2"}


def test_parts_are_named_by_their_weights() -> None:
    original, _ = small_graphs()
    assert quantized_graph.groups(original) == {"head.one": ["first"], "head.two": ["second"]}
    assert quantized_graph.off_limits(original) == {"relu"}


def test_no_picture_both_sets_scales_and_judges() -> None:
    pictures = [quantize.Picture(name, None) for name in "abcdabcdefgh"]  # type: ignore[arg-type]
    calibration, check = quantize.split(pictures)
    assert {p.sha256 for p in calibration} | {p.sha256 for p in check} == set("abcdefgh")
    assert not {p.sha256 for p in calibration} & {p.sha256 for p in check}
    assert len(check) == 2


@pytest.fixture
def in_int8(tmp_path: Path) -> Path:
    """A toy bundle whose int8 graphs are its float32 ones, but for the mask head, which has none."""
    directory = write_bundle(tmp_path)
    (directory / "int8").mkdir()
    manifest = Bundle.read(directory).manifest
    artifacts = list(manifest.artifacts)
    for name, stage in (("detect.onnx", "detect"), ("golden.npz", None)):
        shutil.copy(directory / name, directory / "int8" / name)
        digest = file_sha256(directory / "int8" / name)
        artifacts.append(Artifact(file=f"int8/{name}", stage=stage, sha256=digest, runtime="onnx", precision="int8"))
    write_manifest(directory, manifest.model_copy(update={"artifacts": artifacts}))
    return directory


@needs_openvino
def test_the_engine_runs_the_int8_graphs_and_is_held_to_their_golden_outputs(in_int8: Path) -> None:
    bundle = Bundle.read(in_int8)
    assert bundle.stage_file("detect", "int8") == in_int8 / "int8" / "detect.onnx"
    assert bundle.stage_file("masks", "int8") == in_int8 / "masks.onnx"
    assert bundle.stage_file("detect") == in_int8 / "detect.onnx"
    opened = open_engine(bundle, "openvino", threads=1, precision="int8")
    assert opened.engine.precision == "int8"
    assert verify_golden(opened.engine, bundle).num_matched > 0
    arrays = dict(bundle.golden(INT8_GOLDEN))
    arrays["boxes"] = arrays["boxes"] + 5
    np.savez(in_int8 / INT8_GOLDEN, **arrays)
    with pytest.raises(EngineMismatch, match="int8"):
        verify_golden(opened.engine, bundle)
    opened.engine.close()
    plain = open_engine(bundle, "openvino", threads=1).engine
    assert verify_golden(plain, bundle).num_matched > 0
    plain.close()


def test_int8_is_never_chosen_silently(in_int8: Path, tmp_path: Path) -> None:
    opened = open_engine(Bundle.read(in_int8), "auto", threads=1)
    assert opened.engine.precision == "float32"
    opened.engine.close()
    plain = Bundle.read(write_bundle(tmp_path, version="2"))
    with pytest.raises(EngineUnavailable, match="limner export int8"):
        open_engine(plain, "auto", threads=1, precision="int8")


def test_an_altered_int8_graph_is_refused(in_int8: Path) -> None:
    (in_int8 / "int8" / "detect.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="int8/detect.onnx differs from the manifest's sha256"):
        Bundle.read(in_int8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pictures", "{few}"], "1 .jpg, .png or .webp in it, at least 4 needed"),
        (["--pictures", "{few}", "--out", "{few}/other/1"], "its directories must be, too"),
        (["--pictures", "{few}/none"], "none"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, capsys, monkeypatch, given, message) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    directory, few = write_bundle(tmp_path), tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (90, 60)).save(few / "one.png")
    assert quantize.main([str(directory), *(text.format(few=few) for text in given)]) == 2
    assert message in capsys.readouterr().err
    assert not (directory / "int8").exists()


def test_without_nncf_it_says_what_to_install(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quantize.main([str(write_bundle(tmp_path)), "--pictures", str(tmp_path)]) == 2
    assert "[export,quantize]" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle of the tiny model, and pictures."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint.save(folder / "best", *tiny.make("mask_keypoint_rcnn_r50_fpn"))
    out = folder / "bundles" / "tiny" / "1"
    assert to_onnx.main([str(folder / "best"), "--out", str(out), "--engines", "onnx"]) == 0
    (folder / "photos").mkdir()
    for seed in range(8):
        images, _ = tiny.pictures((96, 128), [(96, 128)], seed)
        Image.fromarray(images[0].numpy()).save(folder / "photos" / f"{seed}.png")
    return out, folder / "photos"


@pytest.mark.slow
@needs_nncf
@needs_openvino
def test_the_whole_way_with_a_tiny_model(exported: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch) -> None:
    source, photos = exported
    out = tmp_path / "tiny" / "1"
    before = json.loads((source / "manifest.json").read_text())
    bars = verify.Bars(0.0, 0.0, 0.0, 1.0, 0.0, 100)
    monkeypatch.setitem(verify.BARS, "int8", bars)  # which nothing in int8 can meet
    arguments = [str(source), "--out", str(out), "--pictures", str(photos)]
    assert quantize.main(arguments) == 1
    assert "in int8 is below its bars" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(quantize, "choose", lambda parts, distance, judge: judge([parts[0]]))
    measured: list[str] = []

    def measure(directory: Path, precision: str, *_: object) -> dict[str, float]:
        measured.append(precision)
        return {"bbox": 0.5 if precision == "float32" else 0.4}

    loose = verify.Bars(1e9, 1e9, 1e9, 0.0, 1e9, 95, confident=0.5)
    monkeypatch.setitem(verify.BARS, "int8", loose)
    more = ["--images", str(photos), "--annotations", str(photos)]
    assert quantize.main([*arguments, *more], measure) == 1
    assert "bbox AP falls from 0.5000 to 0.4000" in capsys.readouterr().err
    assert quantize.main([*arguments, *more, "--allow"], measure) == 0
    assert "ALLOWED though below its bar: bbox AP falls" in capsys.readouterr().out
    assert measured == ["float32", "int8"] * 2
    bundle = Bundle.read(out)
    told = bundle.manifest.compression["int8"]
    assert len(told["calibration_sha256"]) == 6
    assert len(told["certificate_sha256"]) == 2
    assert told["parts_in_float32"] == ["backbone.trunk.conv1"]
    assert told["allowed"] == ["bbox AP falls from 0.5000 to 0.4000, by more than 0.003"]
    certificate = bundle.manifest.parity["engines"][-1]
    assert (certificate["engine"], certificate["precision"]) == ("openvino", "int8")
    assert certificate["matched"] > 0
    assert certificate["allowed"] == told["allowed"]
    int8 = {a.file for a in bundle.manifest.artifacts if a.precision == "int8"}
    assert int8 == {"int8/detect.onnx", "int8/masks.onnx", "int8/keypoints.onnx", INT8_GOLDEN}
    assert json.loads((source / "manifest.json").read_text()) == before
    engine = open_engine(bundle, "openvino", precision="int8").engine
    assert verify_golden(engine, bundle).num_unmatched == 0
    engine.close()
