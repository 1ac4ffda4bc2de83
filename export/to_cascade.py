"""`limner export cascade`: one of OpenCV's cascades (Viola and Jones 2001), or one that opencv_traincascade made, as a
bundle that the service answers with like with any other."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from export.to_onnx import pictures, publish
from service.bundle import (
    GOLDEN,
    Artifact,
    Bundle,
    CanvasRule,
    CascadeRule,
    Limits,
    Manifest,
    Normalisation,
    Port,
    Stage,
    Thresholds,
    file_sha256,
    write_manifest,
)
from service.engines import open_engine
from service.errors import ServiceError
from service.images import fit
from service.proposals import opencv

MAX_DETECTIONS, MAX_BATCH = 100, 16
LOWEST = 0.1  # below what a single window scores


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        found = export(options)
    except (ServiceError, OSError, ValueError) as error:
        print(f"limner export cascade: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {found} found in the golden picture. Serve it: limner serve")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="limner export cascade",
        description="a cascade of OpenCV's becomes a bundle",
        epilog="Example: limner export cascade --out bundles/faces/1 --pictures photos",
    )
    add = parser.add_argument
    add("--cascade", default="haarcascade_frontalface_default", help="a name in OpenCV's data folder, or an XML file")
    add("--class-name", default="face", help="what it finds")
    add("--out", type=Path, required=True, metavar="BUNDLES/NAME/VERSION", help="where the service will find it")
    add("--pictures", type=Path, help="folder of pictures for the golden one; synthetic ones if left out")
    add("--min-neighbors", type=int, default=3, help="windows that agree for a score of 0.5")
    add("--scale-factor", type=float, default=1.1, help="from one size of windows to the next")
    add("--min-side", type=int, default=24, help="of the smallest window, in canvas pixels")
    add("--short-side", type=int, default=480, help="of the canvas")
    add("--long-side", type=int, default=854, help="of the canvas, at most")
    return parser.parse_args(argv)


def export(options: argparse.Namespace) -> int:
    """Written aside, then renamed. Returns how many objects the golden picture holds."""
    cv2 = opencv("a cascade", "CascadeClassifier")
    source = Path(options.cascade)
    if source.suffix != ".xml":
        source = Path(cv2.data.haarcascades) / f"{options.cascade}.xml"
    if not source.is_file():
        known = sorted(path.stem for path in Path(cv2.data.haarcascades).glob("*.xml"))
        raise ValueError(f"--cascade {options.cascade}: no such file; OpenCV {cv2.__version__} has {', '.join(known)}")
    images, told = pictures(options.pictures, 12)
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        directory = Path(aside) / out.name
        directory.mkdir()
        shutil.copyfile(source, directory / "cascade.xml")
        manifest = _manifest(options, directory, source.name)
        write_manifest(directory, manifest)
        found = _write_golden(Bundle.read(directory), images)
        parity = {"pictures": told, "golden_detections": found}
        write_manifest(directory, manifest.model_copy(update={"parity": parity}))
        Bundle.read(directory)
        publish(directory, out, Path(aside) / "replaced")
    return found


def _manifest(options: argparse.Namespace, directory: Path, source: str) -> Manifest:
    canvas = CanvasRule(short_side=options.short_side, long_side=options.long_side, antialias=True)
    inputs = [
        Port(name="images", dtype="uint8", shape=["B", "32h", "32w", 3], frame="canvas"),
        Port(name="sizes", dtype="int64", shape=["B", 2], frame="canvas"),
    ]
    outputs = [
        Port(name="count", dtype="int64", shape=["B"]),
        Port(name="boxes", dtype="float32", shape=["B", MAX_DETECTIONS, 4], frame="canvas"),
        Port(name="scores", dtype="float32", shape=["B", MAX_DETECTIONS]),
        Port(name="labels", dtype="int64", shape=["B", MAX_DETECTIONS]),
    ]
    version = opencv("a cascade", "CascadeClassifier").__version__
    return Manifest(
        name=options.out.parent.name,
        version=options.out.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=[options.class_name],
        canvas=canvas,
        stages={"detect": Stage(file="cascade.xml", inputs=inputs, outputs=outputs)},
        limits=Limits(max_detections=MAX_DETECTIONS, max_batch=MAX_BATCH, max_canvas_pixels=canvas.max_pixels()),
        thresholds=Thresholds(score_floor=LOWEST, nms_iou=1.0),
        cascade=CascadeRule(
            scale_factor=options.scale_factor, min_neighbors=options.min_neighbors, min_side=options.min_side
        ),
        artifacts=[
            Artifact(
                file="cascade.xml",
                stage="detect",
                sha256=file_sha256(directory / "cascade.xml"),
                runtime="opencv",
                runtime_version=version,
                precision="float32",
            )
        ],
        normalisation=Normalisation(mean=[0.0] * 3, std=[1.0] * 3),
        provenance={"cascade": source, "versions": {"opencv": version}},
    )


def _write_golden(bundle: Bundle, images: Sequence[np.ndarray]) -> int:
    """Of the pictures in which anything is found, the first."""
    engine = open_engine(bundle, "auto").engine
    canvases = [fit(image, bundle.manifest.canvas) for image in images]
    answers = [engine.detect(c.pixels[None], np.array([c.size], np.int64)) for c in canvases]
    index = next((i for i, each in enumerate(answers) if each.count[0]), 0)
    found, canvas = answers[index], canvases[index]
    arrays = {name: getattr(found, name) for name in ("count", "boxes", "scores", "labels")}
    with (bundle.directory / GOLDEN).open("wb") as stream:
        np.savez_compressed(stream, images=canvas.pixels[None], sizes=np.array([canvas.size], np.int64), **arrays)
    return int(found.count[0])


if __name__ == "__main__":
    sys.exit(main())
