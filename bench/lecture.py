"""The lecture, re-run: what each paper claimed over the one before, side by side: `python -m bench.lecture`.

These rows need no training, since neither the time of a network nor the number of boxes that it looks at depends on its
weights: the test time of R-CNN, SPP-net and Fast R-CNN with VGG-16 (1), of fully connected layers before and after
truncated SVD (2), and the candidate boxes of each system (10). `--write docs/lecture.md` writes the page.

One process, all of torch's threads; the three systems in turn on the same picture and proposals. R-CNN is timed on
`--regions` of the proposals where that is given and scaled to all of them: its trunk runs on each alone.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn

from bench.masks import processor
from models import checkpoint
from models.checkpoint import CanvasRule, ProposalRule, Spec
from models.dense import AnchorGrid, DenseNetwork
from models.lowrank import LowRank
from models.overfeat import OverFeat
from models.proposed import ProposalNetwork
from models.regions import RegionNetwork
from service.proposals import sliding_windows

CLASSES = tuple(f"class{index}" for index in range(20))  # as many as VOC has
PROPOSALS = 2000
CANVAS = (608, 1024)  # 600 x 1000, the papers' largest, in multiples of 32
SVD_RANKS = {"fc6": 1024, "fc7": 256}  # Fast R-CNN section 4.4
Row = Sequence[str]


def network(name: str) -> nn.Module:
    rule = ProposalRule(max_proposals=PROPOSALS) if name.startswith(("r_cnn", "spp_net", "fast_rcnn")) else None
    torch.manual_seed(0)
    return checkpoint.build(Spec(name, CLASSES, None, CanvasRule(600, 1000), {}, rule)).eval()


def timed(run: Callable[[], object], repetitions: int) -> float:
    """Seconds, the median; the first run is not counted unless it is the only one."""
    taken = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return median(taken[1:] or taken)


def boxes(count: int) -> torch.Tensor:
    """(1, count, 4): sides from 32 pixels up, log-uniform, as selective search has many small and few large ones."""
    generator = torch.Generator().manual_seed(0)
    height, width = CANVAS
    sides = 32 * torch.exp(torch.rand(count, 2, generator=generator) * torch.log(torch.tensor(height / 32)))
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat((corners, corners + sides), dim=1)[None]


@torch.inference_mode()
def region_times(regions: int, repetitions: int) -> list[Row]:
    """Row 1. The paper: 47, 2.3 and 0.32 s a picture on a K40 (Fast R-CNN table 4; R-CNN's with fast features)."""
    images, sizes = torch.randn(1, 3, *CANVAS), torch.tensor([CANVAS])
    paper = {"r_cnn_vgg16": "47.0", "spp_net_vgg16": "2.3", "fast_rcnn_vgg16": "0.32"}
    seconds = {}
    for name in paper:
        model = network(name)
        count = regions if name.startswith("r_cnn") else PROPOSALS
        runs = 1 if name.startswith("r_cnn") else repetitions
        seconds[name] = timed(partial(model, images, sizes, boxes(count)), runs) * PROPOSALS / count
        del model
    slowest = seconds["r_cnn_vgg16"]
    return [
        (name, f"{taken:.2f}", f"{slowest / taken:.0f}x", paper[name], f"{47 / float(paper[name]):.0f}x")
        for name, taken in seconds.items()
    ]


@torch.inference_mode()
def svd_times(repetitions: int) -> list[Row]:
    """Row 2. The paper: 320 ms a picture become 223 (section 4.4)."""
    model = network("fast_rcnn_vgg16")
    assert isinstance(model, ProposalNetwork)
    images, head = torch.randn(1, 3, *CANVAS), model.box_head
    pooled = torch.randn(PROPOSALS, 512 * 49)
    hidden = torch.randn(PROPOSALS, 4096)
    thin = {name: LowRank(layer.in_features, layer.out_features, rank)
            for (name, rank), layer in zip(SVD_RANKS.items(), model.classifier_layers(), strict=True)}  # fmt: skip
    trunk, last = partial(model.backbone, images), lambda: (head.classes(hidden), head.deltas(hidden))
    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "conv1 to conv5": (trunk, trunk),
        "fc6": (partial(head.fcs[0], pooled), partial(thin["fc6"], pooled)),
        "fc7": (partial(head.fcs[1], hidden), partial(thin["fc7"], hidden)),
        "classes and boxes": (last, last),
    }
    rows, totals = [], [0.0, 0.0]
    for name, (before, after) in parts.items():
        taken = [timed(before, repetitions)]
        taken.append(taken[0] if after is before else timed(after, repetitions))
        totals = [total + each for total, each in zip(totals, taken, strict=True)]
        rows.append((name, *(f"{1000 * each:.0f}" for each in taken)))
    return [*rows, ("together", *(f"{1000 * each:.0f}" for each in totals))]


def candidates() -> list[Row]:
    """Row 10: boxes that each system scores on a picture of this canvas, before any is thrown away."""
    rows: list[Row] = [
        ("Viola and Jones", f"{cascade_windows():,}", "windows of 24 pixels, scales 1.1 apart"),
        ("a sliding window", f"{len(sliding_windows(*CANVAS)):,}", "of limner's grid, in three shapes"),
    ]
    with torch.device("meta"):
        images = torch.zeros(1, 3, *CANVAS)
        for name, what in (
            ("overfeat_alexnet", "windows of six scales"),
            ("r_cnn_vgg16", "selective search"),
            ("spp_net_vgg16", "selective search"),
            ("fast_rcnn_vgg16", "selective search"),
            ("faster_rcnn_vgg16", "anchors of the RPN, of which 300 go on"),
            ("faster_rcnn_r50_fpn", "anchors of the RPN, of which 1,000 go on"),
            ("retinanet_r50_fpn", "anchors"),
        ):
            rows.append((name, f"{looked_at(network(name), images):,}", what))
    return rows


def cascade_windows(side: int = 24, factor: float = 1.1) -> int:
    """As OpenCV steps: every second pixel of the picture scaled down, every one from a scale of 2 on."""
    count, scale = 0, 1.0
    while side * scale <= min(CANVAS):
        step = 1 if scale > 2 else 2
        rows, columns = (max(0, int(length / scale) - side) // step + 1 for length in CANVAS)
        count, scale = count + rows * columns, scale * factor
    return count


def looked_at(model: nn.Module, images: torch.Tensor) -> int:
    if isinstance(model, ProposalNetwork):
        return PROPOSALS
    if isinstance(model, OverFeat):
        return len(model._look(images)[2])
    assert isinstance(model, RegionNetwork | DenseNetwork)
    grid: AnchorGrid = model.rpn if isinstance(model, RegionNetwork) else model.detector
    return sum(len(each) for each in grid.anchors(model.backbone(images), images.shape))


def table(heads: Row, rows: Sequence[Row]) -> list[str]:
    lines = ["---:" if cell[0].isdigit() else "---" for cell in rows[0]]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, lines, *rows)]


def page(regions: int, repetitions: int) -> str:
    scaled = "" if regions == PROPOSALS else f" R-CNN was timed on {regions} of them, and the time scaled to all."
    lines = [
        "# The lecture, re-run",
        "",
        f"`python -m bench.lecture`, {date.today()}: {processor()}, {torch.get_num_threads()} of {os.cpu_count()} "
        f"cores; Python {platform.python_version()}, torch {version('torch')}, float32, random weights, a canvas of "
        f"{CANVAS[0]} x {CANVAS[1]}. Rows that need trained networks are not here yet.",
        "",
        "## Test time of R-CNN, SPP-net and Fast R-CNN",
        "",
        f"VGG-16, {PROPOSALS:,} proposals, finding them not counted.{scaled} The paper's are seconds on a K40 "
        "(Girshick 2015, table 4; SPP-net with five scales there, one here, and its features in one pass).",
        "",
        *table(("system", "s a picture", "speed-up", "paper, s", "paper"), region_times(regions, repetitions)),
        "",
        "## Truncated SVD of fc6 and fc7",
        "",
        f"Fast R-CNN, VGG-16, {PROPOSALS:,} RoIs, ranks {', '.join(f'{r} in {n}' for n, r in SVD_RANKS.items())} "
        "(Girshick 2015, section 4.4: 320 ms a picture became 223 on a K40, with 0.3 points of mAP lost).",
        "",
        *table(("layers", "ms before", "ms after"), svd_times(repetitions)),
        "",
        "## Boxes that each system looks at",
        "",
        *table(("system", "boxes", "which"), candidates()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--regions", type=int, default=PROPOSALS, help="of R-CNN's proposals, that are timed")
    options = parser.parse_args()
    text = page(options.regions, options.repetitions)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
