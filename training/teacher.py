"""Adds the people that a data set left unlabelled, as a ready-made detector (YOLOX, ONNX) sees them.

A picture whose background people carry no box teaches a detector to overlook people. Confident detections far from
every existing box become objects without a mask or keypoints (`"source": "teacher"`), doubtful ones become ignore
regions; everything that was annotated stays as it was.

    python -m training.teacher --weights yolox_nano.onnx --images DIR --annotations IN.json --out OUT.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from training.data import DataError, Floats, read_json

PERSON = 0  # COCO's first class
PAD = 114  # YOLOX: the grey of its letterbox
STRIDES = (8, 16, 32)


class Teacher:
    def __init__(self, weights: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        self.side = int(self.input.shape[2])

    def persons(self, picture: Image.Image, floor: float) -> tuple[Floats, Floats]:
        """Boxes (D, 4) in the picture and scores (D,), best first, every one at least `floor`."""
        scale = min(self.side / picture.height, self.side / picture.width)
        raw = self.session.run(None, {self.input.name: self._letterbox(picture, scale)})[0]
        centres, sizes, scores = decode(np.asarray(raw)[0], self.side)
        boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1) / scale
        boxes = np.clip(boxes, 0, [picture.width, picture.height] * 2)
        boxes = boxes.astype(np.float32)
        keep = (scores >= floor) & (boxes[:, 2:] > boxes[:, :2] + 1).all(axis=1)
        boxes, scores = boxes[keep], scores[keep]
        order = suppress(boxes, scores, 0.5)
        return boxes[order], scores[order]

    def _letterbox(self, picture: Image.Image, scale: float) -> Floats:
        size = (round(picture.width * scale), round(picture.height * scale))
        resized = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        box = np.full((self.side, self.side, 3), PAD, np.float32)
        box[: size[1], : size[0]] = resized[..., ::-1]  # YOLOX takes BGR, 0 to 255
        return np.ascontiguousarray(box.transpose(2, 0, 1)[None])


def decode(raw: Floats, side: int) -> tuple[Floats, Floats, Floats]:
    """Centres and sizes on the letterbox, person scores; `raw` (cells, 85) is relative to each cell's grid."""
    grids, steps = [], []
    for stride in STRIDES:
        cells = side // stride
        y, x = np.mgrid[:cells, :cells]
        grids.append(np.stack([x, y], axis=-1).reshape(-1, 2))
        steps.append(np.full((cells * cells, 1), stride))
    step = np.concatenate(steps)
    centres = (raw[:, :2] + np.concatenate(grids)) * step
    return centres, np.exp(raw[:, 2:4]) * step, raw[:, 4] * raw[:, 5 + PERSON]


def pairwise_iou(a: Floats, b: Floats) -> Floats:
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = (a[:, 2:] - a[:, :2]).prod(axis=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(axis=1)[None]
    return common / np.maximum(areas - common, 1e-9)


def nested(box: Floats, known: Floats, fraction: float = 0.7) -> bool:
    """Is most of the box inside a known one, or most of a known one inside the box?"""
    common = (np.minimum(box[2:], known[:, 2:]) - np.maximum(box[:2], known[:, :2])).clip(0).prod(axis=1)
    smaller = np.minimum((box[2:] - box[:2]).prod(), (known[:, 2:] - known[:, :2]).prod(axis=1))
    return bool((common >= fraction * smaller).any())


def suppress(boxes: Floats, scores: Floats, iou: float) -> list[int]:
    keep: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if not keep or pairwise_iou(boxes[index : index + 1], boxes[keep]).max() < iou:
            keep.append(int(index))
    return keep


def add_people(
    content: dict[str, Any], images: Path, teacher: Teacher, threshold: float, floor: float = 0.15, iou: float = 0.4
) -> tuple[int, int]:
    """Appends to `content["annotations"]`; returns how many persons and how many ignore regions."""
    person = next((c["id"] for c in content["categories"] if c["name"] == "person"), None)
    if person is None:
        raise DataError("the annotations have no category named person")
    existing: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] == person:
            x, y, w, h = annotation["bbox"]
            existing[annotation["image_id"]].append([x, y, x + w, y + h])
    next_id = 1 + max((a["id"] for a in content["annotations"]), default=0)
    counts = [0, 0]
    for image in content["images"]:
        with Image.open(images / image["file_name"]) as picture:
            boxes, scores = teacher.persons(picture, floor)
        known = np.array(existing[image["id"]], np.float32).reshape(-1, 4)
        for box, score in zip(boxes, scores, strict=True):
            if known.size and pairwise_iou(box[None], known).max() >= iou:
                continue
            # Half a known person, or a group around one, is no new person; nor is it background.
            confident = bool(score >= threshold) and not nested(box, known)
            content["annotations"].append(_annotation(next_id, image["id"], person, box, float(score), confident))
            next_id += 1
            counts[0 if confident else 1] += 1
    return counts[0], counts[1]


def _annotation(index: int, image: int, category: int, box: Floats, score: float, confident: bool) -> dict[str, Any]:
    x1, y1, x2, y2 = (round(float(value), 2) for value in box)
    annotation: dict[str, Any] = {
        "id": index,
        "image_id": image,
        "category_id": category,
        "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
        "area": round((x2 - x1) * (y2 - y1), 2),
        "iscrowd": 0,
        "score": round(score, 4),
        "source": "teacher",
    }
    return annotation if confident else annotation | {"ignore": 1}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="training.teacher", description="adds the people that a data set left unlabelled"
    )
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.35, help="from this score on a detection is a person")
    parser.add_argument("--floor", type=float, default=0.15, help="from this score on it is an ignore region")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        for path in (options.weights, options.images):
            if not path.exists():
                raise DataError(f"{path}: no such file")
        content = read_json(options.annotations)
        teacher = Teacher(options.weights, options.threads)
        persons, regions = add_people(content, options.images, teacher, options.threshold, options.floor)
        aside = options.out.with_name(options.out.name + ".part")
        aside.write_text(json.dumps(content))
        aside.replace(options.out)
    except DataError as error:
        print(f"teacher: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {persons} persons and {regions} ignore regions added to {len(content['images'])} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
