"""Recipes of the systems before the region proposal network, as published where they were; see `training.recipes`.

The light ones are ours, for hours on a CPU.
"""

from dataclasses import replace

from models.checkpoint import CanvasRule, ProposalRule
from training import voc
from training.compose import Augmentation
from training.recipe import COCO_CLASSES, Recipe

PLAIN = Augmentation()  # the picture and its mirror image, as the old papers have it
SEARCHED = ProposalRule()  # selective search, fast, 2,000 boxes


def fast_rcnn_vgg16() -> Recipe:
    """Fast R-CNN, VGG-16, VOC: Girshick 2015 section 2.3; 66.9 mAP on VOC 2007 test (table 1).

    Command: `limner train fast_rcnn_vgg16 --trunk vgg16.pth --data
    voc=VOC2007/JPEGImages:VOC2007/ImageSets/Main/trainval.txt --out runs/fast`. 9.5 hours on a K40 there.
    """
    return Recipe(
        name="fast_rcnn_vgg16",
        architecture="fast_rcnn_vgg16",
        classes=voc.CLASSES,
        canvas=CanvasRule(short_side=600, long_side=1000),
        augmentation=PLAIN,
        freeze_until="conv3_1",  # section 4.5
        proposals=SEARCHED,
        steps=40_000,
        batch_size=2,
        base_lr=1e-3,
        weight_decay=5e-4,
        warmup_steps=0,
        milestones=(0.75,),
    )


def spp_net_vgg16() -> Recipe:
    """SPP-net, VGG-16, VOC: fc6 and fc7 alone are fine-tuned, then machines and ridge fitted (He et al. 2014 section
    4.1). 63.1 mAP on VOC 2007 test in Fast R-CNN's table 1, with five scales; here is one."""
    return replace(_older("spp_net_vgg16"), frozen=("backbone.",))


def spp_net_alexnet() -> Recipe:
    """SPP-net on AlexNet, VOC; 59.2 mAP on VOC 2007 test with five scales of ZF-5 (He et al. 2014 table 9)."""
    return replace(_older("spp_net_alexnet"), frozen=("backbone.",))


def r_cnn_vgg16() -> Recipe:
    """R-CNN, VGG-16, VOC: Girshick et al. 2014 sections 2.3 and 3.3; 66.0 mAP on VOC 2007 test."""
    return _older("r_cnn_vgg16")


def r_cnn_alexnet() -> Recipe:
    """R-CNN, AlexNet, VOC: 58.5 mAP on VOC 2007 test with box regression (Girshick et al. 2014 table 2).

    Command: `limner train r_cnn_alexnet --trunk alexnet.pth --data
    voc=VOC2007/JPEGImages:VOC2007/ImageSets/Main/trainval.txt --out runs/r_cnn`; runs/r_cnn/fitted is the result.
    """
    return _older("r_cnn_alexnet")


def _older(name: str) -> Recipe:
    """A softmax over proposals at a thousandth; machines and ridge after it."""
    fast = fast_rcnn_vgg16()
    return replace(
        fast, name=name, architecture=name, freeze_until="", steps=50_000, milestones=(0.4, 0.8), fits_machines=True
    )


def overfeat_alexnet() -> Recipe:
    """OverFeat, AlexNet, VOC. Source: ours after Sermanet et al. 2014, which reports ILSVRC 2013 (24.3 mAP). Classifier
    and regressor train in one run; the regressor leaves the trunk as it is, as in section 4.2."""
    return replace(
        fast_rcnn_vgg16(),
        name="overfeat_alexnet",
        architecture="overfeat_alexnet",
        canvas=CanvasRule(short_side=461, long_side=800),
        freeze_until="",
        proposals=None,
    )


def fast_rcnn_mobilenetv2() -> Recipe:
    """The light Fast R-CNN. Source: ours, not run in full here."""
    return _light("fast_rcnn_mobilenetv2")


def spp_net_mobilenetv2() -> Recipe:
    """The light SPP-net: the trunk as ImageNet left it."""
    return replace(_light("spp_net_mobilenetv2"), frozen=("backbone.",), freeze_until="", fits_machines=True)


def r_cnn_mobilenetv2() -> Recipe:
    """The light R-CNN."""
    return replace(_light("r_cnn_mobilenetv2"), freeze_until="", fits_machines=True)


def overfeat_mobilenetv2() -> Recipe:
    """The light OverFeat."""
    return replace(_light("overfeat_mobilenetv2"), proposals=None)


def _light(name: str) -> Recipe:
    return Recipe(
        name=name,
        architecture=name,
        classes=COCO_CLASSES,
        canvas=CanvasRule(short_side=384, long_side=640, antialias=True),
        augmentation=PLAIN,
        freeze_until="4",  # the blocks at strides 2 and 4
        proposals=SEARCHED,
        steps=4_000,
        batch_size=2,
        base_lr=1e-4,
        optimizer="adamw",
        weight_decay=0.05,
        trunk_lr_multiplier=0.5,
        warmup_steps=200,
        schedule="cosine",
        ema_decay=0.998,
        clip_norm=10.0,
    )


CLASSICS = (
    overfeat_alexnet,
    overfeat_mobilenetv2,
    r_cnn_alexnet,
    r_cnn_vgg16,
    r_cnn_mobilenetv2,
    spp_net_alexnet,
    spp_net_vgg16,
    spp_net_mobilenetv2,
    fast_rcnn_vgg16,
    fast_rcnn_mobilenetv2,
)
