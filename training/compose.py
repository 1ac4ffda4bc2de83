"""Makes one training sample: which pictures, at what scale, in what arrangement.

Scales are relative to the size at which the service would see the picture (the model's canvas rule), so a factor of 1
is what the model meets in use. Every choice comes from the generator that is passed in, and from nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from models.checkpoint import CanvasRule
from service.images import fit, resized_size
from training.augment import Jitter, Placement, Sample, blank, cut_out, paste, place, recolour
from training.data import Bytes, Floats, Item, read_picture

Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    flip: float = 0.5  # probability
    colour: Jitter = field(default_factory=Jitter)
    short_sides: tuple[int, ...] = ()  # multi-scale as in the papers: one is drawn per batch; empty: the rule's own
    jitter: float = 0.0  # probability that a sample's scale is jittered
    scales: Range = (1.0, 1.0)
    source_scales: Mapping[str, Range] = field(default_factory=dict)  # by source name, instead of `scales`
    mosaic: float = 0.0  # probability of four pictures on one canvas
    mosaic_scales: Range = (0.8, 1.8)  # relative to the size at which a picture just fits into its quarter
    copy_paste: float = 0.0  # probability of people pasted onto a sample
    max_pasted: int = 3
    paste_heights: Range = (0.1, 0.9)  # of the canvas
    canvases: tuple[tuple[int, int], ...] = ()  # landscape (height, width), one per batch; empty: what the batch needs


class Composer:
    def __init__(
        self,
        items: Sequence[Item],
        weights: Mapping[str, float],
        rule: CanvasRule,
        flips: Sequence[int],
        augmentation: Augmentation,
        propose: Callable[[Bytes], Floats] | None = None,
    ) -> None:
        """`propose` gives boxes (P, 4) of a picture (H, W, 3), for models that take proposals."""
        self.items = items
        self.rule = rule
        self.propose = propose
        self.flips = list(flips)
        self.augmentation = augmentation
        self.donors = find_donors(items) if augmentation.copy_paste else []
        chances = np.array([weights[item.source] for item in items])
        self.chances = np.cumsum(chances / chances.sum())

    def sample(
        self, index: int, rng: np.random.Generator, canvas: tuple[int, int] | None, short_side: int | None = None
    ) -> Sample:
        """On a canvas of that size, or on one just as large as the resized picture."""
        rule = replace(self.rule, short_side=short_side) if short_side else self.rule
        if canvas is not None and rng.random() < self.augmentation.mosaic:
            sample = self._mosaic(index, rng, canvas)
        else:
            sample = self._single(self.items[index], rng, canvas, rule)
        if self.donors and rng.random() < self.augmentation.copy_paste:
            for _ in range(int(rng.integers(1, self.augmentation.max_pasted + 1))):
                self._paste(sample, rng)
        return sample

    def _single(self, item: Item, rng: np.random.Generator, canvas: tuple[int, int] | None, rule: CanvasRule) -> Sample:
        settings = self.augmentation
        jittered = rng.random() < settings.jitter
        if jittered:
            rule = zoomed(rule, log_uniform(rng, settings.source_scales.get(item.source, settings.scales)))
        height, width = resized_size(item.height, item.width, rule)
        sample = blank(*(canvas or (height, width)), num_joints=item.keypoints.shape[1])
        whole = (0, 0, sample.image.shape[0], sample.image.shape[1])
        fits = height <= whole[2] and width <= whole[3]
        self._place(sample, item, rng, rule, whole, at_corner=fits and not jittered)
        if fits and not jittered:
            sample.size = (height, width)  # as the service does it: the rest is padding, not picture
        return sample

    def _mosaic(self, index: int, rng: np.random.Generator, canvas: tuple[int, int]) -> Sample:
        height, width = canvas
        y, x = round(height * rng.uniform(0.3, 0.7)), round(width * rng.uniform(0.3, 0.7))
        windows = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
        sample = blank(height, width, self.items[index].keypoints.shape[1])
        for number, slot in enumerate(rng.permutation(4)):
            item = self.items[index] if number == 0 else self.items[self._any_item(rng)]
            y1, x1, y2, x2 = windows[slot]
            full_height, full_width = resized_size(item.height, item.width, self.rule)
            fitting = min((y2 - y1) / full_height, (x2 - x1) / full_width)
            rule = zoomed(self.rule, fitting * log_uniform(rng, self.augmentation.mosaic_scales))
            self._place(sample, item, rng, rule, windows[slot], at_corner=False)
        return sample

    def _place(
        self,
        sample: Sample,
        item: Item,
        rng: np.random.Generator,
        rule: CanvasRule,
        window: tuple[int, int, int, int],
        at_corner: bool,
    ) -> None:
        y1, x1, y2, x2 = window
        picture = np.asarray(read_picture(item))
        proposals = self.propose(picture) if self.propose else None
        canvas = fit(picture, rule)
        size = canvas.size
        top = 0 if at_corner else int(rng.integers(min(0, y2 - y1 - size[0]), max(0, y2 - y1 - size[0]) + 1))
        left = 0 if at_corner else int(rng.integers(min(0, x2 - x1 - size[1]), max(0, x2 - x1 - size[1]) + 1))
        flip = bool(rng.random() < self.augmentation.flip)
        resized = Image.fromarray(canvas.pixels[: size[0], : size[1]])
        placement = Placement(*size, y1 + top, x1 + left, window, flip)
        recoloured = recolour(resized, self.augmentation.colour, rng)
        place(sample, item, recoloured, placement, self.flips, proposals)

    def _paste(self, sample: Sample, rng: np.random.Generator) -> None:
        number, index = self.donors[int(rng.integers(len(self.donors)))]
        item = self.items[number]
        box = item.boxes[index]
        scale = log_uniform(rng, self.augmentation.paste_heights) * sample.size[0] / float(box[3] - box[1])
        scale = min(scale, 1.5)  # more than that and the person is a blur
        picture: Image.Image = recolour(read_picture(item), self.augmentation.colour, rng)
        cutout = cut_out(item, index, picture, scale, bool(rng.random() < self.augmentation.flip), self.flips)
        height, width = cutout.alpha.shape
        # A fifth of the person may lie beyond any edge.
        top = round(rng.uniform(-0.2 * height, max(0.0, sample.size[0] - 0.8 * height)))
        left = round(rng.uniform(-0.2 * width, max(0.0, sample.size[1] - 0.8 * width)))
        paste(sample, cutout, top, left)
        sample.names.append(str(item.path))

    def _any_item(self, rng: np.random.Generator) -> int:
        return min(int(np.searchsorted(self.chances, rng.random(), side="right")), len(self.items) - 1)


def zoomed(rule: CanvasRule, zoom: float) -> CanvasRule:
    return replace(
        rule, short_side=max(1, round(rule.short_side * zoom)), long_side=max(1, round(rule.long_side * zoom))
    )


def find_donors(items: Sequence[Item], min_side: float = 32) -> list[tuple[int, int]]:
    """(item, object) of everything large enough that has a mask to cut along."""
    return [
        (number, index)
        for number, item in enumerate(items)
        for index, segmentation in enumerate(item.segmentations)
        if segmentation is not None and (item.boxes[index, 2:] - item.boxes[index, :2]).min() >= min_side
    ]


def log_uniform(rng: np.random.Generator, limits: Range) -> float:
    return float(np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]))))
