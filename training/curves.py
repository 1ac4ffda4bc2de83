"""The curves of a run as a picture: `python -m training.curves runs/person --out curves.png` (needs matplotlib)."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOSSES = ("rpn_objectness", "rpn_boxes", "classes", "boxes", "masks", "keypoints")
KINDS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


def read(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the evaluations of `metrics.jsonl`; of a step that was done twice, the later line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    evaluations = {line["step"]: {"step": line["step"], **line["evaluation"]} for line in lines if "evaluation" in line}
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]


def smooth(values: Sequence[float], weight: float = 0.97) -> list[float]:
    """An exponential average without the bias of its start."""
    total = norm = 0.0
    result = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def draw(run: Path, out: Path) -> None:
    from matplotlib.figure import Figure

    steps, evaluations = read(run)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [line["step"] for line in steps]
    for name in LOSSES:
        if name in steps[0]:
            left.plot(at, smooth([line[name] for line in steps]), label=name)
    left.set(xlabel="step", title="losses, smoothed", yscale="log")
    left.legend(fontsize=8)
    for kind, name in KINDS.items():
        known = [(line["step"], line[kind]["AP"]) for line in evaluations if kind in line]
        if known:
            right.plot(*zip(*known, strict=True), marker="o", label=name)
    right.set(xlabel="step", title="AP of the averaged weights", ylim=(0, None))
    right.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.curves", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder that `limner train --out` wrote")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write (.png)")
    options = parser.parse_args(argv)
    try:
        draw(options.run, options.out)
    except (OSError, ValueError, IndexError) as error:
        print(f"training.curves: {options.run}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
