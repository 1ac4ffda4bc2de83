"""Annotation files of COCO's format or Pascal VOC's, several at once and partially labelled, as plain arrays in memory.

An `Item` is one picture with its objects in image coordinates. Any object may lack a mask or keypoints; what it lacks
is recorded so that no loss ever treats "not labelled" as "not there". Crowd regions and annotations flagged
`"ignore": 1` become ignore boxes: neither objects nor background. This file knows nothing of augmentation or tensors.

COCO keypoints are pixel indices; here, as everywhere in limner, coordinates are continuous, so 0.5 is added on load.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from numpy.typing import NDArray
from PIL import Image, ImageOps

from models.checkpoint import Keypoints
from training import voc
from training.errors import DataError as DataError

coco_masks: Any = pycocotools.mask  # its stubs know neither polygons nor codes as plain dictionaries
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Polygons = list[list[float]]
Segmentation = Polygons | dict[str, Any]  # polygons, or a compressed run-length code


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    images: Path
    annotations: Path
    weight: float = 1.0  # how often each picture is seen per epoch

    @classmethod
    def parse(cls, text: str) -> "Source":
        """`NAME=IMAGES_DIR:ANNOTATIONS[:WEIGHT]`, as on the command line."""
        name, equals, rest = text.partition("=")
        parts = rest.split(":")
        if not equals or not name or len(parts) not in (2, 3) or not all(parts):
            raise DataError(f"--data {text!r}: expected NAME=IMAGES_DIR:ANNOTATIONS[:WEIGHT]")
        try:
            weight = float(parts[2]) if len(parts) == 3 else 1.0
        except ValueError as error:
            raise DataError(f"--data {text!r}: the weight {parts[2]!r} is not a number") from error
        if not weight > 0:
            raise DataError(f"--data {text!r}: the weight must be positive")
        return cls(name, Path(parts[0]), Path(parts[1]), weight)


@dataclass(frozen=True, slots=True)
class Item:
    """One picture; G objects, J joints, I ignored regions."""

    source: str
    path: Path
    height: int
    width: int
    boxes: Floats  # (G, 4) xyxy
    labels: NDArray[np.int64]  # (G,)
    segmentations: tuple[Segmentation | None, ...]
    keypoints: Floats  # (G, J, 3) x, y, v; all zero where there are none
    has_keypoints: NDArray[np.bool_]  # (G,)
    ignore: Floats  # (I, 4)


def read_source(source: Source, classes: Sequence[str], keypoints: Keypoints | None) -> list[Item]:
    content = read_annotations(source.annotations)
    if not source.images.is_dir():
        raise DataError(f"{source.images}: no such folder of images")
    reader = _Reader(source, content, classes, keypoints)
    items = [reader.item(image) for image in content["images"]]
    missing = [item.path for item in items if not item.path.is_file()]
    if missing:
        raise DataError(f"{source.annotations}: {len(missing)} pictures are missing, the first is {missing[0]}")
    return items


def read_annotations(path: Path) -> dict[str, Any]:
    """COCO's content of a JSON file, or of Pascal VOC's list of names (.txt) or folder of XML files."""
    return voc.read(path) if path.suffix == ".txt" or path.is_dir() else read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such annotation file") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    absent = [key for key in ("images", "annotations", "categories") if key not in content]
    if absent:
        raise DataError(f"{path}: not a COCO annotation file, it lacks {', '.join(absent)}")
    return content


class _Reader:
    def __init__(
        self, source: Source, content: dict[str, Any], classes: Sequence[str], keypoints: Keypoints | None
    ) -> None:
        self.source = source
        self.num_joints = len(keypoints.names) if keypoints else 0
        self.labels = category_labels(content, classes)
        if not self.labels:
            names = ", ".join(category["name"] for category in content["categories"])
            raise DataError(f"{source.annotations}: none of its categories ({names}) is a class of the model")
        self.joints = {c["id"]: joint_order(c, keypoints) for c in content["categories"] if c["id"] in self.labels}
        self.by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["category_id"] in self.labels:
                self._file(annotation)

    def _file(self, annotation: dict[str, Any]) -> None:
        if annotation["image_id"] not in self.by_image:
            raise DataError(
                f"{self.source.annotations}: annotation {annotation['id']} is of the unknown image "
                f"{annotation['image_id']}"
            )
        self.by_image[annotation["image_id"]].append(annotation)

    def item(self, image: dict[str, Any]) -> Item:
        annotations = self.by_image[image["id"]]
        ignored = [a for a in annotations if is_ignored(a)]
        kept = [a for a in annotations if not is_ignored(a)]
        labelled = image.get("keypoints_labelled", True)
        keypoints = np.stack([self._keypoints(a, labelled) for a in kept]) if kept else self._no_keypoints()
        return Item(
            source=self.source.name,
            path=self.source.images / image["file_name"],
            height=image["height"],
            width=image["width"],
            boxes=self._boxes(kept, image),
            labels=np.array([self.labels[a["category_id"]] for a in kept], np.int64),
            segmentations=tuple(segmentation_of(a, image["height"], image["width"]) for a in kept),
            keypoints=keypoints,
            has_keypoints=np.any(keypoints[..., 2] > 0, axis=1),
            ignore=self._boxes(ignored, image),
        )

    def _no_keypoints(self) -> Floats:
        return np.zeros((0, self.num_joints, 3), np.float32)

    def _keypoints(self, annotation: dict[str, Any], labelled: bool) -> Floats:
        result = np.zeros((self.num_joints, 3), np.float32)
        order = self.joints[annotation["category_id"]]
        if not labelled or order is None or not annotation.get("num_keypoints", 0):
            return result
        triples = np.asarray(annotation["keypoints"], np.float32).reshape(-1, 3)
        triples[:, :2] += 0.5
        for ours, theirs in enumerate(order):
            if theirs >= 0 and triples[theirs, 2] > 0:
                result[ours] = triples[theirs]
        return result

    def _boxes(self, annotations: list[dict[str, Any]], image: dict[str, Any]) -> Floats:
        boxes = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.clip(boxes, 0, [image["width"], image["height"]] * 2, out=boxes)
        bad = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
        if bad.any():
            annotation = annotations[int(bad.argmax())]
            raise DataError(
                f"{self.source.annotations}: image {image['file_name']}, annotation {annotation.get('id')}: "
                f"the box {annotation['bbox']} holds nothing of the {image['width']}x{image['height']} picture"
            )
        return boxes


def category_labels(content: dict[str, Any], classes: Sequence[str]) -> dict[int, int]:
    """Category id -> label, by name; what the model does not know is left out."""
    labels = {name: label for label, name in enumerate(classes)}
    return {c["id"]: labels[c["name"]] for c in content["categories"] if c["name"] in labels}


def joint_order(category: dict[str, Any], keypoints: Keypoints | None) -> list[int] | None:
    """For each of our joints its index in this category, or -1; None if the category has no such joints."""
    if keypoints is None or not category.get("keypoints"):
        return None
    theirs = {name: index for index, name in enumerate(category["keypoints"])}
    order = [theirs.get(name, -1) for name in keypoints.names]
    return order if max(order) >= 0 else None


def is_ignored(annotation: dict[str, Any]) -> bool:
    return bool(annotation.get("iscrowd", 0)) or bool(annotation.get("ignore", 0))


def segmentation_of(annotation: dict[str, Any], height: int, width: int) -> Segmentation | None:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return polygons or None
    if isinstance(segmentation["counts"], list):
        return coco_masks.frPyObjects(segmentation, height, width)
    return segmentation


def rasterise(segmentation: Segmentation, height: int, width: int, scale_y: float, scale_x: float) -> Bytes:
    """The mask of an object (0 or 1) of a picture resized to (height, width)."""
    if isinstance(segmentation, list):
        scaled = [(np.reshape(polygon, (-1, 2)) * (scale_x, scale_y)).ravel().tolist() for polygon in segmentation]
        return np.ascontiguousarray(coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(scaled, height, width))))
    mask = np.ascontiguousarray(coco_masks.decode(segmentation))
    if mask.shape == (height, width):
        return mask
    resized = Image.fromarray(mask * 255).resize((width, height), Image.Resampling.BILINEAR)
    return (np.asarray(resized) >= 128).view(np.uint8)


def read_picture(item: Item) -> Image.Image:
    """RGB, as large as the annotations say; turned upright only if that is how it was annotated."""
    with Image.open(item.path) as opened:
        picture = opened.convert("RGB")
        if picture.size != (item.width, item.height):
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    if picture.size != (item.width, item.height):
        raise DataError(f"{item.path} is {picture.size}, its annotations say {(item.width, item.height)}")
    return picture
