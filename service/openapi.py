"""What /detect adds to the OpenAPI document: the three request forms, the options, the answers and the errors.

The route reads its request and writes its answer by hand, so that an unknown option is refused in every form alike;
hence both are described here, from the same `Options` and `FORMATS` that read and write them.
"""

from typing import Any

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


def _parameters() -> list[dict[str, Any]]:
    parameters = []
    for name, schema in _options_schema().items():
        described = dict(schema)
        description = described.pop("description")
        parameters.append(
            {"name": name, "in": "query", "required": False, "description": description, "schema": described}
        )
    return parameters


def _object(image: dict[str, Any], description: str) -> dict[str, Any]:
    properties = {"image": image, **_options_schema()}
    return {"type": "object", "properties": properties, "description": description}


def problems(
    *classes: type[errors.ServiceError], model: type[BaseModel] = schemas.Problem
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these errors; those that share a status share an entry."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for error in classes:
        told = f"{error.code}: {error.title}."
        if error.status in by_status:
            by_status[error.status]["description"] += f"\n\n{told}"
            continue
        by_status[error.status] = {"description": told, "model": model}
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


def _answers() -> dict[str, Any]:
    """The 200 of /detect: every media type with an example, JSON with one for each choice of `masks`."""
    content: dict[str, Any] = {}
    for name, form in FORMATS.items():
        kind = "string" if form.shows_picture or name == "ndjson" else "object" if name != "coco" else "array"
        schema = {"type": "array" if name == "cvat" else kind, "description": f"format={name}. {form.description}"}
        schema |= {"format": "binary"} if form.shows_picture else {}
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
    **problems(*_HERE, model=schemas.ProtocolError),
}
