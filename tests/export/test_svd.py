"""Truncated SVD: what it computes, what it keeps, what it refuses, and the checkpoint that comes of it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import limner
from export import rebuild, svd, svd_report, to_onnx
from models import checkpoint
from models.lowrank import LowRank
from service.bundle import Bundle, file_sha256
from tests.models import tiny
from tests.training.conftest import make_data as make_data
from tests.training.conftest import tiny_recipe
from training import train

NAME = "person_mobilenetv2_fpn"
BUNDLE = Path(__file__).parents[2] / "more-bundles" / "nuclei" / "1"  # whose layers are whole
SMALL = 1000  # the tiny model's layers: 784 x 32 and 32 x 32
FC = "box_head.fcs.0"


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(40, 24)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "trained", *tiny.make(NAME), {"step": 7})
    return tmp_path / "trained"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    images, _ = tiny.pictures((96, 128), [(96, 128)] * 3)
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


def product(thin: LowRank) -> torch.Tensor:
    return thin[1].weight @ thin[0].weight


def test_at_full_rank_nothing_changes(layer: nn.Linear) -> None:
    rows = torch.randn(50, 40)
    thin = svd.factor(layer, 24)
    assert thin[0].bias is None
    torch.testing.assert_close(thin(rows), layer(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 5, 23])
def test_no_matrix_of_this_rank_is_nearer(layer: nn.Linear, rank: int) -> None:
    """Eckart and Young: the error is the rest of the singular values; and so no other attempt is better."""
    weight = layer.weight.detach()
    error = torch.linalg.matrix_norm(product(svd.factor(layer, rank)) - weight)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), atol=1e-5, rtol=1e-4)
    assert torch.linalg.matrix_rank(product(svd.factor(layer, rank)).detach(), atol=1e-4) == rank
    basis, _ = torch.linalg.qr(torch.randn(24, rank))
    assert torch.linalg.matrix_norm(basis @ basis.T @ weight - weight) > error


def test_energy_is_the_share_of_squared_singular_values() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data = torch.diag(torch.tensor([2.0, 4.0, 1.0, 2.0]))  # squares 16, 4, 4, 1 of 25
    directions = svd.singular_directions(layer)
    assert [directions.rank_for(share) for share in (0.5, 0.64, 0.65, 0.8, 0.96, 0.97, 1.0)] == [1, 1, 2, 2, 3, 4, 4]
    assert directions.energy(3) == pytest.approx(0.96)


def test_directions_of_the_outputs_serve_the_pictures_better_than_those_of_the_weights() -> None:
    """Inputs that vary in three directions around a mean: rank 3 is exact for them, whatever the weights are."""
    model, spec = tiny.make(NAME)
    fc = model.box_head.fcs[0]
    torch.manual_seed(1)
    basis, mean = torch.randn(3, fc.in_features), torch.randn(fc.in_features)
    rows = torch.randn(200, 3) @ basis + mean
    sums = svd._Sums(fc)
    sums(fc, None, fc(rows).detach())
    wanted = fc(rows)
    by_outputs = svd.factor(fc, 3, sums.directions(FC))(rows)
    by_weights = svd.factor(fc, 3)(rows)
    torch.testing.assert_close(by_outputs, wanted, atol=1e-3, rtol=1e-3)
    assert (by_weights - wanted).norm() > 10 * (by_outputs - wanted).norm() + 1


def test_the_compressed_checkpoint_is_a_checkpoint(trained: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "thin"
    arguments = [str(trained), "--out", str(out), "--min-parameters", str(SMALL), "--pictures", str(photos)]
    assert svd.main([*arguments, "--rank", "15", f"{FC}=20"]) == 0
    model, spec = checkpoint.load(out)
    assert spec.options["ranks"] == {FC: 20, "box_head.fcs.1": 15}
    before, old_spec = checkpoint.load(trained)
    thin, thin_spec = svd.compress(before, old_spec, spec.options["ranks"])
    assert thin_spec == spec
    assert list(model.state_dict()) == list(thin.state_dict())
    assert isinstance(before.box_head.fcs[0], nn.Linear)  # the model that it came from is as it was
    provenance = checkpoint.read_config(out)["provenance"]
    assert provenance["step"] == 7
    assert re.search(r"3 pictures, sha256 [0-9a-f]{12}", provenance["svd"]["directions"])


@pytest.mark.skipif(not BUNDLE.is_dir(), reason="more-bundles is not in this checkout")
def test_of_a_bundle_the_weights_in_its_graphs_are_compressed(tmp_path: Path) -> None:
    out = tmp_path / "thin"
    whole, _ = rebuild.load(BUNDLE)
    most = svd.largest_rank(svd.candidates(whole)["box_head.fcs.0"])
    assert svd.main([str(BUNDLE), "--out", str(out), "--rank", f"box_head.fcs.0={most}"]) == 0
    model, spec = checkpoint.load(out)
    assert spec.options["ranks"] == {"box_head.fcs.0": most}
    kept, before = model.state_dict(), whole.state_dict()
    same = [name for name in kept if name in before]
    assert len(same) == len(before) - 2
    assert all(torch.equal(kept[name], before[name]) for name in same)
    provenance = checkpoint.read_config(out)["provenance"]
    assert provenance["svd"]["of_bundle"] == "nuclei/1"
    assert provenance["svd"]["of_sha256"] == file_sha256(BUNDLE / "manifest.json")
    assert provenance["recipe"] == Bundle.read(BUNDLE).manifest.provenance["training"]["recipe"]


def test_it_trains_on(trained: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    model, spec = svd.compress(checkpoint.build(recipe.spec()), recipe.spec(), {FC: 5})
    checkpoint.save(tmp_path / "thin", model, spec)
    recipe = train.with_ranks(recipe, tmp_path / "thin")
    again = checkpoint.build(recipe.spec())
    taken = train.init_from(again, tmp_path / "thin")
    assert taken == f"{len(model.state_dict())} tensors taken over"
    logits, deltas = again.box_head(torch.randn(4, 16, 7, 7))
    (logits.sum() + deltas.sum()).backward()
    thin = again.box_head.fcs[0]
    assert isinstance(thin, LowRank)
    assert all(part.weight.grad.abs().sum() > 0 for part in thin)


def test_onnx_computes_the_same(trained: Path, tmp_path: Path) -> None:
    model, _ = svd.compress(*checkpoint.load(trained), {FC: 12})
    pooled, file = torch.randn(6, 16, 7, 7), tmp_path / "head.onnx"
    torch.onnx.export(model.box_head, (pooled,), file, dynamo=True, verbose=False, input_names=["pooled"])
    logits, deltas = onnxruntime.InferenceSession(str(file)).run(None, {"pooled": pooled.numpy()})
    wanted = model.box_head(pooled)
    np.testing.assert_allclose(logits, wanted[0].detach(), atol=1e-4)
    np.testing.assert_allclose(deltas, wanted[1].detach(), atol=1e-4)


@pytest.mark.slow
def test_the_bundle_of_a_compressed_checkpoint_is_certified(trained: Path, tmp_path: Path) -> None:
    assert svd.main([str(trained), "--out", str(tmp_path / "thin"), "--min-parameters", "20000", "--rank", "12"]) == 0
    out = tmp_path / "bundles" / "thin" / "1"
    assert to_onnx.main([str(tmp_path / "thin"), "--out", str(out), "--engines", "onnx"]) == 0
    assert Bundle.read(out).manifest.provenance["training"]["svd"]["directions"] == "of the weights"


def test_the_report_counts_right(trained: Path, tmp_path: Path) -> None:
    before, spec = checkpoint.load(trained)
    after, _ = svd.compress(before, spec, {FC: 10})
    report = svd_report.compare(
        before, after, {FC: 0.9}, lambda model: {"bbox": 0.5 if model is before else 0.4}, [], "x"
    )
    (change,) = report.layers
    assert (change.inputs, change.outputs, change.rank) == (784, 32, 10)
    assert change.parameters == (784 * 32 + 32, 784 * 10 + 10 * 32 + 32)
    assert change.flops == (2 * 784 * 32, 2 * (784 * 10 + 10 * 32))
    assert report.parameters[0] - report.parameters[1] == change.parameters[0] - change.parameters[1]
    assert report.parameters[0] == sum(p.numel() for p in before.parameters())
    assert report.ap == {"bbox": (0.5, 0.4)}
    text = report.markdown()
    assert f"| {FC} | 784 x 32 | 10 | 0.900 | 25,120 -> 8,192 (3.1x) | 50,176 -> 16,320 (3.1x) |" in text
    assert "| bbox | 0.5000 | 0.4000 | -0.1000 |" in text
    pytest.importorskip("matplotlib")
    svd_report.write_report(
        tmp_path / "report", report, {FC: svd.singular_directions(before.box_head.fcs[0]).strengths}
    )
    assert json.loads((tmp_path / "report" / "svd.json").read_text())["layers"][0]["rank"] == 10
    assert (tmp_path / "report" / "svd.png").read_bytes().startswith(b"\x89PNG")


def test_the_search_keeps_as_little_as_the_bar_allows(trained: Path) -> None:
    """AP that falls by 0.01 for each rank that is missing to 20."""
    model, spec = checkpoint.load(trained)
    layers = svd.candidates(model, 20_000)
    directions = {name: svd.singular_directions(layer) for name, layer in layers.items()}

    def ap(each) -> dict[str, float]:
        fc = each.box_head.fcs[0]
        return {"bbox": 0.5 - 0.01 * max(0, 20 - (fc.rank if isinstance(fc, LowRank) else 32))}

    ranks, trials = svd.search(model, spec, directions, ap, 0.05, layers)
    assert ranks == {FC: 15}
    assert len(trials) == svd.SEARCH_STEPS
    with pytest.raises(ValueError, match="lose at most -1 AP"):
        svd.search(model, spec, directions, ap, -1, layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "0"], "saves weights at ranks from 1 to 30, not at 0"),
        (["--rank", f"{FC}=31"], "saves weights at ranks from 1 to 30, not at 31"),
        (["--rank", "box_head.classes=3"], f"one of {FC}"),
        (["--rank", "some"], "expected a number"),
        (["--energy", "1.5"], "at most 1, not 1.5"),
        (["--energy", "1"], "keep less"),
        (["--rank", "3", "--min-parameters", "1000000"], "no fully connected layer of this model has 1000000"),
        (["--rank", "3", "--pictures", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_words(trained: Path, tmp_path: Path, capsys, given, message) -> None:
    arguments = [str(trained), "--out", str(tmp_path / "out"), "--min-parameters", "20000", *given]
    assert svd.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_impossible_ranks_of_a_layer_and_of_a_checkpoint(layer: nn.Linear) -> None:
    for rank in (0, 25):
        with pytest.raises(ValueError, match="from 1 to 24"):
            svd.factor(layer, rank)
    spec = tiny.SPECS[NAME]
    for ranks, message in (
        ({FC: 33}, "from 1 to 32"),
        ({FC: "3"}, "must be a whole number"),
        ({"box_head.convs": 3}, "no fully connected"),
        ([3], "does not take these options"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.build(replace(spec, options={**spec.options, "ranks": ranks}))


def test_what_is_compressed_is_not_compressed_again(trained: Path) -> None:
    model, spec = svd.compress(*checkpoint.load(trained), {FC: 20})
    with pytest.raises(ValueError, match="start from the original"):
        svd.candidates(model, 10_000)


def test_the_command_measures_ap(tmp_path: Path, make_data, capsys) -> None:
    model, spec = tiny.make(NAME)
    checkpoint.save(tmp_path / "trained", model, replace(spec, classes=("person",)))
    source = make_data(count=3)
    arguments = [str(tmp_path / "trained"), "--out", str(tmp_path / "out"), "--min-parameters", "20000"]
    arguments += ["--max-loss", "1", "--images", str(source.images), "--annotations", str(source.annotations)]
    with pytest.raises(SystemExit) as ended:
        limner.app(["export", "svd", *arguments])
    assert ended.value.code == 0
    assert re.search(r"\| bbox \| 0\.\d{4} \| 0\.\d{4} \|", capsys.readouterr().out)
    assert 1 <= checkpoint.read_spec(tmp_path / "out").options["ranks"][FC] <= 2
