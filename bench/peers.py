"""The servers that `bench.serving` measures beside limner's. Same bundle, same decoding, same engine, same answer; only
what is around them differs. The application is for uvicorn.
"""

import os
import time
from pathlib import Path
from threading import Lock

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from service import formats, images
from service.answers import Found
from service.bundle import Bundle
from service.detector import Detections, Detector, Wants
from service.engines import open_engine
from service.settings import load_settings
from service.wire import Options


class Plain:
    """Bytes in, the answer's bytes out, one picture at a time: all that a server has to be put around."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self._bundle = Bundle.read(bundle)
        self.detector = Detector(self._bundle, open_engine(self._bundle, "auto", threads).engine)
        self._limits = load_settings().decode_limits
        self._options = Options.model_validate({})

    def decode(self, body: bytes) -> images.Canvas:
        return images.fit(images.decode(body, self._limits), self._bundle.manifest.canvas)

    def predict(self, canvas: images.Canvas) -> Detections:
        return self.detector.finish(self.detector.run([canvas], [Wants()])[0])

    def encode(self, detections: Detections) -> bytes:
        timings = {stage: detections.timings_ms.get(stage, 0.0) for stage in ("detect", "masks", "keypoints")}
        found = Found(
            self._bundle.manifest, detections, self._options, {"decode": 0.0, "queue": 0.0, **timings},
            time.perf_counter(),
        )  # fmt: skip
        return formats.FORMATS["json"].encode(found)

    def answer(self, body: bytes) -> bytes:
        return self.encode(self.predict(self.decode(body)))


def plain_fastapi() -> FastAPI:
    """What most people write first: decode, predict and encode in the thread pool, a lock around the model."""
    plain = Plain(Path(os.environ["BENCH_BUNDLE"]), int(os.environ["BENCH_THREADS"]))
    lock = Lock()
    app = FastAPI()

    def answer(body: bytes) -> bytes:
        canvas = plain.decode(body)
        with lock:
            detections = plain.predict(canvas)
        return plain.encode(detections)

    @app.post("/detect")
    async def detect(request: Request) -> Response:
        body = await request.body()
        return Response(await run_in_threadpool(answer, body), media_type="application/json")

    return app
