"""The rows of the lecture that `bench.lecture_coco_runs` trained and measured, as tables and plots."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.lecture_coco_runs import CLASSES, COUNTS, DENSE, FEW, RANKS, STEPS
from bench.lecture_drawing import BLUE, GREY, ORANGE, body, figure, image, table
from bench.lecture_sections import Section


class Measured(NamedTuple):
    """Of a variant: VOC's mAP and persons' AP with what both are on resampled pictures, COCO's AP (all of 100), the
    seconds of CPU that training took, and that test takes of a picture."""

    voc: float
    person: float
    ap: float
    train_s: float
    test_s: float
    vocs: np.ndarray
    persons: np.ndarray

    @property
    def deviation(self) -> float:
        return float(self.vocs.std())

    def told(self) -> tuple[str, str]:
        return f"{self.voc:.1f} ± {self.deviation:.1f}", f"{self.person:.1f} ± {self.persons.std():.1f}"

    def against(self, other: "Measured") -> str:
        """The difference of persons' AP, and its deviation: both see the same resampled pictures."""
        return f"{self.person - other.person:+.1f} ± {(self.persons - other.persons).std():.1f}"

    def verdict(self, other: "Measured") -> str:
        far = abs(self.person - other.person) > 2 * (self.persons - other.persons).std()
        return f"{self.against(other)} points of persons' AP ({'beyond' if far else 'within'} two deviations)"


class Results:
    def __init__(self, cache: Path) -> None:
        self.directory = cache / "coco"

    def has(self, *names: str) -> bool:
        return all((self.directory / f"{name}.json").exists() for name in names)

    def raw(self, name: str) -> dict[str, Any]:
        return json.loads((self.directory / f"{name}.json").read_text())

    def __getitem__(self, name: str) -> Measured:
        found = self.raw(name)
        again = {name: 100 * np.array(values) for name, values in found["resampled"].items()}
        box = found["scores"]
        return Measured(
            100 * box["VOC"], 100 * found["classes"]["person"], 100 * box["AP"], found["cpu_s"], found["test_s"],
            np.nanmean(list(again.values()), axis=0), again["person"],
        )  # fmt: skip


def sections(cache: Path) -> list[Section]:
    """Of the rows that were measured. Plots go to `docs/lecture`."""
    results = Results(cache)
    rows: dict[Callable[[Results], Section], tuple[str, ...]] = {
        three_systems: ("fast_few", "spp_few", "r_cnn_few"),
        svd: ("fast", *(_svd(name) for name in RANKS)),
        layers: ("fast", "fast_fc6", "fast_11", "fast_all"),
        tasks: ("fast", "fast_classes", "fast_unmoved", "fast_stages"),
        proposals: (*(f"fast_{count}" for count in COUNTS), *(f"fast_dense_{count}" for count in DENSE)),
        faster: ("fast", "faster", "seconds"),
    }
    return [make(results) for make, needed in rows.items() if results.has(*needed)]


def _svd(name: str) -> str:
    return f"svd_{name.replace('/', '_')}"


def three_systems(results: Results) -> Section:
    """The paper: Girshick 2015, tables 1 and 4."""
    paper = {"r_cnn": ("84", "1x", "66.0"), "spp": ("25", "3.4x", "63.1"), "fast": ("9.5", "8.8x", "66.9")}
    names = {"r_cnn": "r_cnn_mobilenetv2", "spp": "spp_net_mobilenetv2", "fast": "fast_rcnn_mobilenetv2"}
    found = {name: results[f"{name}_few"] for name in names}
    slowest = found["r_cnn"]
    rows = [
        (
            names[name], f"{each.train_s / 60:.1f}", f"{slowest.train_s / each.train_s:.1f}x", f"{each.test_s:.2f}",
            f"{slowest.test_s / each.test_s:.0f}x", *each.told(), f"{each.ap:.1f}", *paper[name],
        )
        for name, each in found.items()
    ]  # fmt: skip
    heads = ("system", "training, min", "speed-up", "test, s", "speed-up", "mAP", "person", "AP")
    drawn, (left, right) = figure(2)
    for axis, values, title in (
        (left, [each.train_s / 60 for each in found.values()], "training, minutes of CPU"),
        (right, [each.voc for each in found.values()], "mAP"),
    ):
        axis.barh(["R-CNN", "SPP-net", "Fast R-CNN"], values, color=BLUE)
        axis.set_title(title)
        axis.invert_yaxis()
    right.set_yticks([])
    deviations = [each.deviation for each in found.values()]
    right.errorbar([each.voc for each in found.values()], range(3), xerr=deviations, fmt="none", color="black")
    return Section(1, "Test time of R-CNN, SPP-net and Fast R-CNN", body(
        f"**Light networks, trained.** {_setting()} R-CNN and SPP-net: {STEPS} steps with a softmax, then machines and "
        f"ridge regression, on the first {FEW} proposals of a picture; test on as many, for all three. Minutes and "
        "seconds are of one thread's CPU, finding proposals not counted. The paper: hours and mAP with VGG-16.",
        table((*heads, "paper, h", "speed-up", "mAP"), rows),
        image(drawn, "three-systems", "training time and mAP of R-CNN, SPP-net and Fast R-CNN"),
        "Test: the trunk runs once a picture and not once a region; Fast R-CNN needs neither features on disk nor "
        f"machines. Fast R-CNN against R-CNN: {found['fast'].verdict(found['r_cnn'])}, against SPP-net: "
        f"{found['fast'].verdict(found['spp'])}. The paper has R-CNN and Fast R-CNN within a point and SPP-net three "
        "below. R-CNN learns from 16 regions of a picture where the others have 64, for a step would cost four times "
        "as much, which makes its training look cheaper than it is. "
        "Machines on 233 pictures see few objects a class, where the papers have 5,011 pictures.",
    ))  # fmt: skip


def svd(results: Results) -> Section:
    """The paper: section 4.4, figure 2."""
    whole = results["fast"]
    rows = [("whole", "384", "384", *whole.told(), "", f"{whole.ap:.1f}", "66.9")]
    for name, (fc6, fc7) in RANKS.items():
        thin = results[_svd(name)]
        paper = "66.6 (ranks 1024 and 256 of 4096)" if name == "1/4" else ""
        rows.append((name, str(fc6), str(fc7), *thin.told(), thin.against(whole), f"{thin.ap:.1f}", paper))
    drawn, (axis,) = figure()
    shares = ["whole", *RANKS]
    values = [whole, *(results[_svd(name)] for name in RANKS)]
    axis.errorbar(shares, [e.voc for e in values], [e.deviation for e in values], marker="o", color=BLUE, capsize=3)
    axis.set(ylim=(0, None), xlabel="rank of fc6, of its 384 outputs (fc7: a quarter of that)", title="mAP")
    return Section(2, "Truncated SVD of fc6 and fc7", body(
        "**Light Fast R-CNN, trained.** The network of row 3 that learned from block 4 on, its fc6 and fc7 cut by "
        "`limner export svd`'s own code and not trained again. The paper's ranks are a quarter of fc6 and a "
        "sixteenth of fc7.",
        table(("ranks", "fc6", "fc7", "mAP", "person", "against whole", "AP", "paper, mAP"), rows),
        image(drawn, "svd", "mAP against the rank of fc6"),
        f"At the paper's ranks: {results[_svd('1/4')].verdict(whole)}; at a quarter of those: "
        f"{results[_svd('1/16')].verdict(whole)}. Equal shares need not cost the same in layers a tenth as wide.",
    ))  # fmt: skip


def layers(results: Results) -> Section:
    """The paper: table 5, model L."""
    variants = {
        "fast_fc6": ("fc6 and fc7", "61.4 (from fc6 on)"),
        "fast_11": ("block 11", ""),
        "fast": ("block 4", "66.9 (from conv3_1 on)"),
        "fast_all": ("the first layer", "67.2 (from conv2_1 on)"),
    }
    first = results["fast_fc6"]
    rows = []
    for name, (start, paper) in variants.items():
        each = results[name]
        difference = each.against(first) if name != "fast_fc6" else ""
        told = (f"{each.train_s / 60:.1f}", *each.told(), difference, f"{each.ap:.1f}")
        rows.append((start, *told, paper))
    drawn, (left, right) = figure(2)
    places = ["fc6", "block 11", "block 4", "all"]
    found = [results[name] for name in variants]
    left.errorbar(places, [e.voc for e in found], [e.deviation for e in found], marker="o", color=BLUE, capsize=3)
    left.set(title="mAP, trained from there on", ylim=(0, None))
    right.bar(places, [e.train_s / 60 for e in found], color=BLUE)
    right.set(title="training, minutes of CPU")
    return Section(3, "Fine-tuned layers against mAP", body(
        f"Fast R-CNN. {_setting()} `freeze_until` is all that differs.",
        table(("trained from", "training, min", "mAP", "person", "against fc6", "AP", "paper, mAP"), rows),
        image(drawn, "layers", "mAP and training time against the first layer that is trained"),
        f"Against fc6, block 11: {results['fast_11'].verdict(first)}; block 4: {results['fast'].verdict(first)}; all: "
        f"{results['fast_all'].verdict(first)}. The paper gains 5.5 and 5.8 points in 40,000 steps on 5,011 pictures. "
        "That convolutions should learn, too, shows here for the last blocks at most. Training the whole trunk spoils "
        f"it in so short a run: all layers have one rate, and after {STEPS} steps the loss of classes is almost twice "
        "block 4's. The paper leaves conv1 and conv2 as they are, for they are general and cost time: every earlier "
        "layer makes a step dearer here, too.",
    ))  # fmt: skip


def tasks(results: Results) -> Section:
    """The paper: table 6, model L."""
    variants = {
        "fast_classes": ("no", "no", "no", "62.6"),
        "fast_unmoved": ("yes", "no", "no", "63.4"),
        "fast_stages": ("no", "yes", "yes", "64.0"),
        "fast": ("yes", "no", "yes", "66.9"),
    }
    first = results["fast_classes"]
    rows = []
    for name, told in variants.items():
        each = results[name]
        difference = each.against(first) if name != "fast_classes" else ""
        rows.append((*told[:3], *each.told(), difference, f"{each.ap:.1f}", told[3]))
    drawn, (left, right) = figure(2)
    places = ["classes", "multi-task", "stage-wise\n+ boxes", "multi-task\n+ boxes"]
    found = [results[name] for name in variants]
    left.bar(places, [e.voc for e in found], yerr=[e.deviation for e in found], color=BLUE, capsize=3)
    left.set(title="mAP here")
    right.bar(places, [float(told[3]) for told in variants.values()], color=GREY)
    right.set(title="mAP in the paper", ylim=(60, 68))
    for axis in (left, right):
        axis.tick_params("x", labelsize=7)
    return Section(4, "The four multi-task columns", body(
        f"Fast R-CNN. {_setting()} Without multi-task training the loss of the boxes counts nothing "
        "(`box_loss_weight` 0); stage-wise, the box layer alone then learns for as many steps again. Without boxes at "
        "test a box stays the proposal that it was.",
        table(
            ("multi-task", "stage-wise", "boxes at test", "mAP", "person", "against the first", "AP", "paper, mAP"),
            rows,
        ),
        image(drawn, "tasks", "mAP of the four columns here and in the paper"),
        f"Multi-task training alone: {results['fast_unmoved'].verdict(first)}; boxes moved at test, by the layer that "
        f"learned with the rest: {results['fast'].verdict(results['fast_unmoved'])}; multi-task against stage-wise: "
        f"{results['fast'].verdict(results['fast_stages'])}. The paper: +0.8, +3.5 and +2.9 points of mAP. Boxes learn "
        f"late: in these {STEPS} steps their loss falls by less than a tenth, that of the classes by more than half.",
    ))  # fmt: skip


def proposals(results: Results) -> Section:
    """The paper: section 5.5, figure 3."""
    rows, looked, found = [], [], []
    for name in [*map(str, COUNTS), *(f"dense_{count}" for count in DENSE)]:
        each, recall = results[f"fast_{name}"], results.raw(f"recall_{name}")
        most = f"{int(name):,}" if name.isdigit() else f"all, and {int(name.removeprefix('dense_')):,} windows"
        shares = (f"{100 * recall[key]:.1f}" for key in ("recall", "average"))
        rows.append((most, f"{recall['boxes']:,.0f}", *shares, *each.told(), f"{each.ap:.1f}", f"{each.test_s:.2f}"))
        looked.append(recall["boxes"])
        found.append((recall["recall"], recall["average"], each.voc, each.deviation))
    best = max(rows, key=lambda row: float(row[5].split()[0]))[0]
    whole = results[f"fast_{COUNTS[-1]}"]
    drawn, (axis,) = figure()
    at, average, voc, deviation = (np.array(each) for each in zip(*found, strict=True))
    searched = slice(len(COUNTS))
    axis.plot(looked, 100 * at, color=GREY, marker=".", label="recall at IoU 0.5, %")
    axis.plot(looked, 100 * average, color=ORANGE, marker=".", label="average recall, %")
    axis.errorbar(looked, voc, deviation, color=BLUE, capsize=3, marker="o", label="mAP")
    axis.axvspan(looked[searched][-1] * 1.05, looked[-1] * 1.1, color=GREY, alpha=0.2, lw=0)
    axis.set(xscale="log", xlabel="boxes a picture (shaded: windows added)", ylim=(0, 100))
    axis.legend(fontsize=8)
    return Section(5, "mAP and recall against the number of proposals", body(
        "The Fast R-CNN of row 3 that learned from block 4 on. At most so many proposals of selective search (fast, on "
        f"pictures 400 pixels wide: all that it finds are {looked[searched][-1]:,.0f} on average), then windows of a "
        "grid, drawn at random, beside all of them. Recall is of the objects of all classes. The paper (figure 3): "
        "mAP rises and then falls a little from 1,000 to 10,000 proposals while average recall goes on rising; dense "
        "windows beside 2,000 proposals cost more the more there are.",
        table(("proposals", "boxes", "recall at 0.5", "average recall", "mAP", "person", "AP", "test, s"), rows),
        image(drawn, "proposals", "mAP, recall and average recall against the number of boxes"),
        f"Recall rises with every proposal, AP does not: it is best for persons at {best}. From {COUNTS[0]} proposals "
        f"to all it changes by {whole.verdict(results[f'fast_{COUNTS[0]}'])}, and with {DENSE[-1]:,} windows more by "
        f"{results[f'fast_dense_{DENSE[-1]}'].verdict(whole)}. A network that learned so little finds hardly a small "
        "object, and the small boxes that come late can only harm it; the paper's is best at about 2,000. OpenCV's "
        "fast mode ends where the paper's counts begin, and windows stand in for more.",
    ))  # fmt: skip


def faster(results: Results) -> Section:
    """The paper: Ren et al. 2015, tables 3 and 5 (VGG-16, VOC 2007)."""
    seconds = results.raw("seconds")
    rows = []
    for name, proposing, told, paper in (
        ("fast", seconds["search"], "Fast R-CNN on selective search", ("1,510 + 320", "66.9")),
        ("faster", 0.0, "Faster R-CNN, its own 300 proposals", ("198", "69.9")),
    ):
        each = results[name]
        milliseconds = (f"{1000 * value:.0f}" for value in (proposing, seconds[name], proposing + seconds[name]))
        cost = f"{each.train_s / 60:.1f}"
        rows.append((told, *milliseconds, cost, *each.told(), f"{each.ap:.1f}", *paper))
    drawn, (left, right) = figure(2)
    names = ["Fast", "Faster"]
    search, network = [1000 * seconds["search"], 0], [1000 * seconds[name] for name in ("fast", "faster")]
    left.bar(names, search, color=ORANGE, label="selective search")
    left.bar(names, network, bottom=search, color=BLUE, label="network")
    left.set(title="ms a picture")
    left.legend(fontsize=8)
    found = [results[name] for name in ("fast", "faster")]
    right.bar(names, [e.voc for e in found], yerr=[e.deviation for e in found], color=BLUE, capsize=3)
    right.set(title="mAP")
    return Section(6, "Fast with selective search against Faster", body(
        f"The same trunk from block 4 on, the same box head, as many steps. {_setting()} Milliseconds of one thread's "
        "CPU, the median of 24 pictures. The paper: VGG-16 on a K40.",
        table(
            ("system", "proposals, ms", "network, ms", "together", "training, min", "mAP", "person", "AP",
             "paper, ms", "mAP"),
            rows,
        ),
        image(drawn, "faster", "time a picture and mAP of Fast and Faster R-CNN"),
        f"Selective search takes {seconds['search'] / seconds['fast']:.1f} times as long as the network that waits for "
        f"it, and Faster R-CNN needs none. Faster against Fast: {results['faster'].verdict(results['fast'])}. The "
        f"paper gains 3 points of mAP. COCO's AP, which asks for tight boxes, is {results['faster'].ap:.1f} against "
        f"{results['fast'].ap:.1f}: an RPN that starts from nothing has {STEPS} steps here, the paper's 80,000. It "
        "takes longer to train, since proposals are made anew in every step, where those of Fast R-CNN are on disk.",
    ))  # fmt: skip


def _setting() -> str:
    return (
        f"{', '.join(CLASSES)}: 233 pictures of COCO to learn from, 101 to measure on, canvases of 320 x 512 at "
        f"most, {STEPS} steps of two pictures, one seed. mAP is VOC's at an IoU of 0.5, with the deviation that drawing"
        " other test pictures would bring; AP is COCO's."
    )
