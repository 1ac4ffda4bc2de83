"""`limner export onnx`: a checkpoint becomes a bundle of standard ONNX graphs, checked by the service's own engines.

    python export/to_onnx.py runs/person/best --out bundles/person/1 --pictures photos/
    python export/to_onnx.py maskrcnn_resnet50_fpn.pth --out bundles/mask/1 --pictures photos/

Batch, height and width stay dynamic. The bundle appears under its name only when it agrees with the torch model.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is the import root, not export/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import onnx
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from export import verify
from export.lowering import TABLE
from models.checkpoint import CheckpointError, Spec, load, read_config
from models.importers import convert
from models.network import Network
from models.servable import MEAN, STD, DetectStage, KeypointStage, MaskStage
from service.bundle import (
    Artifact,
    Bundle,
    CanvasRule,
    Keypoints,
    Limits,
    Manifest,
    NamePart,
    Normalisation,
    Port,
    ProposalRule,
    Stage,
    StageName,
    Thresholds,
    file_sha256,
    stride_of,
    write_manifest,
)
from service.engines import EngineChoice, Precision
from service.errors import ServiceError
from service.images import Canvas, DecodeLimits, decode

OPSET = 20
MAX_BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        manifest = export(options)
    except (CheckpointError, ServiceError, OSError, ValueError, verify.ParityError) as error:
        print(f"limner export onnx: {error}", file=sys.stderr)
        return 1 if isinstance(error, verify.ParityError) else 2
    print(table(manifest.parity))
    size = sum((options.out / artifact.file).stat().st_size for artifact in manifest.artifacts)
    print(f"{options.out}: {manifest.name}/{manifest.version}, {size / 1e6:.1f} MB. Serve it: limner serve")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="limner export onnx",
        description="a checkpoint becomes a certified bundle",
        epilog="Example: limner export onnx runs/person/best --out bundles/person/2 --pictures photos",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint directory, or a file of torchvision's weights (.pth)")
    add("--out", type=Path, required=True, metavar="BUNDLES/NAME/VERSION", help="where the service will find it")
    add("--pictures", type=Path, help="folder of pictures for the certificate; synthetic ones if left out")
    add("--max-pictures", type=int, default=12)
    add(
        "--golden",
        type=Path,
        metavar="PICTURE",
        help="what engines are checked with: its pixels go into the bundle, to whoever gets that; one of --pictures if "
        "left out",
    )
    add("--ap", type=Path, metavar="JSON", help="the answer of `limner evaluate --json`, for the manifest")
    add(
        "--engines",
        nargs="+",
        default=["onnx", "openvino"],
        help="what the certificate is made for; openvino:bfloat16 beside them, where that precision shall be served",
    )
    add("--classes", nargs="+", help="of torchvision's weights, without the background; COCO's if there are 90")
    return parser.parse_args(argv)


def export(options: argparse.Namespace) -> Manifest:
    """Writes the bundle aside, certifies it there, and renames it to its place."""
    out: Path = options.out
    name = _name(out)
    engines = [_engine(text) for text in options.engines]
    images, source = pictures(options.pictures, options.max_pictures)
    golden = [read_picture(options.golden)] if options.golden else images
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        checkpoint: Path = options.checkpoint
        if checkpoint.is_file():
            convert(checkpoint, Path(aside) / "imported", options.classes)
            checkpoint = Path(aside) / "imported"
        model, spec = load(checkpoint)
        directory = Path(aside) / out.name
        directory.mkdir()
        write_bundle(model, spec, directory, name, provenance(checkpoint))
        manifest = certify(model, directory, images, source, engines, golden)
        if options.ap:
            manifest = manifest.model_copy(update={"ap": json.loads(options.ap.read_text())})
            write_manifest(directory, manifest)
        Bundle.read(directory)
        publish(directory, out, Path(aside) / "replaced")
    return manifest


def _name(out: Path) -> tuple[str, str]:
    """Name and version; before the work, since the manifest would refuse them after it."""
    for part in (out.parent.name, out.name):
        try:
            TypeAdapter(NamePart).validate_python(part)
        except ValidationError:
            raise ValueError(f"--out {out}: {part!r} cannot be a model's name or version") from None
    return out.parent.name, out.name


def publish(directory: Path, out: Path, replaced: Path) -> None:
    if out.exists():
        os.replace(out, replaced)
    os.replace(directory, out)


def write_bundle(
    model: Network, spec: Spec, directory: Path, name: tuple[str, str], provenance: dict[str, Any]
) -> Manifest:
    """The graphs and their manifest, as yet without golden outputs or certificate."""
    stages = {}
    for stage, (module, inputs, outputs) in stage_modules(model).items():
        save_graph(module, stage, [p.name for p in inputs], [p.name for p in outputs], directory / f"{stage}.onnx")
        stages[stage] = Stage(file=f"{stage}.onnx", inputs=inputs, outputs=outputs)
    canvas = CanvasRule(
        short_side=spec.canvas.short_side,
        long_side=spec.canvas.long_side,
        multiple=spec.canvas.multiple,
        antialias=spec.canvas.antialias,
    )
    joints = spec.keypoints if model.keypoint_head is not None else None
    rules = model.rules
    manifest = Manifest(
        name=name[0],
        version=name[1],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=list(spec.classes),
        keypoints=joints
        and Keypoints(names=list(joints.names), skeleton=list(joints.skeleton), flips=list(joints.flips)),
        canvas=canvas,
        stages=stages,
        limits=Limits(max_detections=rules.max_detections, max_batch=MAX_BATCH, max_canvas_pixels=canvas.max_pixels()),
        thresholds=Thresholds(score_floor=rules.score_floor, nms_iou=rules.nms_iou, merge=rules.merge or None),
        proposals=spec.proposals and ProposalRule(**asdict(spec.proposals)),
        artifacts=[
            Artifact(
                file=s.file,
                stage=stage,
                sha256=file_sha256(directory / s.file),
                runtime="onnx",
                runtime_version=f"opset {OPSET}",
                precision="float32",
            )
            for stage, s in stages.items()
        ],
        normalisation=Normalisation(mean=list(MEAN), std=list(STD)),
        provenance=provenance,
    )
    write_manifest(directory, manifest)
    return manifest


def certify(
    model: Network,
    directory: Path,
    images: list[np.ndarray],
    source: str,
    engines: Sequence[tuple[EngineChoice, Precision]],
    golden: Sequence[np.ndarray] = (),
) -> Manifest:
    """Golden outputs, of one of `golden` or of the images, then a certificate for each engine, into the manifest."""
    bundle = Bundle.read(directory)
    canvases = verify.canvases_of(images, bundle)
    detections = verify.write_golden(model, directory, verify.canvases_of(golden, bundle) or canvases)
    certificates = []
    for choice, precision in engines:
        bundle, certificate = _certified(model, bundle, canvases, choice, precision)
        certificates.append(certificate)
    parity = {"pictures": source, "golden_detections": detections, "engines": certificates}
    manifest = bundle.manifest.model_copy(update={"parity": parity})
    write_manifest(directory, manifest)
    return manifest


def _certified(
    model: Network, bundle: Bundle, canvases: list[Canvas], choice: EngineChoice, precision: Precision
) -> tuple[Bundle, dict[str, Any]]:
    """The certificate. Where bfloat16 does not meet its bar, once more with the trunk in float32 up to the pyramid's
    first level, which the bundle then says: the first layers of light trunks stand no rounding."""
    try:
        return bundle, verify.certify(model, bundle, canvases, choice, precision)
    except verify.ParityError:
        until = _first_tap(onnx.load(bundle.stage_file("detect")).graph) if precision == "bfloat16" else None
        if until is None:
            raise
    compression = {**bundle.manifest.compression, "bfloat16": {"float32_until": until}}
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"compression": compression}))
    return bundle, verify.certify(model, bundle, canvases, choice, precision)


def _first_tap(graph: onnx.GraphProto) -> str | None:
    """The tensor that the pyramid's finest level is made from."""
    lateral = "model.backbone.fpn.inner_blocks.0.0.weight"
    return next((node.input[0] for node in graph.node if node.op_type == "Conv" and node.input[1] == lateral), None)


def _engine(name: str) -> tuple[EngineChoice, Precision]:
    choice, _, precision = name.partition(":")
    known: dict[str, EngineChoice] = {"onnx": "onnx", "openvino": "openvino"}
    precisions: dict[str, Precision] = {"": "float32", "float32": "float32", "bfloat16": "bfloat16"}
    if choice not in known or precision not in precisions:
        raise ValueError(f"--engines {name!r}: expected onnx, openvino or openvino:bfloat16")
    return known[choice], precisions[precision]


def stage_modules(model: Network) -> dict[StageName, tuple[nn.Module, list[Port], list[Port]]]:
    """The stages this model has, with their ports. B images, D detections, N RoIs; the canvas is 32 h x 32 w."""
    channels = model.backbone.width
    pyramid = [
        Port(name=name, dtype="float32", shape=["B", channels, *_sides(32 // stride_of(name))], frame="canvas")
        for name in model.backbone.levels
    ]
    detections = model.rules.max_detections
    rois = Port(name="rois", dtype="float32", shape=["N", 5], frame="canvas")
    boxes = Port(name="proposals", dtype="float32", shape=["B", "R", 4], frame="canvas")
    stages: dict[StageName, tuple[nn.Module, list[Port], list[Port]]] = {
        "detect": (
            DetectStage(model),
            [
                Port(name="images", dtype="uint8", shape=["B", "32h", "32w", 3], frame="canvas"),
                Port(name="sizes", dtype="int64", shape=["B", 2], frame="canvas"),
                *([boxes] if model.takes_proposals else []),
            ],
            [
                Port(name="count", dtype="int64", shape=["B"]),
                Port(name="boxes", dtype="float32", shape=["B", detections, 4], frame="canvas"),
                Port(name="scores", dtype="float32", shape=["B", detections]),
                Port(name="labels", dtype="int64", shape=["B", detections]),
                *pyramid,
            ],
        )
    }
    if model.mask_head is not None:
        labels = Port(name="labels", dtype="int64", shape=["N"])
        side = model.mask_head.side
        output = Port(name="probabilities", dtype="float32", shape=["N", side, side], frame="roi")
        stages["masks"] = (MaskStage(model), [*pyramid, rois, labels], [output])
    if model.keypoint_head is not None:
        joints = model.keypoint_head.upsample.out_channels
        output = Port(name="heatmaps", dtype="float32", shape=["N", joints, 56, 56], frame="roi")
        stages["keypoints"] = (KeypointStage(model), [*pyramid, rois], [output])
    return stages


def _sides(multiple: int) -> list[str]:
    return [f"{multiple if multiple > 1 else ''}{side}" for side in ("h", "w")]


def save_graph(module: nn.Module, stage: str, inputs: list[str], outputs: list[str], path: Path) -> None:
    """Traces with a batch of two, since a batch of one may be taken for a constant."""
    module = module.eval().requires_grad_(False)
    example, shapes = _example(module, stage)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table=TABLE,
        )
    assert program is not None
    program.save(path, external_data=False)
    strip_traces(path)


def strip_traces(path: Path) -> None:
    """Takes out what the exporter notes about its own run: stack traces hold the paths of the machine it ran on."""
    graph = onnx.load(path)
    for holder in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.functions):
        del holder.metadata_props[:]
        holder.doc_string = ""
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    onnx.save(graph, path)


def _example(module: nn.Module, stage: str) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    h, w = torch.export.Dim("h", min=2, max=256), torch.export.Dim("w", min=2, max=256)
    if stage == "detect":
        images = torch.randint(0, 256, (2, 192, 256, 3), dtype=torch.uint8)
        example = images, torch.tensor([[192, 256], [180, 250]])
        shapes = {0: batch, 1: 32 * h, 2: 32 * w}, {0: batch}
        if module.get_submodule("model").takes_proposals:
            boxes = torch.tensor([[0.0, 8, 100, 120], [20, 30, 60, 80], [0, 0, 190, 170]])
            some = torch.export.Dim("proposals", min=1, max=65536)
            return (*example, boxes.expand(2, 3, 4).contiguous()), (*shapes, {0: batch, 1: some})
        return example, shapes
    num = torch.export.Dim("rois", min=1, max=65536)
    return head_example(module.get_submodule("model"), stage, (batch, h, w, num))


def head_example(model: nn.Module, stage: str, dims: tuple[Any, ...]) -> tuple[Any, Any]:
    """What a head is traced with, and the dimensions that stay open: those of batch, canvas / 32 and RoIs. The stage
    takes its features one by one: they are one argument of torch's, a tuple."""
    batch, h, w, num = dims
    backbone: Any = model.get_submodule("backbone")
    dtype = next(p.dtype for p in backbone.parameters())
    strides = [stride_of(name) for name in backbone.levels]
    levels = [torch.randn(2, backbone.width, 192 // s, 256 // s).to(dtype) for s in strides]
    shapes = [{0: batch, 2: 32 // s * h if s < 32 else h, 3: 32 // s * w if s < 32 else w} for s in strides]
    rois = torch.tensor([[0.0, 8, 8, 100, 120], [1.0, 20, 30, 60, 80], [1.0, 0, 0, 250, 190]])
    example, shapes = [*levels, rois], [*shapes, {0: num}]
    if stage == "masks":
        example, shapes = [*example, torch.zeros(3, dtype=torch.int64)], [*shapes, {0: num}]
    return tuple(example), (tuple(shapes),)


def pictures(folder: Path | None, limit: int) -> tuple[list[np.ndarray], str]:
    """RGB pictures for the certificate, and in words where they come from."""
    if folder is None:
        return synthetic(4), "4 synthetic pictures"
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:limit]
    if not paths:
        raise ValueError(f"--pictures {folder}: no .jpg, .png or .webp in it")
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in paths]
    return [read_picture(p) for p in paths], f"{len(paths)} pictures, sha256 {' '.join(hashes)}"


def read_picture(path: Path) -> np.ndarray:
    return decode(path.read_bytes(), DecodeLimits(max_pixels=100_000_000, max_side=30_000))


def synthetic(count: int) -> list[np.ndarray]:
    """Smooth coloured blobs, the same ones each time: enough to compare arithmetic, no evidence of accuracy."""
    rng = np.random.default_rng(0)
    images = []
    for index in range(count):
        height, width = ((480, 640), (640, 480))[index // 2 % 2]
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 12)).astype(np.float32))
        fine = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
        images.append(fine[0].permute(1, 2, 0).to(torch.uint8).numpy())
    return images


def provenance(checkpoint: Path) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "onnx", "onnxscript")}
    return {
        "checkpoint_sha256": file_sha256(checkpoint / "model.safetensors"),
        "architecture": read_config(checkpoint)["architecture"],
        "options": read_config(checkpoint)["options"],
        "training": read_config(checkpoint)["provenance"],
        "versions": versions,
    }


def table(parity: dict[str, Any], reference: str = "the torch model") -> str:
    """The certificates as lines a person reads: worst gaps to the torch model."""
    lines = [f"Agreement with {reference} over {parity['pictures']} (worst gaps):"]
    for c in parity["engines"]:
        parts = [f"{c['matched']} detections matched, {c['unmatched']} not"]
        for name, unit in (("box_px", " px"), ("score", ""), ("mask_iou", ""), ("keypoint_px", " px")):
            if c[name]:
                parts.append(f"{name.removesuffix('_px')} {c[name]['worst']:.3g}{unit}")
        lines.append(f"  {c['engine']} {c['precision']}: " + ", ".join(parts))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
