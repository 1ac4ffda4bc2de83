import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from structlog.testing import capture_logs

from service.detector import Wants
from service.engines import Opened
from service.errors import BundleError, ClientGone, NotReady, UnknownModel
from service.images import fit
from service.loading import Warming
from service.store import Policy, Store, discover, version_key
from tests.service.toy import RULE, ToyEngine, picture, wait_until, write_bundle

COLD = Warming(seconds=0)
CANVAS = fit(picture(), RULE)


def opener(bundle):
    return Opened(ToyEngine(), "a test")


def test_highest_version_of_each_name(tmp_path):
    for name, version in (("b", "2"), ("b", "10"), ("b", "9.1"), ("a", "1")):
        write_bundle(tmp_path, name, version)
    write_bundle(tmp_path, "b", "11").rename(tmp_path / "b" / ".11")
    assert [(found.name, found.version) for found in discover(tmp_path)] == [("a", "1"), ("b", "10")]
    assert discover(tmp_path / "nowhere") == []


def test_versions_compare_as_numbers():
    assert sorted(["1.10", "1.9", "2", "1"], key=version_key) == ["1", "1.9", "1.10", "2"]


def test_a_model_that_fails_is_reported_and_others_serve(tmp_path):
    write_bundle(tmp_path, "bad")
    (tmp_path / "bad" / "1" / "detect.onnx").write_bytes(b"altered")
    write_bundle(tmp_path, "good")
    store = Store(tmp_path, opener)
    assert store.is_loading
    with pytest.raises(NotReady, match="being loaded"):
        store.ready("good")
    store.load_all()
    assert not store.is_loading
    assert store.default_name == "good"
    assert store.ready(None).name == "good"
    assert store.named("bad").state == "failed"
    with pytest.raises(NotReady, match="sha256"):
        store.ready("bad")
    with pytest.raises(UnknownModel, match="bad, good"):
        store.ready("other")
    store.close()


def test_the_directory_must_tell_the_truth(tmp_path):
    write_bundle(tmp_path, "toy").rename(tmp_path / "toy" / "7")
    store = Store(tmp_path, opener)
    store.load_all()
    assert "name the directories" in store.named("toy").reason


def test_an_unexpected_failure_says_no_more_than_its_type(tmp_path):
    write_bundle(tmp_path)

    def explode(bundle):
        raise RuntimeError("secret")

    store = Store(tmp_path, explode)
    store.load_all()
    assert store.named(None).reason == "RuntimeError while loading; the log has the rest"


def test_no_bundle(tmp_path):
    with pytest.raises(NotReady, match="no bundle"):
        Store(tmp_path, opener).ready(None)


class Opener:
    """Remembers the engines by name@version, in the order of opening."""

    def __init__(self):
        self.engines = {}
        self.order = []

    def __call__(self, bundle):
        engine = ToyEngine()
        self.order.append(f"{bundle.name}@{bundle.version}")
        self.engines[self.order[-1]] = engine
        return Opened(engine, "a test")


@pytest.fixture
def opened():
    return Opener()


@pytest.fixture
def started(tmp_path, opened):
    """`started(max_models=2)`: a store on tmp_path that has loaded what was there."""
    stores = []

    def _started(versions="latest", max_models=0, default=None):
        store = Store(tmp_path, opened, default, Policy(versions, max_models, COLD))
        stores.append(store)
        store.load_all()
        return store

    yield _started
    for store in stores:
        store.close()


def states(store, name="toy"):
    return {model.found.version: model.state for model in store.versions(name)}


def test_policy_of_versions_at_the_start(tmp_path, started, opened):
    for version in ("1", "2", "10"):
        write_bundle(tmp_path, version=version)
    assert states(started()) == {"10": "ready", "2": "unloaded", "1": "unloaded"}
    assert opened.order == ["toy@10"]
    store = started("all")
    assert states(store) == {"10": "ready", "2": "ready", "1": "ready"}
    assert store.ready("toy").version == "10"
    assert store.ready("toy@2").version == "2"


def test_the_start_falls_back_to_the_newest_version_that_loads(tmp_path, started):
    for version in ("1", "2", "3"):
        write_bundle(tmp_path, version=version)
    (tmp_path / "toy" / "3" / "detect.onnx").write_bytes(b"altered")
    store = started()
    assert states(store) == {"3": "failed", "2": "ready", "1": "unloaded"}
    assert store.ready("toy").version == "2"


def test_an_engine_that_strays_is_closed(tmp_path, started, opened):
    write_bundle(tmp_path)
    store = started()
    broken = ToyEngine()
    broken.detect = lambda images, sizes: 1 / 0
    store._opener = lambda bundle: Opened(broken, "a test")
    write_bundle(tmp_path, version="2")
    with pytest.raises(BundleError, match="ZeroDivisionError"):
        store.load("toy")
    assert broken.closed
    assert not opened.engines["toy@1"].closed


def test_a_bundle_that_is_being_copied_is_retried_when_it_changes_and_told_once(tmp_path, started, opened):
    write_bundle(tmp_path)
    store = started()
    unfinished = write_bundle(tmp_path, version="2")
    whole = (unfinished / "masks.onnx").read_bytes()
    unfinished.rename(tmp_path / "toy" / ".2")
    store.refresh()
    assert states(store) == {"1": "ready"}  # a dot directory is nobody's bundle
    (tmp_path / "toy" / ".2").rename(unfinished)
    with capture_logs() as logs:
        for size in (10, 10, 20, len(whole) - 1):
            (unfinished / "masks.onnx").write_bytes(whole[:size])
            store.refresh()
            assert states(store) == {"2": "failed", "1": "ready"}
            assert "half copied" in store.named("toy@2").reason
            assert store.ready("toy").version == "1"
    assert [each["event"] for each in logs] == ["model failed"]
    (unfinished / "masks.onnx").write_bytes(whole)
    store.refresh()
    assert states(store) == {"2": "ready", "1": "unloaded"}
    for _ in range(3):
        store.refresh()
    assert opened.order == ["toy@1", "toy@2"]


def test_a_version_replaced_on_disk_is_loaded_again(tmp_path, started, opened):
    write_bundle(tmp_path)
    store = started()
    first = opened.engines["toy@1"]
    shutil.rmtree(tmp_path / "toy" / "1")
    write_bundle(tmp_path)
    store.refresh()
    assert opened.order == ["toy@1", "toy@1"]
    wait_until(lambda: first.closed)
    assert store.ready("toy").detector.engine is opened.engines["toy@1"]


def test_a_volume_that_is_gone_takes_nothing_down(tmp_path, started):
    write_bundle(tmp_path)
    store = started()
    (tmp_path / "toy").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    store.refresh()
    assert states(store) == {"1": "ready"}


def test_an_empty_directory_that_fills(tmp_path, started):
    store = started()
    for name in ("b", "a"):
        write_bundle(tmp_path, name)
        store.refresh()
        assert store.ready(None).name == "b"


def test_a_manifest_that_is_gone_is_not_a_removal(tmp_path, started):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    store = started()
    (tmp_path / "a" / "1" / "manifest.json").unlink()
    store.refresh()
    assert states(store, "a") == {"1": "ready"}
    assert "manifest.json is missing" in store.named("a").reason


def test_the_least_recently_asked_makes_room(tmp_path, started, opened):
    for name in ("a", "b", "c", "d"):
        write_bundle(tmp_path, name)
    store = started(max_models=2)
    assert [model.state for model in store.models] == ["ready", "ready", "unloaded", "unloaded"]
    with store.lease() as lease:
        lease.take("a")
    for name, gone in (("c", "b"), ("d", "a")):
        store.load_asked(f"{name}@1", 0)
        with store.lease() as lease:
            lease.take(name)
        assert opened.engines[f"{gone}@1"].closed
        assert "made room" in store.named(gone).reason
    store.refresh()
    assert [model.state for model in store.models] == ["unloaded", "unloaded", "ready", "ready"]
    with pytest.raises(NotReady, match="A request for a@1 loads it"):
        store.ready("a")


def test_who_makes_room_is_closed_before_the_next_is_opened(tmp_path, started, opened):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    store = started(max_models=1)
    opened_early = threading.Event()

    def close():
        opened_early.wait(0.1)
        opened.order.append("closed")

    opened.engines["a@1"].close = close
    store._opener = lambda bundle: (opened_early.set(), opened(bundle))[1]
    assert store.load("b").state == "ready"
    assert opened.order == ["a@1", "closed", "b@1"]


def test_a_newer_version_needs_no_room(tmp_path, started, opened):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    store = started(max_models=2)
    write_bundle(tmp_path, "a", "2")
    store.refresh()
    assert [(model.found.version, model.state) for model in store.models] == [("2", "ready"), ("1", "ready")]
    assert not opened.engines["b@1"].closed


def test_a_broken_bundle_evicts_nobody(tmp_path, started, opened):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    store = started(max_models=1)
    (tmp_path / "b" / "1" / "detect.onnx").write_bytes(b"altered")
    store.load_asked("b@1", 0)
    assert store.named("b").state == "failed"
    assert not opened.engines["a@1"].closed


def test_one_in_use_is_never_evicted(tmp_path, started, opened):
    for name in ("a", "b"):
        write_bundle(tmp_path, name)
    store = started(max_models=1)
    with store.lease() as lease, ThreadPoolExecutor(1) as pool:
        lease.take("a")
        with pytest.raises(NotReady, match="in use: raise LIMNER_MAX_MODELS"):
            store.load("b")
        waits = pool.submit(store.load, "b", None, 10)
        wait_until(lambda: store.named("b").state == "loading")
        assert not opened.engines["a@1"].closed
        assert store.ready("a").num_holders == 1
        lease.__exit__(None, None, None)
        assert waits.result(10).state == "ready"
        assert opened.engines["a@1"].closed


def test_one_request_keeps_the_version_that_it_began_with(tmp_path, started, opened):
    write_bundle(tmp_path)
    store = started()
    with store.lease() as lease:
        assert lease.take("toy").version == "1"
        write_bundle(tmp_path, version="2")
        store.load("toy")
        assert lease.take("toy").version == "1"
        assert lease.take(None).version == "2"
        assert not opened.engines["toy@1"].closed
    wait_until(lambda: opened.engines["toy@1"].closed)
    with pytest.raises(ClientGone):
        lease.take("toy")
    assert store.ready("toy").num_holders == 0


def test_a_batch_holds_the_version_when_all_who_asked_have_left(tmp_path, started, opened):
    write_bundle(tmp_path)
    store = started()
    engine = opened.engines["toy@1"]
    with ThreadPoolExecutor(1) as device:
        with store.lease() as lease:
            ready = lease.take("toy")
            engine.entered.clear()
            engine.free.clear()
            batch = device.submit(ready.run, [CANVAS], [Wants()])
            assert engine.entered.wait(10)
        store.unload("toy")
        assert not engine.closed
        engine.free.set()
        assert len(batch.result(10)) == 1
    wait_until(lambda: engine.closed)
    with pytest.raises(NotReady, match="was unloaded"):
        ready.run([CANVAS], [Wants()])


def test_leases_swaps_and_evictions_at_once(tmp_path, started, opened):
    """Whatever the order, who holds a version finds its engine open, and in the end one is open for each loaded."""
    for name in ("a", "b", "c"):
        write_bundle(tmp_path, name)
    store = started(max_models=2)
    stop = threading.Event()

    def ask(seed):
        asked = 0
        while not stop.is_set():
            name = "abc"[(seed + asked) % 3]
            with store.lease() as lease:
                try:
                    ready = lease.take(name)
                except NotReady as error:
                    if error.to_load is not None:
                        store.load_asked(error.to_load, 10)
                    continue
                ready.run([CANVAS], [Wants(masks="none", keypoints=False)])
                assert not ready.detector.engine.closed
                asked += 1
        return asked

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(ask, seed) for seed in range(4)]
        try:
            for version in ("2", "3", "4"):
                for name in ("a", "b"):
                    write_bundle(tmp_path, name, version)
                    assert store.load(name, wait_s=10).found.version == version
        finally:
            stop.set()
        assert all(worker.result(20) > 0 for worker in workers)
    loaded = [each for name in "abc" for each in store.versions(name) if each.state == "ready"]
    assert 1 <= len(loaded) <= 2
    wait_until(lambda: len(store._open) == len(loaded))


def test_what_an_operator_unloaded_stays_so_until_something_newer_comes(tmp_path, started):
    write_bundle(tmp_path)
    store = started(max_models=3)
    assert [model.state for model in store.unload("toy")] == ["unloaded"]
    store.refresh()
    with pytest.raises(NotReady, match="unloaded on request. POST /models/toy/load") as caught:
        store.ready("toy")
    assert caught.value.to_load is None
    write_bundle(tmp_path, version="2")
    store.refresh()
    assert states(store) == {"2": "ready", "1": "unloaded"}
    with pytest.raises(UnknownModel, match="no version '7'; it has: 2, 1"):
        store.load("toy", "7")
    assert [model.found.version for model in store.unload("toy@2")] == ["2"]
    assert store.load("toy@1").found.version == "1"
