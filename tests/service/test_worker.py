"""Lanes that are processes: what they answer, what becomes of them, and what becomes of a batch when one dies."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from starlette.testclient import TestClient

from service import lanes, worker
from service.app import create_app
from service.bundle import Bundle
from service.detector import Detections, Detector, LaneLost, Lanes, Plan, Wants
from service.encoded import Encoded
from service.engines import open_engine
from service.errors import BrokenImage, DeadlineExceeded
from service.images import Canvas, DecodeLimits, decode, fit
from service.settings import Settings
from service.worker import Worker, WorkerError
from tests.service.toy import encoded, picture, wait_until, write_bundle

pytestmark = pytest.mark.skipif(os.name != "posix", reason="stops and kills processes")

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-administrator"
ADMIN = {"x-api-key": KEY}


def canvas(seed: int = 0) -> Canvas:
    return Canvas(picture(64, 96, seed=seed), (64, 96), (64, 96))


def is_alive(pid: int) -> bool:
    """A zombie is not: whoever adopted it has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def bundle(bundles: Path) -> Bundle:
    return Bundle.read(bundles / "toy" / "1")


@pytest.fixture
def started(bundle: Bundle) -> Iterator[Worker]:
    made = Worker(bundle, "onnx", "float32", 1)
    made.wait()
    yield made
    made.close()
    assert not is_alive(made.pid)


def test_an_error_is_told_and_the_worker_goes_on(started: Worker):
    with pytest.raises(WorkerError, match="longer than argument"):
        started.answer([canvas()], [Wants(), Wants()])
    (found,) = started.answer([canvas()], [Wants()])
    assert len(found.labels) == 3


def test_it_decodes_for_itself(bundle: Bundle, started: Worker):
    file = encoded(picture(), "JPEG")
    given = Encoded.of(file, DecodeLimits(), bundle.manifest.canvas)
    broken = Encoded.of(file[:-200], DecodeLimits(), bundle.manifest.canvas)
    assert given is not None
    assert broken is not None
    decoded = fit(decode(file, DecodeLimits()), bundle.manifest.canvas)
    there, refused, here = started.answer([given, broken, decoded], [Wants()] * 3)
    assert isinstance(refused, BrokenImage)
    assert isinstance(there, Detections)
    assert isinstance(here, Detections)
    assert there.masks == here.masks
    assert {"decode", "fit"} < there.timings_ms.keys()


def test_signals_that_reach_everybody_leave_it_to_the_service_to_end_it(started: Worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(started.pid, number)
    assert len(started.answer([canvas()], [Wants()])) == 1


def test_one_that_cannot_open_its_bundle_says_why(bundle: Bundle):
    made = Worker(bundle, "openvina", "float32", 1)
    with pytest.raises(WorkerError, match="openvina"):
        made.wait()
    made.close()


def test_a_batch_whose_worker_is_killed_is_answered_and_the_worker_replaced(bundle: Bundle):
    made = Worker(bundle, "onnx", "float32", 1)
    made.wait()
    first = made.pid
    detector = Detector(bundle, open_engine(bundle, "onnx", 1).engine, Lanes(Plan(2, 1, {}, processes=True), [made]))
    with ThreadPoolExecutor(1) as pool:
        os.kill(first, signal.SIGSTOP)  # in the middle of its batch
        running = pool.submit(detector.answer_beside, [canvas()], [Wants()])
        assert not running.done()
        os.kill(first, signal.SIGKILL)
        (answer,) = running.result(20)
    alone = detector.finish(detector.run([canvas()], [Wants()])[0])
    assert detector.finish(answer).masks == alone.masks

    def is_back() -> bool:
        try:
            return len(made.answer([canvas()], [Wants()])) == 1
        except LaneLost:
            return False

    wait_until(is_back, seconds=60)
    assert made.pid != first
    assert not is_alive(first)
    detector.close()
    assert not is_alive(made.pid)


@contextmanager
def queued_ahead(made: Worker, *wants: Wants) -> Iterator[list[Future]]:
    """One batch for each, all of them over there before the first is begun; the worker goes on after this."""
    line, sent = made._line, []
    assert line is not None
    send = line.send
    line.send = lambda batch: (send(batch), sent.append(batch))
    pid = made.pid
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(len(wants)) as pool:
        running = []
        for seed, want in enumerate(wants):
            running.append(pool.submit(made.answer, [canvas(seed)], [want]))
            wait_until(lambda: len(sent) == len(running))
        try:
            yield running
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_batch_waits_over_there_while_another_runs_and_each_has_its_own_answer(started: Worker):
    with queued_ahead(started, *(Wants(max_detections=most) for most in (1, 2, 3))) as running:
        assert not any(each.done() for each in running)
    answers = [each.result(20)[0] for each in running]
    assert [len(each.labels) for each in answers] == [1, 2, 3]
    first, second, third = (each.timings_ms["queue"] for each in answers)
    assert 0 <= first < second < third


def test_who_is_too_late_when_its_turn_comes_is_not_computed(started: Worker):
    late = Wants(deadline_s=time.monotonic() + 0.05)
    with queued_ahead(started, Wants(), late, Wants()) as running:
        wait_until(lambda: time.monotonic() > late.deadline_s)
    answers = [each.result(20)[0] for each in running]
    assert [isinstance(each, DeadlineExceeded) for each in answers] == [False, True, False]
    refused, found = started.answer([canvas(), canvas()], [late, Wants()])
    assert isinstance(refused, DeadlineExceeded)
    assert len(found.labels) == 3


def test_all_that_a_worker_has_is_lost_with_it(started: Worker):
    with queued_ahead(started, Wants(), Wants()) as running:
        os.kill(started.pid, signal.SIGKILL)
        assert [type(each.exception(20)) for each in running] == [LaneLost, LaneLost]


def test_nothing_is_started_again_after_the_end(bundle: Bundle, monkeypatch):
    made = Worker(bundle, "onnx", "float32", 1)
    made.wait()
    made.close()
    monkeypatch.setattr(Worker, "_start", lambda self: pytest.fail("started again"))
    with pytest.raises(LaneLost):
        made.answer([canvas()], [Wants()])


OWNER = """
import sys, time
from pathlib import Path
from service.bundle import Bundle
from service.worker import Worker
made = Worker(Bundle.read(Path(sys.argv[1])), "onnx", "float32", 1)
made.wait()
print(made.pid, flush=True)
time.sleep(600)
"""


def test_it_does_not_outlive_who_started_it(bundle: Bundle):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OWNER, str(bundle.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as owner:
        assert owner.stdout
        pid = int(owner.stdout.readline())
        assert is_alive(pid)
        owner.kill()
    wait_until(lambda: not is_alive(pid), seconds=20)


@pytest.fixture
def app_client(tmp_path: Path, monkeypatch) -> Iterator[TestClient]:
    """The application on two workers of one thread each, whatever is faster here."""
    write_bundle(tmp_path)
    monkeypatch.setattr(lanes._Trial, "rate", lambda trial, each, size: 2.0 if isinstance(each[0], Worker) else 1.0)
    settings = Settings(bundles=tmp_path, warm_seconds=1, admin_key=KEY, engine_seconds=2)
    app = create_app(settings, lambda bundle: open_engine(bundle, "onnx", 2))
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until(lambda: not app.state.service.store.is_loading, seconds=60)
        yield client
    assert workers(client) == []


def workers(client: TestClient) -> list[int]:
    """Those of this process that run, whoever holds them."""
    own = str(os.getpid())
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == own and state != "Z" and b"from service.worker import main" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def ask(client: TestClient) -> int:
    return client.post("/detect", content=encoded(picture())).status_code


@contextmanager
def hammered(client: TestClient) -> Iterator[list[int]]:
    """Four ask all the time, so that batches run beside others; the list has all statuses once the context is left."""
    stop = threading.Event()
    said: list[int] = []

    def hammer() -> None:
        while not stop.is_set():
            said.append(ask(client))

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(hammer) for _ in range(4)]
        try:
            yield said
        finally:
            stop.set()
        for each in running:
            each.result(30)


def test_requests_do_not_notice_that_workers_die(app_client: TestClient):
    plan = app_client.get("/models/toy").json()["engine"]
    assert (plan["num_lanes"], plan["processes"]) == (2, True)
    killed = workers(app_client)
    with hammered(app_client) as said:
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(workers(app_client)) - set(killed)) == 2, seconds=60)
    assert set(said) == {200}


def test_a_worker_that_hangs_fails_its_batch_and_is_replaced(app_client: TestClient):
    hung = workers(app_client)
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    with hammered(app_client) as said:
        wait_until(lambda: not set(workers(app_client)) & set(hung), seconds=60)
    assert 500 in said
    assert set(said) <= {200, 500, 503}
    wait_until(lambda: ask(app_client) == 200, seconds=60)
    assert len(workers(app_client)) == 2


def test_pictures_that_are_decoded_beside_are_answered_as_others_are(app_client: TestClient):
    upright = picture()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = encoded(np.rot90(upright), "JPEG", exif=exif)
    assert app_client.post("/detect", content=turned).json()["image"] == {"width": 96, "height": 64}
    file = encoded(upright, "JPEG")
    same = encoded(decode(file, DecodeLimits()))  # a PNG is decoded by the service
    answers = [app_client.post("/detect", content=each) for each in (file, same)]
    beside, here = (answer.json()["detections"] for answer in answers)
    assert beside == here
    for answer in answers:
        assert answer.json()["timings_ms"]["decode"] > 0
        stages = [stage.partition(";")[0] for stage in answer.headers["server-timing"].split(", ")]
        assert stages == ["decode", "fit", "queue", "detect", "masks", "keypoints", "encode"]
    drawn = app_client.post("/detect", params={"format": "png"}, content=file)
    assert PIL.Image.open(io.BytesIO(drawn.content)).size == (96, 64)
    several = app_client.post("/detect", files=[("image", file), ("image", file[:-200]), ("image", file)]).json()
    assert [each.get("error", {}).get("status") for each in several["results"]] == [None, 422, None]


def test_broken_pictures_are_told_so_and_the_engine_is_left_alone(app_client: TestClient):
    broken = encoded(picture(), "JPEG")[:-200]
    with hammered(app_client) as said:
        refused = [app_client.post("/detect", content=broken) for _ in range(5)]
    assert [answer.status_code for answer in refused] == [422] * 5
    assert refused[0].json()["type"].endswith("broken-image")
    assert set(said) == {200}
    metrics = app_client.get("/metrics").text
    assert not [line for line in metrics.splitlines() if "batch_failures_total{" in line and not line.endswith(" 0.0")]


def test_a_swap_leaves_no_worker_of_the_old_version(app_client: TestClient, tmp_path: Path):
    old = workers(app_client)
    write_bundle(tmp_path, version="2")
    assert app_client.post("/models/toy/load", headers=ADMIN).status_code == 200
    assert ask(app_client) == 200
    wait_until(lambda: not set(workers(app_client)) & set(old), seconds=20)
    assert len(workers(app_client)) == 2
    assert app_client.post("/models/toy/unload", headers=ADMIN).status_code == 200
    wait_until(lambda: workers(app_client) == [], seconds=20)


def test_the_pause_between_attempts_ends_with_the_worker(bundle: Bundle, monkeypatch):
    monkeypatch.setattr(worker, "RESTART_PAUSE_S", 3600)
    made = Worker(bundle, "onnx", "float32", 1)
    made.wait()
    monkeypatch.setattr(Worker, "wait", lambda self: (_ for _ in ()).throw(LaneLost("a test")))
    os.kill(made.pid, signal.SIGKILL)
    with pytest.raises(LaneLost):
        made.answer([canvas()], [Wants()])
    (thread,) = (each for each in threading.enumerate() if each.name == "restart worker")
    made.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not is_alive(made.pid)
