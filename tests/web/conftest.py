"""A real server process and a real browser. What is missing skips the tests that want it, with a reason."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.service.conftest import bundles as bundles
from tests.service.conftest import client as client
from tests.service.conftest import engine as engine
from tests.service.conftest import serve as serve
from tests.service.toy import wait_until, write_bundle

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
).split()
PATIENCE_MS = 60_000  # of every wait: long, since it ends with its condition
API_KEY = "the-key-of-the-tests"

# What the page's policy forbids is reported to the page; kept where the test can read it.
WATCH = "window.broken = []; addEventListener('securitypolicyviolation', (e) => broken.push(e.violatedDirective))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[web]'")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        found = found or started.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium: install the system's, or run `playwright install chromium`")
        launched = started.chromium.launch(executable_path=found, args=FLAGS)
        yield launched
        launched.close()


@contextmanager
def serving(bundles: Path, **environment: str) -> Iterator[str]:
    """Address of a `limner serve` of its own, ready to be asked."""
    flags = ["--port", "0", "--engine", "onnx", "--threads", "1", "--bundles", str(bundles)]
    process = subprocess.Popen(
        [sys.executable, "limner.py", "serve", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert found, "the server said nothing of its address"
        wait_until(lambda: is_ready(found[0]), seconds=120)
        yield found[0] + "/"
    finally:
        process.kill()
        process.wait()


def is_ready(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/readyz", timeout=30).status == 200
    except urllib.error.HTTPError:
        return False


@pytest.fixture(scope="module")
def address(browser: Any) -> Iterator[str]:
    """The bundled person model."""
    with serving(ROOT / "bundles") as found:
        yield found


@pytest.fixture(scope="module")
def toy_address(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two toy models behind an API key: one with all heads, one with boxes alone."""
    root = tmp_path_factory.mktemp("two")
    write_bundle(root, "first")
    write_bundle(root, "plain", heads=())
    with serving(root, LIMNER_API_KEYS=API_KEY, LIMNER_DEFAULT_MODEL="first") as found:
        yield found


class Opened:
    """A page, what it asked for (`asked`, URLs), what it should not have (`elsewhere`), and what it complained of."""

    def __init__(self, page: Any, base: str) -> None:
        self.page, self.base = page, base
        self.asked: list[str] = []
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        page.on("request", self._on_request)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._on_console)

    def _on_request(self, request: Any) -> None:
        self.asked.append(request.url)
        if not request.url.startswith((self.base, f"blob:{self.base}")):
            self.elsewhere.append(request.url)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def go(self) -> "Opened":
        self.page.goto(self.base)
        self.page.wait_for_selector("#model-told:not(:empty)", state="attached")
        return self

    def detections_asked(self) -> list[str]:
        return [url for url in self.asked if "/detect?" in url]

    def wait_for(self, state: str) -> None:
        self.page.wait_for_selector(f"#stage[data-state={state}]")

    def settle(self) -> None:
        """Until what was asked to be drawn is: the frame after the next."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def pixels(self) -> np.ndarray:
        """The canvas as it is drawn now, (height, width, 3)."""
        self.settle()
        address = self.page.evaluate("() => document.getElementById('canvas').toDataURL()")
        return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))

    def slide(self, name: str, value: float) -> None:
        self.page.locator(f"#{name}").fill(str(value))
        self.settle()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """`opened(address, **context)` opens the page; at the end it must have kept its own rules."""
    pages: list[Opened] = []

    def _open(base: str, **context: Any) -> Opened:
        made = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        made.grant_permissions(["clipboard-read", "clipboard-write", "camera"], origin=base.rstrip("/"))
        made.add_init_script(WATCH)
        page = made.new_page()
        page.set_default_timeout(PATIENCE_MS)
        pages.append(Opened(page, base))
        return pages[-1].go()

    yield _open
    for each in pages:
        violations = each.page.evaluate("() => window.broken")
        each.page.context.close()
        assert not violations, "the page broke its own Content-Security-Policy"
        assert not each.elsewhere, "the page asked somebody else"
        assert not each.complaints
