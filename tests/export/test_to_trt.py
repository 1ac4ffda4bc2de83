"""`limner export trt` without a GPU: the graphs, their numbers on a CPU, the bundle around the plans, the refusals."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export import into_bundle, plugins, rebuild, to_trt, trt_build, trt_graphs
from export.half import prepared
from export.to_onnx import write_bundle
from export.verify import TorchReference, match, write_golden
from models import checkpoint
from models.servable import normalise
from service.bundle import Bundle, CanvasRule
from service.engines import open_engine
from service.images import Canvas
from tests.export import cut_runner
from tests.models import tiny
from tests.service import fake_gpu
from tests.service.test_tensorrt_engine import install

NAME = "person_mobilenetv2_fpn"
BUNDLE = Path(__file__).parents[2] / "bundles" / "person" / "1"
CANVAS = trt_graphs.FixedCanvas(96, 160)


def rule_of(spec: checkpoint.Spec) -> CanvasRule:
    return CanvasRule(short_side=spec.canvas.short_side, long_side=spec.canvas.long_side)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory):
    model, _ = tiny.make(NAME)
    half = prepared(model, "float16")
    files = trt_graphs.save_stages(half, [CANVAS], 4, 16, tmp_path_factory.mktemp("graphs"))
    return half, {stage: path for (stage, _), path in files.items()}


def test_graphs_hold_what_tensorrt_takes_and_our_two_nodes(graphs) -> None:
    _, files = graphs
    assert set(files) == {"detect", "masks", "keypoints"}
    for stage, path in files.items():
        graph = onnx.load(path)
        assert trt_graphs.problems(graph) == []
        ours = [node.op_type for node in graph.graph.node if node.domain == "limner"]
        assert ours == (
            ["NmsGroups", "NmsMerge", "PyramidRoiAlign", "NmsGroups", "NmsMerge"]
            if stage == "detect"
            else ["PyramidRoiAlign"]
        )
        kinds = {node.op_type for node in graph.graph.node}
        assert not kinds & {"NonZero", "NonMaxSuppression", "If", "Loop", "Scan", "RoiAlign"}
        types = trt_graphs.value_types(graph)
        assert types["p2"] == TensorProto.FLOAT16
        convolutions = [node for node in graph.graph.node if node.op_type in ("Conv", "ConvTranspose")]
        assert {types[node.input[1]] for node in convolutions} == {TensorProto.FLOAT16}
    outputs = {value.name: value.type.tensor_type.elem_type for value in onnx.load(files["detect"]).graph.output}
    assert [outputs[n] for n in ("count", "boxes", "scores", "labels")] == [7, 1, 1, 7]


@pytest.mark.parametrize("count", [1, 3])
def test_the_half_graph_computes_what_the_half_model_does(graphs, count) -> None:
    half, files = graphs
    images, sizes = tiny.pictures((96, 160), [(96, 160), (90, 150), (60, 130)][:count])
    with torch.no_grad():
        want = half(normalise(images, sizes), sizes)
    found = cut_runner.run(files["detect"], {"images": images.numpy(), "sizes": sizes.numpy()})
    matched = 0
    for image in range(count):
        ours, theirs = int(want.count[image]), int(found["count"][image])
        pairs = match(
            want.boxes[image, :ours].numpy(), want.labels[image, :ours].numpy(),
            found["boxes"][image, :theirs], found["labels"][image, :theirs],
        )  # fmt: skip
        assert ours + theirs - 2 * len(pairs) <= 2, "a box near the floor or the last place may come or go"
        matched += sum(
            bool(np.abs(want.boxes[image, a].numpy() - found["boxes"][image, b]).max() < 2) for a, b in pairs
        )
    assert matched >= 4 * count
    assert found["p2"].dtype == np.float16
    rois = np.array([[count - 1, 8, 8, 90, 80], [0, 20, 10, 60, 90]], np.float32)
    levels = {name: want.features[i].numpy() for i, name in enumerate(("p2", "p3", "p4", "p5"))}
    heads = TorchReference(half)
    with torch.no_grad():
        masks = half.mask_probabilities(want.features, torch.from_numpy(rois), torch.zeros(2, dtype=torch.int64))
        maps = half.keypoint_heatmaps(want.features, torch.from_numpy(rois))
    assert heads.model is half
    given = cut_runner.run(files["masks"], {**levels, "rois": rois, "labels": np.zeros(2, np.int64)})
    np.testing.assert_allclose(given["probabilities"], masks.numpy(), atol=5e-3)
    given = cut_runner.run(files["keypoints"], {**levels, "rois": rois})
    np.testing.assert_allclose(given["heatmaps"], maps.numpy(), atol=2e-2 * float(maps.abs().max()))
    assert given["heatmaps"].dtype == np.float32


HALF_BY_DEFAULT = [NAME, "faster_rcnn_r50_fpn"]  # on CPUs; the others with make test-all


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(name, "float32", marks=pytest.mark.slow if name in tiny.SLOW else ()) for name in tiny.VARIANTS]
    + [
        pytest.param(name, "float16", marks=() if name in HALF_BY_DEFAULT else pytest.mark.slow)
        for name in tiny.VARIANTS
    ],
)
def test_a_prepared_model_is_the_same_model(name, precision) -> None:
    model, _ = tiny.make(name)
    images, sizes = tiny.pictures((96, 160), [(96, 160), (90, 150)])
    want, small = TorchReference(model).detect(images.numpy(), sizes.numpy()), prepared(model, precision)
    found = TorchReference(small).detect(images.numpy(), sizes.numpy())
    assert next(small.backbone.parameters()).dtype == {"float32": torch.float32, "float16": torch.float16}[precision]
    assert next(model.backbone.parameters()).dtype == torch.float32, "the original is left alone"
    scores = (want.scores - found.scores).abs().max()
    assert scores < (1e-4 if precision == "float32" else 0.05)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    if precision == "float32":
        torch.testing.assert_close(found.boxes, want.boxes, atol=0.05, rtol=0)


def test_a_weight_that_float16_cannot_hold_is_said_so() -> None:
    model, _ = tiny.make(NAME)
    with torch.no_grad():
        model.box_head.fcs[0].weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"box_head\.fcs\.0 has a weight of 100000.*bfloat16"):
        prepared(model, "float16")
    prepared(model, "bfloat16")


def graph_of(node: onnx.NodeProto, kind: int = TensorProto.FLOAT, **constants: np.ndarray) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(n, kind, None) for n in node.input if n not in constants]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output]
    for value in outputs:
        value.type.tensor_type.elem_type = TensorProto.INT32 if node.domain else TensorProto.FLOAT
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph([node], "g", inputs, outputs[:1], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("limner", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


def test_problems_are_found(monkeypatch) -> None:
    monkeypatch.setattr(onnx.checker, "check_model", lambda _graph: None)
    top = helper.make_node("TopK", ["x", "k"], ["best", "index"], name="top")
    assert trt_graphs.problems(graph_of(top, k=np.array([3840]))) == []
    assert "TopK of 3841, TensorRT ends at 3840" in trt_graphs.problems(graph_of(top, k=np.array([3841])))[0]
    assert "must be a constant" in trt_graphs.problems(graph_of(top))[0]
    nonzero = helper.make_node("NonZero", ["x"], ["y"], name="where")
    assert "does not take ai.onnx::NonZero" in trt_graphs.problems(graph_of(nonzero))[0]
    nms = helper.make_node("NmsGroups", ["boxes", "scores"], ["k", "s", "n"], name="nms", domain="limner", iou=0.5)
    assert trt_graphs.problems(graph_of(nms)) == []
    told = trt_graphs.problems(graph_of(nms, TensorProto.FLOAT16))
    assert told == ["nms: 'boxes' must be float32", "nms: 'scores' must be float32"]


def test_canvases_by_name_and_by_shape() -> None:
    rule = CanvasRule(short_side=800, long_side=1333)
    found = trt_graphs.canvases(rule, ["landscape", "portrait", "square", "800x1088"])
    assert [str(each) for each in found] == ["800x800", "800x1088", "800x1344", "1344x800"]
    for wrong, message in (("100x200", "multiples of 32"), ("wide", "expected landscape")):
        with pytest.raises(ValueError, match=message):
            trt_graphs.canvases(rule, [wrong])


def test_profiles_take_each_bucket_alone_and_the_pyramid_of_any_canvas(graphs) -> None:
    _, files = graphs
    shapes = trt_build.detect_shapes(CANVAS, [4, 1])
    assert [profile["images"][0] for profile in shapes] == [(1, 96, 160, 3), (4, 96, 160, 3)]
    assert all(len(set(sizes)) == 1 for profile in shapes for sizes in profile.values())
    canvases = [CANVAS, trt_graphs.FixedCanvas(160, 96)]
    masks = trt_build.head_shapes(onnx.load(files["masks"]), canvases, 4, [16, 8])
    assert [profile["rois"] for profile in masks] == [((8, 5),) * 3, ((16, 5),) * 3]
    assert masks[0]["labels"] == ((8,),) * 3
    assert masks[0]["p3"] == ((4, 16, 12, 12), (4, 16, 12, 20), (4, 16, 20, 20))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLE, tmp_path / "bundles" / "person" / "1"))


def test_a_model_is_rebuilt_from_its_bundle(copied: Path) -> None:
    model, spec = rebuild.load(copied)
    assert spec.architecture == NAME
    assert model.mask_head is not None
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["provenance"]["options"]["canonical_side"] = 60
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="does not give the bundle's golden outputs"):
        rebuild.load(copied)
    del manifest["provenance"]["training"], manifest["provenance"]["options"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="does not say how its model was built"):
        rebuild.load(copied)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.Machine:
    """A GPU and a TensorRT that makes its plans of the bundle's own portable graphs."""
    made = fake_gpu.Machine()
    install(monkeypatch, made)
    monkeypatch.setattr(plugins, "register", lambda _trt, gpu: None)
    monkeypatch.setattr(trt_graphs, "problems", lambda _graph: [])

    def graphs(_model, shapes, _options, _directory):
        files = {("detect", canvas): BUNDLE / "detect.onnx" for canvas in shapes}
        return files | {(head, None): BUNDLE / f"{head}.onnx" for head in ("masks", "keypoints")}

    def build(_trt, path, profiles, _how, _cache, _say):
        first, name = profiles[0], "images" if "images" in profiles[0] else "rois"
        canvas = first["images"][0][1:3] if name == "images" else None
        rows = [profile[name][0][0] for profile in profiles]
        plan = {"onnx": str(path), "canvas": canvas, "buckets": rows, "max_batch": 2}
        return json.dumps(plan).encode()

    monkeypatch.setattr(to_trt, "_graphs", graphs)
    monkeypatch.setattr(trt_build, "build", build)
    monkeypatch.setattr(to_trt.to_onnx, "synthetic", lambda _count: [])  # the golden picture is enough here
    return made


FEW = ["--precision", "fp32", "--batch", "1", "2", "--rois", "8", "--canvas", "portrait"]


def test_plans_go_into_the_bundle_with_their_certificate(copied: Path, machine, capsys) -> None:
    before = Bundle.read(copied).manifest
    assert to_trt.main([str(copied), *FEW]) == 0, capsys.readouterr().err
    assert "tensorrt float32" in capsys.readouterr().out
    bundle = Bundle.read(copied)
    assert sorted(path.name for path in (copied / "sm90.float32").iterdir()) == [
        "detect.640x384.plan", "golden.npz", "keypoints.plan", "masks.plan", "plans.json",
    ]  # fmt: skip
    assert [path.name for path in copied.parent.iterdir()] == ["1"]
    certificate = bundle.manifest.parity["engines"][-1]
    assert (certificate["engine"], certificate["gpu"], certificate["batches"]) == ("tensorrt", "fake GPU", [1, 2])
    assert certificate["matched"] >= 6
    assert bundle.manifest.parity["engines"][:-1] == before.parity["engines"]
    opened = open_engine(bundle, "auto", precision="auto")
    assert (opened.engine.name, opened.reason) == ("tensorrt", "auto: the bundle has TensorRT plans for this GPU")
    opened.engine.close()


def test_a_copy_of_the_bundle_gets_them(copied: Path, machine, capsys, tmp_path: Path) -> None:
    """As docker compose's `plans` asks for it: from a read-only folder into a volume that is still empty."""
    before, out = (copied / "manifest.json").read_bytes(), tmp_path / "plans" / "person" / "1"
    assert to_trt.main([str(copied), "--out", str(out), *FEW, "--allow", "box_px=0"]) == 1
    assert list(out.parent.iterdir()) == []
    assert to_trt.main([str(copied), "--out", str(out), *FEW]) == 0, capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["1"]
    assert {each.runtime for each in Bundle.read(out).manifest.artifacts} == {"onnx", "tensorrt"}
    assert (copied / "manifest.json").read_bytes() == before
    assert not (copied / "sm90.float32").exists()


def test_below_the_bar_the_bundle_stays_as_it_was(copied: Path, machine, capsys) -> None:
    before = (copied / "manifest.json").read_bytes()
    assert to_trt.main([str(copied), *FEW, "--allow", "box_px=0"]) == 1
    assert "strays from the torch model: box_px differs" in capsys.readouterr().err
    assert (copied / "manifest.json").read_bytes() == before
    assert not (copied / "sm90.float32").exists()
    assert [path.name for path in copied.parent.iterdir()] == ["1"]


def test_wrong_use_in_one_line(copied: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    model, spec = tiny.make(NAME)
    checkpoint.save(tmp_path / "other", model, spec)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for argv, message in (
        ([], "give a checkpoint or a bundle"),
        ([str(tmp_path / "none")], "is no bundle: make one with limner export onnx"),
        ([str(copied), "--allow", "speed=2"], "the bars are box_px, confident, keypoint_px"),
        ([str(copied)], "--dry-run needs neither"),
    ):
        assert to_trt.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="made from another checkpoint"):
        into_bundle.refuse(tmp_path / "other", Bundle.read(copied), spec)


def test_dry_run_needs_no_tensorrt(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    model, spec = tiny.make("faster_rcnn_r50_fpn")
    checkpoint.save(tmp_path / "best", model, spec)
    assert to_trt.main([str(tmp_path / "best"), "--dry-run", "--canvas", "square", "--batch", "1", "2"]) == 0
    told = capsys.readouterr().out
    assert "float16, canvases 96x96" in told
    assert "plugins: 2 limner::NmsGroups, 2 limner::NmsMerge, 1 limner::PyramidRoiAlign, 2 profiles" in told


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_mobilenetv2_fpn",
        pytest.param("mask_rcnn_r50_c4", marks=pytest.mark.slow),
        pytest.param("faster_rcnn_alexnet", marks=pytest.mark.slow),
        pytest.param("retinanet_r50_fpn_v2", marks=pytest.mark.slow),
    ],
)
def test_one_stage_and_one_map_compute_the_same(tmp_path: Path, name) -> None:
    model, _ = tiny.make(name)
    files = trt_graphs.save_stages(prepared(model, "float32"), [CANVAS], 4, 16, tmp_path)
    assert all(trt_graphs.problems(onnx.load(path)) == [] for path in files.values())
    images, sizes = tiny.pictures((96, 160), [(96, 160), (90, 150)])
    want = TorchReference(model).detect(images.numpy(), sizes.numpy())
    found = cut_runner.run(files["detect", CANVAS], {"images": images.numpy(), "sizes": sizes.numpy()})
    assert int(want.count.sum()) > 8
    np.testing.assert_array_equal(found["labels"], want.labels)
    np.testing.assert_allclose(found["boxes"], want.boxes, atol=0.05)
    np.testing.assert_allclose(found["scores"], want.scores, atol=1e-4)
    assert set(found) >= set(model.backbone.levels)
    if model.mask_head is not None:
        rois = np.array([[1, 8, 8, 90, 80], [0, 20, 10, 60, 90]], np.float32)
        given = {name: found[name] for name in model.backbone.levels}
        masks = cut_runner.run(files["masks", None], {**given, "rois": rois, "labels": np.zeros(2, np.int64)})
        with torch.no_grad():
            wanted = model.mask_probabilities(want.features, torch.from_numpy(rois), torch.zeros(2, dtype=torch.int64))
        np.testing.assert_allclose(masks["probabilities"], wanted, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_model_of_the_zoo_in_every_precision(tmp_path: Path, name, precision) -> None:
    model, spec = tiny.make(name)
    shapes = trt_graphs.canvases(rule_of(spec), ["landscape"])
    for path in trt_graphs.save_stages(prepared(model, precision), shapes, 4, 16, tmp_path).values():
        assert trt_graphs.problems(onnx.load(path)) == []


@pytest.mark.slow
def test_dry_run_of_the_whole_zoo_at_its_own_size(capsys) -> None:
    assert to_trt.main(["--dry-run", "--canvas", "landscape"]) == 0
    assert capsys.readouterr().out.count("limner::NmsGroups") >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster_rcnn_r50_fpn", "mask_rcnn_r50_fpn_v2"])
def test_models_with_norms_are_rebuilt_too(tmp_path: Path, name) -> None:
    model, spec = tiny.make(name)
    out = tmp_path / "tiny" / "1"
    out.mkdir(parents=True)
    write_bundle(model, spec, out, ("tiny", "1"), {"architecture": spec.architecture, "options": spec.options})
    images, sizes = tiny.pictures((96, 160), [(96, 160)])
    write_golden(model, out, [Canvas(images[0].numpy(), (96, 160), (96, 160))])
    found, again = rebuild.load(out)
    assert again.architecture == spec.architecture
    assert int(TorchReference(found).detect(images.numpy(), sizes.numpy()).count.sum()) > 0
    checkpoint.save(tmp_path / "again", found, again)
    kept, _ = checkpoint.load(tmp_path / "again")
    wanted, saved = (TorchReference(each).detect(images.numpy(), sizes.numpy()) for each in (model, kept))
    assert torch.equal(wanted.count, saved.count)
    assert float((wanted.boxes - saved.boxes).abs().max()) < 0.01


@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="needs tensorrt-rtx-cu13-libs and its bindings")
def test_tensorrts_own_parser_takes_what_is_between_our_nodes(graphs, tmp_path: Path) -> None:
    import tensorrt_rtx_bindings as rtx

    class Quiet(rtx.ILogger):
        def __init__(self) -> None:
            rtx.ILogger.__init__(self)

        def log(self, _severity, _message) -> None: ...

    logger = Quiet()
    for path in graphs[1].values():
        builder = rtx.Builder(logger)
        network = builder.create_network(0)
        parser = rtx.OnnxParser(network, logger)
        parsed = parser.parse(trt_graphs.cut(onnx.load(path)).SerializeToString())
        assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
