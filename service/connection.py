"""The client's end of a request: its body, read under limits, and whether it still waits for the answer."""

import asyncio
import zlib
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from service import errors
from service.settings import Settings

T = TypeVar("T")

_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
COMPRESSED = ("identity", *_WINDOWS)


async def read_body(request: Request, settings: Settings, encodings: Sequence[str] = ("identity",)) -> bytes:
    """Streamed, so that a body over the cap is refused after the cap and not after its end.

    `encodings` are those that the caller undoes.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() not in encodings:
        raise errors.UnsupportedType(
            f"content encoding {encoding!r} is not taken here, only {', '.join(encodings)}: send the body as it is"
        )
    cap = settings.max_body_bytes
    too_large = f"the body exceeds {cap} bytes: send a smaller file, or raise LIMNER_MAX_BODY_BYTES"
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > cap:
        raise errors.BodyTooLarge(too_large)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > cap:
                    raise errors.BodyTooLarge(too_large)
    except TimeoutError:
        waited = f"the body was not complete after {settings.body_seconds:g} s"
        raise errors.BodyTimeout(f"{waited}: send it faster, or raise LIMNER_BODY_SECONDS") from None
    except ClientDisconnect:
        raise errors.ClientGone("the client left while sending the body") from None
    return bytes(body)


def inflated(body: bytes, encoding: str, settings: Settings) -> bytes:
    """The body without its encoding, under the cap that holds for bodies as they are: the rest is never inflated."""
    if encoding.lower() == "identity":
        return body
    cap = settings.max_body_bytes
    stream = zlib.decompressobj(_WINDOWS[encoding.lower()])
    try:
        content = stream.decompress(body, cap + 1)
    except zlib.error as error:
        raise errors.MalformedRequest(f"the body cannot be decompressed as {encoding} ({error})") from error
    if len(content) > cap:
        raise errors.BodyTooLarge(f"the decompressed body exceeds {cap} bytes: raise LIMNER_MAX_BODY_BYTES")
    if not stream.eof or stream.unused_data:
        raise errors.MalformedRequest(f"the body is not one whole {encoding} stream: is it complete?")
    return content


async def unless_gone(request: Request, waiting: Awaitable[T]) -> T:
    """The result, unless the client leaves first: then its place in the queue is given up.

    Awaited here and not in a task of its own, so that who has the result goes on in the same turn of the loop."""
    task, is_over = asyncio.current_task(), False
    assert task is not None
    gone = asyncio.create_task(_disconnected(request))

    def give_up(_: "asyncio.Task[None]") -> None:
        if not is_over:
            task.cancel()

    gone.add_done_callback(give_up)
    try:
        return await waiting
    except asyncio.CancelledError:
        if gone.done() and task.uncancel() == 0:
            raise errors.ClientGone("the client left before the answer") from None
        raise
    finally:
        is_over = True
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
