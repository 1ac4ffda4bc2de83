"""Masks to run-length strings and heat maps to joints, against the usual ways: `python -m bench.masks`.

One process, one thread, routes in turn within each repetition so that a busy machine slows all of them. Peak memory is
the growth of the resident set during one call in a fresh process (Linux). `--write FILE` writes the page.

Masks: soft outlines of five waves at 28 x 28 in boxes of log-normal sides, clipped to the image. Persons: log-normal
heights around 300 canvas pixels, 0.45 as wide, with one bump a joint on a rough floor.
"""

import argparse
import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read them
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, paste_masks_in_image

from bench.machine import processor
from bench.results import publish
from service import keypoints, masks

torch.set_num_threads(1)

Array = NDArray[Any]
BUDGET_S = 20  # a route that has taken longer is not repeated


class Scene(NamedTuple):
    """`maps` are mask probabilities (N, 28, 28) or heat maps (N, 17, 56, 56), with their boxes (N, 4)."""

    maps: Array
    boxes: Array
    height: int
    width: int


Route = Callable[[Scene], list[Any]]


def outlines(number: int, height: int, width: int) -> Scene:
    rng = np.random.default_rng(1)
    y, x = (np.mgrid[:28, :28] + 0.5) / 28 - 0.5
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    heights, phases = rng.normal(0, 0.05, (5, number, 1, 1)), rng.uniform(0, 2 * np.pi, (5, number, 1, 1))
    rim = 0.42 + sum(heights[k] * np.cos((k + 1) * angle + phases[k]) for k in range(5))
    logits = 25 * (rim - radius) + rng.normal(0, 0.3, (number, 28, 28))
    sides = np.exp(rng.normal(np.log(height / 9), 0.65, (number, 2))).clip(8, [0.9 * width, 0.9 * height])
    boxes = placed(rng, sides, height, width)
    return Scene((1 / (1 + np.exp(-logits))).astype(np.float32), boxes, height, width)


def people(number: int, height: int, width: int) -> Scene:
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:28, :28]
    at, spread = rng.uniform(0, 28, (number, 17, 2, 1, 1)), rng.uniform(0.8, 2, (number, 17, 1, 1))
    bumps = np.exp(-((y - at[:, :, 0]) ** 2 + (x - at[:, :, 1]) ** 2) / (2 * spread**2))
    logits = rng.uniform(5, 14, (number, 17, 1, 1)) * bumps + rng.normal(-3, 0.7, (number, 17, 28, 28))
    heatmaps = torch.nn.functional.interpolate(torch.from_numpy(logits).float(), scale_factor=2, mode="bilinear")
    sides = np.exp(rng.normal(np.log(300), 0.5, (number, 1))).clip(20, height) * [0.45, 1]
    return Scene(heatmaps.numpy(), placed(rng, sides, height, width), height, width)


def noise(number: int, height: int, width: int) -> Scene:
    """`people` with maps of white noise, which no head gives: most cells hold a candidate."""
    scene = people(number, height, width)
    return scene._replace(maps=np.random.default_rng(3).normal(size=scene.maps.shape).astype(np.float32))


def placed(rng: np.random.Generator, sides: Array, height: int, width: int) -> Array:
    centres = rng.uniform(0, 1, sides.shape) * [width, height]
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return boxes.clip(0, [width, height, width, height]).astype(np.float32)


def closed_form(scene: Scene) -> list[Any]:
    return [one["counts"] for one in masks.rle(*scene)]


def paste(scene: Scene, crop: Callable[[Array, Array, Array, Array], Array]) -> list[Any]:
    """Each mask into its window of one reused canvas in pycocotools' order, encoded, and wiped."""
    canvas, found = np.zeros((scene.height, scene.width), np.uint8, order="F"), []
    for mask, box in zip(scene.maps, scene.boxes, strict=True):
        left, top = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
        right, bottom = np.minimum(np.ceil(box[2:]).astype(int) + 1, [scene.width, scene.height])
        x, y = np.arange(left, right, dtype=np.float32), np.arange(top, bottom, dtype=np.float32)
        window = canvas[top:bottom, left:right]
        np.greater_equal(crop(mask, box, x, y), 0.5, out=window.view(bool))
        found.append(encoded(canvas))
        window[...] = 0
    return found


def encoded(canvas: Array) -> str:
    one: Any = coco.encode(canvas)
    return one["counts"].decode()


def bilinear(at: Array) -> Array:
    """(P, 28) weights of the mask cells at positions in cells."""
    cell = np.floor(at).astype(np.int64)
    weights, pixel = np.zeros((len(at), 30), np.float32), np.arange(len(at))
    weights[pixel, (cell + 1).clip(0, 29)] = 1 - (at - cell)
    weights[pixel, (cell + 2).clip(0, 29)] += at - cell
    return weights[:, 1:-1]


def separable_paste(scene: Scene) -> list[Any]:
    def crop(mask: Array, box: Array, x: Array, y: Array) -> Array:
        sides = (box[2:] - box[:2]) / np.float32(28)
        across = bilinear((x + np.float32(0.5) - box[0]) / sides[0] - np.float32(0.5))
        down = bilinear((y + np.float32(0.5) - box[1]) / sides[1] - np.float32(0.5))
        return ((across @ mask.T) @ down.T).T  # columns first: the canvas is in Fortran order

    return paste(scene, crop)


def grid_sample_paste(scene: Scene) -> list[Any]:
    """Detectron2's way on a CPU (`layers/mask_ops.py`, `_do_paste_mask` with skip_empty, one mask at a time)."""

    def crop(mask: Array, box: Array, x: Array, y: Array) -> Array:
        across = torch.from_numpy((x + np.float32(0.5) - box[0]) / (box[2] - box[0]) * 2 - 1)
        down = torch.from_numpy((y + np.float32(0.5) - box[1]) / (box[3] - box[1]) * 2 - 1)
        grid = torch.stack([across.expand(len(y), -1), down[:, None].expand(-1, len(x))], dim=2)
        cells = torch.from_numpy(mask)[None, None]
        return torch.nn.functional.grid_sample(cells, grid[None], align_corners=False)[0, 0].numpy()

    return paste(scene, crop)


def torchvision_paste(scene: Scene) -> list[Any]:
    """One mask a call: the stack of all float32 canvases would be 14 GB at twelve megapixels."""
    found = []
    for mask, box in zip(torch.from_numpy(scene.maps), torch.from_numpy(scene.boxes), strict=True):
        pasted = paste_masks_in_image(mask[None, None], box[None], (scene.height, scene.width))[0, 0]
        found.append(encoded(np.asfortranarray((pasted > 0.5).numpy().view(np.uint8))))
    return found


def sparse_decode(scene: Scene) -> list[Any]:
    return list(keypoints.decode(scene.maps, scene.boxes)[..., :2])


def torchvision_decode(scene: Scene) -> list[Any]:
    joints, _ = heatmaps_to_keypoints(torch.from_numpy(scene.maps), torch.from_numpy(scene.boxes))
    return list(joints[..., :2].numpy())


MASKS: dict[str, Route] = {
    "limner, closed form": closed_form,
    "separable paste + pycocotools": separable_paste,
    "grid_sample paste (Detectron2) + pycocotools": grid_sample_paste,
    "torchvision paste + pycocotools": torchvision_paste,
}
JOINTS: dict[str, Route] = {
    "limner, bounded search": sparse_decode,
    "torchvision heatmaps_to_keypoints": torchvision_decode,
}
CASES: dict[str, tuple[Callable[[], Scene], dict[str, Route]]] = {
    "100 masks, 1920 x 1080": (lambda: outlines(100, 1080, 1920), MASKS),
    "300 masks, 4000 x 3000": (lambda: outlines(300, 3000, 4000), MASKS),
    "100 persons x 17 joints": (lambda: people(100, 800, 1333), JOINTS),
    "100 persons x 17 joints, white noise": (lambda: noise(100, 800, 1333), JOINTS),
}


def timed(scene: Scene, routes: dict[str, Route], repetitions: int) -> dict[str, float]:
    """Median seconds of each route."""
    taken: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(repetitions):
        for name, route in routes.items():
            if sum(taken[name]) < BUDGET_S:
                start = time.perf_counter()
                route(scene)
                taken[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in taken.items()}


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found[1]) * 1024


def peak_bytes(case: str, name: str) -> int:
    """Growth of the resident set while the route runs, called in a fresh process."""
    build, routes = CASES[case]
    scene = build()
    routes[name](scene._replace(maps=scene.maps[:1], boxes=np.array([[1, 1, 9, 9]], np.float32), height=16, width=16))
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = resident("VmRSS")
    routes[name](scene)
    return resident("VmHWM") - before


def peak(case: str, name: str) -> int:
    command = [sys.executable, "-m", "bench.masks", "--peak", case, name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def agreement(ours: list[Any], theirs: list[Any]) -> str:
    if isinstance(ours[0], str):
        return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(ours)} strings"
    apart = np.abs(np.stack(ours) - np.stack(theirs)).max(axis=-1)
    return f"{(apart <= 0.01).mean():.2%} of joints"


def rows(case: str, repetitions: int) -> list[str]:
    build, routes = CASES[case]
    scene = build()
    found = {name: route(scene) for name, route in routes.items()}  # also the warm-up
    seconds, first = timed(scene, routes, repetitions), next(iter(routes))
    width, height = (scene.boxes[:, 2:] - scene.boxes[:, :2]).mean(axis=0)
    lines = []
    for name, taken in seconds.items():
        label, equal = f"{case}; mean box {width:.0f} x {height:.0f}", ""
        if name != first:
            label, equal = "", agreement(found[first], found[name])
        ratio, peak_mib = taken / seconds[first], peak(case, name) / 2**20
        lines.append(f"| {label} | {name} | {1e3 * taken:.1f} | {ratio:.1f} | {peak_mib:.0f} | {equal} |")
    return lines


def page(repetitions: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "torchvision", "pycocotools"))
    lines = [
        "# Masks and keypoints after the network",
        "",
        f"`python -m bench.masks`, {date.today()}: {processor()}, {os.cpu_count()} cores, one thread; "
        f"Python {platform.python_version()}, {packages}. Medians of up to {repetitions} repetitions, routes in turn. "
        "Strings and joints equal to limner's are counted in the last column; torchvision's paste is another function.",
        "",
        "| case | route | ms | times limner | peak MiB | equal |",
        "|---|---|---:|---:|---:|---|",
    ]
    return "\n".join(lines + [line for case in CASES for line in rows(case, repetitions)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "ROUTE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_bytes(*options.peak))
        return
    text = page(options.repetitions)
    publish(text, options.write)


if __name__ == "__main__":
    main()
