"""An HTTP load that costs little itself: `python -m bench.load --port 8000 --picture photo.jpg --clients 8`.

With --clients each connection sends its next request when it has its answer (closed loop); with --rate requests come at
random times of that mean rate, whether or not others are answered (open loop, a Poisson process). Prints one JSON line.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

STAGGER_S = 0.005  # connections are opened so far apart
TIMEOUT_S = 120.0


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[int]
        self._received = bytearray()
        self._length = -1  # of the whole answer, once its head is complete
        self._status = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, request: bytes) -> int:
        """The answer's status; 0 where the server hung up."""
        self._answer = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._length = -1
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._length < 0 and (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end]).lower()
            self._status = int(head[9:12])
            field = head.find(b"content-length:")
            self._length = end + 4 + int(head[field + 15 :].split(b"\r\n", 1)[0])
        if 0 <= self._length <= len(self._received) and not self._answer.done():
            self._answer.set_result(self._status)

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "_answer") and not self._answer.done():
            self._answer.set_result(0)

    def close(self) -> None:
        self._transport.close()


class Load:
    def __init__(self, host: str, port: int, path: str, picture: bytes, is_form: bool = False) -> None:
        kind, body = "image/jpeg", picture
        if is_form:
            kind, part = "multipart/form-data; boundary=bench", 'name="image"; filename="picture.jpg"'
            opening = f"--bench\r\nContent-Disposition: form-data; {part}\r\nContent-Type: image/jpeg\r\n\r\n"
            body = opening.encode() + picture + b"\r\n--bench--\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._host, self._port = host, port
        self.done: list[tuple[float, float, int]] = []  # when it was sent, seconds to its answer, status

    async def closed(self, clients: int, seconds: float) -> float:
        """Returns when it began: all clients are connected."""
        connections = []
        for _ in range(clients):
            connections.append(await self._connect())
            await asyncio.sleep(STAGGER_S)
        start_s = time.perf_counter()

        async def client(connection: Connection, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            while time.perf_counter() < start_s + seconds:
                if not await self._ask(connection):
                    connection = await self._connect()
            connection.close()

        await asyncio.gather(*(client(each, index * STAGGER_S) for index, each in enumerate(connections)))
        return start_s

    async def open(self, rate: float, seconds: float, seed: int = 0) -> float:
        chance = random.Random(seed)
        idle: list[Connection] = []
        tasks: set[asyncio.Task[None]] = set()
        start_s = due_s = time.perf_counter()

        async def one() -> None:
            connection = idle.pop() if idle else await self._connect()
            if await self._ask(connection):
                idle.append(connection)

        while due_s < start_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_s += chance.expovariate(rate)
        await asyncio.gather(*tasks)
        return start_s

    async def _connect(self) -> Connection:
        _, protocol = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return protocol

    async def _ask(self, connection: Connection) -> bool:
        """False where the connection is used up."""
        sent_s = time.perf_counter()
        status = await asyncio.wait_for(connection.ask(self._request), TIMEOUT_S)
        self.done.append((sent_s, time.perf_counter() - sent_s, status))
        return status != 0


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summary(done: Sequence[tuple[float, float, int]], start_s: float, warm_s: float, seconds: float) -> dict[str, Any]:
    """Of what was answered between `warm_s` and `seconds` after the start."""
    span = [each for each in done if warm_s <= each[0] + each[1] - start_s <= seconds]
    good = [passed_s * 1000 for _, passed_s, status in span if status == 200]
    refused = [passed_s * 1000 for _, passed_s, status in span if status == 429]
    return {
        "per_second": len(good) / (seconds - warm_s),
        "mean_ms": sum(good) / len(good) if good else float("nan"),
        "p50_ms": median(good) if good else float("nan"),
        "p99_ms": percentile(good, 0.99),
        "answered": len(good),
        "refused": len(refused),
        "refused_p99_ms": percentile(refused, 0.99),
        "statuses": {str(status): count for status, count in Counter(status for *_, status in done).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/detect")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--form", action="store_true", help="the picture as a multipart form's file")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-seconds", type=float, default=2.0)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--clients", type=int)
    kind.add_argument("--rate", type=float, help="requests a second")
    options = parser.parse_args()
    load = Load(options.host, options.port, options.path, options.picture.read_bytes(), options.form)
    seconds = options.warm_seconds + options.seconds
    if options.clients:
        start_s = asyncio.run(load.closed(options.clients, seconds))
    else:
        start_s = asyncio.run(load.open(options.rate, seconds))
    told = summary(load.done, start_s, options.warm_seconds, seconds)
    print(json.dumps({**told, "client_cpu_s": time.process_time()}))


if __name__ == "__main__":
    main()
