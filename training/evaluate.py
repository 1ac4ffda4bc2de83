"""`limner evaluate`: box, mask and keypoint AP of a checkpoint or a bundle, measured on the path that serves.

Pictures go through the service's own decoding, resize, mask coding and keypoint decoding; COCO's protocol (at most 100
detections a picture, all scores above the model's floor) is computed by faster-coco-eval, or by pycocotools, the
reference, on request.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from models import checkpoint
from service.bundle import MANIFEST, Bundle
from service.detector import Detections, Detector, Interpolation, Wants
from service.engines import Precision, open_engine
from service.errors import ServiceError
from service.images import DecodeLimits, Image, decode
from service.proposals import Cache
from training import voc
from training.data import DataError, category_labels, coco_masks, is_ignored, read_annotations, segmentation_of
from training.engine import torch_detector

# What COCO calls its three kinds of evaluation.
Kind = Literal["bbox", "segm", "keypoints"]
Scores = dict[str, dict[str, float]]

# The rows of COCO's summaries that are reported.
BOX_ROWS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR": 8}
KEYPOINT_ROWS = {"AP": 0, "AP50": 1, "AP75": 2, "APm": 3, "APl": 4, "AR": 5}
READ_AHEAD = 32  # pictures in memory at a time


def evaluate(
    detector: Detector,
    images: Path,
    annotations: Path,
    limit: int = 0,
    reference: bool = False,
    interpolation: Interpolation = "bilinear",
) -> Scores:
    """{"bbox": {"AP", "AP50", ...}, "segm": ..., "keypoints": ...}; heads and truths that are missing are left out.

    Boxes have Pascal VOC's mean AP at an IoU of 0.5, too: `VOC` (area under the curve) and `VOC07` (11 points).

    A number is -1 where COCO's protocol has nothing to average (no truth of that size, for instance). Keypoints have a
    second AP, `AP_by_joints`: the same poses in another order, see `_by_joints`.
    """
    content = read_annotations(annotations)
    if limit:
        content["images"] = content["images"][:limit]
    results, seen = predict(detector, images, content, interpolation)
    return score(results, seen, detector, reference)


def predict(
    detector: Detector, images: Path, content: dict[str, Any], interpolation: Interpolation = "bilinear"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """COCO results, and the truth cut down to the model's classes; `interpolation` is the masks'."""
    labels = category_labels(content, detector.bundle.manifest.classes)
    if not labels:
        raise DataError("the annotations hold no category of the model's classes")
    seen = {
        "images": content["images"],
        "categories": [c for c in content["categories"] if c["id"] in labels],
        "annotations": [a for a in content["annotations"] if a["category_id"] in labels],
    }
    wants = Wants(confidence=0.0, max_detections=100, masks="rle", keypoints=True, mask_interpolation=interpolation)
    categories = {label: category for category, label in labels.items()}
    orders = {category["id"]: _joints(category, detector) for category in seen["categories"]}
    results: list[dict[str, Any]] = []
    for start in range(0, len(content["images"]), READ_AHEAD):
        chunk = content["images"][start : start + READ_AHEAD]
        found = detector.detect_images([_read(images, image) for image in chunk], wants)
        for image, detections in zip(chunk, found, strict=True):
            results += _results(detections, image["id"], categories, orders)
    return results, seen


def _read(images: Path, image: dict[str, Any]) -> Image:
    path = images / image["file_name"]
    try:
        pixels = decode(path.read_bytes(), DecodeLimits())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such picture") from error
    if pixels.shape[:2] != (image["height"], image["width"]):
        raise DataError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[0]} upright, its annotations say "
            f"{image['width']}x{image['height']}"
        )
    return pixels


def _joints(category: dict[str, Any], detector: Detector) -> list[int] | None:
    """For each joint of the category the model's; None without a keypoint head or joints."""
    described = detector.bundle.manifest.keypoints
    if described is None or not category.get("keypoints"):
        return None
    ours = {name: index for index, name in enumerate(described.names)}
    return [ours.get(name, -1) for name in category["keypoints"]]


def _results(
    found: Detections, image: int, categories: dict[int, int], orders: dict[int, list[int] | None]
) -> Iterator[dict[str, Any]]:
    for index, (box, label) in enumerate(zip(found.boxes, found.labels, strict=True)):
        if int(label) not in categories:
            continue
        category = categories[int(label)]
        x1, y1, x2, y2 = map(float, box)
        result: dict[str, Any] = {
            "image_id": image,
            "category_id": category,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(found.scores[index]),
        }
        if found.masks is not None:
            result["segmentation"] = found.masks[index]
        order = orders[category]
        if found.keypoints is not None and order is not None:
            result["keypoints"] = _coco_keypoints(found.keypoints[index], order)
            result["joint_score"] = float(found.keypoints[index, :, 2].mean())
        yield result


def _coco_keypoints(points: np.ndarray, order: list[int]) -> list[float]:
    """(J, 3) continuous -> COCO's flat list of pixel indices."""
    chosen = np.zeros((len(order), 3))
    for index, joint in enumerate(order):
        if joint >= 0:
            chosen[index] = points[joint, 0] - 0.5, points[joint, 1] - 0.5, 1
    return [float(value) for value in chosen.ravel()]


def score(results: list[dict[str, Any]], seen: dict[str, Any], detector: Detector, reference: bool) -> Scores:
    scores: Scores = {"bbox": _summary("bbox", results, seen, reference) | _voc(results, seen)}
    if detector.bundle.has_masks:
        masked = _fully_masked(seen)
        if masked["images"]:
            scores["segm"] = _summary("segm", results, masked, reference)
    if detector.bundle.has_keypoints:
        labelled = _with_keypoints(seen)
        if any(a.get("num_keypoints", 0) for a in labelled["annotations"]):
            scores["keypoints"] = _summary("keypoints", results, labelled, reference)
            ranked = _summary("keypoints", _by_joints(results), labelled, reference)
            scores["keypoints"]["AP_by_joints"] = ranked["AP"]
    return scores


def _voc(results: list[dict[str, Any]], seen: dict[str, Any]) -> dict[str, float]:
    by_kind = voc.average_precisions(results, seen)
    named = {"VOC": by_kind["area"], "VOC07": by_kind["eleven"]}
    return {name: float(np.mean(list(each.values()))) if each else -1.0 for name, each in named.items()}


def _by_joints(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Poses ranked as HRNet ranks them (Sun et al. 2019, section 4.1): a box's score times the mean of its joints'.

    A box can be sure where the pose in it is not; COCO leaves the choice of the score to whoever submits.
    """
    return [{**r, "score": r["score"] * r.get("joint_score", 1.0)} for r in results]


def _fully_masked(seen: dict[str, Any]) -> dict[str, Any]:
    """Pictures whose objects all have masks: on others a good mask would count as a false one."""
    unmasked = {a["image_id"] for a in seen["annotations"] if not is_ignored(a) and not a.get("segmentation")}
    return _restrict(seen, {image["id"] for image in seen["images"]} - unmasked)


def _with_keypoints(seen: dict[str, Any]) -> dict[str, Any]:
    labelled = {image["id"] for image in seen["images"] if image.get("keypoints_labelled", True)}
    restricted = _restrict(seen, labelled)
    restricted["categories"] = [c for c in restricted["categories"] if c.get("keypoints")]
    known = {c["id"] for c in restricted["categories"]}
    restricted["annotations"] = [a for a in restricted["annotations"] if a["category_id"] in known]
    return restricted


def _restrict(seen: dict[str, Any], images: set[int]) -> dict[str, Any]:
    return {
        "images": [image for image in seen["images"] if image["id"] in images],
        "categories": seen["categories"],
        "annotations": [a for a in seen["annotations"] if a["image_id"] in images],
    }


def _truth(seen: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The annotations as both evaluators read them; ignored regions as crowds, the one kind that both know."""
    images = {image["id"]: image for image in seen["images"]}
    annotations = []
    for number, annotation in enumerate((a for a in seen["annotations"] if a["image_id"] in images), start=1):
        image = images[annotation["image_id"]]
        # Numbered afresh: COCO's code takes the id 0 for "no match".
        entry = {**annotation, "id": number, "iscrowd": int(is_ignored(annotation))}
        if kind == "segm":
            entry["segmentation"] = segmentation_of(annotation, image["height"], image["width"]) or _box_mask(
                annotation, image
            )
        if kind == "keypoints":
            joints = next(len(c["keypoints"]) for c in seen["categories"] if c["id"] == annotation["category_id"])
            entry.setdefault("num_keypoints", 0)
            entry.setdefault("keypoints", [0] * 3 * joints)
        entry.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        annotations.append(entry)
    return {"images": seen["images"], "categories": seen["categories"], "annotations": annotations, "info": {}}


def _box_mask(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """An ignored region without a mask covers its box."""
    return coco_masks.frPyObjects([annotation["bbox"]], image["height"], image["width"])[0]


def _summary(kind: Kind, results: list[dict[str, Any]], seen: dict[str, Any], reference: bool) -> dict[str, float]:
    rows = KEYPOINT_ROWS if kind == "keypoints" else BOX_ROWS
    images = {image["id"] for image in seen["images"]}
    categories = {category["id"] for category in seen["categories"]}
    chosen = [r for r in results if r["image_id"] in images and r["category_id"] in categories]
    truth = _truth(seen, kind)
    if not chosen:
        # Both evaluators refuse an empty list of results. Nothing found: 0 where there was something to find.
        return dict.fromkeys(rows, 0.0 if any(not a["iscrowd"] for a in truth["annotations"]) else -1.0)
    with contextlib.redirect_stdout(io.StringIO()):
        stats = (_pycocotools if reference else _faster)(kind, _own_fields(kind, chosen), truth)
    return {name: float(stats[row]) for name, row in rows.items()}


def _own_fields(kind: Kind, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What loadRes needs for this kind; it guesses the kind from the fields it finds."""
    field = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    return [{name: result[name] for name in ("image_id", "category_id", "score", field)} for result in results]


def _faster(kind: Kind, results: list[dict[str, Any]], truth: dict[str, Any]) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    coco = COCO(truth)
    run = COCOeval_faster(coco, coco.loadRes(results), kind, **_sigmas(kind, truth, "kpt_oks_sigmas"))
    for part in (run.evaluate, run.accumulate, run.summarize):
        part()
    return run.stats


def _pycocotools(kind: Kind, results: list[dict[str, Any]], truth: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco: Any = COCO()
    coco.dataset = truth
    coco.createIndex()
    run = COCOeval(coco, coco.loadRes(results), kind)
    for sigmas in _sigmas(kind, truth, "sigmas").values():
        run.params.kpt_oks_sigmas = np.asarray(sigmas)
    for part in (run.evaluate, run.accumulate, run.summarize):
        part()
    return run.stats


def _sigmas(kind: Kind, truth: dict[str, Any], name: str) -> dict[str, Any]:
    """COCO's own for its 17 joints; for other skeletons the mean of those for every joint."""
    joints = {len(category.get("keypoints", ())) for category in truth["categories"]}
    return {} if kind != "keypoints" or joints == {17} else {name: [0.071] * max(joints)}


def open_detector(path: Path, engine: str, threads: int, device: str, precision: Precision = "float32") -> Detector:
    """Of a checkpoint, or of a bundle with the service's engines."""
    if (path / MANIFEST).is_file():
        bundle = Bundle.read(path)
        return Detector(bundle, open_engine(bundle, engine, threads, precision).engine)  # type: ignore[arg-type]
    import torch

    if threads:
        torch.set_num_threads(threads)
    model, spec = checkpoint.load(path)
    return torch_detector(model.to(device).to(memory_format=torch.channels_last), spec)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="limner evaluate",
        description="box, mask and keypoint AP on the path that serves",
        epilog="Example: limner evaluate bundles/person/1 --images val2017 --annotations instances_val2017.json --json",
    )
    parser.add_argument("model", type=Path, help="a checkpoint or a bundle")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--engine", default="auto", choices=("auto", "onnx", "openvino"), help="for a bundle")
    parser.add_argument("--precision", default="float32", choices=get_args(Precision), help="for a bundle")
    parser.add_argument("--device", default="cpu", help="for a checkpoint")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0, help="only the first so many pictures")
    parser.add_argument("--cache", type=Path, help="folder that keeps proposals, for models that take them")
    parser.add_argument(
        "--mask-interpolation", default="bilinear", choices=get_args(Interpolation), help="of masks to pixels"
    )
    parser.add_argument("--reference", action="store_true", help="pycocotools instead of faster-coco-eval")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(argv)
    try:
        detector = open_detector(options.model, options.engine, options.threads, options.device, options.precision)
        if options.cache:
            detector.propose = Cache(options.cache)
        scores = evaluate(
            detector,
            options.images,
            options.annotations,
            options.limit,
            options.reference,
            options.mask_interpolation,
        )
    except (DataError, ServiceError, checkpoint.CheckpointError, OSError) as error:
        print(f"limner evaluate: {error}", file=sys.stderr)
        return 2
    measured = {
        "annotations": options.annotations.name,
        "engine": detector.engine.name,
        "precision": detector.engine.precision,
        "limit": options.limit,
    }
    print(json.dumps({**scores, "data": measured}) if options.json else table(scores))
    return 0


def table(scores: Scores) -> str:
    lines = []
    for kind, numbers in scores.items():
        lines.append(f"{kind:10}" + "  ".join(f"{name} {100 * value:5.1f}" for name, value in numbers.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
