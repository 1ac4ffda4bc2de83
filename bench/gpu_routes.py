"""The routes that bench/gpu.py compares: functions of a shape and a batch that give one run, host to answer."""

import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.networks import CLASSES, DETECTIONS, Below, torchvision_model
from bench.shapes import scene
from export import aoti_build
from export.half import prepared
from models.importers import from_torchvision
from models.servable import normalise
from service.aoti import devices, runner

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
        return Scale(device, ((512, 640),), (1, 2), halves[:1], 0.2, 45, 160, 280, 20, 256)
    return Scale(device, ((800, 1344), (800, 800)), (1, 4, 8, 16), halves, 1.0, 100, 200, 525, 1000, 8192)


# --- what a route is: a function of the shape and the batch that gives one run, which ends when its answer is there ---

Run = Callable[[], tuple[Tensor, Tensor]]  # -> boxes (10, 4) and labels (10,) of the first picture
Prepare = Callable[[Shape, int], Run]


class Setting:
    """What a route's process has: the folder with the weights, the packages and the reference."""

    def __init__(self, folder: Path, size: Scale) -> None:
        self.folder, self.size = folder, size
        self.device = torch.device(size.device)

    def theirs(self) -> nn.Module:
        model = torchvision_model(torch.load(self.folder / WEIGHTS, weights_only=True))
        return model.to(self.device)

    def ours(self, precision: str) -> Any:
        state = torch.load(self.folder / WEIGHTS, weights_only=True)
        network, _ = from_torchvision(state, [f"class_{i}" for i in range(CLASSES)], norm_eps=1e-5)
        small = prepared(network, precision)  # type: ignore[arg-type]
        return small.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def packages(self, precision: str, shape: Shape) -> runner.Packages:
        folder = self.folder / f"{precision}.{shape[0]}x{shape[1]}"
        if not (folder / "built.json").is_file():
            raise RuntimeError(f"the {precision} packages for {shape[0]} x {shape[1]} were not built")
        built = json.loads((folder / "built.json").read_text())
        return runner.Packages(
            folder, {shape: built["detect"]}, built["heads"], self.size.batches, rois_of(self.size), built["kernels"]
        )

    def runner_device(self) -> devices.Cpu:
        return devices.Cpu() if self.device.type == "cpu" else devices.Cuda(warn=lambda text: print(f"note: {text}"))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def rois_of(size: Scale) -> list[int]:
    return [DETECTIONS * batch for batch in size.batches]


def pictures(shape: Shape, batch: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.concatenate([scene(*shape, seed).images.numpy() for seed in range(batch)])
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
        torch._dynamo.reset()  # or the next shape may find the limit of recompilations, and go on without a word
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
            assert found.count.min() >= DETECTIONS, f"found {found.count}: another task"
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


class Compiled(runner.Runner):
    """With the one method of an engine that a runner lacks."""

    def masks(self, features: Any, rois: Any, labels: Any) -> Any:
        return self.head("masks", features, rois, labels)


class Stages(Compiled):
    """The engine's runner over the eager stages in the packages' place."""

    def __init__(self, packages: runner.Packages, device: devices.Cpu, model: Any) -> None:
        self._modules = aoti_build.stages(model)
        super().__init__(packages, device)

    def _load(self, file: str) -> Callable[..., Any]:
        stage = self._modules[file.partition(".")[0]]

        def run(*inputs: Tensor) -> Any:
            with torch.no_grad():
                return stage(*inputs)

        return run


class Enqueued(devices.Cuda):
    """Without CUDA graphs: every kernel is launched each time."""

    def work(self, package: Callable[..., Any], inputs: Sequence[Tensor]) -> devices.Work:
        return _OnCompute(package, inputs, self)


class _OnCompute(devices.Work):
    def __init__(self, package: Callable[..., Any], inputs: Sequence[Tensor], cuda: devices.Cuda) -> None:
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
