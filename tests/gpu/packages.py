"""The tiny person model's packages in one precision, made by a process of its own so that several can be made at once:
`python -m tests.gpu.packages PRECISION FOLDER [DEVICE]`.
"""

import json
import sys
from pathlib import Path

from export import aoti_build
from export.half import prepared
from models.regions import RegionNetwork
from service.aoti import runner
from tests.models import tiny

CANVAS = (96, 160)
BATCHES, ROIS = (1, 4), (4, 16)


def model() -> RegionNetwork:
    return tiny.make("person_mobilenetv2_fpn")[0]


def build(precision: str, folder: Path, device: str = "cuda") -> None:
    small = prepared(model(), precision)  # type: ignore[arg-type]
    made = aoti_build.build(small, [CANVAS], max(BATCHES), max(ROIS), device, folder)
    described = {"detect": made.detect[CANVAS], "heads": made.heads, "kernels": made.kernels}
    (folder / "built.json").write_text(json.dumps(described))


def read(folder: Path) -> runner.Packages:
    built = json.loads((folder / "built.json").read_text())
    return runner.Packages(folder, {CANVAS: built["detect"]}, built["heads"], BATCHES, ROIS, built["kernels"])


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
