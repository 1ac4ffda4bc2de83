"""Pictures that wait for the engine as they came, and are decoded where they run.

A lane that is a process of its own decodes for itself (`service.worker`): a file is several times smaller than its
canvas, so it is the file that waits in the queue and goes from process to process. Its header tells all that admission
and batching want to know.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from service.errors import ServiceError
from service.images import Canvas, DecodeLimits, Image, ResizeRule, decode, padded_size, resized_size, size_by_header


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture, and the sizes of the canvas that it will be, as `Canvas` has them."""

    data: bytes
    limits: DecodeLimits
    shape: tuple[int, int]
    size: tuple[int, int]
    image_size: tuple[int, int]

    @classmethod
    def of(cls, data: bytes, limits: DecodeLimits, rule: ResizeRule) -> Self | None:
        """None where the header does not tell enough: such a picture is decoded first. Raises as `decode`."""
        if (image_size := size_by_header(data, limits)) is None:
            return None
        size = resized_size(*image_size, rule)
        return cls(data, limits, padded_size(size, rule), size, image_size)


Given = Canvas | Encoded


@dataclass(frozen=True, slots=True)
class Opened:
    canvas: Canvas
    timings_ms: dict[str, float]


def opened(given: Given, fit: Callable[[Image], Canvas]) -> Opened | ServiceError:
    """The canvas; of a picture that cannot be decoded the error, for it is no reason to fail others beside it."""
    if isinstance(given, Canvas):
        return Opened(given, {})
    started = time.perf_counter()
    try:
        image = decode(given.data, given.limits)
    except ServiceError as error:
        return error
    decoded = time.perf_counter()
    canvas = fit(image)
    return Opened(canvas, {"decode": (decoded - started) * 1000, "fit": (time.perf_counter() - decoded) * 1000})
