"""Tiny COCO-format data sets of coloured figures, and a recipe small enough to train on them in seconds."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from models.checkpoint import COCO_PERSON, CanvasRule
from training.data import Source
from training.recipes import RECIPES, Recipe, person_mobilenetv2_fpn

DataMaker = Callable[..., Source]


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


def figure(rng: np.random.Generator, width: int, height: int) -> tuple[list[float], list[float]]:
    """An ellipse as a polygon, and 17 joints (pixel indices) inside it."""
    w, h = rng.uniform(0.25, 0.45) * width, rng.uniform(0.4, 0.7) * height
    x, y = rng.uniform(w / 2, width - w / 2), rng.uniform(h / 2, height - h / 2)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    polygon = np.stack([x + np.cos(angles) * w / 2, y + np.sin(angles) * h / 2], axis=1)
    joints = []
    for joint in range(17):
        side = 0.2 * w * (1 if joint % 2 else -1)
        joints += [int(x + side), int(y + (joint / 16 - 0.5) * 0.7 * h), 2]
    return polygon.ravel().tolist(), joints


def category() -> dict[str, Any]:
    return {"id": 7, "name": "person", "keypoints": list(COCO_PERSON.names), "skeleton": []}


@pytest.fixture
def make_data(tmp_path: Path) -> DataMaker:
    """make_data(name, count, masks, keypoints, objects, change) -> Source; `change` may edit the content."""

    def make(
        name: str = "toy",
        count: int = 4,
        masks: bool = True,
        keypoints: bool = True,
        objects: int = 2,
        weight: float = 1.0,
        change: Callable[[dict[str, Any]], None] = lambda content: None,
    ) -> Source:
        rng = np.random.default_rng(len(name) + 10 * count)
        folder = tmp_path / name
        folder.mkdir()
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": [category()]}
        for number in range(count):
            width, height = (96, 64) if number % 2 else (64, 96)
            picture = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
            content["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
            for _ in range(objects):
                polygon, joints = figure(rng, width, height)
                ImageDraw.Draw(picture).polygon(polygon, fill=(220, 40 + 20 * number, 60))
                xs, ys = polygon[::2], polygon[1::2]
                box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
                annotation: dict[str, Any] = {
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": 7, "bbox": box,
                    "area": box[2] * box[3] * 0.785, "iscrowd": 0,
                }  # fmt: skip
                if masks:
                    annotation["segmentation"] = [polygon]
                if keypoints:
                    annotation |= {"keypoints": joints, "num_keypoints": 17}
                content["annotations"].append(annotation)
            picture.save(folder / f"{number}.png")
        change(content)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return Source(name, folder, path, weight)

    return make


def tiny_recipe() -> Recipe:
    recipe = person_mobilenetv2_fpn()
    augmentation = dataclasses.replace(recipe.augmentation, canvases=((64, 96),), source_scales={})
    return dataclasses.replace(
        recipe,
        name="tiny",
        options={"width": 16, "fc": 32, "keypoint_width": 16, "sizes": [8, 16, 32, 64, 96]},
        canvas=CanvasRule(short_side=64, long_side=96, antialias=True),
        augmentation=augmentation,
        steps=6,
        batch_size=2,
        warmup_steps=2,
        amp=False,
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setitem(RECIPES, "tiny", tiny_recipe)
    return tiny_recipe()
