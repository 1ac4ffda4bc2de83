"""Pascal VOC: its annotation files as COCO's, and its AP.

VOC counts pixels from 1 and its corners belong to the box, so box (xmin, ymin, xmax, ymax) is the continuous
(xmin - 1, ymin - 1, xmax, ymax). A `difficult` object becomes `"ignore": 1`: neither positive nor negative in training,
and in evaluation neither asked for nor held against who finds it.
"""

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
Floats = NDArray[np.float64]


def read(path: Path) -> dict[str, Any]:
    """COCO's content of a list of names (VOC2007/ImageSets/Main/trainval.txt) or of a folder of XML files.

    Categories are the 20 classes, or the names that occur where others do. Raises DataError, which names the file.
    """
    files = sorted(path.glob("*.xml")) if path.is_dir() else _listed(path)
    if not files:
        raise DataError(f"{path}: no annotations of Pascal VOC in it")
    roots = [_parsed(file) for file in files]
    names = {_text(each, "name", file) for root, file in zip(roots, files, strict=True) for each in root.iter("object")}
    categories = CLASSES if names <= set(CLASSES) else tuple(sorted(names))
    images, annotations = [], []
    for number, (root, file) in enumerate(zip(roots, files, strict=True), start=1):
        images.append(_image(root, number, file))
        for each in root.findall("object"):
            annotations.append(_annotation(each, number, len(annotations) + 1, categories, file))
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
    }


def _listed(path: Path) -> list[Path]:
    """ImageSets/Main/NAME.txt lists, line by line, what is in Annotations; a list of one class has a flag behind."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such annotation file") from error
    folder = path.parent.parent.parent / "Annotations"
    return [folder / f"{line.split()[0]}.xml" for line in lines if line.strip()]


def _parsed(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such annotation file") from error
    except ElementTree.ParseError as error:
        raise DataError(f"{file}: not XML ({error})") from error


def _text(element: ElementTree.Element, path: str, file: Path) -> str:
    found = element.findtext(path)
    if found is None:
        raise DataError(f"{file}: not an annotation of Pascal VOC, it lacks <{path.replace('/', '><')}>")
    return found.strip()


def _number(element: ElementTree.Element, path: str, file: Path) -> float:
    text = _text(element, path, file)
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{file}: <{path.replace('/', '><')}> is {text!r}, a number is expected") from None


def _image(root: ElementTree.Element, number: int, file: Path) -> dict[str, Any]:
    width, height = (int(_number(root, f"size/{side}", file)) for side in ("width", "height"))
    return {"id": number, "file_name": _text(root, "filename", file), "width": width, "height": height}


def _annotation(
    element: ElementTree.Element, image: int, number: int, categories: Sequence[str], file: Path
) -> dict[str, Any]:
    x1, y1, x2, y2 = (_number(element, f"bndbox/{name}", file) for name in ("xmin", "ymin", "xmax", "ymax"))
    box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
    difficult = int(element.findtext("difficult") or 0)
    return {
        "id": number,
        "image_id": image,
        "category_id": categories.index(_text(element, "name", file)) + 1,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "ignore": difficult,
    }


def average_precisions(
    results: Iterable[dict[str, Any]], truth: dict[str, Any], iou: float = 0.5
) -> dict[str, dict[int, float]]:
    """{"area": {category: AP}, "eleven": ...} of COCO results and a COCO content, for each category that has objects.

    The protocol of VOC (Everingham et al. 2010, sections 3.4 and 4.2), which no library for COCO's can be set to: a
    detection is held to the object that it overlaps most, and is false if an earlier one has it already; COCO would
    give it the next best. Detections of an ignored object count for nothing. "area" is the exact area under the curve
    (VOC 2010 on), "eleven" the mean of 11 points (until 2009).
    """
    objects, by_category = _by_category(truth["annotations"]), _by_category(results)
    scores: dict[str, dict[int, float]] = {"area": {}, "eleven": {}}
    for category in (each["id"] for each in truth["categories"]):
        wanted = sum(not is_ignored(each) for each in objects[category])
        if wanted:
            is_true = np.array([hit for _, hit in judged(by_category[category], objects[category], iou)], bool)
            recall = np.cumsum(is_true) / wanted
            precision = np.cumsum(is_true) / np.arange(1, len(is_true) + 1)
            scores["area"][category] = area_under(recall, precision)
            scores["eleven"][category] = eleven_points(recall, precision)
    return scores


def _by_category(entries: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    sorted_out: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        sorted_out[entry["category_id"]].append(entry)
    return sorted_out


def is_ignored(annotation: dict[str, Any]) -> bool:
    return bool(annotation.get("ignore", 0)) or bool(annotation.get("iscrowd", 0))


def judged(
    results: Iterable[dict[str, Any]], objects: Iterable[dict[str, Any]], iou: float = 0.5
) -> list[tuple[int, bool]]:
    """Of one category's detections, the best first, the image's id and whether it is true; those of ignored objects
    are left out."""
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for each in objects:
        by_image[each["image_id"]].append(each)
    taken: set[int] = set()
    told = []
    for result in sorted(results, key=lambda each: -each["score"]):  # stable: equal scores stay as they came
        here = by_image.get(result["image_id"], [])
        overlaps = [_iou(result["bbox"], each["bbox"]) for each in here]
        best = int(np.argmax(overlaps)) if here else -1
        if best < 0 or overlaps[best] < iou:
            told.append((result["image_id"], False))
        elif not is_ignored(here[best]):
            told.append((result["image_id"], id(here[best]) not in taken))
            taken.add(id(here[best]))
    return told


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Of xywh boxes; continuous, so VOC's "+ 1" for inclusive corners is in the boxes already."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / (one[2] * one[3] + other[2] * other[3] - both) if both else 0.0


def area_under(recall: Floats, precision: Floats) -> float:
    """Of the curve with every precision raised to the best at no lower recall."""
    steps = np.diff(recall, prepend=0.0)
    return float((steps * np.maximum.accumulate(precision[::-1])[::-1]).sum())


def eleven_points(recall: Floats, precision: Floats) -> float:
    """Mean, over recall 0, 0.1, ... 1, of the best precision at no lower recall."""
    levels = np.arange(11) / 10
    return float(np.mean([precision[recall >= level - 1e-9].max(initial=0.0) for level in levels]))
