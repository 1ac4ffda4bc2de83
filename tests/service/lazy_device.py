"""A device for `service.aoti.runner` that is as lazy as a GPU may be: a stream does nothing until it is waited for,
and then only what that needs. One stream may be hasty instead, and do at once what it is given. A copy or run that is
not ordered behind what it reads then finds old memory.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from service.aoti import devices


class Stream:
    """Tasks in order; one of them may be to wait for a place in another stream."""

    def __init__(self, hasty: bool) -> None:
        self.tasks: deque[Callable[[], None]] = deque()
        self.given = self.done = 0
        self.hasty = hasty

    def give(self, task: Callable[[], None]) -> None:
        self.tasks.append(task)
        self.given += 1
        if self.hasty:
            self.until(self.given)

    def until(self, place: int) -> None:
        while self.done < place:
            task = self.tasks.popleft()
            self.done += 1
            task()


class LazyDevice(devices.Cpu):
    def __init__(self, hasty: str = "") -> None:
        self.compute, self.copies = Stream(hasty == "compute"), Stream(hasty == "copies")
        self.recorded: list[tuple[int, ...]] = []  # shape of the first input of each work that was made
        self.shared: list[Tensor] = []  # outputs of all works, which any run may spoil

    def thread(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _spoil(torch.empty(tuple(shape), dtype=dtype))

    pinned = empty

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        assert target.shape == source.shape
        stream.give(lambda: target.copy_(source))

    def order(self, first: Stream, then: Stream) -> None:
        place = first.given
        then.give(lambda: first.until(place))

    def mark(self, stream: Stream) -> tuple[Stream, int]:
        return stream, stream.given

    def wait(self, mark: tuple[Stream, int]) -> None:
        stream, place = mark
        stream.until(place)

    def work(self, package: Callable[..., Any], inputs: Sequence[Tensor]) -> devices.Work:
        self.compute.until(self.compute.given)
        self.recorded.append(tuple(inputs[0].shape))
        return _Work(package, inputs, self)


class _Work(devices.Work):
    """Its outputs are in memory that every other run overwrites, as graphs of one pool may."""

    def __init__(self, package: Callable[..., Any], inputs: Sequence[Tensor], device: LazyDevice) -> None:
        super().__init__(package, inputs)
        self.device = device
        self.outputs = [_spoil(torch.empty_like(each)) for each in self.call()]
        device.shared += self.outputs

    def run(self) -> None:
        self.device.compute.give(self._compute)

    def _compute(self) -> None:
        given = self.call()
        for each in self.device.shared:
            _spoil(each)
        for target, value in zip(self.outputs, given, strict=True):
            target.copy_(value)


def _spoil(memory: Tensor) -> Tensor:
    return memory.fill_(float("nan")) if memory.is_floating_point() else memory.fill_(77)
