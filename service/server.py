"""Runs the application under uvicorn on a socket that is already listening, and turns a signal into a drain."""

import socket
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.metrics import configure_logs
from service.settings import Settings, unknown_variables

log = structlog.get_logger()


class _DrainingServer(uvicorn.Server):
    """Refuses new requests from the signal on; uvicorn alone would do so only once the old ones are done."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if (service := getattr(self._app.state, "service", None)) is not None:
            service.admission.close()
        super().handle_exit(sig, frame)


def run(settings: Settings, listener: socket.socket) -> None:
    configure_logs(settings.log_format)
    for name in unknown_variables():
        log.warning("unknown setting: is it misspelt?", variable=name)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # the application logs each request itself, with its id and its route
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        server_header=False,
    )
    _DrainingServer(config, app).run(sockets=[listener])
