"""The routes that bench/gpu.py compares, and what one process of it does: one route, one build, or one measurement.

What a process finds it prints, a line each: a word in capitals, and its numbers as JSON.
"""

import importlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from bench.networks import CLASSES, DETECTIONS, SMALL, Below, frozen_mask_rcnn, scene
from export import aoti_build
from export.half import prepared
from models.importers import from_torchvision
from models.servable import normalise
from service.aoti import runner

Shape = tuple[int, int]
EAGER, COMPILED = "torchvision eager, float32", "torchvision torch.compile, {} autocast"
WEIGHTS, REFERENCE = "weights.pt", "reference.npz"


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a run is. Seconds are of a row's timing, of a route and of everything."""

    device: str
    canvases: tuple[Shape, ...]
    batches: tuple[int, ...]
    precisions: tuple[str, ...]  # of limner's routes
    row_s: float
    route_s: float
    build_s: float
    total_s: float
    memory_batches: int
    matmul_side: int


def scale(device: str, quick: bool) -> Scale:
    halves = ("float16", "bfloat16") if device == "cuda" else ("float32",)
    if quick:
        return Scale(device, (SMALL,), (1, 2), halves[:1], 0.2, 240, 900, 3000, 20, 256)
    return Scale(device, ((800, 1344), (800, 800)), (1, 4, 8, 16), halves, 1.0, 80, 200, 525, 1000, 8192)


# --- what a route is: a function of the shape and the batch that gives one run, which ends when its answer is there ---

Run = Callable[[], tuple[Tensor, Tensor]]  # -> boxes (10, 4) and labels (10,) of the first picture
Prepare = Callable[[Shape, int], Run]


class Setting:
    """What a route's process has: the folder with the weights, the packages and the reference."""

    def __init__(self, folder: Path, size: Scale) -> None:
        self.folder, self.size = folder, size
        self.device = torch.device(size.device)

    def theirs(self) -> nn.Module:
        model = frozen_mask_rcnn()
        model.load_state_dict(torch.load(self.folder / WEIGHTS, weights_only=True))
        return model.to(self.device)

    def ours(self, precision: str) -> Any:
        state = torch.load(self.folder / WEIGHTS, weights_only=True)
        network, _ = from_torchvision(state, [f"class_{i}" for i in range(CLASSES)], norm_eps=1e-5)
        small = prepared(network, precision)  # type: ignore[arg-type]
        return small.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def packages(self, precision: str, shape: Shape) -> runner.Packages:
        folder = self.folder / f"{precision}.{shape[0]}x{shape[1]}"
        built = json.loads((folder / "built.json").read_text())
        return runner.Packages(
            folder, {shape: built["detect"]}, built["heads"], self.size.batches, rois_of(self.size), built["kernels"]
        )

    def runner_device(self) -> runner.Cpu:
        return runner.Cpu() if self.device.type == "cpu" else runner.Cuda(warn=lambda text: print(f"note: {text}"))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def rois_of(size: Scale) -> list[int]:
    return [DETECTIONS * batch for batch in size.batches]


def pictures(shape: Shape, batch: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.concatenate([scene(*shape, seed).images for seed in range(batch)])
    return images, np.tile(np.array([shape], np.int64), (batch, 1))


def eager(setting: Setting, half: bool = False, exact: bool = False, compiled: bool = False) -> Prepare:
    """torchvision. `exact`: float32 without TF32, which torch allows convolutions by default."""
    if exact:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model, kind = setting.theirs(), setting.device.type
    dtype = torch.float16 if kind == "cuda" else torch.bfloat16

    def prepare(shape: Shape, batch: int) -> Run:
        images, sizes = (torch.from_numpy(each).to(setting.device) for each in pictures(shape, batch))
        canvas, below = normalise(images, sizes), Below(model, shape)
        function = torch.compile(below) if compiled else below

        def run() -> tuple[Tensor, Tensor]:
            with torch.inference_mode(not compiled), torch.no_grad(), torch.autocast(kind, dtype, enabled=half):
                found = function(canvas)
            assert len(found) == batch
            setting.synchronize()
            return found[0]["boxes"], found[0]["labels"] - 1

        return run

    return prepare


def through(setting: Setting, engine: Callable[[Shape], Any]) -> Prepare:
    """limner, by something with the methods of an engine: host to host."""
    engines: dict[Shape, Any] = {}

    def prepare(shape: Shape, batch: int) -> Run:
        if shape not in engines:
            engines[shape] = engine(shape)
        images, sizes = pictures(shape, batch)

        def run() -> tuple[Tensor, Tensor]:
            found = engines[shape].detect(images, sizes)
            rois = [
                np.concatenate([np.full((DETECTIONS, 1), i, np.float32), found.boxes[i, :DETECTIONS]], axis=1)
                for i in range(batch)
            ]
            labels = found.labels[:, :DETECTIONS]
            masks = engines[shape].masks(found.features, np.concatenate(rois), labels.reshape(-1))
            assert masks.shape == (DETECTIONS * batch, 28, 28)
            return torch.from_numpy(found.boxes[0, :DETECTIONS]), torch.from_numpy(labels[0])

        return run

    return prepare


class Stages(runner.Runner):
    """The engine's runner over the eager stages in the packages' place."""

    def __init__(self, packages: runner.Packages, device: runner.Cpu, model: Any) -> None:
        self._modules = aoti_build.stages(model)
        super().__init__(packages, device)

    def _load(self, file: str) -> Callable[..., Any]:
        stage = self._modules[file.partition(".")[0]]

        def run(*inputs: Tensor) -> Any:
            with torch.no_grad():
                return stage(*inputs)

        return run

    def masks(self, features: Any, rois: Any, labels: Any) -> Any:
        return self.head("masks", features, rois, labels)


class Compiled(runner.Runner):
    def masks(self, features: Any, rois: Any, labels: Any) -> Any:
        return self.head("masks", features, rois, labels)


class Enqueued(runner.Cuda):
    """Without CUDA graphs: every kernel is launched each time."""

    def work(self, package: Callable[..., Any], inputs: Sequence[Tensor]) -> runner.Work:
        return _OnCompute(package, inputs, self)


class _OnCompute(runner.Work):
    def __init__(self, package: Callable[..., Any], inputs: Sequence[Tensor], cuda: runner.Cuda) -> None:
        super().__init__(package, inputs)
        self.cuda = cuda

    def run(self) -> None:
        with torch.cuda.stream(self.cuda.compute):
            super().run()


def stages(setting: Setting, precision: str, graphs: bool) -> Prepare:
    model, size = setting.ours(precision), setting.size

    def engine(shape: Shape) -> Stages:
        files = {shape: "detect"}, {"masks": "masks"}
        packages = runner.Packages(setting.folder, *files, size.batches, rois_of(size), {})
        on_gpu = setting.device.type == "cuda"
        device = setting.runner_device() if graphs or not on_gpu else Enqueued()
        return Stages(packages, device, model)

    return through(setting, engine)


def packages(setting: Setting, precision: str) -> Prepare:
    return through(setting, lambda shape: Compiled(setting.packages(precision, shape), setting.runner_device()))


def onnx_runtime(setting: Setting) -> Prepare:
    """Needs what bundles need, too: an ImportError says what is not there."""
    from service.engines.onnx import OnnxEngine, refuse_without_cuda

    if setting.device.type == "cuda":
        refuse_without_cuda()
    bundle, _, _ = in_bundle(setting)
    shared = OnnxEngine(bundle, device=setting.size.device)  # type: ignore[arg-type]
    return through(setting, lambda _shape: shared)


def tensorrt(setting: Setting) -> Prepare:
    """No certificate: random weights put too many candidates at nearly equal scores."""
    importlib.import_module("tensorrt")
    from export import into_bundle, to_trt
    from service.bundle import Bundle
    from service.engines import open_engine

    bundle, network, spec = in_bundle(setting)
    shapes = [f"{height}x{width}" for height, width in setting.size.canvases]
    sizes = ["--batch", *map(str, setting.size.batches), "--rois", *map(str, rois_of(setting.size))]
    options = to_trt.parse([str(bundle.directory), "--precision", "fp16", "--canvas", *shapes, *sizes])
    adding, make = to_trt.plan(options, network, spec)
    (folder := bundle.directory / adding.folder).mkdir()
    make(folder)
    into_bundle.relist(bundle.directory, bundle.manifest, folder, adding)
    opened = open_engine(Bundle.read(bundle.directory), "tensorrt", precision="auto").engine
    return through(setting, lambda _shape: opened)


def in_bundle(setting: Setting) -> Any:
    """The bundle, its network and specification."""
    from export.to_onnx import write_bundle
    from service.bundle import Bundle

    state = torch.load(setting.folder / WEIGHTS, weights_only=True)
    network, spec = from_torchvision(state, [f"class_{i}" for i in range(CLASSES)], norm_eps=1e-5)
    directory = Path(tempfile.mkdtemp(dir=setting.folder)) / "mask" / "1"
    directory.mkdir(parents=True)
    write_bundle(network, spec, directory, ("mask", "1"), {})
    return Bundle.read(directory), network, spec


def routes(size: Scale) -> dict[str, Callable[[Setting], Prepare]]:
    """By name, the ones that matter most first: time may run out."""
    half, (first, *more) = "float16" if size.device == "cuda" else "bfloat16", size.precisions
    found: dict[str, Callable[[Setting], Prepare]] = {
        EAGER: lambda s: eager(s),
        f"limner AOTInductor, {first}": lambda s: packages(s, first),
        f"torchvision eager, {half} autocast": lambda s: eager(s, half=True),
        COMPILED.format(half): lambda s: eager(s, half=True, compiled=True),
    }
    for precision in more:
        found[f"limner AOTInductor, {precision}"] = lambda s, p=precision: packages(s, p)
    found |= {
        f"limner eager in CUDA graphs, {first}": lambda s: stages(s, first, graphs=True),
        f"limner eager, {first}": lambda s: stages(s, first, graphs=False),
        "torchvision eager, float32 without TF32": lambda s: eager(s, exact=True),
        "limner TensorRT, float16": tensorrt,
        "limner ONNX Runtime, float32": onnx_runtime,
    }
    return found


def tell(kind: str, **facts: Any) -> None:
    print(f"{kind} {json.dumps(facts)}", flush=True)


def run_route(name: str, setting: Setting) -> None:
    prepare = routes(setting.size)[name](setting)
    for shape in setting.size.canvases:
        for batch in setting.size.batches:
            seconds, answer = timed(prepare(shape, batch), setting.size.row_s)
            tell("ROW", shape=shape, batch=batch, seconds=seconds, same=agreement(setting, name, shape, answer))


def timed(run: Run, seconds: float) -> tuple[float, tuple[Tensor, Tensor]]:
    """Median of a run, after three that warm up."""
    for _ in range(3):
        answer = run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        answer = run()
        taken.append(time.perf_counter() - start)
    return median(taken), answer


def agreement(setting: Setting, name: str, shape: Shape, answer: tuple[Tensor, Tensor]) -> str:
    """How many of the eager model's detections in the first picture are found again: same class, IoU above 0.5."""
    boxes, labels = (each.detach().float().cpu() for each in answer)
    assert len(boxes) == DETECTIONS, f"{name} found {len(boxes)}: another task"
    file = setting.folder / f"{shape[0]}x{shape[1]}.{REFERENCE}"
    if name == EAGER:
        np.savez(file, boxes=boxes.numpy(), labels=labels.numpy())
        return ""
    if not file.is_file():
        return "?"
    with np.load(file) as wanted:
        overlap = torchvision.ops.box_iou(torch.from_numpy(wanted["boxes"]), boxes)
        overlap[torch.from_numpy(wanted["labels"])[:, None] != labels[None]] = 0
    return f"{int((overlap.amax(1) > 0.5).sum())} of {DETECTIONS}"


def build_packages(setting: Setting, precision: str, shape: Shape) -> None:
    folder = setting.folder / f"{precision}.{shape[0]}x{shape[1]}"
    folder.mkdir()
    size = setting.size
    start = time.perf_counter()
    built = aoti_build.build(
        setting.ours(precision), [shape], max(size.batches), max(rois_of(size)), size.device, folder
    )
    described = {"detect": built.detect[shape], "heads": built.heads, "kernels": built.kernels}
    (folder / "built.json").write_text(json.dumps(described))
    tell("BUILT", seconds=time.perf_counter() - start)


def measure_machine(setting: Setting) -> None:
    """The best that matrix products do here, and what the network asks for."""
    side, device = setting.size.matmul_side, setting.device
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> tuple[Tensor, Tensor]:
        result = one @ other
        setting.synchronize()
        return result, result

    seconds, _ = timed(product, 1.0)
    tell("MATMUL", tflops=2 * side**3 / seconds / 1e12)
    from torch.utils.flop_counter import FlopCounterMode

    model = setting.ours("float32")
    for shape in setting.size.canvases:
        images, sizes = (torch.from_numpy(each).to(device) for each in pictures(shape, 1))
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            found = model(normalise(images, sizes), sizes)
            rois = torch.cat((torch.zeros(DETECTIONS, 1, device=device), found.boxes[0, :DETECTIONS]), dim=1)
            model.mask_probabilities(found.features, rois, found.labels[0, :DETECTIONS].clamp(min=0))
        tell("FLOPS", shape=shape, gflop=counted.get_total_flops() / 1e9)


def measure_memory(setting: Setting) -> None:
    """Batches of changing size, shape and number of RoIs; what the device and the process hold as they go by."""
    size, rng = setting.size, np.random.default_rng(0)
    engines = {
        shape: Compiled(setting.packages(size.precisions[0], shape), setting.runner_device()) for shape in size.canvases
    }
    some = {shape: pictures(shape, max(size.batches)) for shape in size.canvases}
    for turn in range(size.memory_batches):
        shape = size.canvases[int(rng.integers(len(size.canvases)))]
        batch = int(rng.integers(1, max(size.batches) + 1))
        images, sizes = (each[:batch] for each in some[shape])
        found = engines[shape].detect(images, sizes)
        number = int(rng.integers(1, 2 * max(rois_of(size))))
        low, sides = rng.uniform(0, 100, (number, 2)), rng.uniform(1, 300, (number, 2))
        rois = np.concatenate([rng.integers(0, batch, (number, 1)), low, low + sides], axis=1).astype(np.float32)
        engines[shape].masks(found.features, rois, np.zeros(number, np.int64))
        del found
        if turn + 1 in (size.memory_batches // 10, size.memory_batches // 2, size.memory_batches):
            tell("MEMORY", batches=turn + 1, device_mib=device_mib(setting), process_mib=process_mib())


def device_mib(setting: Setting) -> float:
    if setting.device.type == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def process_mib() -> float:
    status = Path("/proc/self/status")
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) / 1024


def run_part(part: str, folder: Path) -> None:
    """`part` is route:NAME, build:PRECISION:HxW, or other:NAME."""
    described: dict[str, Any] = json.loads((folder / "scale.json").read_text())
    described["canvases"] = tuple((height, width) for height, width in described["canvases"])
    setting = Setting(folder, Scale(**described))
    kind, _, name = part.partition(":")
    if kind == "route":
        run_route(name, setting)
    elif kind == "build":
        precision, _, sides = name.partition(":")
        height, width = map(int, sides.split("x"))
        build_packages(setting, precision, (height, width))
    else:
        {"machine": measure_machine, "memory": measure_memory}[name](setting)
