"""WS /stream: encoded frames in, one JSON answer for each, in order.

    receive -> newest waiting frame -> [under way: permit, decode, batch, finish] -> send, in order

A frame under way counts as a request of its own and goes the way of one. How many of a stream are under way is bounded,
so a client that sends faster than the engine works either waits (late=wait: nothing is read meanwhile) or loses the
older of its waiting frames (late=drop). Knows nothing of HTTP routes or keys, which `service.security` checks before.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Literal, get_args

import orjson
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from service import wire
from service.admission import DRAINING
from service.answers import dumps
from service.errors import (
    BodyTooLarge,
    Draining,
    InternalError,
    InvalidOption,
    MalformedRequest,
    Overloaded,
    ServiceError,
)
from service.formats import chosen
from service.pipeline import Service, Told
from service.wire import Options

log = structlog.get_logger()

Late = Literal["wait", "drop"]
ROUTE = "/stream"
PROTOCOL = "limner"  # the subprotocol that is agreed on where a client offers any
NO_OPTIONS = ("format", "image_id", "url")  # which mean nothing on a stream
DROP_IN_FLIGHT = 2  # the frame that runs and the one that is decoded meanwhile: more would only be older
POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART = 1008, 1011, 1012


class Streams:
    """Those that are open. They end by themselves when `drain` is called, after what they have under way."""

    def __init__(self) -> None:
        self.closing = asyncio.Event()
        self.open: dict[_Stream, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self.open)

    async def run(self, stream: "_Stream") -> None:
        task = asyncio.create_task(stream.run(self.closing))
        self.open[stream] = task
        try:
            await task
        finally:
            task.cancel()
            del self.open[stream]

    async def drain(self, timeout_s: float) -> None:
        self.closing.set()
        if self.open:
            await asyncio.wait(self.open.values(), timeout=timeout_s)


async def serve(socket: WebSocket, service: Service, streams: Streams, told: Told) -> None:
    """Raises the error that refuses the stream, before it is accepted. Wrong options are told on the open socket: a
    browser shows a page nothing of a refusal."""
    if service.admission.is_closed or streams.closing.is_set():
        raise Draining(DRAINING)
    if len(streams) >= service.settings.max_requests:
        raise Overloaded(f"{len(streams)} streams are open, no more are taken: come back later")
    await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
    try:
        options, late = _options(socket.query_params.multi_items())
        stream = _Stream(socket, service, options, late, told)
    except ServiceError as error:
        await socket.send_text(dumps({"error": told(error)}).decode())
        await socket.close(POLICY_VIOLATION, error.title)
        return
    await streams.run(stream)


def _options(query: Iterable[tuple[str, str]]) -> tuple[Options, Late]:
    given = list(query)
    late = [value for name, value in given if name == "late"] or ["wait"]
    if len(set(late)) > 1 or late[0] not in get_args(Late):
        raise InvalidOption(f"late = {wire.short(', '.join(late))}: give one of {', '.join(get_args(Late))}")
    if named := [name for name, _ in given if name in NO_OPTIONS]:
        raise InvalidOption(f"a stream has no {', '.join(named)}: its answers are JSON, with the number of the frame")
    options = wire.parse_options((name, value) for name, value in given if name != "late")
    chosen(options, "")
    return options, "drop" if late[0] == "drop" else "wait"


class _Stream:
    def __init__(self, socket: WebSocket, service: Service, options: Options, late: Late, told: Told) -> None:
        self._socket = socket
        self._service = service
        self._options = options
        self._drops = late == "drop"
        self._told = told
        most = service.settings.stream_frames
        self._most = min(most, DROP_IN_FLIGHT) if self._drops else most
        self.num_received = 0
        self._num_dropped = 0  # since the last frame that was started
        self._num_in_flight = 0
        self._waiting: tuple[int, Callable[[], bytes]] | None = None
        self._has_room = asyncio.Event()
        self._order: asyncio.Queue[tuple[int, int, asyncio.Task[bytes]] | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[bytes]] = set()

    async def run(self, closing: asyncio.Event) -> None:
        """Until the client leaves, or `closing` is set and all that came before it is answered."""
        sending = asyncio.create_task(self._send())
        ending = asyncio.create_task(closing.wait())
        try:
            is_open = await self._receive(sending, ending)
            if is_open and not sending.done():
                self._order.put_nowait(None)
                await sending
                await self._socket.close(SERVICE_RESTART, "the service is shutting down")
            elif sending.done():
                sending.result()
        except WebSocketDisconnect:
            pass
        except Exception:
            log.exception("unexpected error", path=ROUTE)
            with suppress(WebSocketDisconnect, RuntimeError):  # it may be closed already
                await self._socket.close(INTERNAL_ERROR, "an unexpected error; the service's log has it")
        finally:
            for task in (sending, ending, *self._tasks):
                task.cancel()
            log.info("stream", frames=self.num_received)

    async def _receive(self, *until: asyncio.Task[Any]) -> bool:
        """False once the client has left, true where one of `until` ended first."""
        while True:
            message = await _unless(self._socket.receive(), *until)
            if message is None:
                return True
            if message["type"] == "websocket.disconnect":
                return False
            self._take(message)
            if not self._drops and self._waiting is not None:
                self._has_room.clear()
                await _unless(self._has_room.wait(), *until)

    def _take(self, message: dict[str, Any]) -> None:
        if self._waiting is not None and self._drops:
            self._num_dropped += 1
        data, cap = message.get("bytes"), self._service.settings.max_body_bytes

        def image() -> bytes:
            if data is None:
                raise MalformedRequest("a frame is a binary message with an encoded picture, this one is text")
            if len(data) > cap:
                raise BodyTooLarge(f"the frame exceeds {cap} bytes: send a smaller one, or raise LIMNER_MAX_BODY_BYTES")
            return data

        self._waiting = (self.num_received, image)
        self.num_received += 1
        self._start_waiting()

    def _start_waiting(self) -> None:
        if self._waiting is None or self._num_in_flight >= self._most:
            return
        (number, image), self._waiting = self._waiting, None
        self._num_in_flight += 1
        task = asyncio.create_task(self._detect(image))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._order.put_nowait((number, self._num_dropped, task))
        self._num_dropped = 0
        self._has_room.set()

    async def _send(self) -> None:
        while True:
            item = await self._order.get()
            if item is None:
                if self._order.empty():
                    return
                self._order.put_nowait(None)  # the newest frame was started behind it
                continue
            number, num_dropped, task = item
            content = await task
            head = {"frame": number, "dropped": num_dropped} if self._drops else {"frame": number}
            self._num_in_flight -= 1
            self._start_waiting()
            await self._socket.send_text((dumps(head)[:-1] + b"," + content[1:]).decode())

    async def _detect(self, image: Callable[[], bytes]) -> bytes:
        """The members of an answer, or of a problem."""
        started_s, watch, status = time.perf_counter(), [], 200
        try:
            return await self._service.detect_frame(image(), self._options, watch.append)
        except ServiceError as error:
            status, failed = error.status, error
        except Exception:  # whatever it was, the other frames go on
            log.exception("unexpected error", path=ROUTE)
            status, failed = 500, InternalError("an unexpected error; the service's log has it")
        finally:
            seconds = time.perf_counter() - started_s
            self._service.metrics.request(ROUTE, status, seconds)
            self._service.metrics.inference(status, seconds, watch[0] if watch else None)
        return orjson.dumps({"error": self._told(failed)})


async def _unless(waiting: Awaitable[Any], *until: asyncio.Task[Any]) -> Any:
    """The result, or None where one of `until` ends first."""
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait({task, *until}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
