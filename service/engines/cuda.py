"""The little of CUDA's runtime that the TensorRT engine needs, over `cuda.bindings`; every call is checked.

Addresses are integers. A call that fails for want of memory raises `EngineOutOfMemory`, any other `EngineFailed`.
"""

import ctypes
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import EngineFailed, EngineOutOfMemory, EngineUnavailable


class Cuda:
    """One device, with what was allocated on it. Raises `EngineUnavailable` where there is no driver or no GPU."""

    def __init__(self, device: int = 0) -> None:
        try:
            runtime: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise EngineUnavailable(f"cuda-python is not installed ({error}): pip install 'cuda-python>=13'") from None
        self._runtime = runtime
        self.device = device
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess:
            raise EngineUnavailable(
                f"no CUDA driver that fits is loaded ({self._name(error)}): nvidia-smi tells which is"
            )
        if device >= count:
            raise EngineUnavailable(f"this machine has {count} CUDA devices, number {device} is not among them")
        self._device_memory: list[int] = []
        self._pinned_memory: list[int] = []
        self._destroy: list[Callable[[], Any]] = []
        self.enter_thread()

    def enter_thread(self) -> None:
        """A thread starts with device 0: each that works here says which device it means."""
        self._do("cudaSetDevice", self.device)

    def compute_capability(self) -> str:
        """Like "sm90"."""
        names = self._runtime.cudaDeviceAttr
        attributes = (names.cudaDevAttrComputeCapabilityMajor, names.cudaDevAttrComputeCapabilityMinor)
        major, minor = (self._do("cudaDeviceGetAttribute", each, self.device) for each in attributes)
        return f"sm{major}{minor}"

    def device_name(self) -> str:
        name = self._do("cudaGetDeviceProperties", self.device).name
        return (name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0")

    def allocate(self, size: int) -> int:
        """Device memory, all zero, freed by `close`."""
        address = int(self._do("cudaMalloc", max(1, size)))
        self._device_memory.append(address)
        self._do("cudaMemset", address, 0, max(1, size))
        self._do("cudaDeviceSynchronize")  # the streams made here do not wait for the one that clears
        return address

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Host memory that the device reads and writes by itself, valid until `close`."""
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        address = int(self._do("cudaMallocHost", size))
        self._pinned_memory.append(address)
        held: Any = (ctypes.c_byte * size).from_address(address)
        return np.frombuffer(held, dtype, math.prod(shape)).reshape(shape)

    def stream(self) -> Any:
        made = self._do("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self._destroy.append(lambda: self._runtime.cudaStreamDestroy(made))
        return made

    def event(self) -> Any:
        made = self._do("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)
        self._destroy.append(lambda: self._runtime.cudaEventDestroy(made))
        return made

    def upload(self, address: int, pinned: npt.NDArray[Any], stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("cudaMemcpyAsync", address, pinned.ctypes.data, pinned.nbytes, kind, stream)

    def download(self, pinned: npt.NDArray[Any], address: int, stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpyAsync", pinned.ctypes.data, address, pinned.nbytes, kind, stream)

    def order(self, first: Any, event: Any, then: Any) -> None:
        """What `then` is given from here on waits for what `first` has been given so far."""
        self._do("cudaEventRecord", event, first)
        self._do("cudaStreamWaitEvent", then, event, 0)

    def record(self, event: Any, stream: Any) -> None:
        self._do("cudaEventRecord", event, stream)

    def wait(self, event: Any) -> None:
        """Until the device has done what the event's stream held when it was recorded."""
        self._do("cudaEventSynchronize", event)

    def synchronize(self, stream: Any) -> None:
        self._do("cudaStreamSynchronize", stream)

    @contextmanager
    def capture(self, stream: Any, captured: list[Any]) -> Iterator[None]:
        """What is given to `stream` inside is not run but becomes a graph, put into `captured`."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("cudaStreamBeginCapture", stream, mode)
        try:
            yield
        except BaseException:
            self._runtime.cudaStreamEndCapture(stream)  # its error is that of the work inside, which is on its way up
            raise
        graph = self._do("cudaStreamEndCapture", stream)
        made = self._do("cudaGraphInstantiate", graph, 0)
        self._do("cudaGraphDestroy", graph)
        self._destroy.append(lambda: self._runtime.cudaGraphExecDestroy(made))
        captured.append(made)

    def launch(self, graph: Any, stream: Any) -> None:
        self._do("cudaGraphLaunch", graph, stream)

    def close(self) -> None:
        """Frees everything; errors are of no use any more."""
        for destroy in reversed(self._destroy):
            destroy()
        for address in self._device_memory:
            self._runtime.cudaFree(address)
        for address in self._pinned_memory:
            self._runtime.cudaFreeHost(address)
        self._destroy, self._device_memory, self._pinned_memory = [], [], []

    def _do(self, function: str, *arguments: Any) -> Any:
        error, *values = getattr(self._runtime, function)(*arguments)
        if error == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise EngineOutOfMemory(f"{function}: the GPU's memory, or the host's that it may read, is exhausted")
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise EngineFailed(f"{function} failed with {self._name(error)}; if it stays, restart the service")
        return values[0] if values else None

    def _name(self, error: Any) -> str:
        return str(getattr(error, "name", error))
