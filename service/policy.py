"""What goes together: pure, a list and a clock in, a batch out. `service.batching` runs it.

This module knows neither the engine nor what a request is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

CloseReason = Literal["full", "shared", "pixels", "shape", "drained"]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_padding` is the largest fraction of a batch's canvas pixels that may be there only because canvases of
    several shapes share it; 0 keeps shapes apart, and every answer what it would be alone. Each of `num_lanes` runs one
    batch, and a further one may be `ahead`: it waits at the lane, which then never waits for us.
    """

    max_batch: int
    max_pixels: int  # of all canvases of a batch together, padding included
    max_padding: float = 0.0
    linger_s: float = 0.0  # how long the oldest waits for company
    engine_s: float = 60.0  # a batch that takes longer has hung
    num_lanes: int = 1
    ahead: bool = False


C = TypeVar("C", bound="Candidate")


class Candidate(Protocol):
    """What the policy needs to know of a waiting request."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def rank_s(self) -> float: ...  # when it came, or would have for its priority; the lowest goes first
    @property
    def deadline_s(self) -> float: ...
    @property
    def is_abandoned(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Batch(Generic[C]):
    """`taken` run together, `expired` are answered without running, `left` wait on; who was abandoned is in none."""

    taken: list[C]
    expired: list[C]
    left: list[C]
    closed_by: CloseReason


def next_batch(
    waiting: Sequence[C], now_s: float, limits: BatchLimits, num_beside: int = 0, is_early: bool = False
) -> Batch[C]:
    """The first by rank and, in that order, those that fit beside it: in number, in pixels and in padding.

    The first is always taken, even alone above the pixel limit: nobody starves. Who does not fit is passed over, not
    waited for. `closed_by` says what kept the batch from growing: "drained" means that nobody else waited.

    `num_beside` others are in batches under way. A lane's part of all is what it has if each has as much running as
    waiting: were all in the batches that run, engines would be idle between them. Where `is_early`, since every lane
    has a batch, nobody is taken until a batch is that large or can grow no more.
    """
    alive = sorted((entry for entry in waiting if not entry.is_abandoned), key=lambda entry: entry.rank_s)
    expired = [entry for entry in alive if entry.deadline_s <= now_s]
    alive = [entry for entry in alive if entry.deadline_s > now_s]
    if not alive:
        return Batch([], expired, [], "drained")
    taken, left, reason = [alive[0]], [], "drained"
    part = _part(len(alive), num_beside, limits.num_lanes)
    for entry in alive[1:]:
        refused = _refusal([each.shape for each in taken], entry.shape, limits)
        if refused is None and len(taken) >= part:
            refused = "shared"
        if refused is None:
            taken.append(entry)
        else:
            left.append(entry)
            reason = refused if reason in ("drained", "shape") else reason
    if is_early and reason == "drained" and len(taken) < min(part, limits.max_batch):
        return Batch([], expired, alive, reason)
    return Batch(taken, expired, left, reason)


def _part(num_waiting: int, num_beside: int, num_lanes: int) -> int:
    return num_waiting if num_lanes == 1 else math.ceil((num_waiting + num_beside) / (2 * num_lanes))


def _refusal(shapes: list[tuple[int, int]], shape: tuple[int, int], limits: BatchLimits) -> CloseReason | None:
    """Why a canvas of this shape cannot join these; None where it can."""
    together = [*shapes, shape]
    height, width = _hull(together)
    pixels = len(together) * height * width
    if 1 - sum(h * w for h, w in together) / pixels > limits.max_padding:
        return "shape"
    if len(together) > limits.max_batch:
        return "full"
    return "pixels" if pixels > limits.max_pixels else None


def _hull(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(height for height, _ in shapes), max(width for _, width in shapes)
