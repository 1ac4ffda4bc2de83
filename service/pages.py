"""The HTML that the service shows: a front page, and the documentation made from the OpenAPI document.

Self-contained: no script, font or style is loaded from anywhere, so both pages work without a network.
"""

import json
from html import escape
from typing import Any

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
pre{background:#f4f2ee;padding:.8rem;overflow-x:auto;border-radius:4px}details{margin-bottom:.6rem}code{font-family:ui-monospace,monospace}
table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem .3rem 0;
text-align:left;vertical-align:top}h2{margin-top:2.5rem}.verb{color:#8a4b08}
@media(prefers-color-scheme:dark){body{background:#16161a;color:#ddd}pre{background:#222228}td,th{border-color:#333}
a{color:#8ab4f8}.verb{color:#e0a458}}
"""


def front_page(address: str) -> str:
    curl = f"curl --data-binary @photo.jpg {address}detect"
    return _page(
        "limner",
        "<h1>limner</h1><p>One picture in; boxes, masks and keypoints in the picture's own pixels out.</p>"
        f"<pre>{escape(curl)}</pre>"
        '<p><a href="docs">Documentation</a> · <a href="openapi.json">OpenAPI</a> · <a href="models">Models</a> · '
        '<a href="metrics">Metrics</a> · <a href="readyz">Ready?</a></p>',
    )


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
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
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
