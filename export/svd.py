"""`limner export svd`: large fully connected layers become two thinner ones (Fast R-CNN, Girshick 2015, section 3.1).

    limner export svd runs/person/best --out runs/person/svd --max-loss 0.003 --pictures photos \\
        --images images --annotations person_keypoints_dev.json

A layer's W (out, in) becomes U_r (U_r^T W). U holds the left singular vectors of W, as in the paper; or, given
pictures, the principal directions of the layer's outputs on them, with their mean put into the bias (Zhang et al. 2015,
"Accelerating Very Deep Convolutional Networks", section 3.1). What is written is a checkpoint like any other: it trains
on and is exported in the same way.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.svd_report import Report, Trial, can_draw, compare, write_report
from export.to_onnx import pictures
from models.checkpoint import CheckpointError, Spec, load, read_config, save
from models.lowrank import LowRank
from models.network import Network
from models.servable import normalise
from service.bundle import CanvasRule, file_sha256
from service.errors import ServiceError
from service.images import fit

MIN_PARAMETERS = 100_000  # smaller layers are not worth two
SEARCH_STEPS = 7  # the energy is then known to 1/128

Evaluate = Callable[[Network], dict[str, float]]
"""AP by kind: bbox, segm, keypoints."""
Measure = Callable[[Network, Spec, Path, Path, int], dict[str, float]]
"""The same of a model, its spec, a folder of pictures, their annotations, and how many of them (0: all)."""


@dataclass(frozen=True, slots=True)
class Directions:
    """Of one layer: orthonormal columns (out, k), the strongest first; what each explains; the outputs' mean (out,)."""

    columns: Tensor
    strengths: Tensor
    mean: Tensor

    def energy(self, rank: int) -> float:
        """The share of the sum of squares that the first `rank` directions hold."""
        return float(self.strengths[:rank].sum() / self.strengths.sum())

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share."""
        shares = self.strengths.cumsum(0) / self.strengths.sum()
        return min(len(shares), int((shares < energy - 1e-12).sum()) + 1)


def candidates(model: Network, min_parameters: int = MIN_PARAMETERS) -> dict[str, nn.Linear]:
    """The fully connected layers of at least so many weights that are not thin already."""
    thin = {id(part) for module in model.modules() if isinstance(module, LowRank) for part in module.modules()}
    named = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in thin}
    found = {name: layer for name, layer in named.items() if layer.weight.numel() >= min_parameters}
    if not found:
        why = " (what is compressed already is not compressed again: start from the original)" if thin else ""
        raise ValueError(f"no fully connected layer of this model has {min_parameters} weights{why}")
    return found


def singular_directions(layer: nn.Linear) -> Directions:
    """Of the weights alone: strengths are squared singular values."""
    left, values, _ = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    return Directions(left, values.square(), left.new_zeros(len(left)))


def output_directions(
    model: Network, layers: Mapping[str, nn.Linear], canvases: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Directions]:
    """Principal components of the outputs, without bias, on canvases of images (1, H, W, 3) uint8 and sizes (1, 2)."""
    sums = {name: _Sums(layer) for name, layer in layers.items()}
    hooks = [layer.register_forward_hook(sums[name]) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            for images, sizes in canvases:
                model(normalise(images, sizes), sizes)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: each.directions(name) for name, each in sums.items()}


class _Sums:
    """Sums of a layer's outputs and of their products."""

    def __init__(self, layer: nn.Linear) -> None:
        self.most = min(layer.weight.shape)
        self.rows, self.total = 0, torch.zeros(layer.out_features, dtype=torch.float64)
        self.products = torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64)

    def __call__(self, layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        values = (output if layer.bias is None else output - layer.bias).double()
        self.rows += len(values)
        self.total += values.sum(0)
        self.products += values.T @ values

    def directions(self, name: str) -> Directions:
        if self.rows <= self.most:
            raise ValueError(f"{self.rows} rows through {name} do not show its {self.most} directions: more pictures")
        mean = self.total / self.rows
        values, vectors = torch.linalg.eigh(self.products / self.rows - torch.outer(mean, mean))
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        return Directions(vectors[:, : self.most], values[: self.most], mean)


def factor(layer: nn.Linear, rank: int, directions: Directions | None = None) -> LowRank:
    """The layer on its first `rank` directions (of its weights, unless others are given).

    Raises ValueError for a rank that is not from 1 to the smaller side of the layer.
    """
    thin = LowRank(layer.in_features, layer.out_features, rank)
    directions = directions or singular_directions(layer)
    columns = directions.columns[:, :rank]
    bias = directions.mean - columns @ (columns.T @ directions.mean)
    if layer.bias is not None:
        bias = bias + layer.bias.detach()
    thin.set(columns.T @ layer.weight.detach().double(), columns, bias)
    return thin


def compress(
    model: Network, spec: Spec, ranks: Mapping[str, int], directions: Mapping[str, Directions] | None = None
) -> tuple[Network, Spec]:
    """A new model with these layers of these ranks, and the Spec that builds it. The old one stays as it is."""
    made = copy.deepcopy(model)
    for name, rank in ranks.items():
        layer = dict(made.named_modules()).get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is no fully connected layer of this model")
        try:
            made.set_submodule(name, factor(layer, rank, (directions or {}).get(name)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    merged = {**spec.options.get("ranks", {}), **ranks}
    return made.eval(), replace(spec, options={**spec.options, "ranks": merged})


def ranks_for(layers: Mapping[str, nn.Linear], directions: Mapping[str, Directions], energy: float) -> dict[str, int]:
    """The ranks that keep this share in each layer; a layer that would not shrink is left out, and so stays whole."""
    if not 0 < energy <= 1:
        raise ValueError(f"an energy is above 0 and at most 1, not {energy:g}")
    ranks = {name: directions[name].rank_for(energy) for name in layers}
    return {name: rank for name, rank in ranks.items() if rank <= largest_rank(layers[name])}


def largest_rank(layer: nn.Linear) -> int:
    """The largest rank at which two layers have fewer weights than the one."""
    return (layer.weight.numel() - 1) // (layer.in_features + layer.out_features)


def loss(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The largest loss of AP over the kinds."""
    return max(before[kind] - after[kind] for kind in before)


def search(
    model: Network,
    spec: Spec,
    directions: Mapping[str, Directions],
    evaluate: Evaluate,
    max_loss: float,
    layers: Mapping[str, nn.Linear],
) -> tuple[dict[str, int], list[Trial]]:
    """The ranks of least energy whose loss of AP is allowed, by bisection, and all that was tried.

    AP need not fall steadily with the energy, so what is found is a good answer and not the least one; that it is
    within the bar was measured. Raises ValueError where nothing that was tried is.
    """
    before, trials, found = evaluate(model), [], None
    low, high = 0.0, 1.0
    for _ in range(SEARCH_STEPS):
        energy = (low + high) / 2
        ranks = ranks_for(layers, directions, energy)
        after = evaluate(compress(model, spec, ranks, directions)[0]) if ranks else before
        trials.append(Trial(energy, ranks, after))
        if loss(before, after) <= max_loss:
            high, found = energy, ranks or found
        else:
            low = energy
    if not found:
        raise ValueError(f"no ranks that save weights lose at most {max_loss:g} AP: allow more, or fine-tune")
    return found, trials


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="limner export svd", description="a checkpoint with thinner box heads")
    add, how = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("checkpoint", type=Path)
    add("--out", type=Path, required=True, help="the checkpoint to write")
    how.add_argument("--rank", nargs="+", metavar="R | LAYER=R", help="one for every large layer, or of each by name")
    how.add_argument("--energy", type=float, help="keep this share of the sum of squares in every large layer")
    how.add_argument("--max-loss", type=float, metavar="AP", help="keep as little as costs at most so much AP, 0 to 1")
    add("--pictures", type=Path, help="choose directions by the layers' outputs on these, not by the weights alone")
    add("--max-pictures", type=int, default=64)
    add("--images", type=Path, help="pictures to measure AP on, with --annotations")
    add("--annotations", type=Path)
    add("--limit", type=int, default=0, help="only the first so many of them")
    add("--min-parameters", type=int, default=MIN_PARAMETERS, help="smaller layers stay whole")
    add("--report", type=Path, metavar="FOLDER", help="write the table (.md, .json) and a plot (.png) there")
    options = parser.parse_args(argv)
    if (options.images is None) != (options.annotations is None):
        parser.error("--images and --annotations go together")
    if options.max_loss is not None and options.images is None:
        parser.error("--max-loss needs --images and --annotations to measure AP on")
    return options


def main(argv: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """`measure` comes from the command, which knows the evaluation; this package does not."""
    options = parse(argv)
    try:
        report = run(options, measure)
    except (CheckpointError, ServiceError, OSError, ValueError) as error:
        print(f"limner export svd: {error}", file=sys.stderr)
        return 2
    print(report.markdown())
    print(f"{options.out}: a checkpoint; `limner export onnx` makes a bundle of it")
    return 0


def run(options: argparse.Namespace, measure: Measure | None) -> Report:
    if options.report and not can_draw():
        raise ValueError("--report draws with matplotlib, which is not installed: pip install matplotlib")
    model, spec = load(options.checkpoint)
    layers = candidates(model, options.min_parameters)
    directions, source = _directions(options, model, spec, layers)
    evaluate = _evaluation(options, spec, measure)
    trials: list[Trial] = []
    if options.rank:
        ranks = named_ranks(options.rank, layers)
    elif options.energy is not None:
        ranks = ranks_for(layers, directions, options.energy)
    else:
        assert evaluate is not None
        ranks, trials = search(model, spec, directions, evaluate, options.max_loss, layers)
    if not ranks:
        raise ValueError(f"to keep a share of {options.energy:g} no layer would get smaller: keep less")
    thin, thin_spec = compress(model, spec, ranks, directions)
    kept = {name: directions[name].energy(rank) for name, rank in ranks.items()}
    report = compare(model, thin, kept, evaluate, trials, f"directions {source}")
    provenance = {
        **read_config(options.checkpoint)["provenance"],
        "svd": {"of_sha256": file_sha256(options.checkpoint / "model.safetensors"), "directions": source},
    }
    save(options.out, thin, thin_spec, provenance)
    if options.report:
        write_report(options.report, report, {name: each.strengths for name, each in directions.items()})
    return report


def _evaluation(options: argparse.Namespace, spec: Spec, measure: Measure | None) -> Evaluate | None:
    if options.images is None:
        return None
    if measure is None:
        raise ValueError("AP is measured by the command: run `limner export svd`")
    return lambda model: measure(model, spec, options.images, options.annotations, options.limit)


def _directions(
    options: argparse.Namespace, model: Network, spec: Spec, layers: Mapping[str, nn.Linear]
) -> tuple[dict[str, Directions], str]:
    if options.pictures is None:
        return {name: singular_directions(layer) for name, layer in layers.items()}, "of the weights"
    if spec.proposals is not None:
        raise ValueError("--pictures: this model takes proposals, so directions are those of the weights: leave it out")
    images, told = pictures(options.pictures, options.max_pictures)
    rule = spec.canvas
    served = CanvasRule(
        short_side=rule.short_side, long_side=rule.long_side, multiple=rule.multiple, antialias=rule.antialias
    )
    canvases = [fit(image, served) for image in images]
    batches = [(torch.from_numpy(c.pixels)[None], torch.tensor([c.size])) for c in canvases]
    return output_directions(model, layers, batches), f"of the outputs on {told}"


def named_ranks(given: Sequence[str], layers: Mapping[str, nn.Linear]) -> dict[str, int]:
    """What --rank says: one number for all, or LAYER=R for some. Refuses ranks that are impossible or save nothing."""
    ranks: dict[str, int] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        if not number.isdigit() or (equals and name not in layers):
            raise ValueError(f"--rank {text}: expected a number, or LAYER=NUMBER with one of {', '.join(layers)}")
        ranks |= dict.fromkeys([name] if equals else layers, int(number))
    for name, rank in ranks.items():
        most = largest_rank(layers[name])
        if not 1 <= rank <= most:
            shape = f"{layers[name].in_features} x {layers[name].out_features}"
            raise ValueError(f"--rank: {name}, {shape}, saves weights at ranks from 1 to {most}, not at {rank}")
    return ranks
