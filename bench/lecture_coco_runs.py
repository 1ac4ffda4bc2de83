"""What the lecture's rows on COCO are made of: small networks, trained and measured on a few hundred pictures.

    python -m bench.lecture_coco_runs --data .data/coco --trunk mobilenet_v2.pth --cache .cache/lecture [--rows 3 5]

`--data` is a folder with `images` and `annotations/instances_{train,dev}.json`. Everything that was trained, searched
or measured stays in `--cache` and is not done again. Networks are the zoo's light ones, on recipes of `training/` made
short; one thread, one seed. `bench.lecture_coco` tells what came out.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.results import keep
from export import svd
from models import boxes as box_ops
from models import checkpoint
from models.checkpoint import CanvasRule, ProposalRule
from models.network import Network
from service.detector import Wants
from service.proposals import Cache, propose, sliding_windows
from training import evaluate, train, voc
from training.data import Bytes, Floats, Source, read_annotations, read_picture, read_source
from training.engine import torch_detector
from training.recipes import RECIPES, Recipe

CLASSES = ("person", "car", "chair", "dining table", "bowl")
SEARCHED = ProposalRule(width=400)  # selective search, fast; a picture 500 wide takes twice as long
FEW = 300  # proposals of the systems that cost by the proposal or by the feature kept
STEPS = 600
RESAMPLINGS = 300
TIMED = 24  # pictures
RANKS = {f"1/{share}": (384 // share, 384 // share // 4) for share in (2, 4, 8, 16)}  # of fc6 and fc7; the paper's: 1/4
COUNTS = (100, 250, 500, 1000, 2000)
DENSE = (1000, 3000)  # windows beside all that was found
Measured = dict[str, Any]


def recipes() -> dict[str, Recipe]:
    """By the name of the variant. All learn for as many steps, and all but R-CNN, where each costs a pass through the
    trunk, from as many RoIs of the same pictures."""
    fast = _short("fast_rcnn_mobilenetv2")
    few = replace(SEARCHED, max_proposals=FEW)
    return {
        "fast": fast,
        "faster": _short("faster_rcnn_mobilenetv2"),
        "spp": replace(_short("spp_net_mobilenetv2"), proposals=few),
        "fast_fc6": replace(fast, freeze_until="fc6"),
        "fast_11": replace(fast, freeze_until="11"),
        "fast_all": replace(fast, freeze_until=""),
        "fast_classes": replace(fast, options={"box_loss_weight": 0.0}),
        "fast_stages": replace(fast, freeze_until="fc6", frozen=("box_head.fcs.", "box_head.classes.")),
        "r_cnn": replace(_short("r_cnn_mobilenetv2"), proposals=few, options={"box_samples": 16}, freeze_until="4"),
    }


STARTS = {"fast_stages": "fast_classes"}  # from what another learned


def _short(name: str) -> Recipe:
    recipe = RECIPES[name]()
    return replace(
        recipe,
        classes=CLASSES,
        canvas=CanvasRule(short_side=320, long_side=512, antialias=True),
        proposals=recipe.proposals and SEARCHED,
        steps=STEPS,
        base_lr=3e-4,
        trunk_relative_steps=True,
        warmup_steps=50,
        ema_decay=0.99,
        amp=False,
    )


class Bench:
    """Trains and measures; `results` keeps JSON by the name of what was measured. `anew`: which is measured again."""

    def __init__(self, data: Path, trunk: Path, cache: Path, anew: bool = False) -> None:
        self.anew, self.fresh = anew, set[str]()
        self.images, self.truth = data / "images", data / "annotations" / "instances_dev.json"
        self.trunk, self.cache, self.results = trunk, cache, cache / "coco"
        self.searched = Cache(cache / "proposals")
        self.results.mkdir(parents=True, exist_ok=True)
        self.pictures = self.results / "train.json"
        if not self.pictures.exists():
            keep(self.pictures, with_classes(read_annotations(data / "annotations" / "instances_train.json")))

    def trained(self, name: str) -> Path:
        """The folder of the run, whose `cost.json` says how many seconds of CPU it took. A run that was stopped goes on
        where it was."""
        run, recipe = self.cache / "runs" / name, recipes()[name]
        if _is_done(run, recipe):
            return run
        command = [f"lecture_{name}", "--data", f"coco={self.images}:{self.pictures}", "--out", str(run), "--resume"]
        command += ["--cache", str(self.cache), "--device", "cpu", "--threads", "1", "--workers", "0"]
        if name in STARTS:
            command += ["--init", str(self.trained(STARTS[name]) / "last")]
        else:
            command += ["--trunk", str(self.trunk)]
        RECIPES[command[0]] = lambda: replace(recipe, name=command[0])
        cost = run / "cost.json"
        before = json.loads(cost.read_text())["cpu_s"] if cost.exists() else 0.0
        began = time.process_time()
        try:
            train.main(command)
        finally:
            run.mkdir(parents=True, exist_ok=True)
            keep(cost, {"cpu_s": before + time.process_time() - began})
        if not _is_done(run, recipe):
            raise SystemExit(f"{name} is not trained yet; the same command goes on")
        return run

    def measure(self, name: str, run: Path, of: str = "last", **changes: Any) -> Measured:
        """AP of a run's checkpoint; see `scores` for `changes`."""

        def compute() -> Measured:
            model, spec = checkpoint.load(run / of)
            return self.scores(model, spec, **changes) | json.loads((run / "cost.json").read_text())

        return self.kept(name, compute)

    def scores(
        self,
        model: Network,
        spec: checkpoint.Spec,
        count: int | None = None,
        dense: int = 0,
        change: Callable[[Network, checkpoint.Spec], tuple[Network, checkpoint.Spec]] | None = None,
    ) -> Measured:
        """On the first `count` proposals of a picture and `dense` windows more, of the model as `change` makes it."""
        if change:
            model, spec = change(model, spec)
        detector = torch_detector(model, spec, max_batch=1)
        most = count

        def given(image: Bytes, rule: Any, count: int | None = None) -> Floats:
            return self.proposals(image, rule, most, dense)

        detector.propose = given
        began = time.process_time()
        found, seen = evaluate.predict(detector, self.images, read_annotations(self.truth))
        took = time.process_time() - began
        box = evaluate.score(found, seen, detector, reference=False)["bbox"]
        names = {category["id"]: category["name"] for category in seen["categories"]}
        classes = {names[each]: ap for each, ap in voc.average_precisions(found, seen)["area"].items()}
        return {
            "scores": box,
            "classes": classes,
            "resampled": resampled(found, seen),
            "test_s": took / len(seen["images"]),
            "pictures": len(seen["images"]),
        }

    def proposals(self, image: Bytes, rule: Any, count: int | None, dense: int) -> Floats:
        found = self.searched(image, rule, count)
        if not dense:
            return found
        windows = sliding_windows(*image.shape[:2])
        chosen = np.random.default_rng(0).permutation(len(windows))[:dense]
        return np.concatenate((found, windows[chosen]))

    def recall(self, count: int | None, dense: int = 0) -> Measured:
        """Of the objects of all classes together: at an IoU of 0.5, the mean over 0.5 to 0.95, and boxes a picture."""
        best: list[NDArray[np.float32]] = []
        looked = 0
        items = read_source(Source("dev", self.images, self.truth), CLASSES, None)
        for item in items:
            boxes = self.proposals(np.asarray(read_picture(item)), SEARCHED, count, dense)
            looked += len(boxes)
            if len(item.boxes):
                overlaps = box_ops.iou(torch.from_numpy(boxes), torch.from_numpy(item.boxes))
                best.append(overlaps.amax(0).numpy())
        quality = np.concatenate(best)
        levels = np.arange(0.5, 0.951, 0.05)
        return {
            "recall": float((quality >= 0.5).mean()),
            "average": float(np.mean([(quality >= level).mean() for level in levels])),
            "boxes": looked / len(items),
        }

    def seconds(self) -> dict[str, float]:
        """Of CPU a picture, the median of `TIMED`: selective search, the networks of Fast and of Faster R-CNN."""
        taken: dict[str, list[float]] = {"search": [], "fast": [], "faster": []}
        networks = {name: checkpoint.load(self.trained(name) / "last") for name in ("fast", "faster")}
        detectors = {name: torch_detector(*loaded, max_batch=1) for name, loaded in networks.items()}
        wants = Wants(confidence=0.0, max_detections=100)
        for item in read_source(Source("dev", self.images, self.truth), CLASSES, None)[:TIMED]:
            picture = np.asarray(read_picture(item))
            began = time.process_time()
            boxes = propose(picture, SEARCHED)
            taken["search"].append(time.process_time() - began)
            for name, detector in detectors.items():
                canvas = detector.fit(picture, boxes)
                began = time.process_time()
                detector.run([canvas], [wants])
                taken[name].append(time.process_time() - began)
        return {name: float(np.median(each)) for name, each in taken.items()}

    def kept(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self.results / f"{name}.json"
        if not path.exists() or (self.anew and name not in self.fresh):
            print(f"measuring {name}", flush=True)
            keep(path, compute())
            self.fresh.add(name)
        return json.loads(path.read_text())


def with_classes(content: dict[str, Any]) -> dict[str, Any]:
    """The pictures that hold any of the classes: a short run has no time for others."""
    categories = {each["id"] for each in content["categories"] if each["name"] in CLASSES}
    wanted = {each["image_id"] for each in content["annotations"] if each["category_id"] in categories}
    return {
        **content,
        "images": [each for each in content["images"] if each["id"] in wanted],
        "annotations": [each for each in content["annotations"] if each["image_id"] in wanted],
    }


def resampled(results: Sequence[dict[str, Any]], seen: dict[str, Any]) -> dict[str, list[float]]:
    """VOC's AP of each class on as many pictures drawn from them with replacement, many times, nan where none holds the
    class; the same draws for every system."""
    pictures = {image["id"]: index for index, image in enumerate(seen["images"])}
    drawn = np.random.default_rng(0).multinomial(len(pictures), [1 / len(pictures)] * len(pictures), RESAMPLINGS)
    by_class = {}
    for category, name in ((each["id"], each["name"]) for each in seen["categories"]):
        truth = [each for each in seen["annotations"] if each["category_id"] == category]
        judged = voc.judged([each for each in results if each["category_id"] == category], truth)
        owners = np.array([pictures[picture] for picture, _ in judged], int)
        hits = np.array([hit for _, hit in judged], float)
        wanted = drawn @ np.bincount(
            [pictures[each["image_id"]] for each in truth if not voc.is_ignored(each)], minlength=len(pictures)
        )
        weights = drawn[:, owners]
        true = (weights * hits).cumsum(1)
        precision = true / np.maximum(weights.cumsum(1), 1)
        by_class[name] = [
            voc.area_under(t / n, p) if n else np.nan for t, p, n in zip(true, precision, wanted, strict=True)
        ]
    return by_class


def without_deltas(model: Network, spec: checkpoint.Spec) -> tuple[Network, checkpoint.Spec]:
    """Boxes stay the proposals that they were."""
    with torch.no_grad():
        for parameter in model.box_head.deltas.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    return model, spec


def row_1(bench: Bench) -> None:
    bench.measure("fast_few", bench.trained("fast"), count=FEW)
    for name in ("spp", "r_cnn"):
        bench.measure(f"{name}_few", bench.trained(name), "fitted")


def row_2(bench: Bench) -> None:
    for name, (fc6, fc7) in RANKS.items():
        ranks = {"box_head.fcs.0": fc6, "box_head.fcs.1": fc7}
        thin = partial(svd.compress, ranks=ranks)
        bench.measure(f"svd_{name.replace('/', '_')}", bench.trained("fast"), change=thin)
    bench.measure("fast", bench.trained("fast"))


def row_3(bench: Bench) -> None:
    for name in ("fast", "fast_fc6", "fast_11", "fast_all"):
        bench.measure(name, bench.trained(name))


def row_4(bench: Bench) -> None:
    bench.measure("fast_classes", bench.trained("fast_classes"), change=without_deltas)
    bench.measure("fast_unmoved", bench.trained("fast"), change=without_deltas)
    bench.measure("fast_stages", bench.trained("fast_stages"))
    bench.measure("fast", bench.trained("fast"))


def row_5(bench: Bench) -> None:
    for count in COUNTS:
        bench.kept(f"recall_{count}", partial(bench.recall, count))
        bench.measure(f"fast_{count}", bench.trained("fast"), count=count)
    for dense in DENSE:
        bench.kept(f"recall_dense_{dense}", partial(bench.recall, None, dense))
        bench.measure(f"fast_dense_{dense}", bench.trained("fast"), dense=dense)


def row_6(bench: Bench) -> None:
    bench.measure("fast", bench.trained("fast"))
    bench.measure("faster", bench.trained("faster"))
    bench.kept("seconds", bench.seconds)


ROWS: dict[int, Callable[[Bench], None]] = {3: row_3, 6: row_6, 4: row_4, 5: row_5, 2: row_2, 1: row_1}


def _is_done(run: Path, recipe: Recipe) -> bool:
    last = run / "last"
    if not last.exists() or checkpoint.read_config(last)["provenance"]["step"] < recipe.steps:
        return False
    return (run / "fitted").exists() or not recipe.fits_machines


def measure(data: Path, trunk: Path, cache: Path, rows: Sequence[int], anew: bool = False) -> None:
    torch.set_num_threads(1)
    bench = Bench(data, trunk, cache, anew)
    for row in rows:
        if row in ROWS:
            ROWS[row](bench)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with images and annotations of COCO")
    parser.add_argument("--trunk", type=Path, required=True, help="ImageNet weights of MobileNetV2 (torchvision, .pth)")
    parser.add_argument("--cache", type=Path, default=Path(".cache/lecture"))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--train", nargs="+", default=[], choices=recipes(), help="only train these")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the cost so far is written
    if options.train:
        bench = Bench(options.data, options.trunk, options.cache)
        torch.set_num_threads(1)
        for name in options.train:
            bench.trained(name)
        return
    measure(options.data, options.trunk, options.cache, options.rows)


if __name__ == "__main__":
    main()
