"""LitServe for `bench.serving`: `python -m bench.peer_litserve BUNDLE PORT`. One worker process a core, each with one
thread, as its documentation advises for CPUs.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from fastapi import Response

from bench.peers import Plain

litserve: Any = importlib.import_module("litserve")  # in no extra: whoever wants the row installs it


class Api(litserve.LitAPI):
    def setup(self, device: Any) -> None:
        self.plain = Plain(Path(sys.argv[1]), 1)

    def decode_request(self, request: Any) -> Any:
        return self.plain.decode(request["image"].file.read())  # its servers take forms or JSON, no plain bodies

    def predict(self, x: Any) -> Any:
        return self.plain.predict(x)

    def encode_response(self, output: Any) -> Response:
        return Response(self.plain.encode(output), media_type="application/json")


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(api_path="/detect"), accelerator="cpu", workers_per_device=os.cpu_count() or 1, timeout=120
    )
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="warning")
