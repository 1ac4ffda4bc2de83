"""docs/client.md: its Python runs against the toy, its JavaScript draws the toy's answers."""

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason='httpx is not installed: pip install -e ".[client]"')

from service import client as limner  # noqa: E402
from tests.service.test_client import Through  # noqa: E402
from tests.service.toy import encoded, picture  # noqa: E402

TEXT = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


class AsyncThrough(httpx.AsyncBaseTransport):
    def __init__(self, client: Any) -> None:
        self._inner = Through(client)

    async def handle_async_request(self, request: Any) -> Any:
        return self._inner.handle_request(request)


@pytest.mark.parametrize("index", [0, 1])
def test_python_examples_run(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded(picture(), "JPEG"))
    monkeypatch.chdir(tmp_path)
    for kind, name, transport in (
        (limner.Client, "Client", Through(client)),
        (limner.AsyncClient, "AsyncClient", AsyncThrough(client)),
    ):
        monkeypatch.setattr(
            limner, name, lambda url, made=kind, way=transport, **more: made(url, transport=way, **more)
        )
    code = [code for kind, code in BLOCKS if kind == "python"][index]
    with redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    assert ("cat 0." if index == 0 else "bytes are no picture") in said.getvalue()


def test_the_table_of_calls_is_true() -> None:
    for name in ("detect", "detect_several", "draw"):
        assert f"| `{name}(" in TEXT
        assert hasattr(limner.Client, name)
        assert hasattr(limner.AsyncClient, name)
    for name in limner.FIXED:
        assert f"`{name}`" in TEXT


DRIVE = """
import { readFileSync } from "node:fs";
const calls = [];
const context = new Proxy({}, {
  get: (_, name) => (...given) => calls.push([name, ...given]),
  set: (_, name, value) => calls.push(["=" + name, value]),
});
const { answer, skeleton } = JSON.parse(readFileSync(0, "utf8"));
globalThis.fetch = async (url, sent) => {
  calls.push(["fetch", url, sent.method]);
  return { ok: true, json: async () => answer };
};
drawAnswer(context, await detect("http://limner", "file", { confidence: 0.3 }), skeleton);
console.log(JSON.stringify(calls));
"""


def test_javascript_draws_an_answer(serve: Callable[..., Any], tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, so the JavaScript of docs/client.md is not run")
    with serve() as client:
        answer = client.post(
            "/detect", params={"masks": "polygon", "confidence": 0.3}, content=encoded(picture(red=255))
        ).json()
        skeleton = client.get("/models/toy").json()["keypoints"]["skeleton"]
    for row, score in zip(answer["detections"], (0.9, 0.01, 0.9, 0.9), strict=True):
        for point in row["keypoints"]:
            point[2] = score
    script = tmp_path / "draw.mjs"
    script.write_text(next(code for kind, code in BLOCKS if kind == "js") + DRIVE, encoding="utf-8")
    given = json.dumps({"answer": answer, "skeleton": skeleton})
    done = subprocess.run([node, script], input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout)
    assert calls[0] == ["fetch", "http://limner/detect?masks=polygon&polygon_tolerance=0.5&confidence=0.3", "POST"]
    best = answer["detections"][0]
    boxes = [call[1:] for call in calls if call[0] == "strokeRect"]
    x1, y1, x2, y2 = best["box"]
    assert len(boxes) == len(answer["detections"]) == 4
    np.testing.assert_allclose(boxes[-1], [x1, y1, x2 - x1, y2 - y1])  # the best lies on top
    assert [call for call in calls if call[0] == "fill"] == [["fill", "evenodd"]] * 4
    corners = [call[1:] for call in calls if call[0] in ("moveTo", "lineTo")]
    rings = best["mask"]["polygons"] + best["mask"]["holes"]
    flat = [list(pair) for ring in rings for pair in zip(ring[::2], ring[1::2], strict=True)]
    assert flat[0] in corners
    start = len(corners) - 2 - len(flat)
    assert corners[start : start + len(flat)] == flat
    assert len([call for call in calls if call[0] == "stroke"]) == 3  # one is too faint
    bone = [point[:2] for point in best["keypoints"]]
    np.testing.assert_allclose(corners[-2:], bone)
