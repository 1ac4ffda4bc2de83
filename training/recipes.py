"""Recipes are code: a model, how its pictures are prepared and how it is fitted, under one name.

Rates are for the recipe's own batch size; with another batch they scale linearly (Goyal et al. 2017).
"""

from dataclasses import replace

from models.checkpoint import COCO_PERSON, CanvasRule, Keypoints
from training.augment import Jitter
from training.classics import CLASSICS, fast_rcnn_mobilenetv2
from training.compose import Augmentation
from training.nuclei import NUCLEI
from training.recipe import COCO_CLASSES as COCO_CLASSES
from training.recipe import Recipe as Recipe

MULTI_SCALE = Augmentation(short_sides=(640, 672, 704, 736, 768, 800))  # detectron2's
# Stem and res2 are frozen, as everywhere (detectron2: freeze_at 2; torchvision: trainable_backbone_layers 3).
AFTER_STEM = "layer2"
# MobileNetV2 up to stride 4: general edges and colours, and on a CPU a quarter of a step's time.
AFTER_LIGHT_STEM = "4"


def person_mobilenetv2_fpn() -> Recipe:
    """People with masks and keypoints, from about a thousand labelled photos and an ImageNet trunk.

    Source: ours. The data is small and lopsided (street photos with one large person, sports photos without masks, a
    few hundred of COCO), so augmentation carries the run: people are shrunk, packed in mosaics and pasted elsewhere.
    Command: `limner train person_mobilenetv2_fpn --trunk mobilenet_v2.pth --data coco=...:2 --data ccp=... --data
    lspet=... --out runs/person`. About 0.25 s a picture on two CPU cores. AP: see the checkpoint's provenance.
    """
    augmentation = Augmentation(
        colour=Jitter(brightness=0.25, contrast=0.25, saturation=0.4),
        jitter=0.75,
        scales=(0.4, 1.6),
        source_scales={"ccp": (0.2, 1.3), "lspet": (0.2, 1.1), "coco": (0.5, 1.6)},
        mosaic=0.35,
        copy_paste=0.4,
        canvases=((384, 512), (320, 448), (352, 480), (288, 416), (320, 512)),
    )
    return Recipe(
        name="person_mobilenetv2_fpn",
        architecture="person_mobilenetv2_fpn",
        classes=("person",),
        keypoints=COCO_PERSON,
        canvas=CanvasRule(short_side=384, long_side=640, antialias=True),
        augmentation=augmentation,
        freeze_until=AFTER_LIGHT_STEM,
        steps=1_900,
        batch_size=8,
        base_lr=4e-4,
        optimizer="adamw",
        weight_decay=0.05,
        trunk_lr_multiplier=0.5,
        warmup_steps=200,
        schedule="cosine",
        ema_decay=0.998,
        clip_norm=10.0,
        amp=True,
    )


def person_heads() -> Recipe:
    """The second stage of the person model: its mask and keypoint heads alone, deepened, on what the first stage left.

    Source: ours. Masks and heatmaps need many more steps than boxes do, and with all else frozen a step costs half;
    the boxes stay exactly what they were. The added convolutions start as the identity (see `train.deepen`).
    Command: as above with `--init runs/person/last` instead of `--trunk`.
    """
    first = person_mobilenetv2_fpn()
    augmentation = replace(
        first.augmentation,
        source_scales={"ccp": (0.35, 1.3), "lspet": (0.3, 1.1), "coco": (0.7, 2.0)},
        mosaic=0.25,
        paste_heights=(0.25, 0.95),
    )
    return replace(
        first,
        name="person_heads",
        options={"mask_convs": 4, "keypoint_convs": 6},
        augmentation=augmentation,
        frozen=("backbone.", "rpn.", "box_head."),
        freeze_until="",
        steps=1_500,
        base_lr=1e-3,
        warmup_steps=50,
    )


def person_poses() -> Recipe:
    """The third stage of the person model: all of it again, for the keypoints' sake above all.

    Source: ours. Sports pictures hold one person each, and poses need many: most samples are mosaics, the heads train
    on few RoIs of a picture, which makes a step cheaper, and pictures are cut so that half a person is a common sight.
    A head that has seen whole people only can learn where joints are in a box instead of what they look like.
    Command: as above with `--init runs/heads/last` and the sports pictures weighted 2.
    """
    heads = person_heads()
    augmentation = replace(
        heads.augmentation,
        source_scales={"ccp": (0.35, 2.2), "lspet": (0.3, 1.2), "coco": (0.7, 2.0)},
        mosaic=0.65,
        mosaic_scales=(0.8, 2.2),
    )
    return replace(
        heads,
        name="person_poses",
        options={**heads.options, "head_samples": 12, "keypoint_sigma": 1.0},
        frozen=(),
        augmentation=augmentation,
        freeze_until=AFTER_LIGHT_STEM,
        steps=2_150,
        base_lr=8e-4,
        trunk_lr_multiplier=0.3,
        trunk_relative_steps=True,
        warmup_steps=100,
    )


def faster_rcnn_r50_fpn() -> Recipe:
    """Faster R-CNN, ResNet-50-FPN, 80 classes: detectron2's 1x schedule (faster_rcnn_R_50_FPN_1x).

    Command: `limner train faster_rcnn_r50_fpn --trunk resnet50.pth --data coco=train2017:instances_train2017.json --out
    runs/faster`. About 7 hours on 8 V100 (detectron2's MODEL_ZOO); box AP 37.9 on val2017.
    """
    return _coco_1x("faster_rcnn_r50_fpn", COCO_CLASSES, None)


def mask_rcnn_r50_fpn() -> Recipe:
    """Mask R-CNN, ResNet-50-FPN, 80 classes: detectron2's 1x schedule (mask_rcnn_R_50_FPN_1x).

    Command: `limner train mask_rcnn_r50_fpn --trunk resnet50.pth --data coco=train2017:instances_train2017.json --out
    runs/mask`. About 8 hours on 8 V100; box AP 38.6, mask AP 35.2 on val2017.
    """
    return _coco_1x("mask_rcnn_r50_fpn", COCO_CLASSES, None)


def keypoint_rcnn_r50_fpn() -> Recipe:
    """Keypoint R-CNN, ResNet-50-FPN, persons: detectron2's 1x schedule (keypoint_rcnn_R_50_FPN_1x).

    Command: `limner train keypoint_rcnn_r50_fpn --trunk resnet50.pth --data
    coco=train2017:person_keypoints_train2017.json --out runs/keypoint`. About 8 hours on 8 V100; box AP 53.6,
    keypoint AP 64.0 on val2017.
    """
    return _coco_1x("keypoint_rcnn_r50_fpn", ("person",), COCO_PERSON)


def mask_keypoint_rcnn_r50_fpn() -> Recipe:
    """Both heads on one ResNet-50-FPN trunk, persons (Mask R-CNN table 5: box 52.0, mask 45.1, keypoint 64.7 minival).

    Command: `limner train mask_keypoint_rcnn_r50_fpn --trunk resnet50.pth --data
    coco=train2017:person_keypoints_train2017.json --out runs/both`. About 9 hours on 8 V100 at the 1x schedule.
    """
    return _coco_1x("mask_keypoint_rcnn_r50_fpn", ("person",), COCO_PERSON)


def faster_rcnn_x101_fpn() -> Recipe:
    """Faster R-CNN, ResNeXt-101-32x8d-FPN: detectron2's 3x schedule (faster_rcnn_X_101_32x8d_FPN_3x).

    Command: `limner train faster_rcnn_x101_fpn --trunk resnext101_32x8d.pth --data
    coco=train2017:instances_train2017.json --out runs/faster_x101`. Box AP 43.0 on val2017.
    """
    return _coco_3x("faster_rcnn_x101_fpn")


def mask_rcnn_x101_fpn() -> Recipe:
    """Mask R-CNN, ResNeXt-101-32x8d-FPN: detectron2's 3x schedule (mask_rcnn_X_101_32x8d_FPN_3x).

    Command: as above with `--out runs/mask_x101`. Box AP 44.3, mask AP 39.5 on val2017.
    """
    return _coco_3x("mask_rcnn_x101_fpn")


def faster_rcnn_r50_c4() -> Recipe:
    """Faster R-CNN, ResNet-50, conv5 on each RoI: detectron2's 1x schedule (faster_rcnn_R_50_C4_1x).

    Command: `limner train faster_rcnn_r50_c4 --trunk resnet50.pth --data coco=train2017:instances_train2017.json --out
    runs/c4`. Box AP 35.7 on val2017.
    """
    return _coco_1x("faster_rcnn_r50_c4", COCO_CLASSES, None)


def mask_rcnn_r50_c4() -> Recipe:
    """Mask R-CNN, ResNet-50, conv5 on each RoI: detectron2's 1x schedule (mask_rcnn_R_50_C4_1x).

    Command: as above with `--out runs/mask_c4`. Box AP 36.8, mask AP 32.2 on val2017.
    """
    return _coco_1x("mask_rcnn_r50_c4", COCO_CLASSES, None)


def faster_rcnn_vgg16() -> Recipe:
    """Faster R-CNN, VGG-16, trained from conv3_1 on: Ren et al. 2015 on COCO (section 4.2), 8 pictures a step.

    240,000 steps at 0.003, 80,000 at 0.0003, on pictures of 600 x 1000. Command: `limner train faster_rcnn_vgg16
    --trunk vgg16.pth --data coco=train2017:instances_train2017.json --out runs/vgg16` (fc6 and fc7 come from the same
    file). The paper: AP 21.9 and AP50 42.7 on test-dev; more is to be expected, for it trains in four steps on less.
    """
    return _vgg16("faster_rcnn_vgg16")


def mask_rcnn_vgg16() -> Recipe:
    """Mask R-CNN on the trunk and by the schedule of `faster_rcnn_vgg16`. No published figure."""
    return _vgg16("mask_rcnn_vgg16")


def faster_rcnn_alexnet() -> Recipe:
    """Faster R-CNN, AlexNet, all of it trained, by the schedule of `faster_rcnn_vgg16`. No published figure.

    Command: as there with `--trunk alexnet.pth --out runs/alexnet`.
    """
    return replace(_vgg16("faster_rcnn_alexnet"), freeze_until="")


def faster_rcnn_mobilenetv2() -> Recipe:
    """The light Faster R-CNN, by the recipe of the light Fast R-CNN. Source: ours, not run in full here."""
    name = "faster_rcnn_mobilenetv2"
    return replace(fast_rcnn_mobilenetv2(), name=name, architecture=name, proposals=None)


def _vgg16(name: str) -> Recipe:
    return replace(
        _coco_1x(name, COCO_CLASSES, None),
        canvas=CanvasRule(short_side=600, long_side=1000),
        augmentation=Augmentation(),
        freeze_until="conv3_1",
        weight_decay=5e-4,
        steps=320_000,
        milestones=(0.75,),
        batch_size=8,
        base_lr=0.003,
        clip_norm=10.0,
    )


def retinanet_r50_fpn() -> Recipe:
    """RetinaNet, ResNet-50-FPN, 80 classes: detectron2's 1x schedule (retinanet_R_50_FPN_1x), half the usual rate.

    Command: `limner train retinanet_r50_fpn --trunk resnet50.pth --data coco=train2017:instances_train2017.json --out
    runs/retina`. Box AP 37.4 on val2017 (torchvision's 26 epochs: 36.4; the paper, 600 pixels: 34.3 on test-dev).
    """
    return replace(_coco_1x("retinanet_r50_fpn", COCO_CLASSES, None), base_lr=0.01)


def retinanet_mobilenetv2_fpn() -> Recipe:
    """The light RetinaNet on COCO's 80 classes and canvases of 384 x 640; for little data, `--classes` and few steps.

    Source: ours, after `person_mobilenetv2_fpn`; never run in full, so no AP is claimed. Command: `limner train
    retinanet_mobilenetv2_fpn --trunk mobilenet_v2.pth --data coco=train2017:instances_train2017.json --out runs/light`.
    """
    return _coco_light("retinanet_mobilenetv2_fpn")


def faster_rcnn_mobilenetv2_fpn() -> Recipe:
    """The light Faster R-CNN, by the recipe of `retinanet_mobilenetv2_fpn` and like it never run in full."""
    return _coco_light("faster_rcnn_mobilenetv2_fpn")


def mask_rcnn_mobilenetv2_fpn() -> Recipe:
    """The light Mask R-CNN, by the recipe of `retinanet_mobilenetv2_fpn` and like it never run in full."""
    return _coco_light("mask_rcnn_mobilenetv2_fpn")


def _coco_light(name: str) -> Recipe:
    return Recipe(
        name=name,
        architecture=name,
        classes=COCO_CLASSES,
        canvas=CanvasRule(short_side=384, long_side=640, antialias=True),
        augmentation=Augmentation(short_sides=(320, 352, 384, 416)),
        freeze_until=AFTER_LIGHT_STEM,
        steps=90_000,
        batch_size=16,
        base_lr=8e-4,
        optimizer="adamw",
        weight_decay=0.05,
        trunk_lr_multiplier=0.5,
        warmup_steps=500,
        schedule="cosine",
        ema_decay=0.998,
        clip_norm=10.0,
        amp=True,
    )


def _coco_3x(name: str) -> Recipe:
    """270,000 steps, cut at 210,000 and 250,000."""
    return replace(_coco_1x(name, COCO_CLASSES, None), steps=270_000, milestones=(7 / 9, 25 / 27))


def _coco_1x(name: str, classes: tuple[str, ...], keypoints: Keypoints | None) -> Recipe:
    """16 pictures a step, 90,000 steps, cut at 60,000 and 80,000."""
    return Recipe(
        name=name,
        architecture=name,
        classes=classes,
        keypoints=keypoints,
        augmentation=MULTI_SCALE,
        freeze_until=AFTER_STEM,
        steps=90_000,
        batch_size=16,
        base_lr=0.02,
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        person_mobilenetv2_fpn,
        person_heads,
        person_poses,
        faster_rcnn_r50_fpn,
        mask_rcnn_r50_fpn,
        keypoint_rcnn_r50_fpn,
        mask_keypoint_rcnn_r50_fpn,
        faster_rcnn_x101_fpn,
        mask_rcnn_x101_fpn,
        faster_rcnn_r50_c4,
        mask_rcnn_r50_c4,
        faster_rcnn_vgg16,
        mask_rcnn_vgg16,
        faster_rcnn_alexnet,
        faster_rcnn_mobilenetv2,
        retinanet_r50_fpn,
        retinanet_mobilenetv2_fpn,
        faster_rcnn_mobilenetv2_fpn,
        mask_rcnn_mobilenetv2_fpn,
        *NUCLEI,
        *CLASSICS,
    )
}
