"""The lecture, re-run: what each paper claimed over the one before, side by side: `python -m bench.lecture`.

Of the ten rows these need no training, since neither the time of a network nor the number of boxes that it looks at
depends on its weights: the test time of R-CNN, SPP-net and Fast R-CNN with VGG-16 (1), of fully connected layers before
and after truncated SVD (2), and the candidate boxes of each system (10). What modules beside this one trained and
measured joins them. All numbers stay in `--cache`; `--rows` measures those rows anew, `--write` writes the page.

    python -m bench.lecture --data .data/coco --trunk mobilenet_v2.pth --regions 128 --write docs/lecture.md
    python -m bench.lecture --rows 10 --write docs/lecture.md

One process, one thread; the three systems in turn on the same picture and proposals. R-CNN is timed on
`--regions` of the proposals where that is given and scaled to all of them: its trunk runs on each alone.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from bench import lecture_coco, lecture_coco_runs, lecture_nuclei
from bench.lecture_drawing import BLUE, GREY, ORANGE, Row, body, figure, image, table
from bench.lecture_sections import Section
from bench.machine import processor
from bench.results import keep, publish
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


def timings(cache: Path, regions: int, repetitions: int, rows: Sequence[int]) -> list[Section]:
    """Rows 1, 2 and 10; measured where they are not in the cache, or are among `rows`."""
    makers: dict[int, tuple[Callable[[], list[Row]], Callable[[dict[str, Any]], Section]]] = {
        1: (partial(region_times, regions, repetitions), three_systems),
        2: (partial(svd_times, repetitions), thinner_layers),
        10: (candidates, boxes_looked_at),
    }
    return [
        tell(kept(cache / f"timing_{row}.json", measure, row in rows, regions))
        for row, (measure, tell) in makers.items()
    ]


COMMANDS = (
    "    python -m bench.lecture_coco_runs --data .data/coco --trunk mobilenet_v2.pth",
    "    python -m bench.lecture --regions 128 --write docs/lecture.md",
    "",
    "The first command trains and measures for rows 1 to 6, with torchvision's trunk and a folder that holds `images` "
    "and `annotations/instances_{train,dev}.json` in COCO's format; it may be stopped and goes on where it was. The "
    "second times VGG-16, where that is not done yet, and writes this page.",
)
SETTING = f"Random weights, a canvas of {CANVAS[0]} x {CANVAS[1]}, float32"


def three_systems(found: dict[str, Any]) -> Section:
    on = found["regions"]
    scaled = "" if on == PROPOSALS else f" R-CNN was timed on {on} of them, and the time scaled to all."
    drawn, (axis,) = figure()
    names, ours, paper = (
        ["R-CNN", "SPP-net", "Fast R-CNN"],
        *([float(row[i]) for row in found["rows"]] for i in (1, 3)),
    )
    places = range(len(names))
    axis.bar([place - 0.2 for place in places], ours, 0.4, color=BLUE, label="here, one CPU core")
    axis.bar([place + 0.2 for place in places], paper, 0.4, color=GREY, label="paper, K40")
    axis.set(yscale="log", ylabel="s a picture", xticks=list(places), xticklabels=names)
    axis.legend(fontsize=8)
    return Section(
        1,
        "Test time of R-CNN, SPP-net and Fast R-CNN",
        body(
            f"**VGG-16, timed.** {SETTING}, {PROPOSALS:,} proposals, finding them not counted.{scaled} "
            f"{found['where']} The paper's are seconds on a K40 (Girshick 2015, table 4).",
            table(("system", "s a picture", "speed-up", "paper, s", "paper"), found["rows"]),
            image(drawn, "test-time", "seconds a picture of R-CNN, SPP-net and Fast R-CNN with VGG-16"),
            "One pass of the trunk instead of one a proposal makes the difference, here as there. It is smaller here, "
            "since fc6 and fc7 on all the RoIs, which R-CNN has to compute, too, are half of Fast R-CNN's time on a "
            "core (row 2). SPP-net is as fast as Fast R-CNN, because here both look at one scale and compute their "
            "features in one pass; the paper's SPP-net looks at five.",
        ),
    )


def thinner_layers(found: dict[str, Any]) -> Section:
    rows, ranks = found["rows"], ", ".join(f"{rank} in {name}" for name, rank in SVD_RANKS.items())
    before, after = ({row[0]: float(row[i]) for row in rows} for i in (1, 2))
    shares = (f"{100 * (each['fc6'] + each['fc7']) / each['together']:.0f} %" for each in (before, after))
    drawn, (axis,) = figure()
    low = [0.0, 0.0]
    for name, color in zip(list(before)[:3], (GREY, BLUE, ORANGE), strict=True):
        heights = [before[name], after[name]]
        axis.bar(["before", "after"], heights, 0.5, bottom=low, color=color, label=name)
        low = [base + height for base, height in zip(low, heights, strict=True)]
    axis.set(ylabel="ms a picture", xlim=(-0.5, 2.6))
    axis.legend(fontsize=8)
    return Section(
        2,
        "Truncated SVD of fc6 and fc7",
        body(
            f"**VGG-16, timed.** {SETTING}, {PROPOSALS:,} RoIs, ranks {ranks}. {found['where']} The paper: 320 ms a "
            "picture became 223 on a K40, with 0.3 points of mAP lost (Girshick 2015, section 4.4).",
            table(("layers", "ms before", "ms after"), rows),
            image(drawn, "svd-time", "milliseconds by layer before and after"),
            f"The layers cut take {' of the time before and '.join(shares)} after; {before['together']:,.0f} ms become "
            f"{100 * after['together'] / before['together']:.0f} % of that, the paper's become 70 %.",
        ),
    )


def boxes_looked_at(found: dict[str, Any]) -> Section:
    drawn, (axis,) = figure()
    names, counts = [row[0] for row in found["rows"]], [int(row[1].replace(",", "")) for row in found["rows"]]
    axis.barh(names, counts, color=BLUE)
    axis.set(xscale="log", xlabel="boxes a picture")
    axis.invert_yaxis()
    axis.tick_params("y", labelsize=7)
    return Section(
        10,
        "Boxes that each system looks at",
        body(
            f"Counted by the code that makes them, on a canvas of {CANVAS[0]} x {CANVAS[1]}.",
            table(("system", "boxes", "which"), found["rows"]),
            image(drawn, "boxes", "boxes that each system looks at"),
            "Proposals took the number from a million to two thousand, so that a network could look into each. Since "
            "the RPN and RetinaNet the boxes are many again, but one convolution scores them all.",
        ),
    )


def kept(path: Path, run: Callable[[], list[Row]], anew: bool, regions: int) -> dict[str, Any]:
    """{"rows", "regions", "where"}, from the file if it is there."""
    if anew or not path.exists():
        where = f"One of {os.cpu_count()} cores: {processor()}, {date.today()}."
        content = {"rows": run(), "regions": regions, "where": where}
        keep(path, content)
    return json.loads(path.read_text())


def page(sections: Sequence[Section]) -> str:
    """Sections of one number stand together, in the order given, below the first one's title."""
    lines = [
        "# The lecture, re-run",
        "",
        f"`python -m bench.lecture`, {date.today()}: Python {platform.python_version()}, torch {version('torch')}. Ten "
        "claims of the papers from OverFeat to Mask R-CNN, each paper's figure beside ours. Times are of real "
        "networks with random weights; AP is of small networks that were trained on a few hundred pictures, each "
        "within minutes of a CPU. What such runs can show is the direction of a claim, not its size; and a difference "
        "within two of its deviations is no result. They are those of other test pictures; other seeds add theirs.",
        "",
        *COMMANDS,
    ]
    number = 0
    for section in sorted(sections, key=lambda each: each.number):
        if section.number != number:
            lines += ["", f"## {section.number}. {section.title}"]
        lines += ["", section.body]
        number = section.number
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--cache", type=Path, default=Path(".cache/lecture"), help="what was trained and measured")
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="measure these anew")
    parser.add_argument("--data", type=Path, help="train and measure on this folder, see bench.lecture_coco_runs")
    parser.add_argument("--trunk", type=Path, help="with the weights of this trunk")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--regions", type=int, default=PROPOSALS, help="of R-CNN's proposals, that are timed")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if (options.data is None) != (options.trunk is None):
        parser.error("--data and --trunk go together")
    if options.data:
        rows = options.rows or list(lecture_coco_runs.ROWS)
        lecture_coco_runs.measure(options.data, options.trunk, options.cache, rows, anew=bool(options.rows))
    sections = timings(options.cache, options.regions, options.repetitions, options.rows)
    text = page([*sections, *lecture_coco.sections(options.cache), *lecture_nuclei.sections(options.cache)])
    publish(text, options.write)


if __name__ == "__main__":
    main()
