"""The OpenAPI document, held to the application: what it allows or forbids is answered as it says, and never by 5xx.

Requests are derived from the document by schemathesis, the same ones in each run; a part of the generated names and
pictures is replaced by real ones, since random bytes would never pass the decoder.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.answers import MASKS
from service.app import create_app
from service.engines import Opened
from service.formats import FORMATS
from service.inference_protocol import OUTPUTS
from service.security import HEALTH_ROUTES
from service.settings import Settings
from tests.service.toy import ToyEngine, encoded, picture, wait_until

schemathesis = pytest.importorskip("schemathesis", reason='pip install -e ".[dev]"')
requests = pytest.importorskip("requests", reason='pip install -e ".[dev]"')
hypothesis = pytest.importorskip("hypothesis", reason='pip install -e ".[dev]"')

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

ADMIN, USER = "an-admin-key-of-32-characters-000", "an-user-key-of-32-characters-0000"
PICTURES = tuple(encoded(picture(red=red), kind) for red, kind in ((250, "PNG"), (130, "JPEG"), (0, "WEBP")))
SETTINGS = hypothesis.settings(
    derandomize=True, database=None, deadline=None, max_examples=25, suppress_health_check=list(hypothesis.HealthCheck)
)

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]

schemathesis.openapi.format("binary", st.sampled_from(PICTURES) | st.binary(max_size=40))


@schemathesis.serializer("image/*")
def as_they_are(ctx: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.fixture(scope="module")
def running(bundles: Path) -> Iterator[TestClient]:
    """Every group of routes is on, and every route that may ask for a key does."""
    app = create_app(
        Settings(bundles=bundles, admin_key=ADMIN, api_keys=USER, docs="key", max_body_bytes=2**20),
        lambda bundle: Opened(ToyEngine(), "a test"),
    )
    with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
        wait_until(lambda: not app.state.service.store.is_loading)
        yield client


SCHEMA = schemathesis.openapi.from_dict(create_app(Settings()).openapi())
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
BY_LABEL = {operation.label: operation for operation in OPERATIONS}
# What breaks the document's rules exists only where a request has something to get wrong.
RUNS = [(operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
RUNS += [(operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation.body or operation.query]


def send(client: TestClient, case: Any, headers: dict[str, str]) -> Any:
    """The very bytes that schemathesis would put on the wire."""
    given_ = case.as_transport_kwargs(base_url="http://testserver", headers=headers)
    parts = ("method", "url", "headers", "params", "data", "files", "json", "cookies")
    prepared = requests.Request(**{key: given_[key] for key in parts if key in given_}).prepare()
    return client.request(prepared.method, prepared.url, headers=dict(prepared.headers), content=prepared.body)


def made_real(case: Any) -> None:
    """Every other name is the model's, and every other base64 a picture."""
    names = case.path_parameters or {}
    if len(names.get("name", "")) % 2:
        names.update({key: value for key, value in (("name", "toy"), ("version", "1")) if key in names})
    if isinstance(case.body, dict) and len(str(case.body)) % 2:
        if "image" in case.body and isinstance(case.body["image"], str):
            case.body["image"] = base64.b64encode(PICTURES[0]).decode()


@pytest.mark.parametrize(
    ("operation", "mode"), RUNS, ids=[f"{operation.label}-{mode.value}" for operation, mode in RUNS]
)
def test_no_answer_is_outside_the_document(operation: Any, mode: Any, running: TestClient) -> None:
    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        made_real(case)
        answer = send(running, case, {"x-api-key": ADMIN})
        case.validate_response(answer, checks=CHECKS)
        if operation.path == "/models/{name}/unload" and answer.status_code == 200:
            assert running.post("/models/toy/load", headers={"x-api-key": ADMIN}).status_code == 200

    each()


def infer(**more: Any) -> dict[str, Any]:
    data = [base64.b64encode(each).decode() for each in PICTURES[:2]]
    return {"json": {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": data}], **more}}


DETECT, INFER, LOAD = "POST /detect", "POST /v2/models/{name}/infer", "POST /models/{name}/load"
PNG, TWO = PICTURES[0], [("image", ("a.png", each)) for each in PICTURES[:2]]
BINARY = {"parameters": {"binary_data_output": True}, "id": "7"}
EXPECTED: list[tuple[str, int, dict[str, Any]]] = [
    *((DETECT, 200, {"content": PNG, "params": {"format": name}}) for name in FORMATS),
    *((DETECT, 200, {"content": PNG, "params": {"masks": choice}}) for choice in MASKS),
    *((DETECT, 200, {"files": TWO, "params": {"format": name}}) for name, form in FORMATS.items() if form.join),
    (DETECT, 200, {"files": [*TWO, ("image", ("b", b"text"))]}),
    (DETECT, 200, {"content": PNG, "params": {"keypoint_format": "coco", "box_format": "xywh"}}),
    (DETECT, 400, {"content": b""}),
    (DETECT, 401, {"content": PNG, "headers": {"x-api-key": "another"}}),
    (DETECT, 404, {"content": PNG, "params": {"model": "nobody"}}),
    (DETECT, 413, {"content": PNG + bytes(2**20)}),
    (DETECT, 413, {"files": TWO * 10}),
    (DETECT, 415, {"content": b"just text"}),
    (DETECT, 422, {"content": PNG[:-60]}),
    (DETECT, 422, {"json": {"url": "https://example.org/photo.jpg"}}),
    *((INFER, 200, infer(outputs=[{"name": name}])) for name in OUTPUTS),
    (INFER, 200, infer()),
    (INFER, 200, infer(**BINARY)),
    (INFER, 400, {"content": b"[" * 5000}),
    (INFER, 401, {"headers": {"x-api-key": "another"}}),
    (INFER, 415, {"content": PNG, "headers": {"content-encoding": "br"}}),
    ("POST /models/{name}/unload", 200, {}),
    (DETECT, 503, {"content": PNG}),
    ("GET /v2/models/{name}", 503, {}),
    ("GET /readyz", 503, {}),
    ("GET /models", 200, {}),
    ("GET /models/{name}", 200, {}),
    (LOAD, 401, {"headers": {"x-api-key": USER}}),
    (LOAD, 200, {}),
    ("GET /models", 200, {}),
    ("GET /models/{name}", 200, {}),
    ("GET /models/{name}", 401, {"headers": {"x-api-key": "another"}}),
    ("GET /metrics", 200, {}),
    ("GET /v2", 200, {}),
    ("GET /v2", 401, {"headers": {"x-api-key": "another"}}),
]


def test_the_usual_answers_are_as_documented(running: TestClient) -> None:
    for label, status, given_ in EXPECTED:
        operation = BY_LABEL[label]
        headers = {"x-api-key": ADMIN} | given_.get("headers", {})
        path = operation.path.replace("{name}", "toy")
        answer = running.request(operation.method, path, **{**given_, "headers": headers})
        assert answer.status_code == status, (label, answer.text[:300])
        kind = answer.headers["content-type"]
        assert kind.partition(";")[0] in documented(operation, status), (label, status, kind)
        operation.validate_response(answer)


def documented(operation: Any, status: int) -> list[str]:
    return list(operation.definition.raw["responses"][str(status)]["content"])


def test_the_document_says_who_needs_a_key(running: TestClient) -> None:
    for operation in OPERATIONS:
        is_open = operation.path in HEALTH_ROUTES
        path = operation.path.replace("{name}", "toy").replace("{version}", "1")
        assert (running.request(operation.method, path).status_code != 401) == is_open
        assert ("security" in operation.definition.raw) != is_open
        assert ("401" in operation.definition.raw["responses"]) != is_open


def test_a_slash_too_many_is_told_and_not_redirected(running: TestClient) -> None:
    answer = running.get("/models/toy/", headers={"x-api-key": ADMIN})
    assert answer.status_code == 404
    assert answer.json()["type"].endswith("unknown-route")
