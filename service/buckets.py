"""Which fixed shape a batch runs in: canvases and sizes (*buckets*), and what is smaller is padded. Pure."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from service.errors import EngineFailed

Shape = tuple[int, int]


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `count`; the largest where none does."""
    return min((size for size in sizes if size >= count), default=max(sizes))


def chunks(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts `count` rows into (start, rows, bucket): full largest buckets, then the one that holds the rest."""
    largest = max(sizes)
    for start in range(0, count, largest):
        rows = min(largest, count - start)
        yield start, rows, bucket(rows, sizes)


def canvas_for(shape: Shape, canvases: Sequence[Shape]) -> Shape:
    """The canvas of the fewest pixels that holds (height, width); raises `EngineFailed` where none does."""
    fitting = [each for each in canvases if each[0] >= shape[0] and each[1] >= shape[1]]
    if not fitting:
        known = ", ".join(f"{height}x{width}" for height, width in canvases)
        raise EngineFailed(
            f"nothing in the bundle takes a canvas of {shape[0]}x{shape[1]}, there are {known}: "
            f"make one with limner export trt (or aoti) --canvas {shape[0]}x{shape[1]}"
        )
    return min(fitting, key=lambda each: (each[0] * each[1], each))


def padded_rois(rois: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """(N, 5) -> (size, 5); the rows behind are RoIs of no extent in the first picture, which cost nothing to sample."""
    rows = np.zeros((size, 5), np.float32)
    rows[: len(rois)] = rois
    return rows
