"""The last steps of R-CNN and SPP-net: features on disk, a linear support vector machine a class, ridge regression of
boxes. They end as weights of the head's two linear layers, so that what is fitted exports and serves like the rest.

Girshick et al. 2014, section 2.3 and appendices B and C, with the constants of its authors' code where the paper gives
none. N RoIs of a picture, H features of the machines, K classes.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models import boxes as box_ops
from models import checkpoint
from models.checkpoint import Spec
from models.proposed import ProposalNetwork, RidgeBoxHead
from models.regions import BOX_WEIGHTS
from models.servable import normalise
from service.images import fit as fit_picture
from service.proposals import onto_canvas
from training.data import Floats, Item, read_picture

COST, POSITIVE_WEIGHT, BIAS_SCALE = 1e-3, 2.0, 10.0  # of the machines
MEAN_NORM = 20.0  # to which features are scaled, so that one COST suits all networks
NEGATIVE_IOU, RIDGE_IOU = 0.3, 0.6  # below the one a proposal is a negative, above the other it learns its box
HARD, EASY = -1.0001, -1.2  # margins from which a negative is taken in, and below which it is dropped again
REFIT = 2000  # new hard negatives before a machine is fitted again
RIDGE = 1000.0  # lambda
NEVER = -10.0  # margin of a class without examples
Halves = NDArray[np.float16]


def fit(
    model: ProposalNetwork,
    spec: Spec,
    items: Sequence[Item],
    propose: Callable[[NDArray[np.uint8]], Floats],
    cache: Path,
    say: Callable[[str], None] = print,
) -> tuple[ProposalNetwork, Spec]:
    """A fitted copy of the fine-tuned model, and its Spec. `cache` keeps what was computed of each picture."""
    pictures = _Pictures(model, spec, items, propose, cache)
    firsts = [(np.linalg.norm(p.hidden.astype(np.float32), axis=1), p.truth, p.labels) for p in pictures]
    norms, truth, labels = zip(*firsts, strict=True)
    scale = MEAN_NORM / max(float(np.concatenate(norms).mean()), 1e-6)
    objects, owners = np.concatenate(truth) * np.float32(scale), np.concatenate(labels)
    machines = [Machine(objects[owners == label]) for label in range(len(spec.classes))]
    for number, picture in enumerate(pictures, start=1):
        for label, machine in enumerate(machines):
            machine.offer(picture.hidden[picture.overlaps[:, label] < NEGATIVE_IOU] * np.float32(scale))
        if number % 100 == 0:
            say(f"hard negatives of {number} of {len(items)} pictures")
    for name, machine in zip(spec.classes, machines, strict=True):
        machine.refit()
        say(f"{name}: {len(machine.positives)} objects, {len(machine.negatives)} hard negatives")
    spec = replace(spec, options={**spec.options, "is_fitted": True})
    fitted = checkpoint.build(spec)
    assert isinstance(fitted, ProposalNetwork)
    fitted.load_state_dict(model.state_dict())
    _fold(fitted, machines, scale, [ridge(pictures.near(label)) for label in range(len(spec.classes))])
    return fitted.eval(), spec


@dataclass(slots=True)
class Picture:
    """Of one picture: hidden (N, H) and overlaps (N, K) of its proposals with the nearest object of each class; truth
    (G, H) and labels (G,) of its objects; near (M, D), goals (M, 4), near_labels (M,) of the RoIs that learn boxes."""

    hidden: Halves
    overlaps: Halves
    truth: Halves
    labels: NDArray[np.int64]
    near: Floats
    goals: Floats
    near_labels: NDArray[np.int64]


class _Pictures:
    """Computed when first read, from disk from then on."""

    def __init__(
        self,
        model: ProposalNetwork,
        spec: Spec,
        items: Sequence[Item],
        propose: Callable[[NDArray[np.uint8]], Floats],
        directory: Path,
    ) -> None:
        self.model, self.spec, self.items, self.propose, self.directory = model.eval(), spec, items, propose, directory
        self.fingerprint = _fingerprint(model)
        directory.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[Picture]:
        return map(self._picture, range(len(self.items)))

    def near(self, label: int) -> Iterator[tuple[Floats, Floats]]:
        """Of each picture with any, features (m, D) and goals (m, 4) of the RoIs that learn boxes of this class."""
        for item in self.items:
            with np.load(self._path(item), allow_pickle=False) as archive:
                mine = archive["near_labels"] == label
                if mine.any():  # else the features, which are large, stay on disk
                    yield archive["near"][mine], archive["goals"][mine]

    def _picture(self, index: int) -> Picture:
        item = self.items[index]
        path = self._path(item)
        if not path.exists():
            computed = self._compute(item)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            with aside.open("wb") as stream:
                np.savez(stream, **{name: getattr(computed, name) for name in Picture.__slots__})
            aside.replace(path)
        with np.load(path, allow_pickle=False) as archive:
            return Picture(**{name: archive[name] for name in Picture.__slots__})

    def _path(self, item: Item) -> Path:
        """Named by all that the features depend on: weights, picture, truth, canvas and proposals."""
        status = item.path.stat()
        told = f"{self.fingerprint} {item.path} {status.st_size} {status.st_mtime_ns} {self.spec}"
        digest = hashlib.sha256(told.encode())
        for array in (item.boxes, item.labels, item.ignore):
            digest.update(np.ascontiguousarray(array).tobytes())
        return self.directory / f"{digest.hexdigest()[:32]}.npz"

    @torch.inference_mode()
    def _compute(self, item: Item) -> Picture:
        pixels = np.asarray(read_picture(item))
        canvas = fit_picture(pixels, self.spec.canvas)
        given, ignored = (torch.from_numpy(onto_canvas(each, canvas)) for each in (self.propose(pixels), item.ignore))
        truth = torch.from_numpy(onto_canvas(item.boxes, canvas))
        given = given[(box_ops.area(given) > 0) & (box_ops.coverage(given, ignored) < 0.5)]
        rois = torch.cat((truth, given))
        device = next(self.model.parameters()).device
        sizes = torch.tensor([canvas.size], device=device)
        images = normalise(torch.from_numpy(canvas.pixels[None]).to(device), sizes)
        features, hidden = self.model.describe(images, torch.cat((rois.new_zeros(len(rois), 1), rois), 1).to(device))
        labels = torch.from_numpy(item.labels)
        overlaps = torch.zeros(len(rois), len(self.spec.classes))
        near, goals, best = torch.zeros(len(rois), dtype=torch.bool), rois.new_zeros(0, 4), labels[:0]
        if len(truth):
            quality = box_ops.iou(rois, truth)
            for label in labels.unique().tolist():
                overlaps[:, label] = quality[:, labels == label].amax(1)
            highest, index = quality.max(1)
            near = highest > RIDGE_IOU
            goals, best = box_ops.encode(truth[index[near]], rois[near], BOX_WEIGHTS), labels[index[near]]
        own = len(truth)
        halves = hidden.half().cpu().numpy()
        arrays = (features[near.to(device)].cpu(), goals, best)
        return Picture(
            halves[own:], overlaps[own:].half().numpy(), halves[:own], item.labels, *(each.numpy() for each in arrays)
        )


@dataclass(slots=True)
class Machine:
    """The support vector machine of one class, against the negatives that it finds hard."""

    positives: Floats
    negatives: Floats = field(init=False)
    weights: Floats | None = None
    bias: float = NEVER
    _fresh: list[Floats] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.positives = self.positives.astype(np.float32)
        self.negatives = self.positives[:0]

    def offer(self, candidates: Floats) -> None:
        """Negatives (n, H): before the first fit all are taken, then those on the wrong side of the margin."""
        if not len(self.positives):
            return
        if self.weights is not None:
            candidates = candidates[self.margins(candidates) > HARD]
        self._fresh.append(candidates)
        if sum(map(len, self._fresh)) >= REFIT:
            self.refit()

    def margins(self, features: Floats) -> Floats:
        assert self.weights is not None
        return features @ self.weights + self.bias

    def refit(self) -> None:
        from sklearn.svm import LinearSVC

        self.negatives = np.concatenate((self.negatives, *self._fresh))
        self._fresh = []
        if not len(self.positives) or not len(self.negatives):
            return
        solver: Any = LinearSVC  # its stubs read their types off the defaults
        machine = solver(
            C=COST, loss="hinge", class_weight={1: POSITIVE_WEIGHT}, intercept_scaling=BIAS_SCALE, max_iter=20_000,
            random_state=0,
        )  # fmt: skip
        labels = np.repeat([1, 0], [len(self.positives), len(self.negatives)])
        machine.fit(np.concatenate((self.positives, self.negatives)), labels)
        self.weights, self.bias = machine.coef_[0].astype(np.float32), float(machine.intercept_[0])
        self.negatives = self.negatives[self.margins(self.negatives) >= EASY]


def ridge(rows: Iterable[tuple[Floats, Floats]]) -> tuple[Floats, Floats] | None:
    """Weights (4, D) and biases (4,) of one class from features and goals; None where nothing came near its objects."""
    from sklearn.linear_model import Ridge

    given = list(rows)
    if not given:
        return None
    features, goals = (np.concatenate(each) for each in zip(*given, strict=True))
    # The goals are those of the head, R-CNN's times BOX_WEIGHTS; least squares scale with them.
    fitted = Ridge(alpha=RIDGE).fit(features, goals)
    return fitted.coef_.astype(np.float32), fitted.intercept_.astype(np.float32)


@torch.no_grad()
def _fold(
    model: ProposalNetwork,
    machines: Sequence[Machine],
    scale: float,
    ridges: Sequence[tuple[Floats, Floats] | None],
) -> None:
    head = model.box_head
    assert isinstance(head, RidgeBoxHead)
    for layer in (head.classes, head.deltas):
        layer.weight.zero_()
        layer.bias.zero_()
    for label, (machine, deltas) in enumerate(zip(machines, ridges, strict=True)):
        head.classes.bias[label + 1] = machine.bias
        if machine.weights is not None:
            head.classes.weight[label + 1] = torch.from_numpy(machine.weights * np.float32(scale))
        if deltas is not None:
            rows = slice(4 * label, 4 * label + 4)
            head.deltas.weight[rows], head.deltas.bias[rows] = (torch.from_numpy(each) for each in deltas)


def _fingerprint(model: ProposalNetwork) -> str:
    """Of the weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
