"""`limner export aoti`: AOTInductor packages for this machine, put into a bundle once they agree with the model.

    python export/to_aoti.py bundles/person/1
    python export/to_aoti.py runs/person/best --out bundles/person/1 --precision bf16 --batch 1 8 32 --canvas 384x512
    python export/to_aoti.py bundles/person/1 --device cpu

Packages go to <bundle>/aoti.sm<compute capability>.<precision>/, or aoti.cpu.<precision>/. Each is for one canvas, as
TensorRT's plans are; smaller pictures are padded to it. docs/gpu.md says what is in them and what is not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is the import root, not export/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from export import aoti_build, into_bundle, rebuild, to_onnx, verify
from export.half import PlanPrecision, prepared
from export.trt_graphs import canvases
from models.checkpoint import CheckpointError
from models.kernels import KernelError
from models.network import Network
from service.engines.plans import PACKAGES, DetectPlan, Kernel, Packages
from service.errors import EngineUnavailable, ServiceError

PRECISIONS: dict[str, PlanPrecision] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        certificate = export(options)
    except (CheckpointError, KernelError, ServiceError, OSError, ValueError, verify.ParityError) as error:
        print(f"limner export aoti: {error}", file=sys.stderr)
        return 1 if isinstance(error, verify.ParityError) else 2
    print(to_onnx.table(certificate))
    how = "LIMNER_ENGINE=aoti" if options.device == "cpu" else "LIMNER_ENGINE=auto takes them"
    print(f"{options.out or options.source}: packages added. Serve it: limner serve ({how})")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="limner export aoti", description="AOTInductor packages into a bundle")
    add = parser.add_argument
    add("source", type=Path, metavar="CHECKPOINT_OR_BUNDLE", help="where the weights are")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: for trying; OpenVINO is faster there")
    add("--precision", choices=list(PRECISIONS), help="fp16 (default on cuda), bf16, or fp32 (default on cpu)")
    into_bundle.add_options(parser, "packages")
    return parser.parse_args(argv)


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Builds aside, certifies there with the service's engine, then puts the bundle's new state in its place."""
    bundle = into_bundle.target(options.source, options.out)
    allowed = into_bundle.allowed(options.allow)
    into_bundle.check_sizes(options)
    precision = PRECISIONS[options.precision or ("fp32" if options.device == "cpu" else "fp16")]
    if (options.device, precision) == ("cpu", "float16"):
        raise ValueError("--precision fp16 is for GPUs: on a processor it is bf16 or fp32")
    gpu, gpu_name = machine(options.device)
    model, spec = rebuild.load(options.source)
    into_bundle.refuse(options.source, bundle, spec)
    images, source = to_onnx.pictures(options.pictures, options.max_pictures)
    shapes = [(each.height, each.width) for each in canvases(into_bundle.canvas_rule(spec), options.canvas)]

    def make(folder: Path) -> None:
        small = prepared(model, precision)
        described = write(small, precision, shapes, options.batch, options.rois, gpu, gpu_name, folder)
        (folder / PACKAGES).write_text(described.model_dump_json(indent=2) + "\n")

    adding = into_bundle.Adding(
        folder=f"aoti.{gpu}.{precision}",
        engine="aoti",
        version=torch.__version__,
        precision=precision,
        gpu=None if gpu == "cpu" else gpu,
        gpu_name=gpu_name,
        canvases=shapes,
        max_batch=max(options.batch),
        allowed=allowed,
    )
    return {"pictures": source, "engines": [into_bundle.add(bundle, model, adding, make, images, source, options.out)]}


def machine(device: str) -> tuple[str, str]:
    """sm90 and the GPU's name; or cpu and the vector instructions that packages for it will use."""
    if device == "cpu":
        return "cpu", torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available():
        raise EngineUnavailable("torch finds no CUDA device: run this on the GPU's machine, or give --device cpu")
    return "sm{}{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name()


def write(
    model: Network,
    precision: PlanPrecision,
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    rois: Sequence[int],
    gpu: str,
    gpu_name: str,
    folder: Path,
) -> Packages:
    """Compiles every stage into `folder`; `model` is what `export.half.prepared` gave."""
    device = "cpu" if gpu == "cpu" else "cuda"
    built = aoti_build.build(model, shapes, max(batches), max(rois), device, folder, _say)
    return Packages(
        precision=precision,
        gpu=gpu,
        gpu_name=gpu_name,
        torch=torch.__version__,
        batches=sorted(set(batches)),
        rois=sorted(set(rois)),
        detect=[DetectPlan(canvas=canvas, file=file) for canvas, file in built.detect.items()],
        heads=built.heads,  # type: ignore[arg-type]
        golden="golden.npz",
        kernels={key: Kernel.model_validate(each) for key, each in built.kernels.items()},
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
