"""Runs a bundle's TensorRT plans: one context and one CUDA graph for each canvas and batch size, nothing of torch.

Pictures go up one by one while the next is being copied to pinned memory; what a head gave goes down while its next
RoIs run. A *lane* is one set of device buffers, large enough for any plan: a `Detected` borrows it, so that its
features stay where they are until it is dropped, and one lane is usually all there is. Heads see the lane's whole
capacity as their batch, since a RoI names its picture and nothing else of the pyramid is read. B images, N RoIs.
"""

import importlib
import math
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import structlog

from service.buckets import Shape, bucket, canvas_for, chunks, padded_rois
from service.bundle import Bundle, StageName, stride_of
from service.engines import Detected, Floats, Integers, Precision, check_outputs
from service.engines.cuda import Cuda
from service.engines.plans import HeadName, Plans, layout
from service.errors import BundleError, EngineFailed, EngineOutOfMemory, EngineUnavailable

log = structlog.get_logger()
trt: Any = importlib.import_module("tensorrt")  # by name: it has no types, and checkers take this file for it

OWN = ("count", "boxes", "scores", "labels")
HEAD_OUTPUT: dict[HeadName, str] = {"masks": "probabilities", "keypoints": "heatmaps"}
ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "UINT8": 1, "BOOL": 1}
HOST_TYPES = {"FLOAT": np.float32, "INT64": np.int64, "UINT8": np.uint8}


class _Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            log.error("tensorrt", message=message)
        elif severity == trt.ILogger.WARNING:
            log.warning("tensorrt", message=message)


LOG = _Log()  # TensorRT keeps one for the process


class _Plan:
    """A deserialised engine, its tensors, and the profile of each bucket."""

    def __init__(self, runtime: Any, path: Path, buckets: list[int]) -> None:
        self.path = path
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise EngineUnavailable(
                f"{path} does not load here, the log says why: make it again with limner export trt"
            )
        self.profiles = {size: index for index, size in enumerate(sorted(buckets))}
        if self.engine.num_optimization_profiles != len(self.profiles):
            raise BundleError(f"{path} has not the {len(self.profiles)} profiles of its plans.json: make it again")
        self.names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]

    def is_input(self, name: str) -> bool:
        return self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT

    def dtype(self, name: str) -> str:
        return self.engine.get_tensor_dtype(name).name

    def shape(self, name: str, rows: int) -> tuple[int, ...]:
        """With `rows` in the place of the first, open, dimension."""
        first, *others = self.engine.get_tensor_shape(name)
        if any(side < 0 for side in others):
            raise BundleError(f"{self.path}: the shape of {name} is open, make the plan again with limner export trt")
        return (rows if first < 0 else first, *others)

    def num_bytes(self, name: str, rows: int) -> int:
        return math.prod(self.shape(name, rows)) * ITEM_BYTES[self.dtype(name)]

    def scratch_bytes(self) -> int:
        return max(self.engine.get_device_memory_size_for_profile_v2(index) for index in self.profiles.values())


@dataclass(eq=False, slots=True)
class _Work:
    """One context at one shape, and its graph for each set of addresses that it ever had."""

    names: list[str]
    context: Any
    graphs: dict[tuple[int, ...], Any] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Lane:
    """Device buffers of one detect run, by tensor name."""

    addresses: dict[str, int]


class _Features:
    """The pyramid, in its lane."""

    __slots__ = ("__weakref__", "canvas", "lane")

    def __init__(self, lane: _Lane, canvas: Shape) -> None:
        self.lane, self.canvas = lane, canvas


@dataclass(eq=False, slots=True)
class _Slot:
    """Where one chunk of RoIs goes up, runs and comes down; there are two a head, used in turn."""

    addresses: dict[str, int]
    pinned: dict[str, npt.NDArray[Any]]
    computed: Any
    down: Any


class TensorrtEngine:
    name = "tensorrt"

    def __init__(self, bundle: Bundle, plans: Plans, directory: Path, cuda: Cuda) -> None:
        """`directory` holds the plans' files; `cuda` is closed with the engine."""
        self.precision: Precision = plans.precision
        self.max_batch, self.canvases = plans.max_batch, plans.canvases
        self.golden_file = f"{directory.name}/{plans.golden}"
        self._plans, self._cuda = plans, cuda
        try:
            self._load(bundle, directory)
        except BaseException:
            cuda.close()
            raise

    def _load(self, bundle: Bundle, directory: Path) -> None:
        plans, cuda = self._plans, self._cuda
        runtime = trt.Runtime(LOG)
        self._runtime = runtime  # must outlive its engines
        self._detect = {each.canvas: _Plan(runtime, directory / each.file, plans.batches) for each in plans.detect}
        self._heads = {head: _Plan(runtime, directory / file, plans.rois) for head, file in plans.heads.items()}
        everything = [*self._detect.values(), *self._heads.values()]
        for stage in bundle.manifest.stages:
            plan = next(iter(self._detect.values())) if stage == "detect" else self._heads.get(cast(HeadName, stage))
            check_outputs(bundle, stage, set(plan.names) if plan else set())
        self._compute, self._copies = cuda.stream(), cuda.stream()
        self._uploaded, self._computed = cuda.event(), cuda.event()
        self._scratch_bytes = max(plan.scratch_bytes() for plan in everything)
        self._scratch = cuda.allocate(self._scratch_bytes)
        self._works: dict[tuple[StageName, Shape, int], _Work] = {}
        names = next(iter(self._detect.values())).names
        self._levels = {port.name for port in bundle.manifest.stages["detect"].outputs} - set(OWN)
        rows = self.max_batch
        self._lane_bytes = {n: max(plan.num_bytes(n, rows) for plan in self._detect.values()) for n in names}
        self._free: deque[_Lane] = deque([self._new_lane()])
        self._pinned = self._staging()
        self._slots = {head: [self._new_slot(plan), self._new_slot(plan)] for head, plan in self._heads.items()}

    def _new_lane(self) -> _Lane:
        offsets, size = layout(self._lane_bytes)
        start = self._cuda.allocate(size)
        return _Lane({name: start + offset for name, offset in offsets.items()})

    def _staging(self) -> dict[str, npt.NDArray[Any]]:
        """Pinned memory for what goes up and down around a detect run, shared by all: one runs at a time."""
        pinned = {"images": self._cuda.pinned((self._lane_bytes["images"],), np.uint8)}
        plan = next(iter(self._detect.values()))
        for name in ("sizes", *OWN):
            pinned[name] = self._cuda.pinned(plan.shape(name, self.max_batch), HOST_TYPES[plan.dtype(name)])
        return pinned

    def _new_slot(self, plan: _Plan) -> _Slot:
        most = max(self._plans.rois)
        names = [name for name in plan.names if name not in self._levels]
        offsets, size = layout({name: plan.num_bytes(name, most) for name in names})
        start = self._cuda.allocate(size)
        addresses = {name: start + offset for name, offset in offsets.items()}
        pinned = {name: self._cuda.pinned(plan.shape(name, most), HOST_TYPES[plan.dtype(name)]) for name in names}
        return _Slot(addresses, pinned, self._cuda.event(), self._cuda.event())

    def detect(self, images: npt.NDArray[np.uint8], sizes: Integers, *_proposals: Floats) -> Detected:
        count, cuda = len(images), self._cuda
        if count > self.max_batch:
            raise EngineOutOfMemory(f"the TensorRT plans take {self.max_batch} pictures at once, not {count}")
        cuda.enter_thread()
        canvas = canvas_for((images.shape[1], images.shape[2]), self._plans.canvases)
        size = bucket(count, self._plans.batches)
        lane = self._free.popleft() if self._free else self._new_lane()
        try:
            self._upload(images, sizes, lane, canvas, size)
            cuda.order(self._copies, self._uploaded, self._compute)
            self._run(self._work("detect", canvas, size), lane.addresses)
            cuda.order(self._compute, self._computed, self._copies)
            for name in OWN:
                cuda.download(self._pinned[name][:size], lane.addresses[name], self._copies)
            cuda.synchronize(self._copies)
        except BaseException:
            self._free.append(lane)
            raise
        features = _Features(lane, canvas)
        weakref.finalize(features, self._free.append, lane).atexit = False
        return Detected(*(self._pinned[name][:count].copy() for name in OWN), features=features)

    def _upload(self, images: npt.NDArray[np.uint8], sizes: Integers, lane: _Lane, canvas: Shape, size: int) -> None:
        cuda, (height, width) = self._cuda, canvas
        cuda.synchronize(self._copies)  # after a run that failed, its copies may still be reading
        staged = self._pinned["images"][: size * height * width * 3].reshape(size, height, width, 3)
        rows = self._pinned["sizes"][:size]
        rows[:] = 1  # of the pictures that fill the bucket; detect blanks what is beyond a picture's size
        rows[: len(sizes)] = sizes
        cuda.upload(lane.addresses["sizes"], rows, self._copies)
        for index, image in enumerate(images):
            staged[index, : image.shape[0], : image.shape[1]] = image
            cuda.upload(lane.addresses["images"] + index * height * width * 3, staged[index], self._copies)

    def masks(self, features: Any, rois: Floats, labels: Integers) -> Floats:
        return self._head("masks", features, rois, labels)

    def keypoints(self, features: Any, rois: Floats) -> Floats:
        return self._head("keypoints", features, rois, None)

    def _head(self, head: HeadName, features: _Features, rois: Floats, labels: Integers | None) -> Floats:
        self._cuda.enter_thread()
        slots, output = self._slots[head], HEAD_OUTPUT[head]
        self._cuda.synchronize(self._copies)
        whole = np.empty((len(rois), *slots[0].pinned[output].shape[1:]), np.float32)
        waiting: deque[Callable[[], None]] = deque()
        for turn, (start, rows, size) in enumerate(chunks(len(rois), self._plans.rois)):
            if len(waiting) == len(slots):
                waiting.popleft()()
            slot = slots[turn % len(slots)]
            part = slice(start, start + rows)
            self._run_chunk(head, features, slot, rois[part], None if labels is None else labels[part], size)
            waiting.append(lambda slot=slot, part=part, rows=rows: self._collect(slot, output, whole[part], rows))
        for collect in waiting:
            collect()
        return whole

    def _run_chunk(
        self, head: HeadName, features: _Features, slot: _Slot, rois: Floats, labels: Integers | None, size: int
    ) -> None:
        """Up and through the head on the compute stream, down on the other: it comes down while the next one runs."""
        cuda, output = self._cuda, HEAD_OUTPUT[head]
        slot.pinned["rois"][:size] = padded_rois(rois, size)
        cuda.upload(slot.addresses["rois"], slot.pinned["rois"][:size], self._compute)
        if labels is not None and "labels" in slot.pinned:
            slot.pinned["labels"][:size] = 0
            slot.pinned["labels"][: len(labels)] = labels
            cuda.upload(slot.addresses["labels"], slot.pinned["labels"][:size], self._compute)
        levels = {name: features.lane.addresses[name] for name in self._levels}
        self._run(self._work(head, features.canvas, size), {**levels, **slot.addresses})
        cuda.order(self._compute, slot.computed, self._copies)
        cuda.download(slot.pinned[output][: len(rois)], slot.addresses[output], self._copies)
        cuda.record(slot.down, self._copies)

    def _collect(self, slot: _Slot, output: str, into: Floats, rows: int) -> None:
        self._cuda.wait(slot.down)
        into[:] = slot.pinned[output][:rows]

    def _work(self, stage: StageName, canvas: Shape, size: int) -> _Work:
        """The context of this shape, made when it is first wanted and never given another one."""
        key = (stage, canvas, size)
        if key not in self._works:
            plan = self._detect[canvas] if stage == "detect" else self._heads[cast(HeadName, stage)]
            self._works[key] = _Work(plan.names, self._context(plan, canvas, size))
        return self._works[key]

    def _context(self, plan: _Plan, canvas: Shape, size: int) -> Any:
        context = plan.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:  # TensorRT logs why; with a plan that has loaded it is memory
            raise EngineOutOfMemory(f"{plan.path.name}: no execution context for {size} rows, the log has the rest")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        done = context.set_optimization_profile_async(plan.profiles[size], int(self._compute))
        self._cuda.synchronize(self._compute)
        for name in filter(plan.is_input, plan.names):
            done = context.set_input_shape(name, self._input_shape(plan, name, canvas, size)) and done
        if not done or context.infer_shapes():
            raise EngineFailed(
                f"{plan.path.name} refuses {size} rows on {canvas}: make it again with limner export trt"
            )
        return context

    def _input_shape(self, plan: _Plan, name: str, canvas: Shape, size: int) -> tuple[int, ...]:
        if name not in self._levels:
            return plan.shape(name, size)
        stride = stride_of(name)
        channels = plan.engine.get_tensor_shape(name)[1]
        return (self.max_batch, channels, canvas[0] // stride, canvas[1] // stride)

    def _run(self, work: _Work, addresses: dict[str, int]) -> None:
        """Enqueues one run on the compute stream; the first at these addresses records its graph."""
        addresses = {name: addresses[name] for name in work.names}  # a head need not read every level of the pyramid
        key = tuple(addresses.values())
        if key not in work.graphs:
            work.graphs[key] = self._record(work.context, addresses)
        graph = work.graphs[key]
        if graph is None:
            self._enqueue(work.context, addresses)
        else:
            self._cuda.launch(graph, self._compute)

    def _record(self, context: Any, addresses: dict[str, int]) -> Any | None:
        self._enqueue(context, addresses)  # what a first run sets up must not fall into the recording
        self._cuda.synchronize(self._compute)
        recorded: list[Any] = []
        try:
            with self._cuda.capture(self._compute, recorded):
                self._enqueue(context, addresses)
        except EngineOutOfMemory:
            raise
        except EngineFailed as error:
            log.warning("no CUDA graph: each run is enqueued anew, with the same results", reason=error.detail)
            return None
        return recorded[0]

    def _enqueue(self, context: Any, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineFailed(f"TensorRT does not take the buffer of {name}; the log has the rest")
        if not context.execute_async_v3(int(self._compute)):
            raise EngineFailed("TensorRT could not enqueue the run; the log has the rest")

    def close(self) -> None:
        self._works.clear()  # contexts before engines, engines before what they stand on
        self._detect, self._heads = {}, {}
        self._runtime = None
        self._free.clear()
        self._pinned, self._slots = {}, {}
        self._cuda.close()
