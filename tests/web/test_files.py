"""The page's files, without a browser."""

import base64
import json
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from service import draw, masks, pages
from tests.web.conftest import API_KEY, ROOT

TEXTS = sorted(path for path in pages.WEB.iterdir() if path.suffix in (".html", ".css", ".js", ".svg"))
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, never fetched


def directives(policy: str) -> dict[str, list[str]]:
    return {name: values for name, *values in (part.split() for part in policy.split(";"))}


@pytest.mark.parametrize("path", pages.ROUTES)
def test_files_are_served_with_their_types_and_kept_until_they_change(client, path):
    answer = client.get(path)
    name = Path(path).name or "index.html"
    assert answer.status_code == 200
    assert answer.content == (pages.WEB / name).read_bytes()
    assert answer.headers["content-type"] == pages.MEDIA_TYPES[Path(name).suffix]
    assert answer.headers["cache-control"] == "no-cache"
    tag = answer.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", ["/web/x.js", "/web/index.html", "/web/SOURCES.txt", "/web/..%2Fpages.py", "/web/"])
def test_nothing_else_is_served(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_page_needs_no_key_unless_told_so(serve):
    with serve(api_keys=(API_KEY,)) as client:
        assert {client.get(path).status_code for path in pages.ROUTES} == {200}
        assert client.get("/web/nothing.js").status_code == 401
    with serve(api_keys=(API_KEY,), docs="key") as client:
        assert {client.get(path).status_code for path in pages.ROUTES} == {401}


def test_the_policy_allows_what_the_page_needs_and_no_more(client):
    policy = directives(client.get("/").headers["content-security-policy"])
    nothing, own = ["'none'"], ["'self'"]
    assert {name: policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {
        "default-src": nothing, "base-uri": nothing, "form-action": nothing, "frame-ancestors": nothing
    }  # fmt: skip
    assert {name for name, values in policy.items() if values == own} == {
        "script-src", "style-src", "img-src", "connect-src"
    }  # fmt: skip
    assert policy["require-trusted-types-for"] == ["'script'"]
    assert len(policy) == 9


def test_answers_and_documentation_may_run_nothing(client):
    for path, scripts in (("/models", False), ("/docs", False), ("/", True)):
        policy = directives(client.get(path).headers["content-security-policy"])
        assert policy["default-src"] == ["'none'"]
        assert ("script-src" in policy) == scripts


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_name_nothing_elsewhere(path):
    text = path.read_text(encoding="utf-8").replace(NAMESPACE, "")
    assert not re.search(r"https?:|wss?:|['\"(]//\w|@import|url\(", text)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._within = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_data(self, data):
        if self._within in ("script", "style") and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag):
        self._within = ""


def test_the_markup_holds_no_script_and_no_style():
    tags = Tags()
    tags.feed((pages.WEB / pages.PAGE).read_text(encoding="utf-8"))
    assert not tags.inline
    for tag, attributes in tags.tags:
        assert tag != "style"
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
    identifiers = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_what_the_files_name_is_there():
    script = "".join(path.read_text(encoding="utf-8") for path in TEXTS if path.suffix == ".js")
    markup = (pages.WEB / pages.PAGE).read_text(encoding="utf-8")
    named = set(re.findall(r"web/([\w.-]+)", markup + script)) | set(re.findall(r'from "\./([\w.-]+)"', script))
    assert named == set(pages.PARTS) - {"docs.css"}
    assert "web/docs.css" in pages.docs_page({"info": {"title": "a", "version": "1"}, "paths": {}})
    asked = set(re.findall(r'byId\("([\w-]+)"\)', script))
    assert asked <= set(re.findall(r'id="([\w-]+)"', markup))


def test_the_sample_is_small_and_its_source_is_told():
    assert (pages.WEB / "sample.jpg").stat().st_size < 60_000
    assert "public domain" in (pages.WEB / "SOURCES.txt").read_text(encoding="utf-8")


def test_the_page_draws_in_the_colours_of_the_service():
    text = (pages.WEB / "draw.js").read_text(encoding="utf-8")
    table = re.search(r"COLOURS = (\[.*?\]);", text, re.DOTALL)
    assert table
    assert json.loads(re.sub(r",\s*\]", "]", table[1])) == [list(colour) for colour in draw.COLOURS]


RUN = """
import { readFileSync } from "node:fs";
import { decode, paste } from "./masks.mjs";
const { scenes } = JSON.parse(readFileSync(0, "utf8"));
for (const { mask, threshold, width, height } of scenes) {
  const full = new Uint8Array(width * height);
  const part = paste(decode(mask), mask.box, threshold, width, height);
  for (let y = 0; y < (part?.height ?? 0); y++)
    full.set(part.inside.subarray(y * part.width, (y + 1) * part.width), (part.top + y) * width + part.left);
  console.log(full.join(""));
}
"""


def test_masks_are_those_of_the_service_to_the_pixel(tmp_path):
    """On the same eight bits: noise, blobs, boxes within, across and beyond the border, and ones without any area."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, so masks.js is not run beside service/masks.py")
    scenes, expected = some_scenes()
    (tmp_path / "masks.mjs").write_bytes((pages.WEB / "masks.js").read_bytes())
    (tmp_path / "run.mjs").write_text(RUN, encoding="utf-8")
    command = [node, str(tmp_path / "run.mjs")]
    done = subprocess.run(command, input=json.dumps({"scenes": scenes}), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line, scene, pixels in zip(done.stdout.splitlines(), scenes, expected, strict=True):
        found = np.array(list(line), np.uint8).reshape(pixels.shape)
        # The service rounds to float32 at each step, the page to float64: a centre on the very edge may differ.
        assert (found != pixels).sum() <= 1e-4 * pixels.size, scene
    assert sum(pixels.sum() for pixels in expected) > 10_000


def some_scenes():
    random = np.random.default_rng(7)
    height, width = 120, 160
    boxes = [[20.3, 10.7, 90.2, 100.1], [-30, -20.5, 60.25, 70], [100.5, 60, 300, 200.9], [0, 0, 160, 120],
             [50, 50, 50.4, 51], [200, 10, 260, 40], [40, 40, 40, 90], [10.01, 20.02, 15.03, 110.04]]  # fmt: skip
    blob = np.clip(1.2 - np.hypot(*(np.mgrid[:28, :28] - 13.5)) / 14, 0, 1)
    scenes, expected = [], []
    for box in boxes:
        for values in (blob, random.random((28, 28)), np.ones((28, 28)), np.zeros((28, 28))):
            for threshold in (0.03, 0.5, 0.91):
                data = np.rint(values * 255).astype(np.uint8)
                mask = {"box": box, "size": [28, 28], "data": base64.b64encode(data.tobytes()).decode()}
                scenes.append({"mask": mask, "threshold": threshold, "width": width, "height": height})
                coded = masks.rle((data / np.float32(255))[None], np.float32([box]), height, width, threshold)
                expected.append(masks.decode(coded[0]))
    return scenes, expected


def test_a_wheel_holds_the_page(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="nothing to build a wheel with: pip install setuptools")
    source = tmp_path / "source"
    for package in ("service", "models", "training", "export"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "limner.py"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"service/web/{path.name}" for path in pages.WEB.iterdir()} <= held
