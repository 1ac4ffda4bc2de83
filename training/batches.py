"""Batches by step number: batch `s` of a run depends on the seed and on `s` alone.

So a resumed run sees what the unbroken one would have seen, with any number of workers. A batch crosses from a worker
to the trainer as a dozen tensors whatever it holds (a tensor per object would use up the file handles), and masks
travel only for the objects that have one.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.network import Target
from training.augment import Sample
from training.compose import Composer

# What the random streams of a run are for; each gets its own.
ORDER, CANVAS, SAMPLE = range(3)


@dataclass(slots=True)
class Batch:
    """B samples; the objects of all of them one after the other."""

    images: Tensor  # (B, H, W, 3) uint8
    sizes: Tensor  # (B, 2)
    counts: Tensor  # (B,) objects of each sample
    boxes: Tensor
    labels: Tensor
    has_mask: Tensor
    masks: Tensor  # (M, H, W) uint8, of those objects that have one
    keypoints: Tensor
    ignore_counts: Tensor  # (B,)
    ignore: Tensor
    proposal_counts: Tensor  # (B,)
    proposals: Tensor
    names: list[list[str]]

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: function(v) for name, v in values.items() if isinstance(v, Tensor)})

    def targets(
        self, counts: Sequence[int], ignore_counts: Sequence[int], proposal_counts: Sequence[int]
    ) -> list[Target]:
        """One per sample. The counts come as numbers, for reading them off a device would stall it."""
        height, width = self.images.shape[1:3]
        masks = self.masks.new_zeros((len(self.boxes), height, width))
        masks[self.has_mask] = self.masks
        has_keypoints = (self.keypoints[..., 2] > 0).any(dim=1)
        ends, ignore_ends = list(accumulate(counts)), list(accumulate(ignore_counts))
        proposals = self.proposals.split(list(proposal_counts))
        return [
            Target(
                boxes=self.boxes[end - count : end],
                labels=self.labels[end - count : end],
                masks=masks[end - count : end],
                has_mask=self.has_mask[end - count : end],
                keypoints=self.keypoints[end - count : end],
                has_keypoints=has_keypoints[end - count : end],
                ignore=self.ignore[ignore_end - ignored : ignore_end],
                proposals=own,
            )
            for count, end, ignored, ignore_end, own in zip(
                counts, ends, ignore_counts, ignore_ends, proposals, strict=True
            )
        ]


def collate(samples: Sequence[Sample], multiple: int) -> Batch:
    height, width = (
        -(-max(sample.image.shape[axis] for sample in samples) // multiple) * multiple for axis in range(2)
    )
    images = np.zeros((len(samples), height, width, 3), np.uint8)
    masks = []
    for image, sample in zip(images, samples, strict=True):
        h, w = sample.image.shape[:2]
        image[:h, :w] = sample.image
        present = [mask for mask in sample.objects.masks if mask is not None]
        padded = np.zeros((len(present), height, width), np.uint8)
        for row, mask in zip(padded, present, strict=True):
            row[:h, :w] = mask
        masks.append(padded)
    objects = [sample.objects for sample in samples]
    return Batch(
        images=torch.from_numpy(images),
        sizes=torch.tensor([sample.size for sample in samples]),
        counts=torch.tensor([len(each.boxes) for each in objects]),
        boxes=torch.from_numpy(np.concatenate([each.boxes for each in objects])),
        labels=torch.from_numpy(np.concatenate([each.labels for each in objects])),
        has_mask=torch.tensor([mask is not None for each in objects for mask in each.masks], dtype=torch.bool),
        masks=torch.from_numpy(np.concatenate(masks)),
        keypoints=torch.from_numpy(np.concatenate([each.keypoints for each in objects])),
        ignore_counts=torch.tensor([len(each.ignore) for each in objects]),
        ignore=torch.from_numpy(np.concatenate([each.ignore for each in objects])),
        proposal_counts=torch.tensor([len(each.proposals) for each in objects]),
        proposals=torch.from_numpy(np.concatenate([each.proposals for each in objects])),
        names=[sample.names for sample in samples],
    )


class Batches(Dataset[Batch]):
    """Element `s` is the batch of step `s`; it goes on for ever."""

    def __init__(self, composer: Composer, weights: dict[str, float], batch_size: int, seed: int) -> None:
        self.composer = composer
        self.batch_size = batch_size
        self.seed = seed
        self.weights = np.array([weights[item.source] for item in composer.items])
        self.portrait = np.array([item.height > item.width for item in composer.items])
        self.steps_per_epoch = max(1, len(self._epoch_indices(0)) // batch_size)
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, step: int) -> Batch:
        indices = self._indices(step)
        canvas, short_side = self._canvas(step, indices)
        samples = [
            self.composer.sample(int(index), np.random.default_rng((self.seed, SAMPLE, step, slot)), canvas, short_side)
            for slot, index in enumerate(indices)
        ]
        return collate(samples, self.composer.rule.multiple)

    def _indices(self, step: int) -> np.ndarray:
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch(epoch))
        return self._order[1][within]

    def _epoch_indices(self, epoch: int) -> np.ndarray:
        """Each picture as often as its source's weight says; of a fraction, a different part in each epoch."""
        rng = np.random.default_rng((self.seed, ORDER, epoch))
        indices = np.arange(len(self.weights))
        chosen = [np.repeat(indices, np.floor(self.weights).astype(int))]
        for fraction in np.unique(self.weights % 1):
            some = indices[self.weights % 1 == fraction]
            chosen.append(rng.permutation(some)[: round(len(some) * fraction)])
        return rng.permutation(np.concatenate(chosen))

    def _epoch(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, batch_size): portraits with portraits, for a canvas that fits both wastes both."""
        indices = self._epoch_indices(epoch)
        if len(indices) < self.batch_size:
            indices = np.resize(indices, self.batch_size)
        portrait = self.portrait[indices]
        groups = [indices[portrait], indices[~portrait]]
        whole = [len(group) // self.batch_size * self.batch_size for group in groups]
        rest = np.concatenate([group[count:] for group, count in zip(groups, whole, strict=True)])
        rows = np.concatenate([*(group[:count] for group, count in zip(groups, whole, strict=True)), rest])
        rows = rows[: self.steps_per_epoch * self.batch_size].reshape(self.steps_per_epoch, self.batch_size)
        return np.random.default_rng((self.seed, ORDER, epoch, 1)).permutation(rows)

    def _canvas(self, step: int, indices: np.ndarray) -> tuple[tuple[int, int] | None, int | None]:
        rng = np.random.default_rng((self.seed, CANVAS, step))
        settings = self.composer.augmentation
        short_side = int(rng.choice(settings.short_sides)) if settings.short_sides else None
        if not settings.canvases:
            return None, short_side
        height, width = settings.canvases[int(rng.integers(len(settings.canvases)))]
        return (width, height) if 2 * self.portrait[indices].sum() > len(indices) else (height, width), short_side


def batches_from(dataset: Batches, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Steps start to stop, prepared ahead of time by worker processes."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=3 if workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    return iter(loader)


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches the whole group of processes. The trainer saves and stops; its workers end when it closes them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
