"""The ingress and the replicas of `service.cluster`: in one process without Ray, and on two nodes with it."""

import asyncio
import http.client
import json
import pickle
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.cluster import DETECTORS, INGRESS, NOT_HERE, Arguments, Ingress, Replica, app
from service.errors import BundleError, EngineFailed, NotReady
from service.settings import Settings, SettingsError
from tests.service.toy import encoded, picture, wait_until, write_bundle

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "tests" / "pictures" / "astronaut.jpg"
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _logs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas set up the logs of their processes, of which this one is none: other tests read what is logged here."""
    monkeypatch.setattr("service.cluster.configure_logs", lambda _log_format: None)


class Dead(Exception):
    """Stands for Ray's errors of replicas that died."""


class Local(Replica):
    """Ended by `Handle.close`, where Ray would call `__del__`."""

    def __del__(self) -> None: ...


class Answering:
    """Ray's promise of an answer."""

    def __init__(self, work: Any, is_taken: bool = True) -> None:
        self._work = asyncio.ensure_future(work)
        self._is_taken = is_taken

    async def _to_object_ref(self) -> None:
        if not self._is_taken:
            await asyncio.sleep(60)

    def __await__(self):
        return self._work.__await__()

    def cancel(self) -> None:
        self._work.cancel()


class Handle:
    """Ray's, of one replica in this process. `before` runs before each picture; it may raise, or give what is answered
    instead. Nobody takes a picture while `is_deserted`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._replicas: list[Replica] = []
        self._is_new = True
        self.before: Callable[[], Any] = lambda: None
        self.is_deserted = False
        self.asked: list[tuple[str, str]] = []
        self.describe = Call(self, "describe")
        self.detect = Call(self, "detect")

    def start_another(self) -> None:
        self._is_new = True

    async def replica(self) -> Replica:
        if self._is_new:
            self._is_new = False
            self._replicas.append(Local.__new__(Local))
            await self._replicas[-1].__init__(self._settings)
        return self._replicas[-1]

    async def close(self) -> None:
        for replica in self._replicas:
            await Replica.__del__(replica)


class Call:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *arguments: Any) -> Answering:
        return Answering(self._answer(arguments), not self._handle.is_deserted)

    async def _answer(self, arguments: tuple[Any, ...]) -> Any:
        replica = await self._handle.replica()
        arguments = pickle.loads(pickle.dumps(arguments))
        if self._name == "detect":
            arguments[2].pixels.flags.writeable = False
            self._handle.asked.append(arguments[:2])
            if (instead := self._handle.before()) is not None:
                return instead
        return pickle.loads(pickle.dumps(await getattr(replica, self._name)(*arguments)))


def settings_of(bundles: Path, **given: Any) -> Settings:
    return Settings(**{"bundles": bundles, "engine": "onnx", "threads": 1, "warm_seconds": 0, **given})


@contextmanager
def clustered(bundles: Path, retries: int = 3, **given: Any) -> Iterator[tuple[TestClient, Handle]]:
    settings = settings_of(bundles, **given)
    handle = Handle(settings)
    made = create_app(settings, make_service=lambda: Ingress(settings, handle, retries, (Dead,)))
    with TestClient(made, raise_server_exceptions=False) as client:
        wait_until(lambda: not made.state.service.store.is_loading, 60)
        yield client, handle
        assert client.portal is not None
        client.portal.call(handle.close)


def without_times(answer: Any) -> Any:
    return {key: value for key, value in answer.json().items() if key != "timings_ms"}


def dying(times: int) -> Callable[[], Any]:
    left = iter(range(times))

    def before() -> None:
        if next(left, None) is not None:
            raise Dead

    return before


@pytest.mark.parametrize("engine", ["onnx", "auto"])
@pytest.mark.parametrize(
    "query", ["", "?masks=polygon&confidence=0.2", "?masks=probability&keypoints=false", "?format=coco"]
)
def test_answers_are_those_of_the_plain_service(bundles: Path, query: str, engine: str):
    body = encoded(picture(seed=3))
    with TestClient(create_app(settings_of(bundles, engine=engine))) as plain:
        wait_until(lambda: plain.get("/readyz").status_code == 200, 60)
        expected, model = plain.post(f"/detect{query}", content=body), plain.get("/models/toy").json()
    with clustered(bundles, engine=engine) as (client, handle):
        answer, told = client.post(f"/detect{query}", content=body), client.get("/models/toy").json()
        assert client.get("/readyz").status_code == 200
    assert handle.asked == [("toy", "1")]
    if query == "?format=coco":
        assert answer.json() == expected.json()
    else:
        assert without_times(answer) == without_times(expected)
        assert set(answer.json()["timings_ms"]) == set(expected.json()["timings_ms"])
    for shown in ("name", "precision", "num_lanes", "max_batch", "golden"):
        assert told["engine"][shown] == model["engine"][shown]
    assert told["engine"]["reason"].endswith("in replicas on Ray")


def test_a_picture_whose_replica_died_is_asked_again(bundles: Path):
    with clustered(bundles) as (client, handle):
        handle.before = dying(2)
        answer = client.post("/detect", content=encoded(picture()))
        assert answer.status_code == 200, answer.text
        assert len(handle.asked) == 3
        assert 'limner_cluster_retries_total{model="toy",version="1"} 2.0' in client.get("/metrics").text


def test_nobody_is_asked_for_ever(bundles: Path):
    with clustered(bundles, retries=2) as (client, handle):
        handle.before = dying(99)
        answer = client.post("/detect", content=encoded(picture()))
        assert answer.status_code == 500
        assert answer.json()["type"] == "urn:limner:problem:engine-failed"
        assert "Dead" in answer.json()["detail"]
        assert len(handle.asked) == 3


def test_a_replica_without_a_working_engine_is_passed_over(bundles: Path):
    with clustered(bundles) as (client, handle):
        instead = iter([NotReady("the engine is being rebuilt"), BundleError("a file is missing on this machine")])
        handle.before = lambda: next(instead, None)
        assert client.post("/detect", content=encoded(picture())).status_code == 200
        assert len(handle.asked) == 3


def test_a_picture_on_which_the_engine_fails_is_not_asked_again(bundles: Path):
    with clustered(bundles) as (client, handle):
        handle.before = lambda: EngineFailed("for a test")
        answer = client.post("/detect", content=encoded(picture()))
        assert (answer.status_code, answer.json()["detail"]) == (500, "for a test")
        assert len(handle.asked) == 1


def test_what_nobody_takes_is_told_at_its_deadline(bundles: Path):
    with clustered(bundles) as (client, handle):
        handle.is_deserted = True
        started_s = time.monotonic()
        answer = client.post("/detect?timeout_ms=50", content=encoded(picture()))
        assert answer.status_code == 504, answer.text
        assert time.monotonic() - started_s < 30


def test_a_version_that_came_after_the_start_does_not_take_over(tmp_path: Path):
    """A replica that starts later finds it, and is asked for the one that was deployed."""
    write_bundle(tmp_path)
    with clustered(tmp_path) as (client, handle):
        write_bundle(tmp_path, version="2")
        handle.start_another()
        answer = client.post("/detect", content=encoded(picture()))
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == {"name": "toy", "version": "1"}


def test_other_bundles_on_another_machine_are_found_out(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    write_bundle(here)
    manifest = write_bundle(there) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"dog"', '"fox"'))
    settings = settings_of(here)
    handle = Handle(settings_of(there))
    with TestClient(create_app(settings, make_service=lambda: Ingress(settings, handle, 0, (Dead,)))) as client:
        wait_until(lambda: client.get("/models").json()["models"][0]["state"] == "failed", 60)
        assert "the same on every machine" in client.get("/models").json()["models"][0]["reason"]


def test_arguments_are_settings_too(tmp_path: Path):
    settings = Arguments.model_validate({"bundles": str(tmp_path), "max_batch": "4", "cpus": "3"}).settings()
    assert (settings.bundles, settings.max_batch, settings.threads) == (tmp_path, 4, 3)
    with pytest.raises(SettingsError, match="no argument 'max_bach'"):
        Arguments.model_validate({"max_bach": 4}).settings()
    with pytest.raises(SettingsError, match="poll_seconds: not on a cluster"):
        Arguments.model_validate({"poll_seconds": 5}).settings()


def test_the_page_names_every_argument():
    for name, field in Arguments.model_fields.items():
        assert f"| `{name}` | {field.default or ('none' if field.default == {} else 0)} |" in PAGE
    for name in NOT_HERE:
        assert f"`{name}`" in PAGE


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def everything_else_is_there(port: int, body: bytes) -> None:
    """Through Ray's proxy, too."""
    from websockets.sync.client import connect

    assert b"<title>" in get(port, "/")[1]
    assert get(port, "/v2/health/ready")[0] == 200
    assert json.loads(get(port, "/models/person")[1])["engine"]["reason"].endswith("in replicas on Ray")
    status, told = get(port, "/nowhere")
    assert (status, json.loads(told)["type"]) == (404, "urn:limner:problem:unknown-route")
    status, told = post(port, b"no picture")
    assert (status, json.loads(told)["type"]) == (415, "urn:limner:problem:not-an-image")
    with connect(f"ws://127.0.0.1:{port}/stream?masks=none") as stream:
        stream.send(body)
        assert json.loads(stream.recv(timeout=60))["detections"]


def post(port: int, body: bytes) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", "/detect", body)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray is imported, which is when it reads some of this."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # what makes Ray keep to the loopback address
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the code of this checkout, in every process


@contextmanager
def two_nodes(port: int) -> Iterator[Any]:
    """A cluster of this machine's, on its loopback only, and the node to be killed. A core each, in name."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "node_ip_address": "127.0.0.1"}
    head = {**node, "include_dashboard": False, "resources": {"front": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        doomed = cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield cluster, doomed
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@needs_ray
def test_the_page_s_config_file_is_one(by_itself: None):
    from ray.serve.schema import ServeDeploySchema

    yaml = pytest.importorskip("yaml", reason='pip install -e ".[dev]"')
    found = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert found
    [deployed] = ServeDeploySchema.model_validate(yaml.safe_load(found[1])).applications
    arguments = Arguments.model_validate({**deployed.args, "bundles": ROOT / "bundles"})
    assert arguments.settings().max_requests == 256
    assert app(arguments)
    assert {deployment.name for deployment in deployed.deployments} <= {INGRESS, DETECTORS}


@pytest.mark.slow
@needs_ray
def test_a_node_dies_under_load_and_every_accepted_request_is_answered(by_itself: None):
    body, settings = PHOTO.read_bytes(), settings_of(ROOT / "bundles", engine="auto")
    with TestClient(create_app(settings)) as plain:
        wait_until(lambda: plain.get("/readyz").status_code == 200, 120)
        expected = without_times(plain.post("/detect", content=body))
    assert expected["detections"]
    port, statuses, wrong, stop = free_port(), Counter[int](), [], threading.Event()

    def load() -> None:
        while not stop.is_set():
            status, answer = post(port, body)
            statuses[status] += 1
            told = json.loads(answer) if status == 200 else {"status": status, "answer": answer.decode()}
            told.pop("timings_ms", None)
            if told != expected:
                wrong.append(told)

    with two_nodes(port) as (cluster, doomed):
        from ray import serve

        where = {"bundles": str(ROOT / "bundles"), "warm_seconds": 0}
        placed = {"min_replicas": 2, "max_replicas": 2, "ingress_cpus": 0, "ingress_resources": {"front": 0.1}}
        serve.run(app(Arguments.model_validate({**where, **placed})), route_prefix="/")
        wait_until(lambda: get(port, "/readyz")[0] == 200, 120)
        everything_else_is_there(port, body)
        clients = [threading.Thread(target=load) for _ in range(6)]
        for client in clients:
            client.start()
        wait_until(lambda: statuses[200] >= 12 or bool(wrong), 120)
        cluster.remove_node(doomed, allow_graceful=False)
        before = statuses[200]
        wait_until(lambda: statuses[200] >= before + 24 or bool(wrong), 120)
        stop.set()
        for client in clients:
            client.join(120)
        metrics = get(port, "/metrics")[1].decode()
    assert not wrong
    assert set(statuses) == {200}
    retries = next(line for line in metrics.splitlines() if line.startswith("limner_cluster_retries_total{"))
    assert float(retries.rsplit(" ", 1)[1]) >= 1


def get(port: int, path: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
