"""`limner export trt`: TensorRT plans for the GPU of this machine, put into a bundle once they agree with the model.

    python export/to_trt.py bundles/person/1
    python export/to_trt.py runs/person/best --out bundles/person/1 --precision bfloat16 --batch 1 8 32 --canvas 384x512

Plans go to <bundle>/sm<compute capability>.<precision>/. Each is for one canvas; smaller ones are padded to it. The
service's own engine runs them against the torch model before the bundle is touched; below the bar it stays as it was.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is the import root, not export/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import onnx

from export import plugins, rebuild, to_onnx, trt_build, trt_graphs, verify
from export.half import PlanPrecision, prepared
from models.checkpoint import CheckpointError, Spec
from models.classics import CLASSICS
from models.network import Network
from models.zoo import MODELS
from service.bundle import MANIFEST, Artifact, Bundle, CanvasRule, Manifest, StageName, file_sha256, write_manifest
from service.engines.cuda import Cuda
from service.engines.plans import PLANS, DetectPlan, Plans
from service.errors import ServiceError
from service.images import Canvas

PORTABLE_ONLY = {function.__name__ for function in CLASSICS}
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
    print(f"{options.out}: plans added. Serve it: limner serve (LIMNER_ENGINE=auto takes them on this GPU)")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="limner export trt", description="TensorRT plans into a bundle")
    add = parser.add_argument
    add(
        "source", type=Path, metavar="CHECKPOINT_OR_BUNDLE", nargs="?", help="where the weights are; --dry-run: the zoo"
    )
    add("--out", type=Path, metavar="BUNDLE", help="bundle that gets the plans; the source itself where that is one")
    add("--precision", default="fp16", choices=list(PRECISIONS), help="fp16 (default), bf16 or fp32")
    add("--batch", type=int, nargs="+", default=[1, 4, 8, 16], help="batch sizes; others are padded to the next one")
    add("--rois", type=int, nargs="+", default=[8, 32, 128], help="numbers of RoIs that the heads are made for")
    add(
        "--canvas",
        nargs="+",
        default=["landscape", "portrait", "square"],
        help="those names (of the model's canvas rule) or shapes like 384x512; others are padded to the next one",
    )
    add("--dry-run", action="store_true", help="everything short of TensorRT, which need not be installed")
    add("--pictures", type=Path, help="folder of pictures for the certificate; synthetic ones if left out")
    add("--max-pictures", type=int, default=12)
    add("--level", type=int, default=3, choices=range(6), help="how hard TensorRT looks for the fastest kernels")
    add("--workspace", type=float, default=8.0, metavar="GIB", help="memory that TensorRT may try kernels with")
    add("--timings", type=Path, help="file that keeps TensorRT's timings between runs")
    add(
        "--allow",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help=f"another bar for the certificate: {', '.join(each.name for each in fields(verify.Bars))}",
    )
    return parser.parse_args(argv)


def dry_run(options: argparse.Namespace) -> int:
    """Every graph of the source, or of every model of the zoo, made and held to what TensorRT takes."""
    failed = 0
    for name, (model, spec) in _models(options.source):
        with tempfile.TemporaryDirectory() as aside:
            rule = _rule(spec)
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

    for name in [name for name in MODELS if name not in PORTABLE_ONLY]:
        people = "keypoint" in name or name.startswith("person")
        spec = Spec(
            name,
            ("person",) if people else tuple(f"class{index}" for index in range(90)),
            COCO_PERSON if people else None,
            Rule(384, 640, antialias=True) if "mobilenetv2" in name else Rule(),
        )
        yield name, (build(spec).eval(), spec)


def _rule(spec: Spec) -> CanvasRule:
    rule = spec.canvas
    return CanvasRule(short_side=rule.short_side, long_side=rule.long_side, multiple=rule.multiple)


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
    bundle = _target(options)
    allowed = _allowed(options.allow)
    if min(options.batch) < 1 or min(options.rois) < 1:
        raise ValueError("--batch and --rois: sizes are 1 at least")
    trt = trt_build.tensorrt()
    cuda = Cuda()
    machine = Machine(cuda.compute_capability(), cuda.device_name(), trt.__version__)
    cuda.close()
    model, spec = rebuild.load(options.source)
    if spec.architecture in PORTABLE_ONLY:
        raise ValueError(f"{spec.architecture} has no TensorRT form here: its portable graphs serve it")
    _same_model(options.source, bundle, spec)
    images, source = to_onnx.pictures(options.pictures, options.max_pictures)
    precision = PRECISIONS[options.precision]
    out = bundle.directory
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        directory = Path(aside) / out.name
        folder = directory / f"{machine.gpu}.{precision}"
        shutil.copytree(out, directory, copy_function=_link, ignore=shutil.ignore_patterns(folder.name))
        folder.mkdir()
        canvases = trt_graphs.canvases(_rule(spec), options.canvas)
        plans = _build(model, canvases, options, machine, folder)
        sides = [(each.height, each.width) for each in canvases]
        # The bundle's golden picture first: in it, at least, the model finds something.
        canvases_given = [_golden_canvas(bundle), *verify.canvases_of(images, bundle)]
        padded = verify.padded(_of_any_shape(canvases_given, sides), sides)
        verify.write_golden(model, folder, padded)
        (folder / PLANS).write_text(plans.model_dump_json(indent=2) + "\n")
        _relist(directory, bundle.manifest, folder, machine, precision)
        batches = sorted({each for each in (1, 2, 5, plans.max_batch) if each <= plans.max_batch})
        made = Bundle.read(directory)
        certificate = verify.certify(model, made, padded, "tensorrt", precision, batches, allowed)
        if not certificate["matched"]:
            raise ValueError("the model finds nothing in these pictures, so nothing was compared: give --pictures")
        certificate |= {"gpu": machine.gpu_name, "pictures_from": source}
        _write_certificate(directory, made.manifest, certificate)
        Bundle.read(directory)
        to_onnx.publish(directory, out, Path(aside) / "replaced")
    return {"pictures": source, "engines": [certificate]}


def _target(options: argparse.Namespace) -> Bundle:
    if options.source is None:
        raise ValueError("give a checkpoint or a bundle, for example bundles/person/1 (only --dry-run can do without)")
    out = options.out or options.source
    if not (out / MANIFEST).is_file():
        raise ValueError(
            f"{out} is no bundle: make one with limner export onnx {options.source} --out bundles/NAME/VERSION, "
            "then give it as --out"
        )
    options.out = out
    return Bundle.read(out)


def _allowed(texts: Sequence[str]) -> dict[str, float]:
    names, found = {each.name for each in fields(verify.Bars)}, {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--allow {text}: expected NAME=NUMBER") from None
        if name not in names:
            raise ValueError(f"--allow {text}: the bars are {', '.join(sorted(names))}")
    return found


def _same_model(source: Path, bundle: Bundle, spec: Spec) -> None:
    """A checkpoint's plans belong into the bundle that was made of it."""
    if (source / MANIFEST).is_file():
        return
    known = bundle.manifest.provenance.get("checkpoint_sha256")
    if list(spec.classes) != bundle.manifest.classes or known != file_sha256(source / "model.safetensors"):
        raise ValueError(f"{bundle.directory} was made from another checkpoint than {source}: export that one anew")


def _link(source: str, target: str) -> None:
    """What stays the same is not copied where the file system can do without."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _of_any_shape(canvases: list[Canvas], sides: list[tuple[int, int]]) -> list[Canvas]:
    """Pictures that some plan takes; at least one must be."""
    fitting = [c for c in canvases if any(c.shape[0] <= h and c.shape[1] <= w for h, w in sides)]
    if not fitting:
        raise ValueError("none of the pictures fits a --canvas: give more canvases, or --pictures of such a shape")
    return fitting


def _golden_canvas(bundle: Bundle) -> Canvas:
    golden = bundle.golden()
    size = (int(golden["sizes"][0, 0]), int(golden["sizes"][0, 1]))
    return Canvas(golden["images"][0], size, size)


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


def _relist(directory: Path, manifest: Manifest, folder: Path, machine: Machine, precision: str) -> None:
    """The manifest with the new plans' files in the place of older ones for the same GPU and precision."""
    kept = [each for each in manifest.artifacts if not each.file.startswith(f"{folder.name}/")]
    added = [
        Artifact(
            file=f"{folder.name}/{path.name}",
            stage=_stage_of(path),
            sha256=file_sha256(path),
            runtime="tensorrt",
            runtime_version=machine.tensorrt,
            precision=precision,
            gpu=machine.gpu,
        )
        for path in sorted(folder.iterdir())
    ]
    write_manifest(directory, manifest.model_copy(update={"artifacts": [*kept, *added]}))


def _stage_of(path: Path) -> StageName | None:
    stages: dict[str, StageName] = {"detect": "detect", "masks": "masks", "keypoints": "keypoints"}
    return stages.get(path.name.partition(".")[0]) if path.suffix == ".plan" else None


def _write_certificate(directory: Path, manifest: Manifest, certificate: dict[str, Any]) -> None:
    def replaced(each: dict[str, Any]) -> bool:
        return (each["engine"], each["precision"], each.get("gpu")) == (
            certificate["engine"], certificate["precision"], certificate["gpu"],
        )  # fmt: skip

    engines = [each for each in manifest.parity.get("engines", []) if not replaced(each)]
    parity = {**manifest.parity, "engines": [*engines, certificate]}
    write_manifest(directory, manifest.model_copy(update={"parity": parity}))


if __name__ == "__main__":
    sys.exit(main())
