"""Versions that come and go while the application answers, on toy engines that tell their version."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.bundle import Bundle, file_sha256
from service.engines import Detected, Opened, open_engine
from service.settings import Settings, SettingsError, load_settings
from tests.service.toy import ToyEngine, encoded, picture, wait_until, write_bundle

KEY = {"authorization": "Bearer secret"}
MARK = 77  # the red that no golden picture has: a picture with it is answered with the version as its score
BODY = encoded(picture(red=MARK))
PERSON = Path(__file__).parents[2] / "bundles" / "person" / "1"


class Told(ToyEngine):
    """Tells its version, and refuses to work once it is closed."""

    def __init__(self, version: str) -> None:
        super().__init__()
        self.version = version

    def detect(self, images: np.ndarray, sizes: np.ndarray) -> Detected:
        detected = super().detect(images, sizes)
        assert not self.closed, "an engine was asked after it was closed"
        marked = images[:, 0, 0, 0] == MARK
        detected.scores[marked, 0] = 0.5 + int(self.version) / 100
        return detected


class Engines:
    """Every engine that was opened, by name@version, in order."""

    def __init__(self) -> None:
        self.opened: dict[str, list[Told]] = {}
        self.hold: dict[str, threading.Event] = {}

    def __call__(self, bundle: Bundle) -> Opened:
        spec = f"{bundle.name}@{bundle.version}"
        engine = Told(bundle.version)
        self.opened.setdefault(spec, []).append(engine)
        if spec in self.hold:
            assert self.hold[spec].wait(10)
        return Opened(engine, "a test")

    def last(self, spec: str) -> Told:
        return self.opened[spec][-1]


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture
def serving(tmp_path: Path, engines: Engines) -> Callable[..., Any]:
    """`with serving(max_models=1) as client`: the application on the bundles that are under tmp_path, ready."""

    @contextmanager
    def _serving(**settings: Any) -> Iterator[TestClient]:
        app = create_app(Settings(**{"bundles": tmp_path, "admin_key": "secret", **settings}), engines)
        with TestClient(app, raise_server_exceptions=False) as client:
            wait_until(lambda: not app.state.service.store.is_loading)
            yield client

    return _serving


def ask(client: TestClient, model: str | None = None, body: bytes = BODY) -> Any:
    return client.post("/detect", content=body, params={"model": model} if model else {})


def said(client: TestClient, model: str | None = None) -> str:
    """name@version as the answer names it, having seen that its engine is the one that answered."""
    answer = ask(client, model)
    assert answer.status_code == 200, answer.text
    return consistent(answer.json())


def consistent(document: dict[str, Any]) -> str:
    name, version = document["model"]["name"], document["model"]["version"]
    assert document["detections"][0]["score"] == pytest.approx(0.5 + int(version) / 100)
    return f"{name}@{version}"


def states(client: TestClient, name: str = "toy") -> dict[str, str]:
    return {each["version"]: each["state"] for each in client.get(f"/models/{name}").json()["versions"]}


def load(client: TestClient, name: str = "toy", **params: str) -> Any:
    return client.post(f"/models/{name}/load", params=params, headers=KEY)


def unload(client: TestClient, name: str = "toy", **params: str) -> Any:
    return client.post(f"/models/{name}/unload", params=params, headers=KEY)


def occupy(client: TestClient, engine: Told, pool: ThreadPoolExecutor, model: str | None = None) -> Any:
    """One request is on this engine when this returns."""
    engine.entered.clear()
    engine.free.clear()
    first = pool.submit(ask, client, model)
    assert engine.entered.wait(10)
    return first


def test_versions_swap_under_load_and_no_request_fails(tmp_path, serving, engines):
    write_bundle(tmp_path)
    stop = threading.Event()
    seen: dict[str, int] = {}

    def hammer(client: TestClient) -> list[Any]:
        answers = []
        while not stop.is_set():
            answer = ask(client)
            answers.append(
                (answer.status_code, consistent(answer.json()) if answer.status_code == 200 else answer.text)
            )
            seen[answers[-1][1]] = seen.get(answers[-1][1], 0) + 1
        return answers

    with serving() as client, ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(hammer, client) for _ in range(8)]
        try:
            for version in ("2", "3", "10"):
                write_bundle(tmp_path, version=version)
                loaded = load(client)
                assert loaded.status_code == 200, loaded.text
                assert loaded.json()["version"] == version
                wait_until(lambda spec=f"toy@{version}": seen.get(spec, 0) > 10)
        finally:
            stop.set()
        answers = [answer for worker in workers for answer in worker.result(20)]
        assert {status for status, _ in answers} == {200}, answers
        assert {spec for _, spec in answers} == {"toy@1", "toy@2", "toy@3", "toy@10"}
        wait_until(lambda: all(engines.last(f"toy@{old}").closed for old in (1, 2, 3)))
        assert not engines.last("toy@10").closed
        assert states(client) == {"10": "ready", "3": "unloaded", "2": "unloaded", "1": "unloaded"}
        wait_until(lambda: len(client.app.state.service._batchers) == 1)
    assert engines.last("toy@10").closed


def test_what_is_under_way_finishes_on_the_old_engine_which_is_closed_after_it(tmp_path, serving, engines, pool):
    write_bundle(tmp_path)
    with serving() as client:
        old = engines.last("toy@1")
        first = occupy(client, old, pool)
        write_bundle(tmp_path, version="2")
        assert load(client).status_code == 200
        assert states(client) == {"2": "ready", "1": "unloaded"}
        assert not old.closed
        old.free.set()
        assert consistent(first.result(10).json()) == "toy@1"
        wait_until(lambda: old.closed)
        assert said(client) == "toy@2"


def test_a_new_version_is_warmed_before_it_is_asked(tmp_path, serving, engines):
    write_bundle(tmp_path)
    with serving(max_batch=4) as client:
        # The golden batch; then landscape, portrait and square alone; then those in full batches.
        assert engines.last("toy@1").batches == [2, 1, 1, 1, 4, 4, 4]
        assert said(client) == "toy@1"
    with serving(warm_seconds=0):
        assert engines.last("toy@1").batches == [2]


def alter(directory: Path) -> None:
    (directory / "detect.onnx").write_bytes(b"altered")


def lose(directory: Path) -> None:
    (directory / "masks.onnx").unlink()


def spoil_manifest(directory: Path) -> None:
    (directory / "manifest.json").write_text('{"format": 1, "na', encoding="utf-8")


def spoil_golden(directory: Path) -> None:
    (directory / "golden.npz").write_bytes(b"PK\x03\x04")


def stray(directory: Path) -> None:
    golden = dict(np.load(directory / "golden.npz"))
    golden["scores"] = golden["scores"] * np.float32(0.9)
    np.savez(directory / "golden.npz", **golden)


HARM = {
    alter: "sha256",
    lose: "masks.onnx is missing",
    spoil_manifest: "is not a manifest",
    spoil_golden: "cannot be read",
    stray: "score differs",
}


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_a_broken_version_leaves_the_old_one_serving_and_says_why(tmp_path, serving, engines, harm):
    write_bundle(tmp_path)
    with serving() as client:
        harm(write_bundle(tmp_path, version="2"))
        refused = load(client)
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:limner:problem:bundle-unusable")
        assert HARM[harm] in refused.json()["detail"]
        assert said(client) == "toy@1"
        assert client.get("/readyz").status_code == 200
        listed = client.get("/models").json()["models"]
        assert [(model["name"], model["version"], model["state"]) for model in listed] == [("toy", "1", "ready")]
        newest, oldest = listed[0]["versions"]
        assert (newest["version"], newest["state"], oldest["state"]) == ("2", "failed", "ready")
        assert HARM[harm] in newest["reason"]
        answer = ask(client, "toy@2")
        assert answer.status_code == 503
        assert HARM[harm] in answer.json()["detail"]
    assert all(engine.closed for opened in engines.opened.values() for engine in opened)


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_harm_to_the_files_of_the_running_version_does_not_take_it_down(tmp_path, serving, harm):
    directory = write_bundle(tmp_path)
    with serving(poll_seconds=0.01) as client:
        harm(directory)
        wait_until(lambda: "reason" in client.get("/models/toy").json()["versions"][0])
        shown = client.get("/models/toy").json()
        assert (shown["state"], shown["classes"]) == ("ready", ["cat", "dog"])
        assert HARM[harm] in shown["reason"]
        assert said(client) == "toy@1"
        shutil.rmtree(directory)
        write_bundle(tmp_path)
        # A look between the two steps sees a removal, and the next one loads it again.
        wait_until(lambda: is_well(client.get("/models/toy").json()))
        assert said(client) == "toy@1"


def is_well(shown: dict[str, Any]) -> bool:
    return shown.get("state") == "ready" and "reason" not in shown


def test_a_truncated_graph_of_the_right_hash(tmp_path):
    write_bundle(tmp_path)
    app = create_app(
        Settings(bundles=tmp_path, admin_key="secret"), lambda bundle: open_engine(bundle, "onnx", threads=1)
    )
    with TestClient(app) as client:
        wait_until(lambda: not app.state.service.store.is_loading)
        directory = write_bundle(tmp_path, version="2")
        graph = directory / "detect.onnx"
        whole = file_sha256(graph)
        graph.write_bytes(graph.read_bytes()[:300])
        manifest = directory / "manifest.json"
        text = manifest.read_text(encoding="utf-8").replace(whole, file_sha256(graph))
        manifest.write_text(text, encoding="utf-8")
        refused = load(client)
        assert refused.status_code == 503
        assert "cannot be loaded by onnxruntime" in refused.json()["detail"]
        assert ask(client).json()["model"]["version"] == "1"


def test_one_version_by_its_name(tmp_path, serving):
    for version in ("9", "10"):
        write_bundle(tmp_path, version=version)
    with serving(versions="all") as client:
        assert [said(client, spec) for spec in ("toy", "toy@9", "toy@10")] == ["toy@10", "toy@9", "toy@10"]
        for spec in ("toy@11", "toy@", "other@9"):
            answer = ask(client, spec)
            assert (answer.status_code == 404) == (spec != "toy@"), spec
        assert client.get("/models/toy@9").json()["version"] == "9"
    with serving() as client:
        assert said(client, "toy@10") == "toy@10"
        refused = ask(client, "toy@9")
        assert refused.status_code == 503
        assert "/models/toy/load?version=9" in refused.json()["detail"]
        assert load(client, version="9").status_code == 200
        assert [said(client, spec) for spec in ("toy", "toy@9")] == ["toy@10", "toy@9"]
        assert unload(client, version="10").json()["versions"][0]["state"] == "unloaded"
        assert said(client) == "toy@9"


def test_models_show_what_an_operator_needs(tmp_path, serving):
    write_bundle(tmp_path)
    with serving() as client:
        before = client.get("/models/toy").json()["versions"][0]
        assert list(before) == ["version", "state", "engine", "load_seconds", "last_used"]
        assert (before["engine"], before["last_used"]) == ("toy", None)
        assert before["load_seconds"] >= 0
        said(client)
        assert client.get("/models/toy").json()["last_used"].startswith("20")


def test_the_documented_list_of_models_is_what_the_service_says(tmp_path, serving):
    text = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
    shown = json.loads(next(block for block in text.split("```") if block.startswith('json\n{\n  "default"'))[5:])
    write_bundle(tmp_path, "person")
    (write_bundle(tmp_path, "person", "2") / "golden.npz").unlink()
    with serving() as client:
        said(client)
        true = client.get("/models").json()

    def keys(listed: dict[str, Any]) -> list[list[str]]:
        model = listed["models"][0]
        return [list(listed), list(model), *(list(version) for version in model["versions"])]

    assert keys(true) == keys(shown)
    assert true["models"][0]["versions"][0]["reason"].endswith("golden.npz is missing: export the bundle again")


def test_loading_again_what_is_loaded_does_nothing(tmp_path, serving, engines, pool):
    write_bundle(tmp_path)
    with serving() as client:
        write_bundle(tmp_path, version="2")
        engines.hold["toy@2"] = threading.Event()
        both = [pool.submit(load, client) for _ in range(2)]
        wait_until(lambda: "toy@2" in engines.opened)
        assert said(client) == "toy@1"  # the service answers meanwhile
        assert states(client) == {"2": "loading", "1": "ready"}
        engines.hold["toy@2"].set()
        assert [each.result(10).status_code for each in both] == [200, 200]
        assert load(client).status_code == 200
        assert len(engines.opened["toy@2"]) == 1
        assert said(client) == "toy@2"


@pytest.mark.parametrize("route", ["/models/toy/load", "/models/toy/unload", "/models/nobody/load"])
def test_changing_models_needs_the_key(tmp_path, serving, route):
    write_bundle(tmp_path)
    file = tmp_path / "keys"
    file.write_text("old\nnew\n", encoding="utf-8")
    for off in ({"admin_key": None}, {"admin_key": ""}):
        with serving(**off) as client:
            for headers in (KEY, {}, {"x-api-key": ""}):
                refused = client.post(route, headers=headers)
                assert (refused.status_code, refused.json()["type"]) == (403, "urn:limner:problem:admin-off")
                assert "LIMNER_ADMIN_KEY" in refused.json()["detail"]
    with serving(admin_key=None, admin_key_file=file) as client:
        for headers in ({}, KEY, {"x-api-key": "ol"}, {"x-api-key": "old\nnew"}, {"authorization": "Basic old"}):
            refused = client.post(route, headers=headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="limner"'), headers
        assert states(client) == {"1": "ready"}
        for headers in ({"x-api-key": "old"}, {"authorization": "Bearer new"}):
            assert client.post(route, headers=headers).status_code == (404 if "nobody" in route else 200)


def test_a_key_file_that_cannot_be_read_stops_the_start(tmp_path):
    with pytest.raises(SettingsError, match="LIMNER_ADMIN_KEY_FILE.*one key on each line"):
        load_settings(admin_key_file=tmp_path / "nothing")
    assert "secret" not in repr(load_settings(admin_key="secret"))


def test_unloading_the_default(tmp_path, serving, engines, pool):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    with serving() as client:
        first = occupy(client, engines.last("a@1"), pool)
        assert unload(client, "a").status_code == 200
        assert client.get("/models").json()["default"] == "b"
        assert client.get("/readyz").json()["model"] == "b"
        refused = ask(client, "a")
        assert refused.status_code == 503
        assert "unloaded on request" in refused.json()["detail"]
        assert not engines.last("a@1").closed
        engines.last("a@1").free.set()
        assert first.result(10).status_code == 200
        wait_until(lambda: engines.last("a@1").closed)
        assert said(client) == "b@1"
        assert load(client, "a").status_code == 200
        assert said(client) == "a@1"
    with serving(default_model="b") as client:
        assert unload(client, "b").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert ask(client).status_code == 503
        assert said(client, "a") == "a@1"
        assert unload(client, "nobody").status_code == 404
        assert unload(client, "a", version="7").status_code == 404


def test_polling_follows_the_directory(tmp_path, serving, engines):
    write_bundle(tmp_path, "b")
    with serving(poll_seconds=0.01) as client:
        write_bundle(tmp_path, "a")
        wait_until(lambda: ask(client, "a").status_code == 200)
        assert said(client) == "b@1"  # a name that comes later does not become the default
        write_bundle(tmp_path, "b", "2")
        wait_until(lambda: said(client) == "b@2")
        shutil.rmtree(tmp_path / "b" / "2")
        wait_until(lambda: states(client, "b") == {"1": "ready"})
        assert said(client) == "b@1"
        wait_until(lambda: engines.last("b@2").closed)
        shutil.rmtree(tmp_path / "a")
        wait_until(lambda: ask(client, "a").status_code == 404)
        wait_until(lambda: engines.last("a@1").closed)
        assert unload(client, "b").status_code == 200
        write_bundle(tmp_path, "c")
        wait_until(lambda: ask(client, "c").status_code == 200)
        assert states(client, "b") == {"1": "unloaded"}  # polling does not undo what an operator did


def test_a_request_for_an_unloaded_model_loads_it(tmp_path, serving, engines, pool):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    with serving(max_models=1) as client:
        assert [model["state"] for model in client.get("/models").json()["models"]] == ["ready", "unloaded"]
        engines.hold["b@1"] = threading.Event()
        both = [pool.submit(ask, client, "b") for _ in range(2)]
        wait_until(lambda: "b@1" in engines.opened)
        assert engines.last("a@1").closed  # its memory was free before the other was opened
        assert client.get("/readyz").status_code == 200  # the default comes back when it is asked
        engines.hold["b@1"].set()
        assert [consistent(each.result(10).json()) for each in both] == ["b@1", "b@1"]
        assert len(engines.opened["b@1"]) == 1
        assert said(client) == "a@1"
        assert len(engines.opened["a@1"]) == 2


def test_a_model_in_use_is_not_evicted(tmp_path, serving, engines, pool):
    for name in ("a", "b", "c"):
        write_bundle(tmp_path, name)
    with serving(max_models=2) as client:
        said(client, "a")
        said(client, "b")
        first = occupy(client, engines.last("a@1"), pool)  # asked before b, but in use
        waits = pool.submit(ask, client, "c")
        wait_until(lambda: engines.last("b@1").closed)
        assert not engines.last("a@1").closed
        engines.last("a@1").free.set()
        assert consistent(first.result(10).json()) == "a@1"
        assert consistent(waits.result(10).json()) == "c@1"


def test_who_waits_for_room_is_told_in_time(tmp_path, serving, engines, pool):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    with serving(max_models=1, deadline_seconds=0.2) as client:
        first = occupy(client, engines.last("a@1"), pool)
        refused = ask(client, "b")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        engines.last("a@1").free.set()
        assert consistent(first.result(10).json()) == "a@1"
        assert not engines.last("a@1").closed
        wait_until(lambda: ask(client, "b").status_code == 200)


def test_who_waits_for_a_slow_load_is_told_in_time(tmp_path, serving, engines):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    with serving(max_models=1, deadline_seconds=0.2) as client:
        engines.hold["b@1"] = threading.Event()
        refused = ask(client, "b")
        assert refused.status_code == 503
        assert "LIMNER_DEADLINE_SECONDS" in refused.json()["detail"]
        engines.hold["b@1"].set()
        wait_until(lambda: ask(client, "b").status_code == 200)
        assert len(engines.opened["b@1"]) == 1


def test_models_take_turns_in_one_place_and_nobody_fails(tmp_path, serving, engines):
    names = ("a", "b", "c")
    for name in names:
        write_bundle(tmp_path, name)

    def hammer(client: TestClient, seed: int) -> set[tuple[int, str]]:
        asked = [names[index % 3] for index in range(seed, seed + 12)]
        answers = [(name, ask(client, name)) for name in asked]
        assert all(consistent(answer.json()) == f"{name}@1" for name, answer in answers if answer.status_code == 200)
        return {(answer.status_code, answer.text if answer.status_code != 200 else "") for _, answer in answers}

    with serving(max_models=1, warm_seconds=0) as client, ThreadPoolExecutor(6) as pool:
        outcomes = set().union(*(worker.result(60) for worker in [pool.submit(hammer, client, n) for n in range(6)]))
        assert outcomes == {(200, "")}
        opened = [engine for engines_of in engines.opened.values() for engine in engines_of]
        wait_until(lambda: sum(not engine.closed for engine in opened) == 1)


def test_shutdown_does_not_wait_for_a_load_that_warms(tmp_path, engines):
    write_bundle(tmp_path)
    app = create_app(Settings(bundles=tmp_path, warm_seconds=60), engines)
    engines.hold["toy@1"] = threading.Event()
    with TestClient(app):
        wait_until(lambda: "toy@1" in engines.opened)
        service = app.state.service
        service.store.stop_loading()
        engines.hold["toy@1"].set()
    assert engines.last("toy@1").closed
    assert engines.last("toy@1").batches == [2]


@pytest.mark.skipif(not (PERSON / "detect.onnx").is_file(), reason="the person bundle is not in this checkout")
def test_the_person_model_is_swapped_live(tmp_path, pool):
    shutil.copytree(PERSON, tmp_path / "person" / "1")
    settings = Settings(bundles=tmp_path, admin_key="secret", warm_seconds=1)
    app = create_app(settings, lambda bundle: open_engine(bundle, "onnx", threads=1))
    body = (Path(__file__).parents[1] / "pictures" / "astronaut.jpg").read_bytes()
    with TestClient(app) as client:
        wait_until(lambda: not app.state.service.store.is_loading, seconds=60)
        before = ask(client, body=body).json()
        stop = threading.Event()
        hammer = pool.submit(_hammer, client, body, stop)
        shutil.copytree(PERSON, tmp_path / "person" / ".2")
        manifest = tmp_path / "person" / ".2" / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": "2"}), encoding="utf-8")
        manifest.parent.rename(tmp_path / "person" / "2")
        assert load(client, "person").status_code == 200
        after = ask(client, body=body).json()
        stop.set()
        answers = hammer.result(60)
    assert (before["model"]["version"], after["model"]["version"]) == ("1", "2")
    assert len(before["detections"]) > 0
    assert after["detections"] == before["detections"]
    assert {status for status, _ in answers} == {200}
    assert all(json.loads(text)["detections"] == before["detections"] for _, text in answers)


def _hammer(client: TestClient, body: bytes, stop: threading.Event) -> list[tuple[int, str]]:
    answers = []
    while not stop.is_set():
        answer = ask(client, body=body)
        answers.append((answer.status_code, answer.text))
    return answers
