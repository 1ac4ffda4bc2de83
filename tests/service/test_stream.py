"""WS /stream: order, lateness, errors as answers, keys, origins, and how it ends."""

import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.websockets import WebSocketDisconnect

from service.stream import DROP_IN_FLIGHT
from tests.service.toy import ToyEngine, encoded, picture, wait_until

ROOT = Path(__file__).parents[2]
KEY = "first-key-0123456789"


def frame(red: int) -> bytes:
    return encoded(picture(red=red))


def best(answer: dict[str, Any]) -> int:
    """The red that a frame was made with."""
    return round(answer["detections"][0]["score"] * 255)


def service_of(client: Any) -> Any:
    return client.app.state.service


def test_answers_come_in_order_and_are_those_of_detect(client: Any) -> None:
    reds = list(range(130, 250, 5))
    with client.websocket_connect("/stream?confidence=0.4&masks=polygon&box_format=xywh") as socket:
        for red in reds:
            socket.send_bytes(frame(red))
        answers = [socket.receive_json() for _ in reds]
    assert [(each["frame"], best(each)) for each in answers] == list(enumerate(reds))
    query = {"confidence": 0.4, "masks": "polygon", "box_format": "xywh"}
    alone = client.post("/detect", params=query, content=frame(reds[3])).json()
    assert answers[3]["detections"] == alone["detections"]
    assert answers[3].keys() - alone.keys() == {"frame"}


def test_a_slow_engine_holds_the_client_back(serve: Any, engine: ToyEngine) -> None:
    with serve(stream_frames=3, max_requests=4) as client, client.websocket_connect("/stream") as socket:
        engine.free.clear()
        for red in range(200, 212):
            socket.send_bytes(frame(red))
        admission = service_of(client).admission
        wait_until(lambda: admission.num_held == 3)
        assert client.post("/detect", content=b"").status_code == 400  # others still get in
        assert admission.num_held == 3
        engine.free.set()
        answers = [socket.receive_json() for _ in range(12)]
    assert [best(each) for each in answers] == list(range(200, 212))
    assert not any("error" in each or "dropped" in each for each in answers)
    assert max(engine.batches) > 1  # the frames of one stream share batches


def test_late_frames_are_dropped_and_told(serve: Any, engine: ToyEngine) -> None:
    with serve() as client, client.websocket_connect("/stream?late=drop") as socket:
        engine.free.clear()
        socket.send_bytes(frame(180))
        assert engine.entered.wait(20)
        for red in range(181, 200):
            socket.send_bytes(frame(red))
        socket.send_text("last")  # an error, but only once it is its turn
        engine.free.set()
        answers = [socket.receive_json()]
        while answers[-1]["frame"] != 20:
            answers.append(socket.receive_json())
    numbers = [each["frame"] for each in answers]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert sum(each["dropped"] for each in answers) == 21 - len(answers)
    for before, each in zip([-1, *numbers], answers, strict=False):
        assert each["dropped"] == each["frame"] - before - 1
        assert "error" in each if each["frame"] == 20 else best(each) == 180 + each["frame"]


def test_dropping_keeps_the_newest(serve: Any, engine: ToyEngine) -> None:
    with serve() as client, client.websocket_connect("/stream?late=drop") as socket:
        engine.free.clear()
        for red in range(180, 184):
            socket.send_bytes(frame(red))
        wait_until(lambda: service_of(client).admission.num_held == DROP_IN_FLIGHT)
        for red in range(184, 190):
            socket.send_bytes(frame(red))
        # Received by the stream, as nothing waits for the socket in this mode.
        wait_until(lambda: _received(client) == 10)
        engine.free.set()
        answers = [socket.receive_json() for _ in range(DROP_IN_FLIGHT + 1)]
    assert [each["frame"] for each in answers] == [0, 1, 9]
    assert [each["dropped"] for each in answers] == [0, 0, 7]


def _received(client: Any) -> int:
    (stream,) = client.app.state.streams.open
    return stream.num_received


def test_an_error_of_one_frame_is_its_answer(serve: Any, engine: ToyEngine) -> None:
    with serve(max_body_bytes=30_000) as client, client.websocket_connect("/stream") as socket:
        socket.send_bytes(frame(250))
        socket.send_bytes(b"nonsense")
        socket.send_text("hello")
        socket.send_bytes(b"")
        socket.send_bytes(b"x" * 30_001)
        socket.send_bytes(frame(240))
        answers = [socket.receive_json() for _ in range(6)]
        engine.fail = True
        socket.send_bytes(frame(230))
        failed = socket.receive_json()
        engine.fail = False
        last: dict[str, Any] = {"error": None}
        end_s = time.monotonic() + 60
        while "error" in last and time.monotonic() < end_s:  # the engine may be rebuilt before
            socket.send_bytes(frame(220))
            last = socket.receive_json()
    kinds = [each.get("error", {}).get("type", "").rpartition(":")[2] for each in answers]
    assert kinds == ["", "not-an-image", "malformed-request", "empty-body", "body-too-large", ""]
    assert [each["frame"] for each in answers] == list(range(6))
    assert answers[1]["error"].keys() == {"type", "title", "status", "detail", "instance", "request_id"}
    assert failed["error"]["type"].endswith(":engine-failed")
    assert "secret" not in json.dumps(failed)
    assert best(last) == 220


def test_frames_are_admitted_like_requests(serve: Any, engine: ToyEngine) -> None:
    with serve(max_requests=1) as client, client.websocket_connect("/stream") as socket:
        engine.free.clear()
        asking = threading.Thread(target=client.post, args=("/detect",), kwargs={"content": frame(250)})
        asking.start()
        assert engine.entered.wait(20)
        socket.send_bytes(frame(240))
        refused = socket.receive_json()
        engine.free.set()
        asking.join()
        assert refused["error"]["status"] == 429
        wait_until(lambda: service_of(client).admission.num_held == 0)
        socket.send_bytes(frame(230))
        assert best(socket.receive_json()) == 230
        with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect("/stream"):
            raise AssertionError("connected")
        assert caught.value.status_code == 429


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("late=never", "late = never"),
        ("late=wait&late=drop", "give one of"),
        ("format=jpeg", "no format"),
        ("url=http://a/b", "no url"),
        ("confidense=1", "unknown option"),
        ("confidence=2", "confidence"),
    ],
)
def test_wrong_options_are_told_and_end_it(client: Any, query: str, told: str) -> None:
    with client.websocket_connect(f"/stream?{query}") as socket:
        problem = socket.receive_json()["error"]
        assert problem["status"] == 422
        assert told in problem["detail"]
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_json()
        assert caught.value.code == 1008


def test_an_unknown_model_is_the_answer_to_each_frame(client: Any) -> None:
    with client.websocket_connect("/stream?model=other") as socket:
        for number in range(2):
            socket.send_bytes(frame(250))
            answer = socket.receive_json()
            assert (answer["frame"], answer["error"]["status"]) == (number, 404)


def test_a_client_that_leaves_gives_everything_back(serve: Any, engine: ToyEngine) -> None:
    with serve() as client:
        with client.websocket_connect("/stream") as socket:
            engine.free.clear()
            for red in range(200, 206):
                socket.send_bytes(frame(red))
            wait_until(lambda: service_of(client).admission.num_held == 4)
        wait_until(lambda: service_of(client).admission.num_held == 0)
        assert len(client.app.state.streams) == 0
        engine.free.set()
        assert client.post("/detect", content=frame(250)).status_code == 200


def test_draining_answers_what_is_under_way_and_closes(serve: Any, engine: ToyEngine) -> None:
    with serve() as client, client.websocket_connect("/stream") as socket:
        engine.free.clear()
        socket.send_bytes(frame(250))
        assert engine.entered.wait(20)
        service_of(client).admission.close()
        draining = client.portal.start_task_soon(client.app.state.streams.drain, 30)
        engine.free.set()
        assert best(socket.receive_json()) == 250
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_json()
        assert (caught.value.code, caught.value.reason) == (1012, "the service is shutting down")
        draining.result(30)
        with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/stream"):
            raise AssertionError("connected")
        assert refused.value.status_code == 503


def offered(key: str) -> list[str]:
    return ["limner", "limner.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")]


def test_keys_in_headers_or_as_a_subprotocol(serve: Any) -> None:
    with serve(api_keys=(SecretStr(KEY),)) as client:
        for way in (
            {"headers": {"authorization": f"Bearer {KEY}"}},
            {"headers": {"x-api-key": KEY}},
            {"subprotocols": offered(KEY)},
        ):
            with client.websocket_connect("/stream", **way) as socket:
                assert socket.accepted_subprotocol == ("limner" if "subprotocols" in way else None)
                socket.send_bytes(frame(250))
                assert best(socket.receive_json()) == 250
        for way in (
            {},
            {"headers": {"x-api-key": KEY + "x"}},
            {"subprotocols": offered(KEY[:-1])},
            {"subprotocols": ["limner", "limner.key.***"]},
            {"subprotocols": ["limner"]},
        ):
            with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect("/stream", **way):
                raise AssertionError("connected")
            assert caught.value.status_code == 401
            assert KEY not in caught.value.text
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            client.websocket_connect(f"/stream?api_key={KEY}"),
        ):
            raise AssertionError("connected")
        assert caught.value.status_code == 401  # addresses end up in logs: no key is taken there


@pytest.mark.parametrize(
    ("origins", "origin", "may"),
    [
        ((), "http://testserver", True),
        ((), "https://app.example.org", False),
        ((), "null", False),
        (("https://app.example.org",), "https://app.example.org", True),
        (("https://app.example.org",), "https://other.example.org", False),
        (("*",), "https://other.example.org", True),
    ],
)
def test_pages_of_other_origins_are_refused(serve: Any, origins: tuple[str, ...], origin: str, may: bool) -> None:
    with serve(cors_origins=origins) as client:
        if may:
            with client.websocket_connect("/stream", headers={"origin": origin}):
                return
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            client.websocket_connect("/stream", headers={"origin": origin}),
        ):
            raise AssertionError("connected")
        assert caught.value.status_code == 403
        assert "LIMNER_CORS_ORIGINS" in caught.value.json()["detail"]


def test_frames_are_counted(client: Any) -> None:
    with client.websocket_connect("/stream") as socket:
        for data in (frame(250), frame(250), b"nonsense"):
            socket.send_bytes(data)
            socket.receive_json()
    counted = re.findall(r'_count\{code="(\d+)",route="/stream"\} ([\d.]+)', client.get("/metrics").text)
    swapped = re.findall(r'_count\{route="/stream",code="(\d+)"\} ([\d.]+)', client.get("/metrics").text)
    assert dict(counted or swapped) == {"200": "2.0", "415": "1.0"}


def test_over_a_socket_and_a_signal(bundles: Path) -> None:
    sync = pytest.importorskip("websockets.sync.client", reason="websockets is not installed: pip install -e .")
    from websockets.exceptions import ConnectionClosed

    command = [sys.executable, "limner.py", "serve", "--port", "0", "--engine", "onnx", "--threads", "1"]
    command += ["--bundles", str(bundles), "--max-body-bytes", "40000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = re.search(r"127\.0\.0\.1:\d+", process.stderr.readline())
        assert found
        with sync.connect(f"ws://{found[0]}/stream?late=wait", open_timeout=60) as socket:
            answer: dict[str, Any] = {"error": None}
            while "error" in answer:  # it still loads
                socket.send(frame(250))
                answer = json.loads(socket.recv(60))
            assert best(answer) == 250
            socket.send(b"x" * 40_001)
            assert json.loads(socket.recv(60))["error"]["status"] == 413
            socket.send(b"x" * 80_001)
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(60)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
        with sync.connect(f"ws://{found[0]}/stream", open_timeout=60) as socket:
            socket.send(frame(240))
            assert best(json.loads(socket.recv(60))) == 240
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(60)
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1012, "the service is shutting down")
        process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
