"""What goes wrong around a service that runs: clients that vanish, signals, swaps and loads that hang.

Where a socket or a signal is the matter, a real server: in a thread, or `limner serve` as a process.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from service.app import create_app
from service.bundle import Bundle
from service.engines import Opened
from service.settings import Settings
from tests.service.toy import ToyEngine, encoded, picture, wait_until, write_bundle

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-administrator"
BODY = encoded(picture())
LARGE = encoded(picture(1200, 1600), "JPEG")  # decoding takes a while, so that many requests are under way at once
NUM_CLIENTS = 12


@dataclass(frozen=True)
class Said:
    started_s: float
    ended_s: float
    status: int  # 0: the connection was refused or closed before any answer
    body: bytes


@dataclass(frozen=True)
class Process:
    popen: subprocess.Popen[bytes]
    port: int
    log: Path

    def logged(self, route: str) -> list[int]:
        """Status of every request to this route, as the service's own log has it."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line["status"] for line in lines if line.get("event") == "request" and line["route"] == route]


@contextmanager
def limner_serve(bundles: Path, directory: Path, *flags: str) -> Iterator[Process]:
    command = [sys.executable, "limner.py", "serve", "--port", "0", "--engine", "onnx", "--threads", "1"]
    log = directory / "serve.log"
    with log.open("wb") as stream:
        arguments = [*command, "--bundles", str(bundles), "--log-format", "json", *flags]
        popen = subprocess.Popen(arguments, cwd=ROOT, stderr=stream, env={**os.environ, "LIMNER_ADMIN_KEY": KEY})
    try:
        wait_until(lambda: "listens on" in log.read_text(), seconds=120)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        assert found
        process = Process(popen, int(found[1]), log)
        wait_until(lambda: ask(process.port, "GET", "/readyz").status == 200, seconds=120)
        yield process
    finally:
        popen.kill()
        popen.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> Said:
    connection, started_s = http.client.HTTPConnection("127.0.0.1", port, timeout=120), time.monotonic()
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return Said(started_s, time.monotonic(), answer.status, answer.read())
    except ConnectionError:
        return Said(started_s, time.monotonic(), 0, b"")
    finally:
        connection.close()


def hammer(port: int, body: bytes, stop: threading.Event, said: list[Said]) -> None:
    while not stop.is_set():
        said.append(ask(port, "POST", "/detect", body))
        if said[-1].status == 0:
            return  # the server is gone


@contextmanager
def under_load(port: int, body: bytes) -> Iterator[list[Said]]:
    """Many clients ask all the time; the list has all answers once the context is left."""
    stop: threading.Event = threading.Event()
    said: list[Said] = []
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        running = [pool.submit(hammer, port, body, stop, said) for _ in range(NUM_CLIENTS)]
        try:
            yield said
        finally:
            stop.set()
        for each in running:
            each.result()


def test_a_signal_under_load_loses_no_accepted_request(bundles, tmp_path):
    with limner_serve(bundles, tmp_path, "--drain-seconds", "100") as server:
        with under_load(server.port, LARGE) as said:
            wait_until(lambda: len(said) > 2 * NUM_CLIENTS, seconds=120)
            signalled_s = time.monotonic()
            server.popen.send_signal(signal.SIGTERM)
            assert server.popen.wait(120) in (0, -signal.SIGTERM)
        served = [each for each in said if each.status == 200]
        assert any(each.started_s < signalled_s < each.ended_s for each in served)
        found = json.loads(served[0].body)["detections"]
        assert found
        assert all(json.loads(each.body)["detections"] == found for each in served)
        refused = [each for each in said if each.status not in (0, 200)]
        assert {each.status for each in refused} <= {503}
        assert all(json.loads(each.body)["type"].endswith("draining") for each in refused)
        # What the service took, the clients have: none is left over on either side.
        logged = server.logged("/detect")
        assert (logged.count(200), logged.count(503)) == (len(served), len(refused))
        assert len(logged) == len(served) + len(refused)
        assert ask(server.port, "GET", "/healthz").status == 0


def test_a_swap_under_load_on_a_real_server_fails_no_request(tmp_path):
    bundles = tmp_path / "bundles"
    write_bundle(bundles)
    with limner_serve(bundles, tmp_path) as server:
        with under_load(server.port, BODY) as said:
            for version in ("2", "3"):
                write_bundle(bundles, version=version)
                loaded = ask(server.port, "POST", "/models/toy/load", **{"x-api-key": KEY})
                assert loaded.status == 200, loaded.body
                since = len(said)
                wait_until(lambda since=since: len(said) > since + 2 * NUM_CLIENTS, seconds=60)
        assert {each.status for each in said} == {200}
        assert {json.loads(each.body)["model"]["version"] for each in said} == {"1", "2", "3"}
        assert all(len(json.loads(each.body)["detections"]) == 3 for each in said)


@pytest.fixture
def listening(bundles: Path) -> Iterator[tuple[Any, int]]:
    """The application under uvicorn, with room for one request."""
    app = create_app(Settings(bundles=bundles, max_requests=1), lambda bundle: Opened(ToyEngine(), "a test"))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started, seconds=60)
    wait_until(lambda: not app.state.service.store.is_loading, seconds=60)
    yield app.state.service, running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("head", [b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n40\r\n"])
def test_a_client_gone_in_the_middle_of_its_upload_frees_its_permit(listening, head):
    service, port = listening
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"POST /detect HTTP/1.1\r\nHost: test\r\n" + head + BODY[:50])
        wait_until(lambda: service.admission.num_held == 1)
        assert ask(port, "POST", "/detect", BODY).status == 429
    # Long before LIMNER_BODY_SECONDS would have ended it.
    wait_until(lambda: service.admission.num_held == 0, seconds=service.settings.body_seconds / 2)
    assert ask(port, "POST", "/detect", BODY).status == 200


class Hanging:
    """Opens engines, and hangs on the versions in `hangs` until `go` is set."""

    def __init__(self, *hangs: str) -> None:
        self.hangs = hangs
        self.go = threading.Event()
        self.engines: dict[str, ToyEngine] = {}

    def __call__(self, bundle: Bundle) -> Opened:
        spec = f"{bundle.name}@{bundle.version}"
        self.engines[spec] = ToyEngine()
        if spec in self.hangs:
            assert self.go.wait(60)
        return Opened(self.engines[spec], "a test")


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    openers: list[Hanging] = []

    @contextmanager
    def _hanging(*hangs: str) -> Iterator[tuple[TestClient, Hanging]]:
        openers.append(Hanging(*hangs))
        app = create_app(Settings(bundles=tmp_path, admin_key=KEY, load_seconds=1), openers[-1])
        with TestClient(app, raise_server_exceptions=False) as client:
            wait_until(lambda: not app.state.service.store.is_loading, seconds=30)
            yield client, openers[-1]

    yield _hanging
    for each in openers:
        each.go.set()


def test_a_load_that_hangs_at_the_start_leaves_the_others_ready(tmp_path, hanging):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    with hanging("a@1") as (client, _):
        assert client.get("/readyz").json() == {"status": "ready", "model": "b"}
        assert client.post("/detect", content=BODY).status_code == 200
        listed = {each["name"]: each for each in client.get("/models").json()["models"]}
        assert listed["a"]["state"] == "failed"
        assert "LIMNER_LOAD_SECONDS" in listed["a"]["reason"]


def test_a_load_that_hangs_is_left_behind_and_others_can_load(tmp_path, hanging):
    write_bundle(tmp_path)
    with hanging("toy@2") as (client, opener):
        write_bundle(tmp_path, version="2")
        write_bundle(tmp_path, "other")
        hung = client.post("/models/toy/load", headers={"x-api-key": KEY})
        assert hung.status_code == 503
        assert "LIMNER_LOAD_SECONDS" in hung.json()["detail"]
        assert client.post("/detect", content=BODY).json()["model"]["version"] == "1"
        assert client.post("/models/other/load", headers={"x-api-key": KEY}).status_code == 200
        assert client.post("/detect", content=BODY, params={"model": "other"}).status_code == 200
        # It comes to itself: nobody waits for it any more, so it is closed and serves nobody.
        assert not opener.engines["toy@2"].closed
        opener.go.set()
        wait_until(lambda: opener.engines["toy@2"].closed)
        assert client.post("/detect", content=BODY).json()["model"]["version"] == "1"
        again = client.post("/models/toy/load", headers={"x-api-key": KEY})
        assert (again.status_code, again.json()["version"]) == (200, "2")
