"""What one process of bench/gpu.py does: one route, one build, or one measurement.

What it finds it prints, a line each: a word in capitals, and its numbers as JSON.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from bench.gpu_routes import EAGER, REFERENCE, Compiled, Run, Scale, Setting, Shape, pictures, rois_of, routes
from bench.networks import DETECTIONS
from export import aoti_build
from models.servable import normalise


def tell(kind: str, **facts: Any) -> None:
    print(f"{kind} {json.dumps(facts)}", flush=True)


def run_route(name: str, setting: Setting) -> None:
    prepare = routes(setting.size)[name](setting)
    for shape in setting.size.canvases:
        for batch in sorted(setting.size.batches, key=lambda size: size != 8):  # the one that matters first
            seconds, answer = timed(prepare(shape, batch), setting.size.row_s)
            tell("ROW", shape=shape, batch=batch, seconds=seconds, same=agreement(setting, name, shape, answer))


def timed(run: Run, seconds: float) -> tuple[float, tuple[Tensor, Tensor]]:
    """Median of a run, after three that warm up."""
    for _ in range(3):
        answer = run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        answer = run()
        taken.append(time.perf_counter() - start)
    return median(taken), answer


def agreement(setting: Setting, name: str, shape: Shape, answer: tuple[Tensor, Tensor]) -> str:
    """How many of the eager model's detections in the first picture are found again: same class, IoU above 0.5."""
    boxes, labels = (each.detach().float().cpu() for each in answer)
    assert len(boxes) == DETECTIONS, f"{name} found {len(boxes)}: another task"
    file = setting.folder / f"{shape[0]}x{shape[1]}.{REFERENCE}"
    if name == EAGER:
        np.savez(file, boxes=boxes.numpy(), labels=labels.numpy())
        return ""
    if not file.is_file():
        return "?"
    with np.load(file) as wanted:
        overlap = torchvision.ops.box_iou(torch.from_numpy(wanted["boxes"]), boxes)
        overlap[torch.from_numpy(wanted["labels"])[:, None] != labels[None]] = 0
    return f"{int((overlap.amax(1) > 0.5).sum())} of {DETECTIONS}"


def build_packages(setting: Setting, precision: str, shape: Shape) -> None:
    folder = setting.folder / f"{precision}.{shape[0]}x{shape[1]}"
    folder.mkdir()
    size = setting.size
    start = time.perf_counter()
    built = aoti_build.build(
        setting.ours(precision), [shape], max(size.batches), max(rois_of(size)), size.device, folder
    )
    described = {"detect": built.detect[shape], "heads": built.heads, "kernels": built.kernels}
    (folder / "built.json").write_text(json.dumps(described))
    tell("BUILT", seconds=time.perf_counter() - start)


def measure_machine(setting: Setting) -> None:
    """The best that matrix products do here, and what the network asks for."""
    side, device = setting.size.matmul_side, setting.device
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> tuple[Tensor, Tensor]:
        result = one @ other
        setting.synchronize()
        return result, result

    seconds, _ = timed(product, 1.0)
    tell("MATMUL", tflops=2 * side**3 / seconds / 1e12)
    from torch.utils.flop_counter import FlopCounterMode

    model = setting.ours("float32")
    for shape in setting.size.canvases:
        images, sizes = (torch.from_numpy(each).to(device) for each in pictures(shape, 1))
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            found = model(normalise(images, sizes), sizes)
            rois = torch.cat((torch.zeros(DETECTIONS, 1, device=device), found.boxes[0, :DETECTIONS]), dim=1)
            model.mask_probabilities(found.features, rois, found.labels[0, :DETECTIONS].clamp(min=0))
        tell("FLOPS", shape=shape, gflop=counted.get_total_flops() / 1e9)


def measure_memory(setting: Setting) -> None:
    """Batches of changing size, shape and number of RoIs; what the device and the process hold as they go by."""
    size, rng = setting.size, np.random.default_rng(0)
    engines = {
        shape: Compiled(setting.packages(size.precisions[0], shape), setting.runner_device()) for shape in size.canvases
    }
    some = {shape: pictures(shape, max(size.batches)) for shape in size.canvases}
    for turn in range(size.memory_batches):
        shape = size.canvases[int(rng.integers(len(size.canvases)))]
        batch = int(rng.integers(1, max(size.batches) + 1))
        images, sizes = (each[:batch] for each in some[shape])
        found = engines[shape].detect(images, sizes)
        number = int(rng.integers(1, 2 * max(rois_of(size))))
        low, sides = rng.uniform(0, 100, (number, 2)), rng.uniform(1, 300, (number, 2))
        rois = np.concatenate([rng.integers(0, batch, (number, 1)), low, low + sides], axis=1).astype(np.float32)
        engines[shape].masks(found.features, rois, np.zeros(number, np.int64))
        del found
        if turn + 1 in (size.memory_batches // 10, size.memory_batches // 2, size.memory_batches):
            tell("MEMORY", batches=turn + 1, device_mib=device_mib(setting), process_mib=process_mib())


def device_mib(setting: Setting) -> float:
    if setting.device.type == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def process_mib() -> float:
    status = Path("/proc/self/status")
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) / 1024


def run_part(part: str, folder: Path) -> None:
    """`part` is route:NAME, build:PRECISION:HxW, or other:NAME."""
    described: dict[str, Any] = json.loads((folder / "scale.json").read_text())
    described["canvases"] = tuple((height, width) for height, width in described["canvases"])
    setting = Setting(folder, Scale(**described))
    kind, _, name = part.partition(":")
    if kind == "route":
        run_route(name, setting)
    elif kind == "build":
        precision, _, sides = name.partition(":")
        height, width = map(int, sides.split("x"))
        build_packages(setting, precision, (height, width))
    else:
        {"machine": measure_machine, "memory": measure_memory}[name](setting)
