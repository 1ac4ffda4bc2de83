import pytest

from service.engines import Opened
from service.errors import NotReady, UnknownModel
from service.store import Store, discover, version_key
from tests.service.toy import ToyEngine, write_bundle


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
