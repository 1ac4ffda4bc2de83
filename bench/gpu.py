"""Mask R-CNN R50-FPN on a GPU, ours against torchvision's: `PYTHONPATH=. python -m bench.gpu`, from the checkout.

Needs torch, torchvision and numpy; what else is installed (TensorRT, ONNX Runtime with CUDA) is measured, too. Every
route runs in a process of its own, one after the other: one that fails or takes too long says so, and the rest go on.
Packages are compiled first, side by side, while nothing is timed. `--write FILE` writes the page; `--quick` takes small
pictures and, with `--device cpu`, tries the program itself.

torchvision is called below its transform (backbone, rpn, roi_heads) on tensors that are normalised and on the GPU
already, and leaves its results there. limner's routes start from bytes in the host's memory and end with boxes and
masks there.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torchvision

from bench.gpu_parts import run_part
from bench.gpu_routes import EAGER, WEIGHTS, Scale, Shape, routes, scale
from bench.networks import CLASSES, DETECTIONS, weights
from bench.results import publish

ROOT = Path(__file__).parent.parent


@dataclass(slots=True)
class Outcome:
    facts: list[tuple[str, dict[str, Any]]]
    failure: str = ""

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        return (facts for found, facts in self.facts if found == kind)


class Child:
    """A part of the run in a process of its own."""

    def __init__(self, part: str, folder: Path) -> None:
        self.log = folder / f"{abs(hash(part))}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        command = [sys.executable, "-m", "bench.gpu", "--part", part, "--folder", str(folder)]
        self.output = self.log.open("w")
        # A session of its own, so that what it starts, compilers above all, ends with it.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.output, stderr=self.output, start_new_session=True
        )

    def wait(self, seconds: float) -> Outcome:
        failure = ""
        try:
            status = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            status, failure = 0, f"ended after {seconds:.0f} s"
        self.output.close()
        text = self.log.read_text(errors="replace")
        facts = [line.partition(" ")[::2] for line in text.splitlines() if line.partition(" ")[0].isupper()]
        told = [(kind, json.loads(rest)) for kind, rest in facts if rest.startswith("{")]
        if status:
            words = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
            failure = words[-1][:300] if words else f"ended with {status}"
        return Outcome(told, failure)


def run_all(size: Scale) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """By route; and by what else is measured."""
    end = time.monotonic() + size.total_s
    by_route: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="limner-bench-") as aside:
        folder = Path(aside)
        torch.save(weights(), folder / WEIGHTS)
        (folder / "scale.json").write_text(json.dumps(asdict(size)))
        others = build_all(folder, size)
        names = [("route", name) for name in routes(size)]
        # The machine's peak first: without it no share can be told.
        parts = [("other", "machine"), *names[:4], ("other", "memory"), *names[4:]]
        for number, (kind, name) in enumerate(parts):
            left = end - time.monotonic()
            most = size.route_s * (2 if "torch.compile" in name else 1)
            cap = min(most, left - 2 * (len(parts) - number - 1))
            if left < 10:
                outcome = Outcome([], "no time was left")
            else:
                outcome = Child(f"{kind}:{name}", folder).wait(cap)
            (by_route if kind == "route" else others)[name] = outcome
            note = outcome.failure or f"{len(outcome.facts)} rows"
            print(f"{name}: {note} ({end - time.monotonic():.0f} s left)", file=sys.stderr, flush=True)
    return by_route, others


def build_all(folder: Path, size: Scale) -> dict[str, Outcome]:
    """Side by side on a machine with many cores."""
    wanted = [(precision, shape) for precision in size.precisions for shape in size.canvases]
    names = [f"build:{precision}:{shape[0]}x{shape[1]}" for precision, shape in wanted]
    end, found = time.monotonic() + size.build_s, {}
    children = {name: Child(name, folder) for name in names}
    for name, child in children.items():
        found[name] = child.wait(end - time.monotonic())
        taken = "".join(f"{each['seconds']:.0f} s" for each in found[name].of("BUILT"))
        print(f"{name}: {found[name].failure or taken}", file=sys.stderr, flush=True)
    return found


def page(size: Scale, by_route: dict[str, Outcome], others: dict[str, Outcome]) -> str:
    peak = next((facts["tflops"] for facts in others["machine"].of("MATMUL")), float("nan"))
    gflop = {tuple(facts["shape"]): facts["gflop"] for facts in others["machine"].of("FLOPS")}
    device = torch.cuda.get_device_name() if size.device == "cuda" else "the processor"
    lines = [
        "# Mask R-CNN on a GPU",
        "",
        f"`python -m bench.gpu`, {date.today()}: {device}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, CUDA {torch.version.cuda}.",
        "",
        f"Mask R-CNN R50-FPN, {CLASSES} classes, 1000 proposals, masks of {DETECTIONS} detections a picture, the same "
        "random weights. Every route in a process of its own, medians after three runs. torchvision starts from "
        "normalised tensors on the device and leaves its answers there; limner starts from bytes in the host's memory, "
        "reads boxes and masks back, and normalises on the way. torchvision's float32 is torch's default, which lets "
        "convolutions use TF32, unless said otherwise. Nobody resizes a picture or pastes a mask.",
        "",
        f"Measured bfloat16 matmul peak ({size.matmul_side} cubed): {peak:.3g} TFLOP/s. The last column but one is the "
        "share of it that the network's products (counted by torch, 10 mask RoIs) make up; the last counts the eager "
        "model's detections that are found again in the first picture (same class, IoU above 0.5), which random "
        "weights put at nearly equal scores, so that half precision picks others, torchvision's as well.",
    ]
    for shape in size.canvases:
        per_picture = gflop.get(shape, float("nan"))
        lines += ["", f"## {shape[0]} x {shape[1]}, {per_picture:.0f} GFLOP a picture", ""]
        lines += table(shape, size, by_route, per_picture, peak)
    failures = {**by_route, **others}
    told = [f"- {name}: {each.failure}" for name, each in failures.items() if each.failure]
    if told:
        lines += ["", "## What did not run", "", *told]
    lines += ["", "## Memory and compiling", ""]
    lines += [
        f"- after {f['batches']} batches of changing sizes: {f['device_mib']:.0f} MiB on the device (all processes), "
        f"{f['process_mib']:.0f} MiB in the process"
        for f in others["memory"].of("MEMORY")
    ]
    builds = {name: each for name, each in others.items() if name.startswith("build:")}
    lines += [
        f"- {name.removeprefix('build:')}: compiled in {f['seconds']:.0f} s, {len(builds)} side by side"
        for name, each in builds.items()
        for f in each.of("BUILT")
    ]
    return "\n".join(lines) + "\n"


def table(shape: Shape, size: Scale, by_route: dict[str, Outcome], gflop: float, peak: float) -> list[str]:
    head = "| route | batch | latency ms | images/s | times eager float32 | % of peak | same detections |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---|"]
    rates: dict[int, float] = {}
    for name, outcome in by_route.items():
        for row in sorted(outcome.of("ROW"), key=lambda row: row["batch"]):
            if tuple(row["shape"]) != shape:
                continue
            rate = row["batch"] / row["seconds"]
            if name == EAGER:
                rates[row["batch"]] = rate
            ratio = rate / rates[row["batch"]] if row["batch"] in rates else float("nan")
            share = 100 * rate * gflop / 1e3 / peak
            cells = (row["batch"], f"{1e3 * row['seconds']:.2f}", f"{rate:.1f}", f"{ratio:.2f}", f"{share:.1f}")
            lines.append(f"| {name} | {' | '.join(map(str, cells))} | {row['same']} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--quick", action="store_true", help="a small canvas, batches of one and two")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.folder)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.gpu: torch finds no CUDA device; --device cpu --quick tries the program")
    size = scale(options.device, options.quick)
    text = page(size, *run_all(size))
    publish(text, options.write)


if __name__ == "__main__":
    main()
