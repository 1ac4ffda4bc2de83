"""TensorRT and CUDA's runtime as far as the engine uses them, on host memory, with ONNX Runtime in the plans' place.

Streams are as late as they may be: nothing runs before somebody waits for it, and then only what that wait needs. So a
copy or a run that the engine forgot to wait for reads or leaves stale bytes. Every access is held to allocations.
"""

import ctypes
import json
import math
from collections.abc import Callable
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

VERSION = "11.4.0.106"
Types = Enum("Types", "FLOAT HALF BF16 INT64 INT32 UINT8 BOOL")
OF_ORT = {"tensor(float)": Types.FLOAT, "tensor(int64)": Types.INT64, "tensor(uint8)": Types.UINT8}
NUMPY = {Types.FLOAT: np.float32, Types.INT64: np.int64, Types.UINT8: np.uint8}


def write_plan(path: Path, onnx: Path, canvas: tuple[int, int] | None, buckets: list[int], max_batch: int) -> None:
    plan = {"onnx": str(onnx), "canvas": canvas, "buckets": sorted(buckets), "max_batch": max_batch}
    path.write_text(json.dumps(plan))


class Stream:
    def __init__(self) -> None:
        self.given: list[Callable[[], None]] = []
        self.done = 0
        self.recording: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return id(self)

    def give(self, work: Callable[[], None]) -> None:
        (self.given if self.recording is None else self.recording).append(work)

    def run(self, until: int | None = None) -> None:
        while self.done < (len(self.given) if until is None else until):
            self.done += 1
            self.given[self.done - 1]()


class Event:
    stream: Stream | None = None
    position = 0


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Machine:
    """The device: what is allocated, what was called, and what shall fail."""

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 1 << 30, captures: bool = True) -> None:
        self.capability, self.memory, self.captures = capability, memory, captures
        self.blocks: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.calls: list[str] = []
        self.contexts: list[Any] = []
        self.runs: list[tuple[str, int]] = []  # onnx file's stem and rows

    def block(self, size: int) -> int:
        held = (ctypes.c_byte * size)()
        ctypes.memset(held, 0x5A, size)  # fresh memory holds anything
        address = ctypes.addressof(held)
        self.blocks[address] = held
        return address

    def check(self, address: int, size: int) -> None:
        inside = any(start <= address and address + size <= start + len(held) for start, held in self.blocks.items())
        assert inside, f"{size} bytes at {address:#x} are not inside any allocation"

    def modules(self) -> dict[str, ModuleType]:
        """For sys.modules."""
        runtime = ModuleType("cuda.bindings.runtime")
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(runtime, name, self._logged(name))
        runtime.cudaError_t = Status
        runtime.cudaDeviceAttr = Enum("Attr", "cudaDevAttrComputeCapabilityMajor cudaDevAttrComputeCapabilityMinor")
        runtime.cudaMemcpyKind = Enum("Kind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost")
        runtime.cudaStreamCaptureMode = Enum("Mode", "cudaStreamCaptureModeThreadLocal")
        runtime.cudaStreamNonBlocking, runtime.cudaEventDisableTiming = 1, 2
        bindings, cuda = ModuleType("cuda.bindings"), ModuleType("cuda")
        bindings.runtime, cuda.bindings = runtime, bindings
        return {
            "cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime, "tensorrt": _tensorrt(self),
        }  # fmt: skip

    def _logged(self, name: str) -> Callable[..., Any]:
        function = getattr(self, name)

        def called(*arguments: Any) -> Any:
            self.calls.append(name)
            return function(*arguments)

        return called

    def cudaGetDeviceCount(self):
        return Status.cudaSuccess, 1

    def cudaSetDevice(self, _device):
        return (Status.cudaSuccess,)

    def cudaDeviceSynchronize(self):
        for stream in self.streams.values():
            stream.run()
        return (Status.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute, _device):
        return Status.cudaSuccess, self.capability[attribute.value - 1]

    def cudaGetDeviceProperties(self, _device):
        return Status.cudaSuccess, SimpleNamespace(name=b"fake GPU")

    def cudaMalloc(self, size):
        if sum(map(len, self.blocks.values())) + size > self.memory:
            return Status.cudaErrorMemoryAllocation, None
        return Status.cudaSuccess, self.block(size)

    cudaMallocHost = cudaMalloc

    def cudaMemset(self, address, value, size):
        self.check(address, size)
        ctypes.memset(address, value, size)
        return (Status.cudaSuccess,)

    def cudaFree(self, address):
        del self.blocks[address]
        return (Status.cudaSuccess,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1, "only non-blocking streams overlap"
        stream = Stream()
        self.streams[int(stream)] = stream
        return Status.cudaSuccess, stream

    def cudaStreamDestroy(self, stream):
        del self.streams[int(stream)]
        return (Status.cudaSuccess,)

    def cudaEventCreateWithFlags(self, _flags):
        return Status.cudaSuccess, Event()

    def cudaEventDestroy(self, _event):
        return (Status.cudaSuccess,)

    def cudaEventRecord(self, event, stream):
        event.stream, event.position = stream, len(stream.given)
        return (Status.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream, event, _flags):
        other, position = event.stream, event.position
        stream.give(lambda: other.run(position))
        return (Status.cudaSuccess,)

    def cudaEventSynchronize(self, event):
        event.stream.run(event.position)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        stream.run()
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to, source, size, _kind, stream):
        self.check(to, size)
        self.check(source, size)
        stream.give(lambda: ctypes.memmove(to, source, size))
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, _mode):
        stream.recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        recorded, stream.recording = stream.recording, None
        if not self.captures:
            return Status.cudaErrorStreamCaptureUnsupported, None
        return Status.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph, _flags):
        return Status.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, _graph):
        return (Status.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        stream.given.extend(graph)
        return (Status.cudaSuccess,)


class FakeEngine:
    def __init__(self, machine: Machine, plan: dict[str, Any]) -> None:
        self.machine, self.plan = machine, plan
        self.session = onnxruntime.InferenceSession(plan["onnx"], providers=["CPUExecutionProvider"])
        self.inputs = {port.name: OF_ORT[port.type] for port in self.session.get_inputs()}
        self.outputs = {port.name: OF_ORT[port.type] for port in self.session.get_outputs()}
        self.num_optimization_profiles = len(plan["buckets"])
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        canvas = plan["canvas"] or (64, 64)
        self.shapes = {port.name: self._shape(port.name, port.shape) for port in self.session.get_inputs()}
        example = {
            name: np.zeros(
                [abs(d) if i == 0 or d > 0 else canvas[i - 2] // (4 << int(name[1]) - 2) for i, d in enumerate(shape)],
                NUMPY[self.inputs[name]],
            )
            for name, shape in self.shapes.items()
        }
        found = self.session.run(list(self.outputs), example)
        self.shapes |= {n: (-1, *value.shape[1:]) for n, value in zip(self.outputs, found, strict=True)}

    def _shape(self, name: str, declared: list[Any]) -> tuple[int, ...]:
        if name == "images":
            return (-1, *self.plan["canvas"], 3)
        if name.startswith("p"):
            return (self.plan["max_batch"], declared[1], -1, -1)
        return (-1, *declared[1:])

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Types:
        return {**self.inputs, **self.outputs}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 1000 * (1 + index)

    def create_execution_context(self, strategy: str) -> "FakeContext":
        assert strategy == "user managed"
        context = FakeContext(self)
        self.machine.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.shapes_set = 0
        self.scratch = 0

    def set_device_memory(self, address: int, size: int) -> None:
        self.engine.machine.check(address, size)
        self.scratch = size

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        assert self.scratch >= self.engine.get_device_memory_size_for_profile_v2(index)
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        assert name in self.engine.inputs
        self.shapes_set += 1
        rows = self.engine.plan["buckets"][self.profile]
        declared = self.engine.shapes[name]
        wanted = [rows if i == 0 and d < 0 else d for i, d in enumerate(declared)]
        self.shapes[name] = tuple(shape)
        return all(d in (-1, s) for d, s in zip(wanted, shape, strict=True))

    def infer_shapes(self) -> list[str]:
        return sorted(self.engine.inputs.keys() - self.shapes.keys())

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in {**self.engine.inputs, **self.engine.outputs}
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        assert addresses.keys() == {**self.engine.inputs, **self.engine.outputs}.keys()
        self.engine.machine.streams[stream].give(lambda: self._compute(addresses, shapes))
        return True

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        engine, machine = self.engine, self.engine.machine
        offered = {}
        for name, shape in shapes.items():
            dtype = np.dtype(NUMPY[engine.inputs[name]])
            size = math.prod(shape) * dtype.itemsize
            machine.check(addresses[name], size)
            offered[name] = np.frombuffer(ctypes.string_at(addresses[name], size), dtype).reshape(shape)
        rows = len(offered["images" if "images" in offered else "rois"])
        machine.runs.append((Path(engine.plan["onnx"]).stem, rows))
        for name, value in zip(engine.outputs, engine.session.run(list(engine.outputs), offered), strict=True):
            machine.check(addresses[name], value.nbytes)
            ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)


def _tensorrt(machine: Machine) -> ModuleType:
    trt = ModuleType("tensorrt")

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Runtime:
        def __init__(self, _logger: Any) -> None: ...

        def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
            return FakeEngine(machine, json.loads(content)) if content.startswith(b"{") else None

    trt.__version__, trt.ILogger, trt.Runtime = VERSION, Logger, Runtime
    trt.TensorIOMode = type("TensorIOMode", (), {"INPUT": "input", "OUTPUT": "output"})
    trt.ExecutionContextAllocationStrategy = type("Strategy", (), {"USER_MANAGED": "user managed"})
    return trt
