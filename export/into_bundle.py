"""Adding what was compiled for a device to a bundle: made aside, held to the torch model, and only then put in place.

TensorRT's plans and AOTInductor's packages go this way. Each set has a folder, and golden outputs on its own canvases.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export import to_onnx, verify
from models.checkpoint import Spec
from models.classics import CLASSICS
from models.network import Network
from service.bundle import MANIFEST, Artifact, Bundle, CanvasRule, Manifest, StageName, file_sha256, write_manifest
from service.engines import EngineChoice, Precision
from service.images import Canvas

SUFFIXES = (".plan", ".pt2")  # of files that are one stage
STAGES: tuple[StageName, ...] = ("detect", "masks", "keypoints")
PORTABLE_ONLY = {function.__name__ for function in CLASSICS}


@dataclass(frozen=True, slots=True)
class Adding:
    """What is added: its folder in the bundle, the engine that runs it and for what it was made."""

    folder: str
    engine: EngineChoice
    version: str
    precision: Precision
    gpu: str | None  # sm90; None: the processor
    gpu_name: str
    canvases: Sequence[tuple[int, int]]
    max_batch: int
    allowed: dict[str, float]


def add_options(parser: argparse.ArgumentParser, made: str) -> None:
    """Those of every export for one device; `made` is the plural of what goes into the bundle."""
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        metavar="BUNDLE",
        help=f"bundle that gets the {made}, or a new one for a copy of the source with them; else the source itself",
    )
    add("--batch", type=int, nargs="+", default=[1, 4, 8, 16], help="batch sizes; others are padded to the next one")
    add("--rois", type=int, nargs="+", default=[8, 32, 128], help="numbers of RoIs that the heads are made for")
    add(
        "--canvas",
        nargs="+",
        default=["landscape", "portrait", "square"],
        help="those names (of the model's canvas rule) or shapes like 384x512; others are padded to the next one",
    )
    add("--pictures", type=Path, help="folder of pictures for the certificate; synthetic ones if left out")
    add("--max-pictures", type=int, default=12)
    add(
        "--allow",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help=f"another bar for the certificate: {', '.join(each.name for each in fields(verify.Bars))}",
    )


def check_sizes(options: argparse.Namespace) -> None:
    if min(options.batch) < 1 or min(options.rois) < 1:
        raise ValueError("--batch and --rois: sizes are 1 at least")


def canvas_rule(spec: Spec) -> CanvasRule:
    rule = spec.canvas
    return CanvasRule(short_side=rule.short_side, long_side=rule.long_side, multiple=rule.multiple)


def target(source: Path | None, out: Path | None) -> Bundle:
    """The bundle that is added to: `out`, or the source where that is one and `out` is absent or not there as yet."""
    if source is None:
        raise ValueError("give a checkpoint or a bundle, for example bundles/person/1 (only --dry-run can do without)")
    is_copied = out is not None and not out.exists() and (source / MANIFEST).is_file()
    directory = source if out is None or is_copied else out
    if not (directory / MANIFEST).is_file():
        raise ValueError(
            f"{directory} is no bundle: make one with limner export onnx {source} --out bundles/NAME/VERSION, "
            "then give it as --out"
        )
    return Bundle.read(directory)


def allowed(texts: Sequence[str]) -> dict[str, float]:
    """--allow NAME=NUMBER: bars of the certificate that are replaced."""
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


def refuse(source: Path, bundle: Bundle, spec: Spec) -> None:
    """What a checkpoint gives belongs into the bundle that was made of it; some models have portable graphs alone."""
    if spec.architecture in PORTABLE_ONLY:
        raise ValueError(f"{spec.architecture} has no form for one device: its portable graphs serve it")
    if (source / MANIFEST).is_file():
        return
    known = bundle.manifest.provenance.get("checkpoint_sha256")
    if list(spec.classes) != bundle.manifest.classes or known != file_sha256(source / "model.safetensors"):
        raise ValueError(f"{bundle.directory} was made from another checkpoint than {source}: export that one anew")


def add(
    bundle: Bundle,
    model: Network,
    adding: Adding,
    make: Callable[[Path], None],
    images: Sequence[npt.NDArray[np.uint8]],
    source: str,
    out: Path | None = None,
) -> dict[str, Any]:
    """`make` fills the folder; the service's engine runs what it made against `model`. Returns the certificate.

    `out` gets the bundle with what was added, and is the bundle's own directory where it is None. Raises ParityError
    below the bar, ValueError where nothing was found to compare; the bundle stays as it was then.
    """
    out = out or bundle.directory
    out.parent.mkdir(parents=True, exist_ok=True)
    # The bundle's golden picture first: in it, at least, the model finds something.
    canvases = [_golden_canvas(bundle), *verify.canvases_of(images, bundle)]
    padded = verify.padded(_that_fit(canvases, adding.canvases), adding.canvases)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        directory = Path(aside) / out.name
        folder = directory / adding.folder
        shutil.copytree(bundle.directory, directory, copy_function=_link, ignore=shutil.ignore_patterns(folder.name))
        folder.mkdir()
        make(folder)
        verify.write_golden(model, folder, padded)
        relist(directory, bundle.manifest, folder, adding)
        batches = sorted({each for each in (1, 2, 5, adding.max_batch) if each <= adding.max_batch})
        made = Bundle.read(directory)
        certificate = verify.certify(
            model, made, padded, adding.engine, adding.precision, batches, dict(adding.allowed)
        )
        if not certificate["matched"]:
            raise ValueError("the model finds nothing in these pictures, so nothing was compared: give --pictures")
        certificate |= {"gpu": adding.gpu_name, "pictures_from": source}
        _write_certificate(directory, made.manifest, certificate)
        Bundle.read(directory)
        to_onnx.publish(directory, out, Path(aside) / "replaced")
    return certificate


def _link(source: str, target: str) -> None:
    """What stays the same is not copied where the file system can do without."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _that_fit(canvases: Sequence[Canvas], sides: Sequence[tuple[int, int]]) -> list[Canvas]:
    """Pictures that some canvas takes; at least one must be."""
    fitting = [c for c in canvases if any(c.shape[0] <= h and c.shape[1] <= w for h, w in sides)]
    if not fitting:
        raise ValueError("none of the pictures fits a --canvas: give more canvases, or --pictures of such a shape")
    return fitting


def _golden_canvas(bundle: Bundle) -> Canvas:
    golden = bundle.golden()
    size = (int(golden["sizes"][0, 0]), int(golden["sizes"][0, 1]))
    return Canvas(golden["images"][0], size, size)


def relist(directory: Path, manifest: Manifest, folder: Path, adding: Adding) -> None:
    """The manifest with the new files in the place of older ones for the same device and precision."""
    kept = [each for each in manifest.artifacts if not each.file.startswith(f"{folder.name}/")]
    added = [
        Artifact(
            file=f"{folder.name}/{path.name}",
            stage=_stage_of(path),
            sha256=file_sha256(path),
            runtime=adding.engine,
            runtime_version=adding.version,
            precision=adding.precision,
            gpu=adding.gpu,
        )
        for path in sorted(folder.iterdir())
    ]
    write_manifest(directory, manifest.model_copy(update={"artifacts": [*kept, *added]}))


def _stage_of(path: Path) -> StageName | None:
    name = path.name.partition(".")[0]
    return next((stage for stage in STAGES if stage == name and path.suffix in SUFFIXES), None)


def _write_certificate(directory: Path, manifest: Manifest, certificate: dict[str, Any]) -> None:
    def replaced(each: dict[str, Any]) -> bool:
        return (each["engine"], each["precision"], each.get("gpu")) == (
            certificate["engine"], certificate["precision"], certificate["gpu"],
        )  # fmt: skip

    engines = [each for each in manifest.parity.get("engines", []) if not replaced(each)]
    parity = {**manifest.parity, "engines": [*engines, certificate]}
    write_manifest(directory, manifest.model_copy(update={"parity": parity}))
