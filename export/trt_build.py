"""From a graph to a TensorRT plan for the GPU of this machine: TensorRT 10.13 to 11.4, strongly typed.

Nothing that TensorRT 11 has removed is touched: precision is in the graph, so there are no precision flags, no
calibrators and no layer constraints.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from export.trt_graphs import FixedCanvas
from service.bundle import stride_of
from service.errors import EngineUnavailable

MINIMUM = (10, 13)
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # min, opt, max by input


class BuildError(RuntimeError):
    """TensorRT made no plan; the message has what it said."""


def tensorrt() -> Any:
    """The module; raises EngineUnavailable, which says what to install."""
    try:
        found: Any = importlib.import_module("tensorrt")
    except ImportError as error:
        raise EngineUnavailable(
            f"tensorrt cannot be imported ({error}): pip install tensorrt-cu13 on the machine with the GPU, "
            "or use NVIDIA's tensorrt container; --dry-run needs neither"
        ) from None
    except OSError as error:
        raise EngineUnavailable(
            f"TensorRT's libraries cannot be loaded ({error}): install tensorrt-cu13-libs"
        ) from None
    if tuple(int(part) for part in found.__version__.split(".")[:2]) < MINIMUM:
        raise EngineUnavailable(f"TensorRT {found.__version__} is older than {'.'.join(map(str, MINIMUM))}: update it")
    return found


@dataclass(frozen=True, slots=True)
class Building:
    """How hard the builder looks for tactics, and with how much memory."""

    level: int = 3
    workspace_bytes: int = 8 << 30


def detect_shapes(canvas: FixedCanvas, batches: Sequence[int]) -> list[Shapes]:
    """A profile for each batch size, which takes that size alone: such kernels are tuned for nothing else."""
    return [_fixed({"images": (b, canvas.height, canvas.width, 3), "sizes": (b, 2)}) for b in sorted(batches)]


def head_shapes(
    graph: onnx.ModelProto, canvases: Sequence[FixedCanvas], max_batch: int, rois: Sequence[int]
) -> list[Shapes]:
    """A profile for each number of RoIs; the pyramid may be of any of the canvases, for the largest batch."""
    profiles = []
    for num in sorted(rois):
        shapes: Shapes = {}
        for value in graph.graph.input:
            if value.name in ("rois", "labels"):
                shapes |= _fixed({value.name: (num, 5) if value.name == "rois" else (num,)})
                continue
            channels, stride = value.type.tensor_type.shape.dim[1].dim_value, stride_of(value.name)
            sides = [(c.height // stride, c.width // stride) for c in canvases]
            low, high = (tuple(pick(column) for column in zip(*sides, strict=True)) for pick in (min, max))
            most = max(sides, key=lambda side: side[0] * side[1])
            shapes[value.name] = tuple((max_batch, channels, *side) for side in (low, most, high))  # type: ignore[assignment]
        profiles.append(shapes)
    return profiles


def _fixed(shapes: dict[str, tuple[int, ...]]) -> Shapes:
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def build(
    trt: Any, path: Path, profiles: Sequence[Shapes], how: Building, cache: Path, say: Callable[[str], None]
) -> bytes:
    """The plan of one graph; raises BuildError. The plugins must be registered."""
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        told = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise BuildError(f"TensorRT {trt.__version__} does not take {path.name}: {told or 'it gives no reason'}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, how.workspace_bytes)
    config.builder_optimization_level = how.level
    config.clear_flag(trt.BuilderFlag.TF32)  # what the graph calls float32 decides where boxes are
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{path.name}: TensorRT refuses the profile {shapes}")
    config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.is_file() else b""), False)
    monitor = _monitor(trt, path.stem, say)  # held here, too, for as long as it is called
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"TensorRT {trt.__version__} made no plan of {path.name}; its messages are above")
    _keep_timings(config, cache)
    return bytes(plan)


def _network_flags(trt: Any) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    wanted = (getattr(flags, name, None) for name in ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"))
    return sum(1 << int(flag) for flag in wanted if flag is not None)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                print(f"TensorRT: {message}", file=sys.stderr)

    return Log()


def _monitor(trt: Any, name: str, say: Callable[[str], None]) -> Any:
    """Tells the outermost phase and how far it is."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: str | None = None
            self.steps = 1

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            if parent is None:
                self.outer, self.steps = phase, max(1, num_steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outer:
                say(f"{name}: {phase} {100 * (step + 1) // self.steps} %")
            return True

        def phase_finish(self, phase: str) -> None: ...

    return Monitor()


def _keep_timings(config: Any, cache: Path) -> None:
    """For the next build; one that cannot be kept costs minutes, nothing else."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_name(f".{cache.name}.{os.getpid()}")
        aside.write_bytes(bytes(config.get_timing_cache().serialize()))
        aside.replace(cache)


def cache_file(gpu: str, version: str) -> Path:
    """Of this GPU and TensorRT; timings of others are of no use."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "limner" / f"tensorrt-{version}-{gpu}.timings"
