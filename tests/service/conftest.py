from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from starlette.testclient import TestClient

from service.app import create_app
from service.engines import Opened
from service.settings import Settings
from tests.service.toy import ToyEngine, wait_until, write_bundle

# As the service's own: the default, which draws every local variable of a traceback, takes seconds for a batch.
structlog.configure(
    processors=[structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]
)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one bundle, toy/1. Tests that change a bundle write their own."""
    root = tmp_path_factory.mktemp("bundles")
    write_bundle(root)
    return root


@pytest.fixture
def engine() -> ToyEngine:
    return ToyEngine()


ClientMaker = Callable[..., Any]


@pytest.fixture
def serve(bundles: Path, engine: ToyEngine) -> ClientMaker:
    """`with serve(max_requests=2) as client`: the application on the toy engine, ready."""

    @contextmanager
    def _serve(**settings: Any) -> Iterator[TestClient]:
        app = create_app(Settings(**{"bundles": bundles, **settings}), opener=lambda bundle: Opened(engine, "a test"))
        with TestClient(app, raise_server_exceptions=False) as client:
            wait_until(lambda: not app.state.service.store.is_loading)
            engine.batches.clear()
            for rows in engine.rois.values():
                rows.clear()
            engine.entered.clear()
            yield client

    return _serve


@pytest.fixture
def client(serve: ClientMaker) -> Iterator[TestClient]:
    with serve() as ready:
        yield ready
