"""docs/http.md, held to the code: its tables, examples and snippets."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import answers, errors, openapi, schemas
from service.access import protocol_keys
from service.detector import Detections
from service.formats import FORMATS, WRITING
from service.masks import decode
from service.wire import Options
from tests.service.test_masks import scattered, stress
from tests.service.toy import encoded, picture

TEXT = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def options_table() -> list[str]:
    rows = [row("option", "values", "default", "meaning"), "|---|---|---|---|"]
    for item in openapi.DETECT["parameters"]:
        schema = item["schema"]
        bounds = f"{schema.get('minimum', '')} to {schema.get('maximum', 'the limit')}" if "minimum" in schema else ""
        values = ", ".join(f"`{choice}`" for choice in schema.get("enum", [])) or bounds or schema["type"]
        default = f"`{json.dumps(schema['default']).strip(chr(34))}`" if "default" in schema else ""
        rows.append(row(f"`{item['name']}`", values, default, item["description"]))
    return rows


def formats_table() -> list[str]:
    rows = [row("`format`", "`Accept`, content type", "holds", "masks", "options"), "|---|---|---|---|---|"]
    for name, form in FORMATS.items():
        masks, takes = ", ".join(form.masks), ", ".join(option for option in WRITING if option in form.takes)
        rows.append(row(f"`{name}`", f"`{form.media_type}`", form.description, masks, takes))
    return rows


def errors_table() -> list[str]:
    rows = [row("status", "code", "title"), "|---|---|---|"]
    met = (error for error in errors.all_errors() if error is not errors.ClientGone)
    return rows + [row(str(error.status), f"`{error.code}`", error.title) for error in met]


TABLES = {"OPTIONS": options_table, "FORMATS": formats_table, "ERRORS": errors_table}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_complete_and_true(name: str) -> None:
    expected = "\n".join(TABLES[name]())
    assert expected in TEXT, f"the table should read:\n{expected}"


def test_every_route_is_named(client) -> None:
    for path in client.get("/openapi.json").json()["paths"]:
        assert f"{path}`" in TEXT or f"POST {path}" in TEXT, path


def sections() -> list[tuple[str, str]]:
    """Heading and fenced text of each example of an answer or a mask."""
    return re.findall(r"^### ([a-z]+)\n(?:(?!^##).)*?^```(?:json|text)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.shows_picture])
def test_examples_of_answers_are_what_the_service_says(name: Any) -> None:
    shown = dict(sections())[name]
    if name == "ndjson":
        assert shown == schemas.example(name)
    else:
        assert json.loads(shown) == schemas.example(name)


@pytest.mark.parametrize("name", [name for name in answers.MASKS if name != "probability"])
def test_examples_of_masks_are_what_the_service_says(name: Any) -> None:
    shown = [text for heading, text in sections() if heading == name]
    assert json.loads(shown[-1]) == schemas.example("json", name)["detections"][0]["mask"]


def test_the_example_of_probabilities() -> None:
    shown = json.loads(dict(sections())["probability"])
    true = schemas.example("json", "probability")["detections"][0]["mask"]
    assert len(true["data"]) == 1048
    assert true["data"].startswith(shown.pop("data").removesuffix("..."))
    assert shown.items() <= true.items()


def scene(format: str) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Masks of all kinds in one picture: as the answer has them, and as pixels."""
    rng = np.random.default_rng(3)
    height, width, number = 53, 71, 6
    boxes = np.concatenate([scattered(rng, number, 2, 80, 70) for _ in range(4)]).clip(0, [width, height] * 2)
    levels = np.concatenate([stress(rng, kind, number, 28) for kind in range(4)])
    levels = np.rint(levels * 255).astype(np.float32) / np.float32(255)  # what 8 bits can tell
    pasted = schemas.masks.rle(levels, boxes.astype(np.float32), height, width)
    many = Detections(
        height, width, boxes.astype(np.float32), np.ones(24), np.zeros(24, int), pasted, None, probabilities=levels
    )
    rows = answers.MASKS[format](many, Options())
    return json.loads(answers.dumps(rows)), [decode(mask) for mask in pasted]


def assert_same(format: str, found: np.ndarray, expected: np.ndarray) -> None:
    differing = int((found != expected).sum())
    # Values in the middle between two bytes fall on the threshold itself, which float64 and float32 round differently.
    assert differing == 0 if format != "probability" else differing <= 2


@pytest.mark.parametrize("format", answers.MASKS)
def test_python_snippets_decode(format: str) -> None:
    names: dict[str, Any] = {}
    exec(next(code for kind, code in BLOCKS if kind == "python" and f"def decode_{format}(" in code), names)
    rows, expected = scene(format)
    for mask, pixels in zip(rows, expected, strict=True):
        with np.errstate(all="ignore"):  # some of these boxes lie outside the picture, clipped to nothing
            found = names[f"decode_{format}"](mask, pixels.shape[1], pixels.shape[0])
        assert_same(format, found, pixels)


RUN = """
import { readFileSync } from "node:fs";
const { masks, width, height } = JSON.parse(readFileSync(0, "utf8"));
for (const mask of masks) console.log((await decode(mask, width, height)).join(""));
"""


@pytest.mark.parametrize("format", answers.MASKS)
def test_javascript_snippets_decode(format: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, so the JavaScript of docs/http.md is not run")
    name = f"decode{format.title()}"
    code = next(code for kind, code in BLOCKS if kind == "js" and f"function {name}(" in code)
    script = tmp_path / "decode.mjs"
    script.write_text(code + f"const decode = {name};\n" + RUN, encoding="utf-8")
    rows, expected = scene(format)
    given = json.dumps({"masks": rows, "width": expected[0].shape[1], "height": expected[0].shape[0]})
    done = subprocess.run([node, script], input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, pixels in zip(lines, expected, strict=True):
        assert_same(format, np.array(list(line), np.uint8).reshape(pixels.shape), pixels)


def test_the_nuclio_function_asks_as_it_should(client, monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        body = {"image": base64.b64encode(encoded(picture())).decode(), "threshold": 0.7}

    class Context:
        @staticmethod
        def Response(**members: Any) -> dict[str, Any]:
            return members

    class Sent:
        def __init__(self, request: urllib.request.Request) -> None:
            answer = client.post("/detect", content=request.data, headers=dict(request.header_items()))
            assert answer.status_code == 200, answer.text
            self.read = lambda: answer.content

    names: dict[str, Any] = {}
    exec(next(code for kind, code in BLOCKS if "def handler(" in code), names)
    monkeypatch.setattr(urllib.request, "urlopen", Sent)
    shapes = json.loads(names["handler"](Context, Event)["body"])
    assert [shape["type"] for shape in shapes] == ["mask", "skeleton"] * 2


STREAM = """
globalThis.WebSocket = class {
  constructor(...given) {
    console.log(JSON.stringify(given));
  }
};
const answers = [];
const socket = openStream("https://limner", (answer) => answers.push(answer), { key: process.argv[2], masks: "none" });
socket.onmessage({ data: '{"frame": 1}' });
console.log(answers[0].frame);
"""


def test_the_stream_snippet_connects_with_a_key(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, so the JavaScript of docs/http.md is not run")
    script = tmp_path / "stream.mjs"
    script.write_text(next(code for kind, code in BLOCKS if "function openStream(" in code) + STREAM, encoding="utf-8")
    key = "~~~~????key>>>0123"  # its base64 has the letters that differ
    done = subprocess.run([node, script, key], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    opened, frame = done.stdout.splitlines()
    address, offered = json.loads(opened)
    assert address == "wss://limner/stream?late=drop&masks=none"
    assert list(protocol_keys(offered)) == [key.encode()]
    assert frame == "1"
