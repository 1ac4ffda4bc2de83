"""Runs compiled packages on their fixed shapes, on a GPU in CUDA graphs. Knows torch; no bundles, no requests.

One graph for each canvas and batch bucket, and for each head, number of RoIs and lane. All graphs take their memory
from one pool, so nothing may stay in it past a run: what a run gave is copied out on the same stream before another
starts. A *lane* is where the features of one detect run lie, large enough for any canvas and batch; a `Features`
borrows it until it is dropped, and one lane is usually all there is. Pictures go up while the next is copied to pinned
memory, and what a head gave comes down while its next RoIs run. B images, N RoIs.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.aoti import ops
from service.aoti.devices import Cpu, Work
from service.buckets import Shape, bucket, canvas_for, chunks, padded_rois
from service.errors import EngineOutOfMemory

Array = npt.NDArray[Any]
NUM_OWN = 4  # count, boxes, scores, labels; then the pyramid
SLOTS = 2


@dataclass(frozen=True, slots=True)
class Packages:
    """What is in `folder`: files by canvas, by head, and of the machine code of our ops by its key."""

    folder: Path
    detect: Mapping[Shape, str]
    heads: Mapping[str, str]
    batches: Sequence[int]
    rois: Sequence[int]
    kernels: Mapping[str, Mapping[str, Any]]

    def offer_kernels(self) -> None:
        """To the ops, which must know them before a package that calls them runs."""
        ops.offer(
            {
                key: ops.Code((self.folder / each["file"]).read_bytes(), each["threads"], each["slices"])
                for key, each in self.kernels.items()
            }
        )


class _Lane:
    """Room for the pyramid of any canvas and batch; `like` are the maps of one run."""

    def __init__(self, device: Cpu, like: Sequence[Tensor], rows: int, canvases: Sequence[Shape]) -> None:
        self.rows, self.channels = rows, [level.shape[1] for level in like]
        self.flat = [
            device.empty((rows * level.shape[1] * max(_cells(canvas, i) for canvas in canvases),), level.dtype)
            for i, level in enumerate(like)
        ]

    def levels(self, canvas: Shape) -> list[Tensor]:
        """(rows, C, h, w) each, channels-last."""
        found = []
        for i, (flat, channels) in enumerate(zip(self.flat, self.channels, strict=True)):
            height, width = _side(canvas[0], i), _side(canvas[1], i)
            shape = (self.rows, height, width, channels)
            found.append(flat[: math.prod(shape)].view(shape).permute(0, 3, 1, 2))
        return found


def _side(side: int, level: int) -> int:
    return side // (4 << level)


def _cells(canvas: Shape, level: int) -> int:
    return _side(canvas[0], level) * _side(canvas[1], level)


class Features:
    """The pyramid, in its lane."""

    __slots__ = ("__weakref__", "canvas", "lane")

    def __init__(self, lane: _Lane, canvas: Shape) -> None:
        self.lane, self.canvas = lane, canvas


class Found(NamedTuple):
    """count (B,), boxes (B, D, 4), scores (B, D), labels (B, D), as numpy; and the features."""

    count: Array
    boxes: Array
    scores: Array
    labels: Array
    features: Features


@dataclass(eq=False, slots=True)
class _Slot:
    """Where one chunk of RoIs goes up and what it gives comes down; used in turn."""

    rois: Tensor
    labels: Tensor
    given: Tensor | None = None  # on the device
    host: Tensor | None = None


class Runner:
    """Called from one thread at a time. Errors of torch pass through."""

    def __init__(self, packages: Packages, device: Cpu) -> None:
        self._packages, self._device = packages, device
        self.max_batch = max(packages.batches)
        packages.offer_kernels()
        with device.thread():
            self._detect = {canvas: self._load(file) for canvas, file in packages.detect.items()}
            self._heads = {head: self._load(file) for head, file in packages.heads.items()}
            largest, most = max(map(math.prod, packages.detect)), max(packages.rois)
            self._images = device.empty((self.max_batch * largest * 3,), torch.uint8)
            self._sizes = device.empty((self.max_batch, 2), torch.int64)
            self._staged = device.pinned(self._images.shape, torch.uint8)
            self._staged_sizes = device.pinned(self._sizes.shape, torch.int64)
            self._rois = device.empty((most, 5), torch.float32)
            self._labels = device.empty((most,), torch.int64)
            self._slots = {head: [self._new_slot(most) for _ in range(SLOTS)] for head in packages.heads}
            for buffer in (self._sizes, self._rois, self._labels):
                device.copy(buffer, torch.zeros_like(buffer, device="cpu"), device.compute)
            device.wait(device.mark(device.compute))
        self._own: list[Tensor] = []
        self._works: dict[tuple[Any, ...], Work] = {}
        self._free: deque[_Lane] = deque()

    def _load(self, file: str) -> Callable[..., Any]:
        # Single-threaded: no events of its own around a run, which a CUDA graph could not hold.
        path = str(self._packages.folder / file)
        return torch._inductor.aoti_load_package(path, run_single_threaded=True, device_index=self._device.index)

    def _new_slot(self, most: int) -> _Slot:
        return _Slot(self._device.pinned((most, 5), torch.float32), self._device.pinned((most,), torch.int64))

    def detect(self, images: Array, sizes: Array) -> Found:
        """images uint8 (B, H, W, 3), any canvas that some package holds; sizes int64 (B, 2) height, width."""
        count, device = len(images), self._device
        if count > self.max_batch:
            raise EngineOutOfMemory(f"the packages take {self.max_batch} pictures at once, not {count}")
        canvas = canvas_for((images.shape[1], images.shape[2]), list(self._packages.detect))
        size = bucket(count, self._packages.batches)
        with device.thread():
            work = self._detect_work(canvas, size)
            self._upload(images, sizes, canvas, size)
            device.order(device.copies, device.compute)
            work.run()
            device.order(device.compute, device.copies)
            own, levels = work.outputs[:NUM_OWN], work.outputs[NUM_OWN:]
            lane = self._free.popleft() if self._free else self._new_lane(levels)
            try:
                for target, given in zip(lane.levels(canvas), levels, strict=True):
                    device.copy(target[:size], given, device.compute)
                numbers = self._download(own, count)
            except BaseException:
                self._free.append(lane)
                raise
        features = Features(lane, canvas)
        weakref.finalize(features, self._free.append, lane).atexit = False
        return Found(numbers[0], numbers[1], numbers[2], numbers[3], features)

    def _new_lane(self, like: Sequence[Tensor]) -> _Lane:
        return _Lane(self._device, like, self.max_batch, list(self._packages.detect))

    def _upload(self, images: Array, sizes: Array, canvas: Shape, size: int) -> None:
        device = self._device
        device.wait(device.mark(device.copies))  # after a run that failed, its copies may still be reading
        shape = (size, *canvas, 3)
        staged, there = (buffer[: math.prod(shape)].view(shape) for buffer in (self._staged, self._images))
        rows = self._staged_sizes[:size]
        rows[:] = 1  # of the pictures that fill the bucket; detect blanks what is beyond a picture's size
        rows[: len(sizes)] = torch.from_numpy(np.ascontiguousarray(sizes))
        device.copy(self._sizes[:size], rows, device.copies)
        for index, image in enumerate(images):
            staged[index, : image.shape[0], : image.shape[1]] = torch.from_numpy(np.ascontiguousarray(image))
            device.copy(there[index], staged[index], device.copies)

    def _download(self, own: Sequence[Tensor], count: int) -> list[Array]:
        device = self._device
        if not self._own:
            self._own = [device.pinned((self.max_batch, *each.shape[1:]), each.dtype) for each in own]
        for target, given in zip(self._own, own, strict=True):
            device.copy(target[: len(given)], given, device.copies)
        device.wait(device.mark(device.copies))
        return [each[:count].numpy().copy() for each in self._own]

    def _detect_work(self, canvas: Shape, size: int) -> Work:
        key = ("detect", canvas, size)
        if key not in self._works:
            shape = (size, *canvas, 3)
            inputs = (self._images[: math.prod(shape)].view(shape), self._sizes[:size])
            self._works[key] = self._device.work(self._detect[canvas], inputs)
        return self._works[key]

    def head(self, head: str, features: Features, rois: Array, labels: Array | None) -> Array:
        """What the head gives for rois (N, 5), in float32."""
        device, slots = self._device, self._slots[head]
        parts: list[Array] = []
        waiting: deque[Callable[[], Array]] = deque()
        with device.thread():
            for turn, (start, rows, size) in enumerate(chunks(len(rois), self._packages.rois)):
                if len(waiting) == len(slots):
                    parts.append(waiting.popleft()())
                part, slot = slice(start, start + rows), slots[turn % len(slots)]
                mark = self._run_chunk(head, features, slot, rois[part], None if labels is None else labels[part], size)
                waiting.append(lambda slot=slot, rows=rows, mark=mark: self._collect(slot, rows, mark))
            parts.extend(collect() for collect in waiting)
        return np.concatenate(parts)

    def _run_chunk(
        self, head: str, features: Features, slot: _Slot, rois: Array, labels: Array | None, size: int
    ) -> Any:
        device = self._device
        work = self._head_work(head, features, size)
        slot.rois[:size] = torch.from_numpy(padded_rois(rois, size))
        device.copy(self._rois[:size], slot.rois[:size], device.compute)
        if labels is not None:
            slot.labels[:size] = 0
            slot.labels[: len(labels)] = torch.from_numpy(np.ascontiguousarray(labels))
            device.copy(self._labels[:size], slot.labels[:size], device.compute)
        work.run()
        given = work.outputs[0]
        if slot.given is None or slot.host is None:
            shape = (max(self._packages.rois), *given.shape[1:])
            slot.given, slot.host = device.empty(shape, given.dtype), device.pinned(shape, given.dtype)
        device.copy(slot.given[: len(rois)], given[: len(rois)], device.compute)
        device.order(device.compute, device.copies)
        device.copy(slot.host[: len(rois)], slot.given[: len(rois)], device.copies)
        return device.mark(device.copies)

    def _collect(self, slot: _Slot, rows: int, mark: Any) -> Array:
        assert slot.host is not None
        self._device.wait(mark)
        return slot.host[:rows].numpy().copy()

    def _head_work(self, head: str, features: Features, size: int) -> Work:
        key = (head, features.canvas, size, id(features.lane))  # a lane lives as long as the runner
        if key not in self._works:
            inputs = [*features.lane.levels(features.canvas), self._rois[:size]]
            inputs += [self._labels[:size]] if head == "masks" else []
            self._works[key] = self._device.work(self._heads[head], inputs)
        return self._works[key]

    def close(self) -> None:
        self._works, self._own, self._slots = {}, [], {}
        self._free.clear()
        self._detect, self._heads = {}, {}
        self._images = self._sizes = self._staged = self._staged_sizes = self._rois = self._labels = torch.empty(0)
        self._device.close()
