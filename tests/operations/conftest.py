"""The toy service on a real port, with traffic of every outcome, for what reads its metrics."""

import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from service.app import create_app
from service.engines import Opened
from service.settings import Settings
from tests.service.toy import ToyEngine, encoded, picture, wait_until, write_bundle


@dataclass(frozen=True, slots=True)
class Served:
    address: str  # host:port
    engine: ToyEngine

    def traffic(self) -> None:
        """One request that is answered, one that is wrong, and one that is rejected: there is one permit."""
        assert self._post("/detect", encoded(picture())) == 200
        assert self._post("/detect", b"no picture") == 415
        self.engine.entered.clear()
        self.engine.free.clear()
        try:
            first = threading.Thread(target=self._post, args=("/detect", encoded(picture())))
            first.start()
            assert self.engine.entered.wait(20)
            assert self._post("/detect", encoded(picture())) == 429
        finally:
            self.engine.free.set()
        first.join(20)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=20) as answer:
            return answer.read().decode()

    def _post(self, path: str, body: bytes) -> int:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", body, timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    bundles, engine = tmp_path_factory.mktemp("bundles"), ToyEngine()
    write_bundle(bundles)
    app = create_app(Settings(bundles=bundles, max_requests=1), opener=lambda bundle: Opened(engine, "a test"))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started, seconds=30)
    wait_until(lambda: not app.state.service.store.is_loading, seconds=30)
    yield Served(f"127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", engine)
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """The path of a program, beside this interpreter or on the machine; skips the test where there is none."""

    def find(name: str) -> str:
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed here")
        return found

    return find
