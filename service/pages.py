"""What a browser gets: the page at `/`, which is files under `web/`, and the documentation made from OpenAPI.

Self-contained: no script, font or style comes from anywhere else, so that both work without a network. The files name
each other relative to the page, so that they also work behind a proxy that puts a prefix before every path.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from fastapi import Response
from starlette.exceptions import HTTPException

WEB = Path(__file__).parent / "web"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".jpg": "image/jpeg",
    ".svg": "image/svg+xml",
}
PAGE = "index.html"  # served at / alone, since what it names is relative to that
PARTS = sorted(path.name for path in WEB.iterdir() if path.suffix in MEDIA_TYPES and path.name != PAGE)
ROUTES = ("/", *(f"/web/{name}" for name in PARTS))

# An answer that is no page may load and do nothing; nobody may frame any of them.
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
DOCS_POLICY = f"{POLICY}; style-src 'self'; img-src 'self'"
PAGE_POLICY = f"{DOCS_POLICY}; script-src 'self'; connect-src 'self'; require-trusted-types-for 'script'"


@dataclass(frozen=True, slots=True)
class File:
    content: bytes
    headers: dict[str, str]


def part(name: str, asked: Mapping[str, str]) -> Response:
    """A file that the page names; `asked` are the request's headers."""
    if name not in PARTS:
        raise HTTPException(404)
    return page(asked, name)


def page(asked: Mapping[str, str], name: str = PAGE) -> Response:
    """The page, or 304 where the request's headers say that the browser has this one."""
    file = _file(name)
    known = {tag.strip().removeprefix("W/") for tag in asked.get("if-none-match", "").split(",")}
    if file.headers["etag"] in known or "*" in known:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers={**file.headers, "content-type": MEDIA_TYPES[Path(name).suffix]})


@cache
def _file(name: str) -> File:
    content = (WEB / name).read_bytes()
    # Asked about each time and sent only when changed: after an update no page runs with half of the old scripts.
    headers = {"etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "cache-control": "no-cache"}
    return File(content, headers | {"content-security-policy": PAGE_POLICY})


def docs_page(document: dict[str, Any]) -> str:
    info = document["info"]
    parts = [f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))}</p>"]
    schemas = document.get("components", {}).get("schemas", {})
    for path, verbs in document["paths"].items():
        parts.extend(_operation(verb, path, operation) for verb, operation in verbs.items())
    parts.append("<h2>Shapes</h2>")
    parts.extend(_schema(name, schema) for name, schema in schemas.items())
    return _page(f"{info['title']}: documentation", "".join(parts))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="web/icon.svg"><link rel="stylesheet" href="web/docs.css">'
        f"<title>{escape(title)}</title></head><body>{body}</body></html>"
    )


def _operation(verb: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f'<h2><span class="verb">{verb.upper()}</span> <code>{escape(path)}</code></h2>']
    parts.append(_prose(operation.get("description") or operation.get("summary", "")))
    if parameters := operation.get("parameters"):
        rows = [
            (f"<code>{escape(item['name'])}</code>", _type(item["schema"]), escape(item.get("description", "")))
            for item in parameters
        ]
        parts.append("<h3>Options</h3>" + _table(("name", "type", "meaning"), rows))
    if body := operation.get("requestBody"):
        rows = [
            (f"<code>{escape(kind)}</code>", escape(content.get("schema", {}).get("description", "")))
            for kind, content in body["content"].items()
        ]
        parts.append("<h3>Body</h3>" + _table(("content type", "holds"), rows))
    answers = operation.get("responses", {})
    rows = [(code, _prose(answer.get("description", ""))) for code, answer in answers.items()]
    parts.append("<h3>Answers</h3>" + _table(("status", "meaning"), rows))
    parts.extend(_form(kind, content) for kind, content in answers.get("200", {}).get("content", {}).items())
    return "".join(parts)


def _form(kind: str, content: dict[str, Any]) -> str:
    """One media type of an answer, with its examples folded away."""
    told = content.get("schema", {}).get("description", "")
    examples = {name: example["value"] for name, example in content.get("examples", {}).items()}
    examples |= {"example": content["example"]} if "example" in content else {}
    shown = [
        f"<details><summary>{escape(name)}</summary><pre>{escape(_text(value))}</pre></details>"
        for name, value in examples.items()
    ]
    return f"<p><code>{escape(kind)}</code> {escape(told)}</p>{''.join(shown)}" if shown else ""


def _text(example: Any) -> str:
    return example if isinstance(example, str) else json.dumps(example)


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = [
        (f"<code>{escape(field)}</code>", _type(detail), escape(detail.get("description", "")))
        for field, detail in schema.get("properties", {}).items()
    ]
    parts = [f"<h3 id='{escape(name)}'>{escape(name)}</h3>", _prose(schema.get("description", ""))]
    parts.append(_table(("field", "type", "meaning"), rows))
    if "example" in schema:
        parts.append(f"<pre>{escape(json.dumps(schema['example'], indent=2))}</pre>")
    return "".join(parts)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return escape(" or ".join(map(str, schema["enum"])))
    if "const" in schema:
        return escape(str(schema["const"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = "".join(f" {sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in schema)
    default = f", default {json.dumps(schema['default'])}" if schema.get("default") is not None else ""
    return escape(f"{schema.get('type', 'anything')}{bounds}{default}")


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _prose(text: str) -> str:
    return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph.strip())
