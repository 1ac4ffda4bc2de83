"""What can be done to a training picture: place it on a canvas, recolour it, paste people onto it.

Everything geometric is one operation, `place`: a picture is resized, perhaps mirrored, put somewhere on a canvas and
cut by a window of it. A plain sample, scale jitter, a crop and each quarter of a mosaic differ only in the placement.

What becomes of an object that is cut: if less than `MIN_VISIBLE` of it is left, the rest is an ignore region, for it
is still a part of a person and no background. Otherwise its box shrinks to what is visible, and keypoints outside
lose their label.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageEnhance

from training.data import Bytes, Floats, Item, rasterise

MIN_VISIBLE = 0.3
MIN_SIDE = 2.0  # canvas pixels; a smaller object cannot be told from noise
FILL = (124, 116, 104)  # the ImageNet mean: zero once normalised


@dataclass(frozen=True, slots=True)
class Placement:
    """A whole picture resized to (height, width), its corner at (top, left) of the canvas, seen through a window."""

    height: int
    width: int
    top: int
    left: int
    window: tuple[int, int, int, int]  # y1, x1, y2, x2 on the canvas
    flip: bool = False

    def visible(self) -> tuple[int, int, int, int]:
        """y1, x1, y2, x2 of the part of the canvas that the picture covers."""
        y1, x1, y2, x2 = self.window
        return max(y1, self.top), max(x1, self.left), min(y2, self.top + self.height), min(x2, self.left + self.width)


def no_boxes() -> Floats:
    return np.zeros((0, 4), np.float32)


@dataclass(slots=True)
class Objects:
    """G objects on a canvas (H, W); a mask is (H, W) of 0 and 1, or None where none is labelled. `proposals` (P, 4) lie
    on the same canvas."""

    boxes: Floats
    labels: np.ndarray
    masks: list[Bytes | None]
    keypoints: Floats
    ignore: Floats
    proposals: Floats = field(default_factory=no_boxes)

    @classmethod
    def none(cls, num_joints: int) -> "Objects":
        return cls(no_boxes(), np.zeros(0, np.int64), [], np.zeros((0, num_joints, 3), np.float32), no_boxes())

    def select(self, keep: np.ndarray) -> "Objects":
        masks = [mask for mask, kept in zip(self.masks, keep, strict=True) if kept]
        return replace(
            self, boxes=self.boxes[keep], labels=self.labels[keep], masks=masks, keypoints=self.keypoints[keep]
        )

    def join(self, other: "Objects") -> "Objects":
        return Objects(
            np.concatenate([self.boxes, other.boxes]),
            np.concatenate([self.labels, other.labels]),
            self.masks + other.masks,
            np.concatenate([self.keypoints, other.keypoints]),
            np.concatenate([self.ignore, other.ignore]),
            np.concatenate([self.proposals, other.proposals]),
        )


@dataclass(slots=True)
class Sample:
    image: Bytes  # (H, W, 3) RGB
    size: tuple[int, int]  # height, width of what is picture; the rest is padding
    objects: Objects
    names: list[str] = field(default_factory=list)


def blank(height: int, width: int, num_joints: int) -> Sample:
    image = np.tile(np.array(FILL, np.uint8), (height, width, 1))
    return Sample(image, (height, width), Objects.none(num_joints))


@dataclass(frozen=True, slots=True)
class Jitter:
    """Largest relative change, either way, of each."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0


def recolour(picture: Image.Image, jitter: Jitter, rng: np.random.Generator) -> Image.Image:
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation)
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * ranges
    if jitter.saturation:
        picture = ImageEnhance.Color(picture).enhance(saturation)
    if jitter.brightness or jitter.contrast:
        levels = np.arange(256) * brightness
        levels = np.clip((levels - 128) * contrast + 128, 0, 255).astype(np.uint8)
        picture = picture.point(levels.tolist() * 3)
    return picture


def place(
    sample: Sample,
    item: Item,
    resized: Image.Image,
    placement: Placement,
    flips: list[int],
    proposals: Floats | None = None,
) -> None:
    """Paints `resized`, the whole picture of `item`, onto the sample and adds the item's objects.

    `flips` names for each keypoint the one it becomes in a mirror; `proposals` (P, 4) are in the item's own pixels.
    """
    y1, x1, y2, x2 = placement.visible()
    if y1 >= y2 or x1 >= x2:
        return
    pixels = np.asarray(resized)
    pixels = pixels[:, ::-1] if placement.flip else pixels
    top, left = placement.top, placement.left
    sample.image[y1:y2, x1:x2] = pixels[y1 - top : y2 - top, x1 - left : x2 - left]
    objects = _objects(item, placement, (sample.image.shape[0], sample.image.shape[1]), flips)
    if proposals is not None:
        objects.proposals = _proposals(proposals, item, placement)
    sample.objects = sample.objects.join(objects)
    sample.names.append(str(item.path))


def _proposals(boxes: Floats, item: Item, placement: Placement) -> Floats:
    """On the canvas, cut to what is visible; those of which nothing is are left out."""
    boxes = boxes * np.tile(np.array([placement.width / item.width, placement.height / item.height], np.float32), 2)
    if placement.flip:
        boxes, _ = mirror(boxes, np.zeros((0, 0, 3), np.float32), placement.width, [])
    boxes = boxes + np.tile(np.array([placement.left, placement.top], np.float32), 2)
    y1, x1, y2, x2 = placement.visible()
    boxes = clip(boxes, np.array([x1, y1, x2, y2], np.float32))
    return boxes[areas(boxes) > 0]


def mirror(boxes: Floats, keypoints: Floats, width: float, flips: list[int]) -> tuple[Floats, Floats]:
    boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    keypoints = keypoints[:, flips] if flips else keypoints.copy()
    keypoints[..., 0] = np.where(keypoints[..., 2] > 0, width - keypoints[..., 0], 0)
    return boxes, keypoints


def _objects(item: Item, placement: Placement, canvas: tuple[int, int], flips: list[int]) -> Objects:
    y1, x1, y2, x2 = placement.visible()
    scale = np.array([placement.width / item.width, placement.height / item.height], np.float32)
    offset = np.array([placement.left, placement.top], np.float32)
    boxes, ignore, keypoints = item.boxes * np.tile(scale, 2), item.ignore * np.tile(scale, 2), item.keypoints.copy()
    keypoints[..., :2] *= scale
    if placement.flip:
        boxes, keypoints = mirror(boxes, keypoints, placement.width, flips)
        ignore, _ = mirror(ignore, keypoints[:0], placement.width, flips)
    boxes, ignore = boxes + np.tile(offset, 2), ignore + np.tile(offset, 2)
    keypoints[..., :2] += offset
    bounds = np.array([x1, y1, x2, y2], np.float32)
    clipped = clip(boxes, bounds)
    drop_outside(keypoints, bounds)
    visible = areas(clipped) / np.maximum(areas(boxes), 1e-6)
    masks: list[Bytes | None] = []
    for index, segmentation in enumerate(item.segmentations):
        if segmentation is None or visible[index] <= 0:
            masks.append(None)
            continue
        whole = rasterise(segmentation, placement.height, placement.width, float(scale[1]), float(scale[0]))
        whole = whole[:, ::-1] if placement.flip else whole
        mask = np.zeros(canvas, np.uint8)
        top, left = placement.top, placement.left
        mask[y1:y2, x1:x2] = whole[y1 - top : y2 - top, x1 - left : x2 - left]
        if visible[index] < 1 and whole.any():
            visible[index] = mask.sum() / whole.sum()
            clipped[index] = tighten(clipped[index], mask)
        masks.append(mask if mask.any() else None)
    objects = Objects(clipped, item.labels, masks, keypoints, clip(ignore, bounds))
    return keep_visible(objects, visible)


def keep_visible(objects: Objects, visible: np.ndarray) -> Objects:
    """Objects of which too little is left become ignore regions; nothing is left of some."""
    large = ((objects.boxes[:, 2:] - objects.boxes[:, :2]) >= MIN_SIDE).all(axis=1)
    keep = (visible >= MIN_VISIBLE) & large
    ignore = np.concatenate([objects.ignore, objects.boxes[~keep]])
    kept = objects.select(keep)
    kept.ignore = ignore[areas(ignore) > 0]
    return kept


def clip(boxes: Floats, bounds: Floats) -> Floats:
    """To the rectangle `bounds` (x1, y1, x2, y2); a box outside collapses to no area."""
    low, high = np.tile(bounds[:2], 2), np.tile(bounds[2:], 2)
    return np.clip(boxes, low, high).astype(np.float32)


def areas(boxes: Floats) -> Floats:
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)


def drop_outside(keypoints: Floats, bounds: Floats) -> None:
    inside = ((keypoints[..., :2] >= bounds[:2]) & (keypoints[..., :2] < bounds[2:])).all(axis=-1)
    keypoints[~inside | (keypoints[..., 2] <= 0)] = 0


def tighten(box: Floats, mask: Bytes) -> Floats:
    """The box around what is left of a mask, and never larger than the box was."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros(4, np.float32)
    tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    low, high = np.maximum(box[:2], tight[:2]), np.minimum(box[2:], tight[2:])
    return np.concatenate([low, np.maximum(low, high)])


@dataclass(frozen=True, slots=True)
class Cutout:
    """One person cut out of its picture at its final size: what is pasted."""

    pixels: Bytes  # (h, w, 3)
    alpha: Bytes  # (h, w), 255 is the person
    label: int
    keypoints: Floats  # (J, 3) on the cutout


def cut_out(item: Item, index: int, picture: Image.Image, scale: float, flip: bool, flips: list[int]) -> Cutout:
    segmentation = item.segmentations[index]
    assert segmentation is not None, f"{item.path}: object {index} has no mask to cut along"
    x1, y1 = np.floor(item.boxes[index, :2]).astype(int)
    x2, y2 = np.ceil(item.boxes[index, 2:]).astype(int)
    width, height = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    # The mask is decoded where it was drawn; its antialiased edge blends the person into the new picture.
    mask = rasterise(segmentation, item.height, item.width, 1.0, 1.0)[y1:y2, x1:x2]
    alpha = np.asarray(Image.fromarray(mask * 255).resize((width, height), Image.Resampling.BILINEAR))
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=(x1, y1, x2, y2)))
    keypoints = item.keypoints[index : index + 1].copy()
    keypoints[..., :2] = (keypoints[..., :2] - (x1, y1)) * (width / (x2 - x1), height / (y2 - y1))
    keypoints[keypoints[..., 2] <= 0] = 0
    if flip:
        _, keypoints = mirror(np.zeros((1, 4), np.float32), keypoints, width, flips)
        pixels, alpha = pixels[:, ::-1], alpha[:, ::-1]
    return Cutout(pixels, alpha, int(item.labels[index]), keypoints[0])


def paste(sample: Sample, cutout: Cutout, top: int, left: int) -> None:
    """Puts a person in front of what the sample shows; what it hides is hidden in the labels, too."""
    height, width = sample.size
    y1, x1 = max(0, top), max(0, left)
    y2, x2 = min(height, top + cutout.alpha.shape[0]), min(width, left + cutout.alpha.shape[1])
    if y1 >= y2 or x1 >= x2:
        return
    alpha = cutout.alpha[y1 - top : y2 - top, x1 - left : x2 - left]
    mask = np.zeros(sample.image.shape[:2], np.uint8)
    mask[y1:y2, x1:x2] = alpha >= 128
    whole = np.count_nonzero(cutout.alpha >= 128)
    box = tighten(np.array([0, 0, width, height], np.float32), mask)
    if mask.sum() < MIN_VISIBLE * max(1, whole) or (box[2:] - box[:2] < MIN_SIDE).any():
        return  # nothing is painted: a person of whom too little shows would need an ignore region
    share = alpha[..., None].astype(np.float32) / 255
    pixels = cutout.pixels[y1 - top : y2 - top, x1 - left : x2 - left]
    region = sample.image[y1:y2, x1:x2]
    region[:] = (pixels * share + region * (1 - share) + 0.5).astype(np.uint8)
    keypoints = cutout.keypoints[None].copy()
    keypoints[..., :2] += (left, top)
    drop_outside(keypoints, np.array([0, 0, width, height], np.float32))
    new = Objects(box[None], np.array([cutout.label]), [mask], keypoints, np.zeros((0, 4), np.float32))
    sample.objects = occlude(sample.objects, mask).join(new)


def occlude(objects: Objects, cover: Bytes) -> Objects:
    """Objects behind `cover`: masks cut, boxes shrunk, keypoints labelled but no longer visible."""
    visible = np.ones(len(objects.boxes))
    boxes, masks, keypoints = objects.boxes.copy(), list(objects.masks), objects.keypoints.copy()
    for index, mask in enumerate(masks):
        x1, y1 = np.floor(boxes[index, :2]).astype(int)
        x2, y2 = np.ceil(boxes[index, 2:]).astype(int)
        hidden = cover[y1:y2, x1:x2]
        if not hidden.any():
            continue
        if mask is None:
            visible[index] = 1 - hidden.mean()
            continue
        before, left_over = mask.sum(), np.where(cover > 0, 0, mask).astype(np.uint8)
        visible[index] = left_over.sum() / before
        if visible[index] < 1:
            boxes[index] = tighten(boxes[index], left_over)
            masks[index] = left_over if left_over.any() else None
    columns = np.clip(keypoints[..., 0].astype(int), 0, cover.shape[1] - 1)
    rows = np.clip(keypoints[..., 1].astype(int), 0, cover.shape[0] - 1)
    behind = (keypoints[..., 2] > 1) & (cover[rows, columns] > 0)
    keypoints[..., 2] = np.where(behind, 1, keypoints[..., 2])
    return keep_visible(replace(objects, boxes=boxes, masks=masks, keypoints=keypoints), visible)
