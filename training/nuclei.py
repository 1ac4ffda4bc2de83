"""Recipes for nuclei in microscope pictures (2018 Data Science Bowl, BBBC038, CC0): one class, small and dense.

Made for 435 pictures of 256 to 360 pixels and for minutes on one CPU core. Half of the nuclei are smaller than 16
pixels and hardly one is larger than 64, hence pictures at about one and a half times their size, anchors from 12 pixels
on, and a trunk that ends at stride 16. The data has no version of these models' figures that was made on the same
split: what they reached is in docs/nuclei-models.md.
"""

from dataclasses import replace
from typing import Any

from models.checkpoint import CanvasRule
from training.augment import Jitter
from training.compose import Augmentation
from training.recipe import Recipe

MANY = {"width": 32, "max_detections": 200}  # one picture in twenty has more than eighty nuclei
SMALL: dict[str, Any] = {"last": 4, "sizes": (12, 24, 48, 96), "canonical_side": 112, **MANY}


def nuclei_mask_rcnn() -> Recipe:
    """Mask R-CNN on MobileNetV2, ours. Command: `limner train nuclei_mask_rcnn --trunk mobilenet_v2.pth --data
    nuclei=nuclei/images:nuclei/annotations/instances_train.json --out runs/nuclei`."""
    options = {**SMALL, "fc": 128, "num_proposals": 300, "head_samples": 24}
    return _nuclei("nuclei_mask_rcnn", "mask_rcnn_mobilenetv2_fpn", options, steps=900)


def nuclei_faster_rcnn() -> Recipe:
    """The same without masks."""
    mask = nuclei_mask_rcnn()
    return replace(mask, name="nuclei_faster_rcnn", architecture="faster_rcnn_mobilenetv2_fpn")


def nuclei_retinanet() -> Recipe:
    """RetinaNet on MobileNetV2, p3 to p6, ours. Command: as above with `--out runs/nuclei-retinanet`."""
    options = {"last": 4, "sizes": SMALL["sizes"], **MANY}
    return _nuclei("nuclei_retinanet", "retinanet_mobilenetv2_fpn", options, steps=900)


def _nuclei(name: str, architecture: str, options: dict[str, Any], steps: int) -> Recipe:
    return Recipe(
        name=name,
        architecture=architecture,
        classes=("nucleus",),
        canvas=CanvasRule(short_side=384, long_side=640, antialias=True),
        options=options,
        augmentation=Augmentation(
            short_sides=(320, 352, 384, 416), colour=Jitter(brightness=0.2, contrast=0.2, saturation=0.2)
        ),
        freeze_until="4",
        steps=steps,
        batch_size=4,
        base_lr=1e-3,
        optimizer="adamw",
        weight_decay=0.05,
        trunk_lr_multiplier=0.3,
        trunk_relative_steps=True,
        warmup_steps=50,
        schedule="cosine",
        ema_decay=0.998,
        clip_norm=10.0,
        amp=True,
    )


NUCLEI = (nuclei_mask_rcnn, nuclei_faster_rcnn, nuclei_retinanet)
