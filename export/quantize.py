"""`limner export int8`: the graphs of a bundle in eight bits, beside those in float32, certified against them.

    limner export int8 bundles/person/1 --pictures photos --images images --annotations person_keypoints_dev.json

Of the pictures every fourth is kept for the certificate; the rest set the scales. Where the certificate, or AP, is
below its bar, the parts of the network that cost most go back to float32 until it is not, and the manifest names them.
The service computes in int8 only where LIMNER_PRECISION=int8 asks for it.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is the import root, not export/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import onnx

from export import quantized_graph as graphs
from export import verify
from export.equalise import equalise
from export.to_onnx import publish, table
from service.bundle import INT8_GOLDEN, Artifact, Bundle, StageName, file_sha256, write_manifest
from service.engines import golden_rois, open_engine
from service.errors import ServiceError
from service.images import Canvas, DecodeLimits, decode, fit

HEAD_PICTURES = 32  # whose RoIs set the scales of a head
HEAD_ROIS = 16  # of one picture
CHECK_EVERY = 4  # pictures; the rest are for calibration
RANK_CANVASES = 6  # on which the parts are compared
MAX_RELEASED = 0.5  # of the parts; with more of them in float32 little would be left to gain

Measure = Callable[[Path, str, Path, Path, int], dict[str, float]]
"""AP by kind of a bundle at a precision, on a folder of pictures, their annotations, and how many (0: all)."""


class Refused(RuntimeError):
    """In int8 the bundle is below its bars; the message says by how much."""


@dataclass(frozen=True, slots=True)
class Picture:
    sha256: str
    canvas: Canvas


@dataclass(slots=True)
class Verdict:
    """One choice of parts that stay in float32, and what it came to; `failed` is empty where every bar is met."""

    released: list[str]
    certificate: dict[str, Any]
    ap: dict[str, tuple[float, float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """`measure` comes from the command, which knows the evaluation; this package does not."""
    options = parse(argv)
    try:
        verdict = run(options, measure)
    except Refused as error:
        print(f"limner export int8: {error}", file=sys.stderr)
        return 1
    except (ServiceError, OSError, ValueError) as error:
        print(f"limner export int8: {error}", file=sys.stderr)
        return 2
    print(told(verdict))
    print(f"{options.out or options.bundle}: serve it with LIMNER_PRECISION=int8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="limner export int8", description="a bundle's graphs in eight bits, certified"
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLES/NAME/VERSION")
    add("--pictures", type=Path, required=True, help="folder of pictures like those that will be served, 20 or more")
    add("--max-pictures", type=int, default=100)
    add("--out", type=Path, help="write the bundle there, as this version; left out: in its place")
    add("--images", type=Path, help="pictures to measure AP on, with --annotations")
    add("--annotations", type=Path)
    add("--limit", type=int, default=0, help="only the first so many of them")
    add("--max-loss", type=float, default=0.003, metavar="AP", help="allowed of box, mask and keypoint AP, 0 to 1")
    add("--allow", action="store_true", help="publish although a bar is not met; the manifest says so")
    options = parser.parse_args(argv)
    if (options.images is None) != (options.annotations is None):
        parser.error("--images and --annotations go together")
    return options


def run(options: argparse.Namespace, measure: Measure | None) -> Verdict:
    if importlib.util.find_spec("nncf") is None:
        raise ValueError('nncf is not installed: pip install -e ".[export,quantize]"')
    bundle, out = Bundle.read(options.bundle), options.out or options.bundle
    if out.name != bundle.version or out.parent.name != bundle.name:
        raise ValueError(f"--out {out}: the bundle is {bundle.name}/{bundle.version}, so its directories must be, too")
    if bundle.takes_proposals or bundle.manifest.cascade is not None:
        raise ValueError(f"{bundle.name}/{bundle.version} takes proposals or is a cascade: int8 is for neither")
    calibration, check = split(read_pictures(options.pictures, options.max_pictures, bundle))
    ap = None
    if options.images is not None:
        if measure is None:
            raise ValueError("AP is measured by the command: run `limner export int8`")
        ap = _ap_of(options, measure)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        work = Work(bundle, Path(aside), [p.canvas for p in check], ap, options.max_loss)
        work.quantize([p.canvas for p in calibration])
        verdict = work.choose()
        if verdict.failed and not options.allow:
            raise Refused(
                f"{bundle.name} in int8 is below its bars: {'; '.join(verdict.failed)}. Nothing was written. Calibrate "
                "with more pictures like those that are served, or publish it nevertheless with --allow"
            )
        if verdict.failed and not verdict.ap:  # what is allowed is told in full
            work.write(verdict.released)
            work.measure_ap(verdict)
        work.finish(verdict, [p.sha256 for p in calibration], [p.sha256 for p in check])
        publish(work.directory, out, Path(aside) / "replaced")
    return verdict


def read_pictures(folder: Path, limit: int, bundle: Bundle) -> list[Picture]:
    limits = DecodeLimits(max_pixels=100_000_000, max_side=30_000)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:limit]
    if len(paths) < CHECK_EVERY:
        raise ValueError(f"--pictures {folder}: {len(paths)} .jpg, .png or .webp in it, at least {CHECK_EVERY} needed")
    read = ((path, path.read_bytes()) for path in paths)
    rule = bundle.manifest.canvas
    return [Picture(hashlib.sha256(data).hexdigest(), fit(decode(data, limits), rule)) for _, data in read]


def split(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """For the scales, and for the certificate: no picture is in both, however often it is in the folder."""
    distinct = list({picture.sha256: picture for picture in pictures}.values())
    check = distinct[CHECK_EVERY - 1 :: CHECK_EVERY]
    taken = {picture.sha256 for picture in check}
    return [picture for picture in distinct if picture.sha256 not in taken], check


def _ap_of(options: argparse.Namespace, measure: Measure) -> Callable[[Path, str], dict[str, float]]:
    return lambda directory, precision: measure(
        directory, precision, options.images, options.annotations, options.limit
    )


class Work:
    """A copy of the bundle in which graphs in int8 are tried."""

    def __init__(
        self,
        bundle: Bundle,
        aside: Path,
        check: Sequence[Canvas],
        ap: Callable[[Path, str], dict[str, float]] | None,
        max_loss: float,
    ) -> None:
        self.bundle, self.check, self.ap, self.max_loss = bundle, check, ap, max_loss
        self.directory = aside / bundle.version
        shutil.copytree(bundle.directory, self.directory)
        shutil.rmtree(self.directory / "int8", ignore_errors=True)
        (self.directory / "int8").mkdir()
        self.original = {stage: onnx.load(bundle.stage_file(stage)) for stage in bundle.manifest.stages}
        self.quantized: dict[StageName, onnx.ModelProto] = {}
        self.float_engine = open_engine(bundle, "openvino").engine
        self.reference = verify.FloatReference(self.float_engine, bundle)
        self.ap_before: dict[str, float] = {}
        # heads are parts of their own: mask_head.convs.0, keypoint_head.upsample, ...
        self.parts: dict[str, tuple[StageName, list[str]]] = {}

    def quantize(self, canvases: Sequence[Canvas]) -> None:
        """Every stage wholly; what does not stand it goes back to float32 later."""
        for stage in self.bundle.manifest.stages:
            items = canvases if stage == "detect" else self._pictures_with_rois(canvases)
            if not items:
                raise ValueError(f"nothing is found on these pictures, so nothing can calibrate {stage}: give others")
            feed = partial(self._feed, stage)
            self.original[stage] = equalise(graphs.sized(self.original[stage]), items, feed)
            self.quantized[stage] = graphs.quantize(self.original[stage], items, feed)
            for name, nodes in graphs.groups(self.original[stage]).items():
                self.parts[name] = (stage, nodes)

    def _pictures_with_rois(self, canvases: Sequence[Canvas]) -> list[Canvas]:
        some = (canvas for canvas in canvases if int(self._found(canvas).count[0]))
        return [canvas for canvas, _ in zip(some, range(HEAD_PICTURES), strict=False)]

    def _found(self, canvas: Canvas) -> Any:
        return self.float_engine.detect(canvas.pixels[None], np.array([canvas.size], np.int64))

    def _feed(self, stage: StageName, canvas: Canvas) -> dict[str, Any]:
        if stage == "detect":
            return {"images": canvas.pixels[None], "sizes": np.array([canvas.size], np.int64)}
        found = self._found(canvas)
        num = min(HEAD_ROIS, int(found.count[0]))
        rois = np.concatenate([np.zeros((num, 1), np.float32), found.boxes[0, :num]], 1)
        levels = {name: np.array(tensor.data) for name, tensor in found.features.levels.items()}
        offered = {**levels, "rois": rois, "labels": found.labels[0, :num]}
        return {port.name: offered[port.name] for port in self.original[stage].graph.input}

    def write(self, released: Sequence[str]) -> Bundle:
        """The bundle with these parts in float32; a stage of which nothing is left in int8 has no graph of its own."""
        artifacts = [a for a in self.bundle.manifest.artifacts if a.precision != "int8"]
        for stage, graph in self.quantized.items():
            nodes = [node for name in released for part, nodes in [self.parts[name]] if part == stage for node in nodes]
            made = graphs.biased(graphs.quantize_early(graphs.release(graph, self.original[stage], nodes)))
            path = self.directory / "int8" / f"{stage}.onnx"
            path.unlink(missing_ok=True)
            if graphs.is_quantized(made):
                onnx.save(made, path)
                artifacts.append(self._artifact(path, stage))
        manifest = self.bundle.manifest.model_copy(update={"artifacts": artifacts})
        write_manifest(self.directory, manifest)
        return Bundle.read(self.directory)

    def _artifact(self, path: Path, stage: StageName | None) -> Artifact:
        return Artifact(
            file=path.relative_to(self.directory).as_posix(),
            stage=stage,
            sha256=file_sha256(path),
            runtime="onnx",
            runtime_version="QDQ",
            precision="int8",
        )

    def choose(self) -> Verdict:
        return choose(list(self.parts), self.distance, self.judge)

    def distance(self, released: Sequence[str]) -> float:
        """How far int8 is from float32 on a few pictures: lost detections, and means of what the others differ by."""
        some = self.check[:RANK_CANVASES]
        gaps = verify.measure(self.reference, self.write(released), some, "openvino", "int8", (1,), confident=0)
        lost = gaps.unmatched / max(1, gaps.unmatched + len(gaps.box_px))
        scores, masks = (float(np.mean(values)) if values else 0.0 for values in (gaps.score, gaps.mask_iou or [1.0]))
        boxes, joints = (float(np.mean(np.minimum(v, 10))) / 10 if v else 0.0 for v in (gaps.box_px, gaps.keypoint_px))
        return lost + scores + boxes + (1 - masks) + joints

    def judge(self, released: Sequence[str]) -> Verdict:
        bundle = self.write(released)
        certificate, failed = verify.judge(self.reference, bundle, self.check, "openvino", "int8")
        verdict = Verdict(list(released), certificate, failed=failed)
        if not failed:  # AP takes much longer
            self.measure_ap(verdict)
        return verdict

    def measure_ap(self, verdict: Verdict) -> None:
        """Of what was written last."""
        if self.ap is None:
            return
        self.ap_before = self.ap_before or self.ap(self.bundle.directory, "float32")
        after = self.ap(self.directory, "int8")
        verdict.ap = {kind: (before, after[kind]) for kind, before in self.ap_before.items()}
        for kind, (before, now) in verdict.ap.items():
            if not before - now <= self.max_loss:
                verdict.failed.append(f"{kind} AP falls from {before:.4f} to {now:.4f}, by more than {self.max_loss:g}")

    def finish(self, verdict: Verdict, calibration: list[str], check: list[str]) -> None:
        """The manifest of what was chosen, and the golden outputs of the int8 graphs."""
        bundle = self.write(verdict.released)
        golden = self.directory / INT8_GOLDEN
        _write_golden(bundle, golden)
        parity = dict(bundle.manifest.parity)
        others = [each for each in parity.get("engines", []) if each.get("precision") != "int8"]
        allowed = {"allowed": verdict.failed} if verdict.failed else {}
        parity["engines"] = [*others, {**verdict.certificate, **allowed, "against": "the bundle's float32 graphs"}]
        told_of = {
            "tool": f"nncf {importlib.metadata.version('nncf')}",
            "weights": "symmetric, a scale for each channel",
            "calibration_sha256": calibration,
            "certificate_sha256": check,
            "parts": len(self.parts),
            "parts_in_float32": verdict.released,
            "ap": {kind: {"float32": a, "int8": b} for kind, (a, b) in verdict.ap.items()},
            **allowed,
        }
        artifacts = [*bundle.manifest.artifacts, self._artifact(golden, None)]
        compression = {**bundle.manifest.compression, "int8": told_of}
        updated = {"artifacts": artifacts, "parity": parity, "compression": compression}
        write_manifest(self.directory, bundle.manifest.model_copy(update=updated))
        Bundle.read(self.directory)


def choose(
    parts: Sequence[str], distance: Callable[[Sequence[str]], float], judge: Callable[[Sequence[str]], Verdict]
) -> Verdict:
    """As few parts in float32 as it takes for every bar to be met.

    The parts are ordered by how far from float32 each alone in int8 is: beside all the others, what one costs is lost
    among what they cost. They go back to float32 in that order, twice as many each time, then as few of these as still
    do. Where half of the parts is not enough, the last verdict, which says what failed, is given.
    """
    verdict = judge([])
    if not verdict.failed:
        return verdict
    order = sorted(parts, key=lambda part: -distance([other for other in parts if other != part]))
    most = max(1, math.floor(len(parts) * MAX_RELEASED))
    low, high = 0, 1  # `low` parts are known not to be enough
    while (verdict := judge(order[:high])).failed:
        if high == most:
            return verdict
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        tried = judge(order[:middle])
        low, high, verdict = (middle, high, verdict) if tried.failed else (low, middle, tried)
    return verdict


def _write_golden(bundle: Bundle, path: Path) -> None:
    """What the int8 graphs give for the canvas of golden.npz, in its form."""
    wanted = bundle.golden()
    engine = open_engine(bundle, "openvino", precision="int8").engine
    found = engine.detect(wanted["images"], wanted["sizes"])
    arrays = {name: getattr(found, name) for name in ("count", "boxes", "scores", "labels")}
    rois, labels = golden_rois(arrays)
    if bundle.has_masks:
        arrays["probabilities"] = (
            engine.masks(found.features, rois, labels) if len(rois) else wanted["probabilities"][:0]
        )
    if bundle.has_keypoints:
        heatmaps = engine.keypoints(found.features, rois) if len(rois) else wanted["heatmaps"][:0]
        arrays["heatmaps"] = heatmaps.astype(np.float16)
    engine.close()
    with path.open("wb") as stream:
        np.savez_compressed(stream, images=wanted["images"], sizes=wanted["sizes"], **arrays)


def told(verdict: Verdict) -> str:
    """The certificate, the AP and the parts in float32 as lines that a person reads."""
    parity = {"pictures": f"{verdict.certificate['pictures']} pictures", "engines": [verdict.certificate]}
    lines = [table(parity, "the float32 graphs")]
    lines += [f"  {kind} AP {before:.4f} -> {after:.4f}" for kind, (before, after) in verdict.ap.items()]
    lines.append("In float32: " + (", ".join(verdict.released) or "only the box arithmetic"))
    lines += [f"ALLOWED though below its bar: {failed}" for failed in verdict.failed]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
