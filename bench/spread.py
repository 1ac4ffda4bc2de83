"""How far an AP may be off because the pictures are few: resampling pictures, for one class (Efron 1979).

V thresholds of IoU, D detections of all pictures by falling score, P pictures.
"""

import contextlib
import io
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Kind = Literal["bbox", "segm"]
RECALLS = np.linspace(0, 1, 101)


class Verdicts(NamedTuple):
    """true (V, D): is a detection right at this threshold; picture (D,): whose it is; truths (P,): objects of each."""

    true: NDArray[np.bool_]
    picture: NDArray[np.int64]
    truths: NDArray[np.int64]


def verdicts(results: list[dict[str, Any]], truth: dict[str, Any], kind: Kind) -> Verdicts:
    """Of COCO results on a truth of one class without ignored regions, by pycocotools' matching."""
    if len(truth["categories"]) != 1 or any(each.get("iscrowd") for each in truth["annotations"]):
        raise ValueError("verdicts are for one class without crowds")
    coco: Any = COCO()
    coco.dataset = {**truth, "info": {}}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), kind)
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
    order = {image: number for number, image in enumerate(run.params.imgIds)}
    scores, true, picture = [], [], []
    truths = np.zeros(len(order), np.int64)
    for each in filter(None, run.evalImgs):
        number = order[each["image_id"]]
        truths[number] = len(each["gtIds"])
        scores.append(np.array(each["dtScores"]))
        true.append(np.asarray(each["dtMatches"]) > 0)
        picture.append(np.full(len(scores[-1]), number))
    falling = np.argsort(-np.concatenate(scores), kind="stable")
    return Verdicts(np.concatenate(true, axis=1)[:, falling], np.concatenate(picture)[falling], truths)


def average_precision(found: Verdicts, weights: NDArray[np.floating[Any]] | None = None) -> float:
    """COCO's AP, each picture counted `weights` (P,) times."""
    times = np.ones(len(found.truths)) if weights is None else weights
    mine = times[found.picture]
    hits, total = np.cumsum(found.true * mine, axis=1), np.cumsum(mine)
    precision = hits / np.maximum(total, np.finfo(float).eps)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = hits / (times @ found.truths)
    places = [np.searchsorted(row, RECALLS, side="left") for row in recall]
    padded = np.pad(precision, ((0, 0), (0, 1)))
    return float(np.mean([row[place] for row, place in zip(padded, places, strict=True)]))


def difference(ours: Verdicts, theirs: Verdicts, resamplings: int = 500) -> tuple[float, float]:
    """Where 95 % of the differences in AP lie, ours minus theirs, when the same pictures are drawn anew for both."""
    rng = np.random.default_rng(0)
    count = len(ours.truths)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamplings).astype(float)
    gaps = [average_precision(ours, draw) - average_precision(theirs, draw) for draw in draws]
    low, high = np.percentile(gaps, [2.5, 97.5])
    return float(low), float(high)


def save(path: Path, found: Verdicts) -> None:
    np.savez_compressed(path, **found._asdict())


def load(path: Path) -> Verdicts:
    with np.load(path) as archive:
        return Verdicts(**{name: archive[name] for name in Verdicts._fields})
