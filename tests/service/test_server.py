"""`limner serve` as a process: the socket, the signal, the exit."""

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.toy import encoded, picture, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(bundles: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    command = [sys.executable, "limner.py", "serve", "--port", "0", "--engine", "onnx", "--threads", "1"]
    process = subprocess.Popen([*command, "--bundles", str(bundles)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stderr.readline())
    assert found
    yield process, int(found[1])
    process.kill()
    process.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_serves_and_leaves(server):
    process, port = server
    wait_until(lambda: ask(port, "GET", "/readyz")[0] == 200, seconds=20)
    # As curl --data-binary sends it.
    curl = {"content-type": "application/x-www-form-urlencoded"}
    status, body = ask(port, "POST", "/detect", encoded(picture()), **curl)
    assert status == 200
    assert len(json.loads(body)["detections"]) == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (0, -signal.SIGTERM)
