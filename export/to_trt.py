"""`limner export trt`: TensorRT plans for the GPU of this machine, put into a bundle once they agree with the model.

    python export/to_trt.py bundles/person/1
    python export/to_trt.py runs/person/best --out bundles/person/1 --precision bfloat16 --batch 1 8 32 --canvas 384x512
    python export/to_trt.py bundles/person/1 --out plans/person/1          # a copy gets them

Plans go to <bundle>/sm<compute capability>.<precision>/. Each is for one canvas; smaller ones are padded to it. The
service's own engine runs them against the torch model before the bundle is touched; below the bar it stays as it was.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is the import root, not export/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import onnx

from export import into_bundle, plugins, rebuild, to_onnx, trt_build, trt_graphs, verify
from export.half import PlanPrecision, prepared
from models.checkpoint import CheckpointError, Spec
from models.network import Network
from models.zoo import MODELS
from service.bundle import StageName
from service.engines.cuda import Cuda
from service.engines.plans import PLANS, DetectPlan, Plans
from service.errors import ServiceError

PRECISIONS: dict[str, PlanPrecision] = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16",
}  # fmt: skip
Graphs = dict[tuple[StageName, trt_graphs.FixedCanvas | None], Path]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plans are for."""

    gpu: str
    gpu_name: str
    tensorrt: str


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.dry_run:
            return dry_run(options)
        certificate = export(options)
    except (CheckpointError, ServiceError, OSError, ValueError, trt_build.BuildError, verify.ParityError) as error:
        print(f"limner export trt: {error}", file=sys.stderr)
        return 1 if isinstance(error, verify.ParityError) else 2
    print(to_onnx.table(certificate))
    where = options.out or options.source
    print(f"{where}: plans added. Serve it: limner serve (LIMNER_ENGINE=auto takes them on this GPU)")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="limner export trt", description="TensorRT plans into a bundle")
    add = parser.add_argument
    add(
        "source", type=Path, metavar="CHECKPOINT_OR_BUNDLE", nargs="?", help="where the weights are; --dry-run: the zoo"
    )
    add("--precision", default="fp16", choices=list(PRECISIONS), help="fp16 (default), bf16 or fp32")
    add("--dry-run", action="store_true", help="everything short of TensorRT, which need not be installed")
    add("--level", type=int, default=3, choices=range(6), help="how hard TensorRT looks for the fastest kernels")
    add("--workspace", type=float, default=8.0, metavar="GIB", help="memory that TensorRT may try kernels with")
    add("--timings", type=Path, help="file that keeps TensorRT's timings between runs")
    into_bundle.add_options(parser, "plans")
    return parser.parse_args(argv)


def dry_run(options: argparse.Namespace) -> int:
    """Every graph of the source, or of every model of the zoo, made and held to what TensorRT takes."""
    failed = 0
    for name, (model, spec) in _models(options.source):
        with tempfile.TemporaryDirectory() as aside:
            rule = into_bundle.canvas_rule(spec)
            shapes = trt_graphs.canvases(rule, options.canvas)
            graphs = _graphs(model, shapes, options, Path(aside))
            print(f"{name}, {PRECISIONS[options.precision]}, canvases {', '.join(map(str, shapes))}")
            for (stage, canvas), path in graphs.items():
                graph = onnx.load(path)
                told = trt_graphs.problems(graph)
                failed += len(told)
                profiles = _profiles(stage, canvas, graph, shapes, options)
                print(f"  {path.stem}: {trt_graphs.plan_of(graph)}, {len(profiles)} profiles")
                for problem in told:
                    print(f"    {problem}")
    return 1 if failed else 0


def _models(source: Path | None) -> Any:
    if source is not None:
        yield str(source), rebuild.load(source)
        return
    from models.checkpoint import COCO_PERSON, build
    from models.checkpoint import CanvasRule as Rule

    for name in [name for name in MODELS if name not in into_bundle.PORTABLE_ONLY]:
        people = "keypoint" in name or name.startswith("person")
        spec = Spec(
            name,
            ("person",) if people else tuple(f"class{index}" for index in range(90)),
            COCO_PERSON if people else None,
            Rule(384, 640, antialias=True) if "mobilenetv2" in name else Rule(),
        )
        yield name, (build(spec).eval(), spec)


def _graphs(
    model: Network, shapes: Sequence[trt_graphs.FixedCanvas], options: argparse.Namespace, directory: Path
) -> Graphs:
    small = prepared(model, PRECISIONS[options.precision])
    return trt_graphs.save_stages(small, shapes, max(options.batch), max(options.rois), directory)


def _profiles(
    stage: StageName,
    canvas: trt_graphs.FixedCanvas | None,
    graph: onnx.ModelProto,
    shapes: Sequence[trt_graphs.FixedCanvas],
    options: argparse.Namespace,
) -> list[trt_build.Shapes]:
    if canvas is not None:
        return trt_build.detect_shapes(canvas, sorted(set(options.batch)))
    return trt_build.head_shapes(graph, shapes, max(options.batch), sorted(set(options.rois)))


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Builds aside, certifies there with the service's engine, then puts the bundle's new state in its place."""
    bundle = into_bundle.target(options.source, options.out)
    into_bundle.allowed(options.allow)
    into_bundle.check_sizes(options)
    trt_build.tensorrt()  # its absence is said before anything takes time
    model, spec = rebuild.load(options.source)
    into_bundle.refuse(options.source, bundle, spec)
    images, source = to_onnx.pictures(options.pictures, options.max_pictures)
    certificate = into_bundle.add(bundle, model, *plan(options, model, spec), images, source, options.out)
    return {"pictures": source, "engines": [certificate]}


def plan(options: argparse.Namespace, model: Network, spec: Spec) -> tuple[into_bundle.Adding, Callable[[Path], None]]:
    """What is going to be added to a bundle, and the function that makes it in a folder."""
    cuda = Cuda()
    machine = Machine(cuda.compute_capability(), cuda.device_name(), trt_build.tensorrt().__version__)
    cuda.close()
    precision = PRECISIONS[options.precision]
    canvases = trt_graphs.canvases(into_bundle.canvas_rule(spec), options.canvas)

    def make(folder: Path) -> None:
        plans = _build(model, canvases, options, machine, folder)
        (folder / PLANS).write_text(plans.model_dump_json(indent=2) + "\n")

    adding = into_bundle.Adding(
        folder=f"{machine.gpu}.{precision}",
        engine="tensorrt",
        version=machine.tensorrt,
        precision=precision,
        gpu=machine.gpu,
        gpu_name=machine.gpu_name,
        canvases=[(each.height, each.width) for each in canvases],
        max_batch=max(options.batch),
        allowed=into_bundle.allowed(options.allow),
    )
    return adding, make


def _build(
    model: Network,
    canvases: Sequence[trt_graphs.FixedCanvas],
    options: argparse.Namespace,
    machine: Machine,
    folder: Path,
) -> Plans:
    trt, how = trt_build.tensorrt(), trt_build.Building(options.level, int(options.workspace * 2**30))
    plugins.register(trt, machine.gpu)
    cache = options.timings or trt_build.cache_file(machine.gpu, machine.tensorrt)
    detect, heads = [], {}
    with tempfile.TemporaryDirectory() as aside:
        for (stage, canvas), path in _graphs(model, canvases, options, Path(aside)).items():
            graph = onnx.load(path)
            if told := trt_graphs.problems(graph):
                raise trt_build.BuildError(f"{path.name}: {'; '.join(told)}")
            profiles = _profiles(stage, canvas, graph, canvases, options)
            file = _plan_name(stage, canvas)
            (folder / file).write_bytes(trt_build.build(trt, path, profiles, how, cache, _say()))
            print(f"{file}: {(folder / file).stat().st_size / 1e6:.1f} MB, {len(profiles)} profiles", file=sys.stderr)
            if canvas is None:
                heads[stage] = file
            else:
                detect.append(DetectPlan(canvas=(canvas.height, canvas.width), file=file))
    return Plans(
        precision=PRECISIONS[options.precision],
        gpu=machine.gpu,
        gpu_name=machine.gpu_name,
        tensorrt=machine.tensorrt,
        batches=sorted(set(options.batch)),
        rois=sorted(set(options.rois)),
        detect=detect,
        heads=heads,
        golden="golden.npz",
    )


def _plan_name(stage: StageName, canvas: trt_graphs.FixedCanvas | None) -> str:
    return f"{stage}.{canvas}.plan" if canvas else f"{stage}.plan"


def _say() -> Callable[[str], None]:
    """On a terminal, one line that changes; in a log, nothing."""
    if not sys.stderr.isatty():
        return lambda _text: None
    return lambda text: print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
