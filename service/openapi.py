"""What the routes add to the OpenAPI document: the request forms, the options, the answers and the errors.

The route reads its request and writes its answer by hand, so that an unknown option is refused in every form alike;
hence both are described here, from the same `Options` and `FORMATS` that read and write them.
"""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from service import errors, schemas, tensors, wire
from service.answers import MASKS
from service.formats import FORMATS

RAW = {"type": "string", "format": "binary", "description": "The picture's bytes; options go in the query."}


def _options_schema() -> dict[str, Any]:
    schema = wire.Options.model_json_schema()["properties"]
    for option in schema.values():
        option.pop("title", None)
        # `null` is how an option is left out in Python; on the wire it is left out.
        choices = [choice for choice in option.pop("anyOf", []) if choice != {"type": "null"}]
        option.update(*choices)
        if option.get("default", 0) is None:
            del option["default"]
    return schema


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Of an option in the query or a form, where a list is written as JSON."""
    if schema.get("type") != "array":
        return schema
    told = {"type": "string", "contentMediaType": "application/json", "description": schema["description"]}
    return {**told, "contentSchema": {name: value for name, value in schema.items() if name != "description"}}


def _parameters() -> list[dict[str, Any]]:
    parameters = []
    for name, schema in _options_schema().items():
        schema = _as_text(schema)
        described = dict(schema)
        description = described.pop("description")
        parameters.append(
            {"name": name, "in": "query", "required": False, "description": description, "schema": described}
        )
    return parameters


def _object(image: dict[str, Any], description: str, is_form: bool = False) -> dict[str, Any]:
    options = _options_schema()
    properties = {"image": image, **({name: _as_text(each) for name, each in options.items()} if is_form else options)}
    return {"type": "object", "properties": properties, "description": description}


def problems(
    *classes: type[errors.ServiceError], model: type[BaseModel] = schemas.Problem
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these errors; those that share a status share an entry. `correct` adds the shapes."""
    media_type = "application/problem+json" if model is schemas.Problem else "application/json"
    content = {media_type: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    by_status: dict[int | str, dict[str, Any]] = {}
    for error in classes:
        told = f"{error.code}: {error.title}."
        if error.status in by_status:
            by_status[error.status]["description"] += f"\n\n{told}"
            continue
        by_status[error.status] = {"description": told, "content": content}
    return by_status


DETECT: dict[str, Any] = {
    "parameters": _parameters(),
    "requestBody": {
        "required": False,  # the query may name a url instead
        "content": {
            "image/*": {"schema": RAW},
            "application/octet-stream": {"schema": RAW},
            "application/x-www-form-urlencoded": {
                "schema": {
                    **RAW,
                    "description": "The picture's bytes too: what curl --data-binary @photo.jpg sends by itself.",
                }
            },
            "multipart/form-data": {
                "schema": {
                    "required": ["image"],
                    **_object(
                        {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
                        "A field 'image' (or 'file') for each picture; options as further fields or in the query. "
                        "Several pictures are answered together, in order.",
                        is_form=True,
                    ),
                }
            },
            "application/json": {
                "schema": {
                    "anyOf": [{"required": ["image"]}, {"required": ["url"]}],
                    **_object(
                        {"type": "string", "description": "base64; a data: URL is taken too."},
                        "The picture as base64 in 'image', or its address in 'url'; options beside it or in the query.",
                    ),
                },
                "example": {"image": "/9j/4AAQSkZJRg...", "confidence": 0.5, "masks": "rle"},
            },
        },
    },
}


def _rows_of(*required: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "object", "required": list(required)}}


# Of the forms that others have fixed, what each answer holds; the rest is theirs to document.
_SHAPES: dict[str, dict[str, Any]] = {
    "coco": _rows_of("image_id", "category_id", "bbox", "score"),
    "roboflow": {"type": "object", "required": ["time", "image", "predictions"]},
    "labelstudio": {"type": "object", "required": ["predictions"]},
    "cvat": _rows_of("label", "type", "confidence"),
}


def _answers() -> dict[str, Any]:
    """The 200 of /detect: every media type with an example, JSON with one for each choice of `masks`."""
    content: dict[str, Any] = {}
    for name, form in FORMATS.items():
        shape = {"type": "string", "format": "binary"} if form.shows_picture else _SHAPES.get(name, {"type": "string"})
        schema = {**shape, "description": f"format={name}. {form.description}"}
        content[form.media_type] = {"schema": schema, "example": schemas.example(name)}
    ours = content[FORMATS["json"].media_type]
    del ours["schema"], ours["example"]  # FastAPI adds the schema of `schemas.Answer`
    ours["examples"] = {
        choice: {"summary": f"masks={choice}", "value": schemas.example("json", choice)} for choice in MASKS
    }
    told = "The detections, best first: JSON, or the form that `format` names or Accept prefers."
    return {"description": told, "content": content}


_NOT_HERE = (
    errors.ClientGone,
    errors.UnknownRoute,
    errors.WrongMethod,
    errors.KeyRequired,
    errors.AdminOff,
    errors.OriginRefused,
)
_HERE = [error for error in errors.all_errors() if error not in _NOT_HERE]
DETECT_RESPONSES: dict[int | str, dict[str, Any]] = {200: _answers(), **problems(*_HERE)}


def inlined(schema: Any, definitions: dict[str, Any] | None = None) -> Any:
    """A pydantic schema in one piece: its "#/$defs" would not be found within an OpenAPI document."""
    if isinstance(schema, list):
        return [inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    definitions = definitions or schema.get("$defs", {})
    if "$ref" in schema:
        return inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {name: inlined(each, definitions) for name, each in schema.items() if name != "$defs"}


SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Asked for where the service has API keys."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
_BY_URL = (errors.UrlFailed, errors.UrlRefused)
_BEHIND = "The same JSON, then binary data; Inference-Header-Content-Length is the length of the JSON."
INFER: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": inlined(tensors.InferRequest.model_json_schema())},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary", "description": _BEHIND}},
        },
    },
}
INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs asked for.",
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary", "description": _BEHIND}}
        },
    },
    **problems(*(each for each in _HERE if each not in _BY_URL), model=schemas.ProtocolError),
}


def correct(app: FastAPI, open_paths: Collection[str]) -> None:
    """Makes `app.openapi` say what this application does where FastAPI guesses; `open_paths` ask for no API key."""
    guess = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _corrected(guess(), open_paths)
        return app.openapi_schema

    app.openapi = document


def _corrected(document: dict[str, Any], open_paths: Collection[str]) -> dict[str, Any]:
    for model in (schemas.Problem, schemas.ProtocolError):
        document["components"]["schemas"][model.__name__] = model.model_json_schema()
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    document["components"]["securitySchemes"] = SECURITY_SCHEMES
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            if "HTTPValidationError" in str(answers.get("422")):
                del answers["422"]  # what the frame would check by itself is text that may be anything
            if path not in open_paths:
                is_admin = "403" in answers
                operation["security"] = [*([] if is_admin else [{}]), *({name: []} for name in SECURITY_SCHEMES)]
                model = schemas.ProtocolError if path.startswith("/v2") else schemas.Problem
                (refusal,) = problems(errors.Unauthorized, model=model).values()
                answers.setdefault("401", refusal)
            operation["responses"] = dict(sorted(answers.items()))
    return document
