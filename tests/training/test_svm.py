"""The last steps of R-CNN and SPP-net: machines, hard negatives, ridge, and the weights that they become."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from models.checkpoint import Spec
from models.proposed import ProposalNetwork
from models.regions import BOX_WEIGHTS
from models.servable import normalise
from service.images import fit as fit_picture
from service.proposals import onto_canvas, propose
from tests.models.classics import WINDOWS, make
from tests.training.conftest import DataMaker
from training import svm
from training.data import Item, read_picture, read_source

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def two_clouds(count: int, gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    here, there = rng.normal(size=(2, count, 6)).astype(np.float32)
    here[:, 0] += gap
    return here * 5, there * 5


def test_a_machine_tells_its_class_from_the_rest() -> None:
    positives, negatives = two_clouds(100, 6)
    machine = svm.Machine(positives)
    machine.offer(negatives)
    machine.refit()
    assert (machine.margins(positives) > 0).mean() > 0.97
    assert (machine.margins(negatives) < 0).mean() > 0.97


def test_only_hard_negatives_are_kept_and_they_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svm, "REFIT", 300)
    monkeypatch.setattr(svm, "COST", 1.0)
    positives, negatives = two_clouds(400, 5)
    machine = svm.Machine(positives)
    for part in np.array_split(negatives, 8):
        machine.offer(part)
    machine.refit()
    whole = svm.Machine(positives)
    whole.offer(negatives)
    whole.refit()
    assert len(machine.negatives) < 0.7 * len(negatives)
    assert (machine.margins(machine.negatives) >= svm.EASY).all()
    same = np.sign(machine.margins(np.concatenate((positives, negatives))))
    assert (same == np.sign(whole.margins(np.concatenate((positives, negatives))))).mean() > 0.99


def test_a_class_without_objects_is_never_found() -> None:
    machine = svm.Machine(np.zeros((0, 6), np.float32))
    machine.offer(np.ones((5, 6), np.float32))
    machine.refit()
    assert machine.weights is None
    assert machine.bias < -5


class Fitted(NamedTuple):
    model: ProposalNetwork
    spec: Spec
    items: list[Item]
    result: ProposalNetwork
    result_spec: Spec
    searches: list[int]
    again: Callable[[], ProposalNetwork]
    said: str


@pytest.fixture
def fitted(make_data: DataMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fitted:
    monkeypatch.setattr(svm, "COST", 1.0)  # the paper's is for thousands of objects
    model, spec = make("spp_net_mobilenetv2", ("person", "dog"))
    assert isinstance(model, ProposalNetwork)
    items = read_source(make_data(count=6, objects=1), spec.classes, None)
    searches: list[int] = []
    said: list[str] = []

    def searched(image: np.ndarray) -> np.ndarray:
        searches.append(1)
        return propose(image, WINDOWS)

    def fit() -> tuple[ProposalNetwork, Spec]:
        return svm.fit(model, spec, items, searched, tmp_path / "features", said.append)

    return Fitted(model, spec, items, *fit(), searches, lambda: fit()[0], " ".join(said))


@torch.no_grad()
def logits_of_truth(model: ProposalNetwork, spec: Spec, item: Item) -> torch.Tensor:
    canvas = fit_picture(np.asarray(read_picture(item)), spec.canvas)
    truth = torch.from_numpy(onto_canvas(item.boxes, canvas))
    images = normalise(torch.from_numpy(canvas.pixels[None]), torch.tensor([canvas.size]))
    rois = torch.cat((truth.new_zeros(len(truth), 1), truth), 1)
    return model.box_head(model._pool_boxes(model.backbone(images), rois))[0]


def test_what_is_fitted_becomes_two_linear_layers(fitted: Fitted) -> None:
    assert fitted.result_spec.options["is_fitted"]
    assert fitted.result.is_fitted
    state, before = fitted.result.state_dict(), fitted.model.state_dict()
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed == {f"box_head.{layer}.{kind}" for layer in ("classes", "deltas") for kind in ("weight", "bias")}
    logits = torch.cat([logits_of_truth(fitted.result, fitted.spec, item) for item in fitted.items])
    assert (logits[:, 1] > 0).float().mean() > 0.7  # the objects themselves are on the right side
    assert (logits[:, 2] == svm.NEVER).all()  # no dog anywhere
    assert "person: 6 objects" in fitted.said


def test_features_come_from_disk_the_second_time(fitted: Fitted) -> None:
    assert len(fitted.searches) == len(fitted.items)
    again = fitted.again()
    assert len(fitted.searches) == len(fitted.items)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, fitted.result.state_dict()[name])
    with torch.no_grad():
        fitted.model.box_head.fcs[0].weight += 0.01
    fitted.again()
    assert len(fitted.searches) == 2 * len(fitted.items)


def test_ridge_is_the_paper_s_least_squares() -> None:
    """Appendix C, equation 5, with an intercept: in closed form."""
    rng = np.random.default_rng(0)
    near, goals = rng.normal(size=(30, 12)), rng.normal(size=(30, 4)) * BOX_WEIGHTS
    assert svm.ridge([]) is None
    weights, bias = svm.ridge([(near[:10], goals[:10]), (near[10:], goals[10:])])
    x, y = near - near.mean(0), goals - goals.mean(0)
    expected = np.linalg.solve(x.T @ x + svm.RIDGE * np.eye(12), x.T @ y).T
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias, goals.mean(0) - expected @ near.mean(0), rtol=1e-4, atol=1e-5)
