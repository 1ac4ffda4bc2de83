"""Where compiled packages run: a GPU with its streams and CUDA graphs, or the processor, which answers at once.

`service/aoti/runner.py` says what runs when; this says how, and nothing else of it touches CUDA.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Work:
    """A package at one shape, with its input buffers; `outputs` are valid until any other work runs."""

    outputs: Sequence[Tensor]

    def __init__(self, package: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.package, self.inputs = package, inputs

    def call(self) -> Sequence[Tensor]:
        given = self.package(*self.inputs)
        return [given] if isinstance(given, Tensor) else list(given)

    def run(self) -> None:
        self.outputs = self.call()


class Cpu:
    """Where packages run; `compute` and `copies` are its streams, here none: all is done when a call returns."""

    index = -1
    compute: Any = None
    copies: Any = None

    def thread(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def copy(self, target: Tensor, source: Tensor, _stream: Any) -> None:
        target.copy_(source)

    def order(self, _first: Any, _then: Any) -> None:
        """What `_then` is given from here on waits for what `_first` has been given so far."""

    def mark(self, _stream: Any) -> Any:
        return None

    def wait(self, _mark: Any) -> None:
        """Until the stream has done what it held when it was marked."""

    def work(self, package: Callable[..., Any], inputs: Sequence[Tensor]) -> Work:
        return Work(package, inputs)

    def close(self) -> None:
        """After everything that was made here is dropped."""


class Cuda(Cpu):
    """A GPU. `warn` is told once where a run cannot be recorded as a graph."""

    def __init__(self, index: int = 0, warn: Callable[[str], None] = warnings.warn) -> None:
        self.index, self.warn = index, warn
        self.device = torch.device("cuda", index)
        with self.thread():
            self.compute, self.copies = torch.cuda.Stream(), torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def thread(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.index)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        torch.cuda.synchronize()  # the streams here do not wait for the one that this memory was last used on
        return made

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def order(self, first: Any, then: Any) -> None:
        then.wait_stream(first)

    def mark(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def work(self, package: Callable[..., Any], inputs: Sequence[Tensor]) -> Work:
        return Recorded(package, inputs, self)

    def close(self) -> None:
        torch.cuda.empty_cache()


class Recorded(Work):
    """As a CUDA graph; where the package cannot be recorded, called each time, with the same results."""

    def __init__(self, package: Callable[..., Any], inputs: Sequence[Tensor], cuda: Cuda) -> None:
        super().__init__(package, inputs)
        self.cuda = cuda
        self.graph: torch.cuda.CUDAGraph | None = None
        # What a first run loads and chooses must not fall into the recording, and the choice must be the same there.
        with _Exact(), torch.cuda.stream(cuda.compute):
            self.call()
            cuda.compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate meanwhile: they decode pictures into pinned memory.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=cuda.pool, stream=cuda.compute, capture_error_mode=mode):
                    self.outputs = self.call()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                cuda.warn(f"no CUDA graph, each run is enqueued anew, with the same results: {error}")
                return
        self.graph = graph

    def run(self) -> None:
        with _Exact(), torch.cuda.stream(self.cuda.compute):
            if self.graph is not None:
                self.graph.replay()
            else:
                super().run()


class _Exact:
    """cuDNN tries which algorithm is fastest for a shape, and what is called float32 is that: TF32 has ten bits."""

    def __enter__(self) -> None:
        cudnn: Any = torch.backends.cudnn  # its attributes are properties, which a checker cannot know of a module
        matmul = torch.backends.cuda.matmul
        self.before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False

    def __exit__(self, *_: object) -> None:
        cudnn: Any = torch.backends.cudnn
        matmul = torch.backends.cuda.matmul
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = self.before
