"""LitServe as `bench.serving` measures it: `python -m bench.peer_litserve BUNDLE PORT`, pictures as a form's file.

One worker process a core, each with one thread. A module of its own, since its workers import the class by name.
"""

import os
import sys
from pathlib import Path
from typing import Any

import litserve  # pyright: ignore[reportMissingImports]
from fastapi import Request, Response

from bench.peers import Plain
from service.detector import Detections
from service.images import Canvas


class Api(litserve.LitAPI):
    def __init__(self, bundle: Path) -> None:
        super().__init__(api_path="/detect")
        self.bundle = bundle

    def setup(self, device: Any) -> None:
        self.plain = Plain(self.bundle, 1)

    def decode_request(self, request: Request) -> Canvas:
        return self.plain.decode(request["image"].file.read())  # it takes forms and JSON, no plain bodies

    def predict(self, x: Canvas) -> Detections:
        return self.plain.predict(x)

    def encode_response(self, output: Detections) -> Response:
        return Response(self.plain.encode(output), media_type="application/json")


if __name__ == "__main__":
    # By its importable name, so that what unpickles it need not be this script.
    from bench.peer_litserve import Api as Importable

    server = litserve.LitServer(
        Importable(Path(sys.argv[1])), accelerator="cpu", workers_per_device=os.cpu_count() or 1, timeout=120
    )
    server.run("127.0.0.1", int(sys.argv[2]), generate_client_file=False, log_level="warning")
