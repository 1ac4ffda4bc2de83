"""What truncated SVD brought: weights, arithmetic, time and AP before and after, as Markdown, JSON and a plot."""

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from models.lowrank import LowRank
from models.network import Network

ROWS = 1000  # RoIs that the layers are timed on
REPEATS = 7


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of a search: the share of energy kept, the ranks, and AP by kind."""

    energy: float
    ranks: dict[str, int]
    ap: dict[str, float]


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One layer before and after. FLOPs are of one RoI, two for each weight; milliseconds of ROWS RoIs."""

    name: str
    inputs: int
    outputs: int
    rank: int
    energy: float
    parameters: tuple[int, int]
    flops: tuple[int, int]
    ms: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Report:
    """`parameters` of the whole model; `ap` by kind, empty where it was not measured."""

    how: str
    layers: list[LayerChange]
    parameters: tuple[int, int]
    ap: dict[str, tuple[float, float]]
    trials: list[Trial]
    threads: int

    def markdown(self) -> str:
        how = self.how.partition(", sha256")[0]  # the hashes are in the JSON and in the checkpoint
        lines = [
            f"Truncated SVD, {how}. ms: {ROWS} RoIs, median of {REPEATS}, torch, {self.threads} threads.",
            "",
            "| layer | size | rank | energy kept | weights and biases | FLOPs a RoI | ms |",
            "|---|---|---:|---:|---|---|---|",
        ]
        for each in self.layers:
            lines.append(
                f"| {each.name} | {each.inputs} x {each.outputs} | {each.rank} | {each.energy:.3f} "
                f"| {_change(each.parameters)} | {_change(each.flops)} | {each.ms[0]:.2f} -> {each.ms[1]:.2f} |"
            )
        together = (sum(each.parameters[0] for each in self.layers), sum(each.parameters[1] for each in self.layers))
        lines += [f"| these layers | | | | {_change(together)} | | |"]
        lines += [f"| the whole model | | | | {_change(self.parameters)} | | |", ""]
        if not self.ap:
            lines.append("AP was not measured: give --images and --annotations.")
        else:
            lines += ["| AP | before | after | change |", "|---|---:|---:|---:|"]
            lines += [f"| {kind} | {a:.4f} | {b:.4f} | {b - a:+.4f} |" for kind, (a, b) in self.ap.items()]
        return "\n".join(lines)


def compare(
    before: Network,
    after: Network,
    energies: Mapping[str, float],
    evaluate: Callable[[Network], dict[str, float]] | None,
    trials: list[Trial],
    how: str,
) -> Report:
    """energies: for each layer that changed, the share that its rank keeps."""
    old, new = dict(before.named_modules()), dict(after.named_modules())
    layers = []
    for name, energy in energies.items():
        whole, thin = old[name], new[name]
        assert isinstance(whole, nn.Linear)
        assert isinstance(thin, LowRank)
        layers.append(
            LayerChange(
                name,
                whole.in_features,
                whole.out_features,
                thin.rank,
                energy,
                (_parameters(whole), _parameters(thin)),
                (_flops(whole), _flops(thin)),
                (_milliseconds(whole, whole.in_features), _milliseconds(thin, whole.in_features)),
            )
        )
    ap = {}
    if evaluate is not None:
        first, second = evaluate(before), evaluate(after)
        ap = {kind: (first[kind], second[kind]) for kind in first}
    return Report(how, layers, (_parameters(before), _parameters(after)), ap, trials, torch.get_num_threads())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(module: nn.Module) -> int:
    """A multiplication and an addition for each weight, for one row."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


@torch.inference_mode()
def _milliseconds(module: nn.Module, inputs: int) -> float:
    rows, taken = torch.randn(ROWS, inputs), []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        module(rows)
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken[1:])


def _change(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} -> {pair[1]:,} ({pair[0] / pair[1]:.1f}x)"


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_report(folder: Path, report: Report, strengths: Mapping[str, Tensor]) -> None:
    """svd.md, svd.json and svd.png; strengths: what each direction of each layer explains, the strongest first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "svd.md").write_text(report.markdown() + "\n")
    (folder / "svd.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    _draw(folder / "svd.png", report, strengths)


def _draw(path: Path, report: Report, strengths: Mapping[str, Tensor]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layer in report.layers:
        shares = (strengths[layer.name].cumsum(0) / strengths[layer.name].sum()).tolist()
        (line,) = left.plot(range(1, len(shares) + 1), shares, label=layer.name)
        left.plot([layer.rank], [layer.energy], "o", color=line.get_color())
    left.set(xlabel="rank", title="energy kept", xscale="log", ylim=(0, 1.02))
    left.legend(fontsize=8)
    if report.trials:
        _draw_trials(right, report)
    else:
        _draw_parameters(right, report.layers)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_trials(axes: Any, report: Report) -> None:
    for kind, (before, _) in report.ap.items():
        points = sorted((trial.energy, trial.ap[kind]) for trial in report.trials)
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=kind)
        axes.axhline(before, color=line.get_color(), linestyle=":")
    axes.set(xlabel="energy kept", title="AP of what was tried (dotted: before)")


def _draw_parameters(axes: Any, layers: list[LayerChange]) -> None:
    for when, label in enumerate(("before", "after")):
        places = [index + 0.4 * when - 0.2 for index in range(len(layers))]
        axes.bar(places, [layer.parameters[when] for layer in layers], 0.4, label=label)
    axes.set_xticks(range(len(layers)), [layer.name for layer in layers])
    axes.set(title="weights and biases")
