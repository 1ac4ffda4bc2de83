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

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if (service := getattr(self._app.state, "service", None)) is not None:
            service.admission.close()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams first: uvicorn would close them in the middle of their answers."""
        if (streams := getattr(self._app.state, "streams", None)) is not None:
            await streams.drain(self._drain_seconds)
        await super().shutdown(sockets)


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
        # A frame that is a little too large is answered with an error; beyond this nobody reads it.
        ws_max_size=2 * settings.max_body_bytes,
        ws_per_message_deflate=False,  # pictures are compressed already
    )
    _DrainingServer(config, app, settings.drain_seconds).run(sockets=[listener])
