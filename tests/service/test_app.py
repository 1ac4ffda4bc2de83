import base64

import pytest

from service import errors, formats, schemas, wire
from tests.service.toy import encoded, picture


def ask(client, image=None, **kwargs):
    body = encoded(picture() if image is None else image)
    return client.post("/detect", content=body, **kwargs)


def test_answer_has_exactly_the_documented_shape(client):
    answer = ask(client)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert list(document) == ["model", "image", "detections", "timings_ms"]
    assert document["model"] == {"name": "toy", "version": "1"}
    assert document["image"] == {"width": 96, "height": 64}
    first = document["detections"][0]
    assert list(first) == ["label", "class_id", "score", "box", "mask", "keypoints"]
    assert first["label"] == "cat"
    assert first["box"] == [0.0, 0.0, 48.0, 32.0]
    assert first["score"] == round(250 / 255, 4)
    assert first["mask"]["size"] == [64, 96]
    assert [len(point) for point in first["keypoints"]] == [3, 3]
    assert list(document["timings_ms"]) == ["decode", "queue", "detect", "masks", "keypoints", "encode"]
    schemas.Answer.model_validate(document)


def test_three_forms_give_the_same_answer(client):
    image = encoded(picture())
    text = base64.b64encode(image).decode()
    options = {"confidence": 0.3, "max_detections": 3}
    answers = [
        client.post("/detect", content=image, params=options),
        client.post("/detect", content=image, params=options, headers={"content-type": "image/png"}),
        client.post(
            "/detect", content=image, params=options, headers={"content-type": "application/x-www-form-urlencoded"}
        ),
        client.post("/detect", files={"image": ("photo.png", image, "image/png")}, data=options),
        client.post("/detect", files={"file": image}, params=options),
        client.post("/detect", json={"image": text, **options}),
        client.post("/detect", json={"image": f"data:image/png;base64,{text}"}, params=options),
    ]
    found = [answer.json().get("detections") for answer in answers]
    assert len(found[0]) == 3
    assert all(one == found[0] for one in found), [answer.text[:200] for answer in answers]


def test_what_was_not_asked_for_is_absent_and_not_computed(client, engine):
    document = ask(client, params={"masks": "none", "keypoints": "false"}).json()
    assert list(document["detections"][0]) == ["label", "class_id", "score", "box"]
    assert engine.rois == {"masks": [], "keypoints": []}


def test_confidence_selects_and_heads_see_only_that(client, engine):
    document = ask(client, params={"confidence": 0.7}).json()
    assert [row["label"] for row in document["detections"]] == ["cat", "dog"]
    assert engine.rois == {"masks": [2], "keypoints": [2]}


def test_confidence_below_the_floor_is_accepted(client):
    assert len(ask(client, params={"confidence": 0}).json()["detections"]) == 4


def test_no_detection_runs_no_head(client, engine):
    document = ask(client, picture(red=0)).json()
    assert document["detections"] == []
    assert engine.rois == {"masks": [], "keypoints": []}


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"conf": 0.5}, "known are: confidence, max_detections, masks, mask_threshold,"),
        ({"confidence": 1.5}, "confidence = '1.5'"),
        ({"confidence": "nan"}, "confidence"),
        ({"max_detections": 0}, "max_detections"),
        ({"max_detections": 5}, "at most 4"),
        ({"masks": "contour"}, "masks"),
        ({"mask_threshold": 0}, "mask_threshold"),
        ({"mask_threshold": 1.01}, "mask_threshold"),
        ({"mask_interpolation": "nearest"}, "'bilinear' or 'bicubic'"),
        ({"polygon_tolerance": -1}, "polygon_tolerance"),
        ({"polygon_tolerance": "inf"}, "polygon_tolerance"),
        ({"box_format": "yxyx"}, "'xyxy', 'xywh' or 'cxcywh'"),
        ({"keypoint_format": "xy"}, "'xys' or 'coco'"),
        ({"format": "xml"}, "'json', 'ndjson'"),
        ({"image_id": 2**53}, "image_id"),
        ({"keypoints": "perhaps"}, "keypoints"),
        ({"confidence": [0.1, 0.2]}, "given twice"),
    ],
)
def test_wrong_options_are_told(client, params, told):
    answer = ask(client, params=params)
    assert answer.status_code == 422
    assert told in answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "content", "status", "code"),
    [
        ({}, b"", 400, "empty-body"),
        ({}, b"hello, this is text", 415, "not-an-image"),
        ({"content-type": "text/html"}, b"<html>", 415, "unsupported-type"),
        ({"content-encoding": "gzip"}, b"\x1f\x8b", 415, "unsupported-type"),
        ({}, encoded(picture(), "JPEG")[:900], 422, "broken-image"),
        ({}, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not-an-image"),
        ({"content-type": "application/json"}, b"{", 400, "malformed-request"),
        ({"content-type": "application/json"}, b"[1]", 400, "malformed-request"),
        ({"content-type": "application/json"}, b'{"image": 5}', 400, "malformed-request"),
        ({"content-type": "application/json"}, b'{"image": "%%%"}', 400, "malformed-request"),
        ({"content-type": "application/json"}, b'{"image": ""}', 400, "empty-body"),
        ({"content-type": "multipart/form-data"}, b"--x", 400, "malformed-request"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"nonsense", 400, "malformed-request"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x--\r\n", 400, "malformed-request"),
    ],
)
def test_bad_bodies_are_refused_and_the_service_lives(client, headers, content, status, code):
    answer = client.post("/detect", content=content, headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:limner:problem:{code}"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(answer.json()) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert ask(client).status_code == 200


def test_body_cap_holds_declared_and_streamed(serve):
    def chunks():
        for _ in range(100):
            yield b"x" * 100

    with serve(max_body_bytes=1000) as client:
        for content in (b"x" * 1001, chunks()):
            answer = client.post("/detect", content=content)
            assert answer.status_code == 413
            assert "LIMNER_MAX_BODY_BYTES" in answer.json()["detail"]


def test_pixel_cap(serve):
    with serve(max_pixels=1000) as client:
        answer = ask(client)
        assert answer.status_code == 413
        assert "LIMNER_MAX_PIXELS" in answer.json()["detail"]


def test_unknown_model_route_and_method(client):
    assert ask(client, params={"model": "nobody"}).json()["type"].endswith("unknown-model")
    assert client.get("/nothing").json()["type"].endswith("unknown-route")
    answer = client.get("/detect")
    assert answer.json()["type"].endswith("wrong-method")
    assert answer.headers["allow"] == "POST"


def test_request_id_is_kept_if_harmless_and_made_otherwise(client):
    assert client.get("/healthz", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    made = client.get("/nothing", headers={"x-request-id": "a b<script>"})
    assert len(made.headers["x-request-id"]) == 32
    assert made.json()["request_id"] == made.headers["x-request-id"]


def test_unexpected_error_is_a_problem_without_its_inside(client, monkeypatch):
    def boom(*_):
        raise ZeroDivisionError("secret inner state")

    monkeypatch.setattr(formats, "chosen", boom)
    answer = ask(client)
    assert answer.status_code == 500
    assert answer.json()["type"].endswith("internal-error")
    assert "secret" not in answer.text


def test_operations(client):
    ask(client)
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "toy"}
    text = client.get("/metrics").text
    for line in (
        'limner_request_duration_seconds_count{code="200",route="/detect"} 1.0',
        'limner_detections_total{label="cat",model="toy",version="1"} 2.0',
        'limner_batch_close_total{model="toy",reason="drained",version="1"} 1.0',
    ):
        assert line in text, f"{line} not in\n{text}"


def test_unknown_paths_do_not_become_metric_labels(client):
    client.get("/wp-admin.php")
    text = client.get("/metrics").text
    assert "wp-admin" not in text
    assert 'route="unmatched"' in text


def test_models(client):
    listed = client.get("/models").json()
    assert listed["default"] == "toy"
    assert [(model["name"], model["state"]) for model in listed["models"]] == [("toy", "ready")]
    details = client.get("/models/toy").json()
    assert details["classes"] == ["cat", "dog"]
    assert details["keypoints"]["skeleton"] == [[0, 1]]
    assert details["ap"] == {"bbox": {"AP": 0.5}}
    assert details["engine"]["golden"]["num_unmatched"] == 0
    assert client.get("/models/nobody").status_code == 404


def test_openapi_describes_detect(client):
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/detect"]["post"]
    assert [item["name"] for item in operation["parameters"]] == list(wire.Options.model_fields)
    forms = set(operation["requestBody"]["content"])
    assert {"image/*", "multipart/form-data", "application/json"} <= forms
    assert {"200", "400", "413", "415", "422", "429", "500", "503", "504"} <= set(operation["responses"])
    shapes = document["components"]["schemas"]
    assert shapes["Answer"]["example"] == schemas.example("json")
    assert "Problem" in shapes


def test_the_documentation_loads_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert page.status_code == 200
    assert "<code>/detect</code>" in page.text
    for outside in ('src="http', 'href="http', "url(", "@import", "<script"):
        assert outside not in page.text


@pytest.mark.parametrize("error", errors.all_errors(), ids=lambda error: error.code)
def test_every_error_is_complete_and_answers_as_a_problem(client, monkeypatch, error):
    def refuse(*_):
        raise error("what to do")

    monkeypatch.setattr(wire, "parse_upload", refuse)
    answer = ask(client)
    assert answer.status_code == error.status
    body = answer.json()
    assert body["type"] == f"urn:limner:problem:{error.code}"
    assert (body["title"], body["detail"], body["instance"]) == (error.title, "what to do", "/detect")
    assert ("retry-after" in answer.headers) == (error.retry_after_s is not None)


def test_error_codes_are_distinct_and_drawn():
    found = errors.all_errors()
    assert len({error.code for error in found}) == len(found)
    assert len({error.title for error in found}) >= len(found) - 1  # InternalError repeats the root's
    for error in found:
        assert f"{error.__name__} " in (errors.__doc__ or ""), f"{error.__name__} is not drawn in the docstring"
        assert f"{error.status}" in (errors.__doc__ or "")
