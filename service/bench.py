"""`limner bench`: how long each stage of a bundle takes here, by engine and batch size, through the service's own code.

A measure of this machine at this moment: what else runs on it shows.
"""

import statistics
import time
from collections.abc import Iterator, Sequence

from service import local
from service.bundle import Bundle
from service.detector import Detector
from service.engines import EngineChoice
from service.errors import ServiceError
from service.loading import WANTS, likely_canvases
from service.machine import Facts
from service.settings import Settings

STAGES = ("detect", "masks", "keypoints")
FEWEST_RUNS = 3


def measure(
    settings: Settings, bundle: Bundle, engines: Sequence[EngineChoice], batches: Sequence[int], seconds: float
) -> Iterator[Facts]:
    """One row for each engine and batch size: median milliseconds of each stage and of the whole run. The heads get
    up to 8 RoIs of each picture, `rois` of them together. An engine that cannot run the bundle has a `reason`.
    """
    canvas = likely_canvases(bundle)[0]
    for engine in engines:
        try:
            detector = local.load(settings, bundle, engine).detector
        except ServiceError as error:
            yield {"engine": engine, "reason": error.detail}
            continue
        try:
            for size in batches:
                if size > bundle.manifest.limits.max_batch:
                    most = bundle.manifest.limits.max_batch
                    yield {"engine": engine, "batch": size, "reason": f"the bundle takes batches of up to {most}"}
                else:
                    timed = _timed(detector, [canvas] * size, seconds)
                    yield {"engine": engine, "precision": detector.engine.precision, "batch": size,
                           "canvas": list(canvas.shape), **timed}  # fmt: skip
        finally:
            detector.close()


def _timed(detector: Detector, canvases: Sequence, seconds: float) -> Facts:
    wants = [WANTS] * len(canvases)
    raws = detector.run(canvases, wants)  # some engines compile at the first run of a shape
    rows: list[dict[str, float]] = []
    end_s = time.perf_counter() + seconds
    while len(rows) < FEWEST_RUNS or time.perf_counter() < end_s:
        started_s = time.perf_counter()
        raws = detector.run(canvases, wants)
        rows.append({**raws[0].timings_ms, "total": (time.perf_counter() - started_s) * 1000})
    ran = {"detect": True, "masks": detector.bundle.has_masks, "keypoints": detector.bundle.has_keypoints}
    medians = {
        f"{stage}_ms": round(statistics.median(row[stage] for row in rows), 3)
        for stage in (*STAGES, "total")
        if ran.get(stage, True)
    }
    rois = sum(len(raw.scores) for raw in raws)
    rate = len(canvases) * 1000 / medians["total_ms"] if medians["total_ms"] else 0.0
    return {"rois": rois, "runs": len(rows), **medians, "per_second": round(rate, 2)}
