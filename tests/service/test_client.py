"""The client: against the toy service in this process and as a process, and against servers that misbehave."""

import asyncio
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydantic import SecretStr

from service.app import create_app
from service.engines import Opened
from service.settings import Settings
from tests.service.test_http_doc import assert_same, scene
from tests.service.toy import encoded, picture, wait_until

httpx = pytest.importorskip("httpx", reason='httpx is not installed: pip install -e ".[client]"')

from service import client as limner  # noqa: E402

ROOT = Path(__file__).parents[2]
KEY = "a-key-0123456789abcdef"


class Through(httpx.BaseTransport):
    """Into the application of a TestClient."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def handle_request(self, request: Any) -> Any:
        answer = self._client.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


@pytest.fixture
def ours(client: Any) -> Iterator[limner.Client]:
    with limner.Client("http://testserver", transport=Through(client)) as made:
        yield made


def scripted(*outcomes: Any) -> tuple[Any, list[Any]]:
    """A transport that gives or raises these one after another, and the requests that it was sent."""
    waiting, seen = list(outcomes), []

    def handle(request: Any) -> Any:
        seen.append(request)
        outcome = waiting.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return httpx.MockTransport(handle), seen


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, which take no time here."""
    pauses: list[float] = []

    async def wait(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(limner.time, "sleep", pauses.append)
    monkeypatch.setattr(limner.anyio, "sleep", wait)
    return pauses


GOOD = {
    "model": {"name": "toy", "version": "1"},
    "image": {"width": 4, "height": 3},
    "detections": [],
    "timings_ms": {"decode": 1.0},
}


def refusal(status: int, code: str = "overloaded", **headers: str) -> Any:
    told = {"type": f"urn:limner:problem:{code}", "title": "No", "status": status, "detail": "because", "instance": "/"}
    kind = {"content-type": "application/problem+json"}
    return httpx.Response(status, json={**told, "request_id": "r1"}, headers={**kind, **headers})


def test_results_are_typed(ours: limner.Client, client: Any) -> None:
    image = picture()
    answer = ours.detect(image, confidence=0.5)
    told = client.post("/detect", content=encoded(image)).json()
    assert (answer.model, answer.version, answer.width, answer.height) == ("toy", "1", 96, 64)
    assert [each.label for each in answer.detections] == [row["label"] for row in told["detections"]] != []
    for found, row in zip(answer.detections, told["detections"], strict=True):
        assert (found.class_id, found.score, list(found.box)) == (row["class_id"], row["score"], row["box"])
        assert found.keypoints is not None
        np.testing.assert_allclose(found.keypoints, row["keypoints"], rtol=1e-6)
        assert found.mask is not None
        assert found.mask.pixels().shape == (64, 96)
        assert found.mask.pixels().dtype == np.bool_
    assert answer.timings_ms["detect"] > 0


def test_every_way_to_give_a_picture_sends_the_same_pixels(ours: limner.Client, tmp_path: Path) -> None:
    image = picture(seed=3)
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(image))
    ways = [image, image[::-1][::-1], encoded(image), bytearray(encoded(image)), file, str(file),
            PIL.Image.fromarray(image)]  # fmt: skip
    answers = [ours.detect(way).detections for way in ways]
    masks = [[each.mask.answered for each in found if each.mask] for found in answers]
    assert all(each == masks[0] for each in masks)
    grey = ours.detect(image[:, :, 0]).detections
    assert len(grey) == len(answers[0])


def test_pixels_become_a_lossless_file() -> None:
    for image in (picture(37, 23), picture(37, 23)[:, :, 1]):
        assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(limner.encoded(image)))), image)


@pytest.mark.parametrize(
    ("given", "kind"),
    [(np.zeros((4, 4, 3)), ValueError), (np.zeros((4, 4, 4), np.uint8), ValueError), (7, TypeError),
     (np.zeros((0, 4, 3), np.uint8), ValueError), ("/no/such/file.jpg", FileNotFoundError)],
)  # fmt: skip
def test_what_is_no_picture_is_refused_before_it_is_sent(ours: limner.Client, given: Any, kind: type) -> None:
    with pytest.raises(kind):
        ours.detect(given)


@pytest.mark.parametrize("format", [*limner.DECODERS, "probability"])
def test_masks_decode_to_the_service_s_own_pixels(format: str) -> None:
    rows, expected = scene(format)
    for row, pixels in zip(rows, expected, strict=True):
        assert_same(format, limner.Mask(row, pixels.shape).pixels(), pixels != 0)


def test_all_mask_formats_and_no_heads(ours: limner.Client) -> None:
    image = picture()
    drawn = {}
    for format in (*limner.DECODERS, "probability"):
        mask = ours.detect(image, masks=format).detections[0].mask
        assert mask is not None
        assert mask.format == format
        drawn[format] = mask.pixels()
    assert drawn["rle"].any()
    assert not drawn["rle"].all()
    for format in limner.DECODERS:
        assert np.array_equal(drawn[format], drawn["rle"])
    bare = ours.detect(image, masks="none", keypoints=False).detections[0]
    assert bare.mask is None
    assert bare.keypoints is None


def test_several_pictures_with_one_that_fails(ours: limner.Client) -> None:
    first, broken, last = ours.detect_several([picture(), b"nonsense", picture(red=100)], confidence=0.3)
    assert isinstance(first, limner.Answer)
    assert isinstance(broken, limner.Problem)
    assert isinstance(last, limner.Answer)
    assert (broken.code, broken.status) == ("not-an-image", 415)
    assert first.detections[0].score > last.detections[0].score
    (alone,) = ours.detect_several([picture()])
    assert isinstance(alone, limner.Answer)
    with pytest.raises(ValueError, match="no picture"):
        ours.detect_several([])


def test_drawn(ours: limner.Client) -> None:
    with PIL.Image.open(io.BytesIO(ours.draw(picture(), "png"))) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (96, 64))


def test_errors_carry_the_service_s_words(ours: limner.Client) -> None:
    with pytest.raises(limner.Problem, match="known are") as caught:
        ours.detect(picture(), confidense=0.5)
    assert (caught.value.status, caught.value.code) == (422, "invalid-option")
    assert caught.value.title == "An option is unknown or out of range"
    assert caught.value.request_id
    with pytest.raises(limner.Problem, match="no model"):
        ours.detect(picture(), model="other")
    with pytest.raises(ValueError, match="box_format"):
        ours.detect(picture(), box_format="xywh")


def test_keys_are_sent(serve: Callable[..., Any]) -> None:
    with serve(api_keys=(SecretStr(KEY),)) as client:
        with (
            limner.Client("http://testserver", transport=Through(client)) as without,
            pytest.raises(limner.Problem, match="API key"),
        ):
            without.detect(picture())
        with limner.Client("http://testserver", transport=Through(client), api_key=KEY) as having:
            assert having.detect(picture()).detections


def test_the_service_s_time_is_honoured(slept: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=9), usegmt=True)
    transport, seen = scripted(
        refusal(429, **{"retry-after": "3"}), refusal(503, **{"retry-after": soon}), httpx.Response(200, json=GOOD)
    )
    answer = limner.Client(transport=transport).detect(b"picture", priority="high", keypoints=False)
    assert answer.width == 4
    assert slept[0] == 3
    assert 4 < slept[1] <= 9
    assert len(seen) == 3
    assert all(each.read() == b"picture" for each in seen)
    assert dict(seen[2].url.params) == {"priority": "high", "keypoints": "false", "format": "json"}


def test_retries_are_bounded_in_number_and_in_time(slept: list[float]) -> None:
    transport, seen = scripted(*(refusal(429, **{"retry-after": "1"}) for _ in range(9)))
    with pytest.raises(limner.Problem, match="because"):
        limner.Client(transport=transport, max_retries=2).detect(b"x")
    assert (len(seen), slept) == (3, [1, 1])
    transport, seen = scripted(*(refusal(503, **{"retry-after": "20"}) for _ in range(9)))
    with pytest.raises(limner.Problem):
        limner.Client(transport=transport, max_wait_s=50).detect(b"x")
    assert (len(seen), slept[2:]) == (3, [20, 20])


@pytest.mark.parametrize("status", [400, 422, 500, 503, 504])
def test_what_will_not_change_is_not_tried_again(slept: list[float], status: int) -> None:
    transport, seen = scripted(refusal(status, "bundle-unusable"))
    with pytest.raises(limner.Problem) as caught:
        limner.Client(transport=transport).detect(b"x")
    assert (caught.value.status, caught.value.code, caught.value.detail) == (status, "bundle-unusable", "because")
    assert (len(seen), slept) == (1, [])


def test_lost_connections_are_tried_again_and_late_answers_are_not(slept: list[float]) -> None:
    lost = [httpx.ConnectError("refused"), httpx.RemoteProtocolError("closed"), httpx.ReadError("reset")]
    transport, seen = scripted(*lost, httpx.Response(200, json=GOOD))
    assert limner.Client(transport=transport).detect(b"x").height == 3
    assert len(seen) == 4
    assert slept == sorted(slept)
    transport, seen = scripted(httpx.ReadTimeout("timed out"))
    with pytest.raises(limner.Unreachable, match="timed out"):
        limner.Client(transport=transport).detect(b"x")
    assert len(seen) == 1


def test_another_program_s_error_is_a_problem_too(slept: list[float]) -> None:
    page = httpx.Response(502, html="<h1>Bad gateway</h1>")
    transport, _ = scripted(httpx.Response(503, text="busy"), page)
    with pytest.raises(limner.Problem, match="Bad gateway") as caught:
        limner.Client(transport=transport).detect(b"x")
    assert (caught.value.status, caught.value.code) == (502, "")
    assert len(slept) == 1  # a proxy's 503 names no time


def test_the_async_client_is_the_same(bundles: Path, engine: Any) -> None:
    async def ask() -> list[Any]:
        app = create_app(Settings(bundles=bundles), opener=lambda bundle: Opened(engine, "a test"))
        async with app.router.lifespan_context(app):
            await asyncio.to_thread(wait_until, lambda: not app.state.service.store.is_loading)
            transport = httpx.ASGITransport(app)
            async with limner.AsyncClient("http://testserver", transport=transport) as client:
                many = await asyncio.gather(*(client.detect(picture(red=250 - index)) for index in range(4)))
                several = await client.detect_several([picture(), b"nonsense"])
                drawn = await client.draw(picture())
                with pytest.raises(limner.Problem, match="known are"):
                    await client.detect(picture(), confidense=1)
        return [many, several, drawn]

    many, several, drawn = asyncio.run(ask())
    assert [each.detections[0].score for each in many] == [round((250 - index) / 255, 4) for index in range(4)]
    assert several[0].detections
    assert several[1].code == "not-an-image"
    assert drawn.startswith(b"\xff\xd8")


def test_the_async_client_tries_again(slept: list[float]) -> None:
    async def ask() -> limner.Answer:
        transport, _ = scripted(
            httpx.ConnectError("refused"), refusal(429, **{"retry-after": "2"}), httpx.Response(200, json=GOOD)
        )
        async with limner.AsyncClient(transport=transport) as client:
            return await client.detect(b"x")

    assert asyncio.run(ask()).width == 4
    assert slept[1] == 2


def test_against_a_server_over_a_socket(bundles: Path) -> None:
    command = [sys.executable, "limner.py", "serve", "--port", "0", "--engine", "onnx", "--threads", "1"]
    process = subprocess.Popen([*command, "--bundles", str(bundles)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert found
        # It still loads: the client waits for it by what the 503s say.
        with limner.Client(found[0], max_retries=60, max_wait_s=120) as client:
            answer = client.detect(picture())
            assert len(answer.detections) == 3
            assert len(client.detect_several([picture()] * 3)) == 3
    finally:
        process.kill()
        process.wait()
    with (
        limner.Client(found[0], max_retries=1) as client,
        pytest.raises(limner.Unreachable, match="no answer from"),
    ):
        client.detect(picture())


def test_the_file_can_be_copied(tmp_path: Path) -> None:
    shutil.copy(ROOT / "service" / "client.py", tmp_path / "limner_client.py")
    code = "import limner_client, sys; assert 'service' not in sys.modules; limner_client.Client().close()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
