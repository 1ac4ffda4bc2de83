"""The application under concurrent load, on the toy engine whose device can be held."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.detector import Detector
from service.engines import Opened
from service.settings import Settings
from tests.service.toy import ToyEngine, encoded, picture, wait_until, write_bundle

BODY = encoded(picture())


def ask(client, red=250, **kwargs):
    return client.post("/detect", content=encoded(picture(red=red, seed=red)), **kwargs)


def occupy(client, engine, pool):
    """One request is on the device when this returns."""
    engine.entered.clear()
    engine.free.clear()
    first = pool.submit(ask, client)
    assert engine.entered.wait(10)
    return first


def depth(client) -> float:
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith("limner_queue_depth{"))
    return float(line.rsplit(" ", 1)[1])


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as threads:
        yield threads


def test_requests_that_wait_go_together_and_equal_single(serve, engine, pool):
    with serve() as client:
        reds = [255, 240, 225, 210, 0]
        alone = {red: ask(client, red).json()["detections"] for red in reds}
        engine.batches.clear()
        first = occupy(client, engine, pool)
        rest = {red: pool.submit(ask, client, red) for red in reds}
        wait_until(lambda: depth(client) == 5)
        engine.free.set()
        assert first.result(10).status_code == 200
        together = {red: future.result(10).json()["detections"] for red, future in rest.items()}
        assert engine.batches == [1, 5]
        assert together == alone


def test_overload_is_refused_at_the_door(serve, engine, pool):
    with serve(max_requests=1) as client:
        first = occupy(client, engine, pool)
        refused = ask(client)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "LIMNER_MAX_REQUESTS" in refused.json()["detail"]
        engine.free.set()
        assert first.result(10).status_code == 200
        assert ask(client).status_code == 200


def test_who_would_wait_too_long_is_refused_at_the_door(serve, engine, pool):
    with serve(max_wait_ms=1e-6) as client:
        assert ask(client).status_code == 200  # from now on it is known what a picture takes
        first = occupy(client, engine, pool)
        refused = ask(client)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "LIMNER_MAX_WAIT_MS" in refused.json()["detail"]
        engine.free.set()
        assert first.result(10).status_code == 200
        assert ask(client).status_code == 200  # nobody is there


def test_an_engine_failure_is_one_batch_and_tells_nothing(serve, engine):
    with serve() as client:
        engine.fail = True
        failed = ask(client)
        assert failed.status_code == 500
        assert failed.json()["type"].endswith("engine-failed")
        assert "secret" not in failed.text
        engine.fail = False
        wait_until(lambda: ask(client).status_code == 200)  # once its golden outputs are right again


def test_deadline(serve, engine, pool):
    with serve(deadline_seconds=0.05) as client:
        first = occupy(client, engine, pool)
        assert ask(client).status_code == 504  # at once, and not when the engine frees
        engine.free.set()
        assert first.result(10).status_code == 200


def test_not_ready_until_loaded_yet_alive(bundles, engine):
    engine.free.clear()  # holds the golden check
    app = create_app(Settings(bundles=bundles), opener=lambda bundle: Opened(engine, "a test"))
    with TestClient(app) as client:
        assert client.get("/healthz").status_code == 200
        for answer in (client.get("/readyz"), client.post("/detect", content=BODY)):
            assert answer.status_code == 503
            assert answer.json()["type"].endswith("not-ready")
            assert "retry-after" in answer.headers
        engine.free.set()
        wait_until(lambda: client.get("/readyz").status_code == 200)
    assert engine.closed


def test_a_model_that_strays_is_never_ready(tmp_path, engine):
    write_bundle(tmp_path)
    engine.name = "other"
    original = engine.masks
    engine.masks = lambda *given: original(*given) + 0.5
    app = create_app(Settings(bundles=tmp_path), opener=lambda bundle: Opened(engine, "a test"))
    with TestClient(app) as client:
        wait_until(lambda: not app.state.service.store.is_loading)
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "mask differs by 0.5" in answer.json()["detail"]
        assert "mask differs" in client.get("/models").json()["models"][0]["reason"]


def test_shutdown_finishes_what_is_under_way_and_admits_nobody(serve, engine, pool):
    with serve() as client:
        first = occupy(client, engine, pool)
        client.app.state.service.admission.close()
        assert client.get("/readyz").status_code == 503
        refused = ask(client)
        assert refused.status_code == 503
        assert refused.json()["type"].endswith("draining")
        engine.free.set()
        assert first.result(10).status_code == 200
    assert engine.closed


async def call(app, body: bytes, leave: asyncio.Event, more: bool = False, kind: str = ""):
    """POST /detect by hand, as a server would, with a client that leaves when told, or that never sends the rest."""
    sent: list[dict] = []
    pending = [{"type": "http.request", "body": body, "more_body": more}]

    async def receive():
        if pending:
            return pending.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/detect",
        "raw_path": b"/detect",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", kind.encode())] if kind else [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "state": {},
    }
    await app(scope, receive, send)
    return sent[0]["status"]


def test_a_client_that_leaves_frees_its_place(bundles, engine):
    app = create_app(Settings(bundles=bundles), opener=lambda bundle: Opened(engine, "a test"))

    async def scenario() -> None:
        async with app.router.lifespan_context(app):
            service = app.state.service
            while service.store.is_loading:
                await asyncio.sleep(0.01)
            engine.batches.clear()
            engine.entered.clear()
            engine.free.clear()
            leave = asyncio.Event()
            first = asyncio.create_task(call(app, BODY, asyncio.Event()))
            assert await asyncio.to_thread(engine.entered.wait, 10)
            gone = asyncio.create_task(call(app, BODY, leave))
            stays = asyncio.create_task(call(app, BODY, asyncio.Event()))
            toy, counted = {"model": "toy", "version": "1"}, service.metrics.registry
            while counted.get_sample_value("limner_queue_depth", toy) != 2:
                await asyncio.sleep(0.01)
            leave.set()
            assert await gone == 499
            assert service.admission.num_held == 2
            engine.free.set()
            assert [await first, await stays] == [200, 200]
            assert engine.batches == [1, 1]

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_client_that_leaves_frees_the_places_of_all_its_pictures(bundles, engine):
    app = create_app(Settings(bundles=bundles), opener=lambda bundle: Opened(engine, "a test"))
    part = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + BODY + b"\r\n"
    form, kind = part * 3 + b"--x--\r\n", "multipart/form-data; boundary=x"

    async def scenario() -> None:
        async with app.router.lifespan_context(app):
            service = app.state.service
            while service.store.is_loading:
                await asyncio.sleep(0.01)
            engine.batches.clear()
            engine.entered.clear()
            engine.free.clear()
            leave = asyncio.Event()
            first = asyncio.create_task(call(app, BODY, asyncio.Event()))
            assert await asyncio.to_thread(engine.entered.wait, 10)
            gone = asyncio.create_task(call(app, form, leave, kind=kind))
            while (
                service.metrics.registry.get_sample_value("limner_queue_depth", {"model": "toy", "version": "1"}) != 3
            ):
                await asyncio.sleep(0.01)
            assert service.admission.num_held == 4
            leave.set()
            assert await gone == 499
            assert service.admission.num_held == 1
            engine.free.set()
            assert [await first, await call(app, form, asyncio.Event(), kind=kind)] == [200, 200]
            assert sum(engine.batches) == 4
            assert service.admission.num_held == 0

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_body_that_never_ends(bundles, engine):
    app = create_app(Settings(bundles=bundles, body_seconds=0.05), opener=lambda bundle: Opened(engine, "a test"))

    async def scenario() -> None:
        async with app.router.lifespan_context(app):
            never, at_once = asyncio.Event(), asyncio.Event()
            at_once.set()
            assert await call(app, BODY[:50], never, more=True) == 408
            assert await call(app, BODY[:50], at_once, more=True) == 499
            assert app.state.service.admission.num_held == 0

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_request_brings_its_own_deadline(client, engine):
    engine.free.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client)
        assert engine.entered.wait(5)
        answer = ask(client, params={"timeout_ms": 1})
        engine.free.set()
        assert first.result().status_code == 200
    assert answer.status_code == 504
    assert "timeout_ms" in answer.json()["detail"]
    assert ask(client, params={"timeout_ms": 0}).status_code == 422


def test_a_partial_answer_says_what_is_missing(client):
    whole = ask(client, params={"allow_partial": "true"}).json()
    assert "partial" not in whole
    detector = client.app.state.service.store.ready(None).detector
    detector._roi_ms["keypoints"] = 1e9
    part = ask(client, params={"allow_partial": "true", "priority": "high"}).json()
    assert part["partial"] == ["keypoints"]
    assert all("keypoints" not in row and "mask" in row for row in part["detections"])
    assert "partial" not in ask(client).json()


def test_an_engine_that_breaks_is_rebuilt_and_readiness_tells(bundles):
    broken, spare = ToyEngine(), ToyEngine()
    engines = [broken, spare]
    opening = threading.Event()
    opening.set()

    def opener(bundle):
        assert opening.wait(10)
        return Opened(engines.pop(0), "a test")

    app = create_app(Settings(bundles=bundles), opener=opener)
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        broken.fail = True
        opening.clear()
        assert ask(client).status_code == 500
        wait_until(lambda: client.get("/readyz").status_code == 503)
        assert ask(client).status_code == 503
        assert "rebuilt" in client.get("/readyz").json()["detail"]
        assert "\nlimner_ready 0.0\n" in client.get("/metrics").text
        opening.set()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        counted = client.get("/metrics").text
        assert "\nlimner_ready 1.0\n" in counted
        rebuilds = [line for line in counted.splitlines() if line.startswith("limner_engine_rebuilds_total{")]
        assert [line.rsplit(" ", 1)[1] for line in rebuilds] == ["1.0"]
        assert ask(client).status_code == 200
        assert spare.batches


def as_form(content: bytes) -> dict:
    return {"files": {"image": ("a.jpg", content, "image/jpeg")}}


@pytest.mark.parametrize("kind", ["sound", "not its end", "not its header", "too large"])
def test_a_lone_jpeg_whose_header_is_read_on_the_loop_is_answered_as_one_of_a_form(serve, monkeypatch, kind):
    monkeypatch.setattr(Detector, "decodes_beside", True)
    jpeg = encoded(picture(64, 96), "JPEG")
    body = {"sound": jpeg, "not its end": jpeg[:-200], "not its header": jpeg[:100], "too large": jpeg}[kind]
    with serve(**{"max_side": 80} if kind == "too large" else {}) as client:
        bare, form = client.post("/detect", content=body), client.post("/detect", **as_form(body))
        assert bare.status_code == form.status_code == (200 if kind == "sound" else 413 if kind == "too large" else 422)
        told = [{**answer.json(), "request_id": None, "timings_ms": None} for answer in (bare, form)]
        assert told[0] == told[1]
        if kind == "sound":
            assert told[0]["detections"]
            assert client.post("/detect", content=encoded(picture(64, 96))).json()["detections"]  # a PNG: in the pool
