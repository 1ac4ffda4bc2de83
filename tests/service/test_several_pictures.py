"""Several pictures in one form: answers in order, each failing alone, permits all or none."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service import schemas
from tests.service.toy import encoded, picture, wait_until

BROKEN = encoded(picture(), "JPEG")[:900]
SCENES = [encoded(picture(64, 96, 250, seed=1)), encoded(picture(50, 40, 130, seed=2)), encoded(picture(64, 96, 0))]


def ask(client, images, field="image", **kwargs):
    return client.post("/detect", files=[(field, image) for image in images], **kwargs)


def settled(document: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run."""
    return {name: value for name, value in document.items() if name != "timings_ms"}


def test_answers_are_those_of_each_alone_in_order(client):
    params = {"confidence": 0.3, "masks": "polygon"}
    alone = [settled(ask(client, [image], params=params).json()) for image in SCENES]
    assert [len(answer["detections"]) for answer in alone] == [4, 3, 0]
    document = ask(client, SCENES, params=params).json()
    assert list(document) == ["model", "results"]
    assert document["model"] == {"name": "toy", "version": "1"}
    assert [settled(result) for result in document["results"]] == alone
    assert [settled(result) for result in ask(client, SCENES, "file", params=params).json()["results"]] == alone
    schemas.Answers.model_validate(document)


def test_a_lone_picture_is_answered_as_ever(client):
    assert list(ask(client, SCENES[:1]).json()) == ["model", "image", "detections", "timings_ms"]


def test_pictures_of_a_request_go_together(client, engine):
    assert ask(client, SCENES[:1] * 4).status_code == 200
    assert sum(engine.batches) == 4


def test_one_that_fails_has_its_problem_and_the_others_are_served(client):
    answer = ask(client, [SCENES[0], BROKEN, b"text", SCENES[1]])
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert ["error" in result for result in results] == [False, True, True, False]
    told = [result["error"] for result in results[1:3]]
    assert [problem["type"].rsplit(":", 1)[-1] for problem in told] == ["broken-image", "not-an-image"]
    assert [problem["status"] for problem in told] == [422, 415]
    assert told[0]["request_id"] == answer.headers["x-request-id"]
    schemas.Answers.model_validate(answer.json())


def test_ndjson_tells_where_each_picture_begins(client):
    answer = ask(client, [SCENES[0], BROKEN, SCENES[2]], params={"format": "ndjson"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    first = 1 + lines[0]["num_detections"]
    assert lines[first]["error"]["status"] == 422
    assert lines[first + 1]["num_detections"] == 0
    assert len(lines) == first + 2


def test_coco_counts_image_ids_up(client):
    rows = ask(client, [SCENES[0], SCENES[2], SCENES[0]], params={"format": "coco", "image_id": 7}).json()
    assert [row["image_id"] for row in rows] == [7, 7, 7, 9, 9, 9]


def test_coco_fails_as_a_whole(client):
    answer = ask(client, [SCENES[0], BROKEN], params={"format": "coco"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("picture 2 of 2: ")
    high = ask(client, SCENES, params={"format": "coco", "image_id": 2**53 - 2})
    assert (high.status_code, high.json()["type"].rsplit(":", 1)[-1]) == (422, "invalid-option")


@pytest.mark.parametrize("form", ["jpeg", "png", "roboflow", "labelstudio", "cvat"])
def test_forms_of_one_picture_refuse_several(client, engine, form):
    answer = ask(client, SCENES, params={"format": form})
    assert answer.status_code == 422
    assert "json, ndjson, coco" in answer.json()["detail"]
    assert engine.batches == []


def test_an_empty_field_is_named(client):
    answer = ask(client, [SCENES[0], b""])
    assert answer.status_code == 400
    assert "image field 2 of 2 is empty" in answer.json()["detail"]


@pytest.mark.parametrize("settings", [{"max_pictures": 2}, {"max_requests": 2}])
def test_too_many_are_refused_undecoded(serve, engine, settings):
    with serve(**settings) as client:
        answer = ask(client, [BROKEN] * 3)
        assert answer.status_code == 413
        assert "at most 2" in answer.json()["detail"]
        assert "LIMNER_MAX_PICTURES" in answer.json()["detail"]
        assert ask(client, SCENES[:2]).status_code == 200


def test_permits_are_taken_all_or_none_and_given_back(serve, engine):
    with serve(max_requests=4) as client, ThreadPoolExecutor(2) as pool:
        engine.entered.clear()
        engine.free.clear()
        first = pool.submit(ask, client, SCENES[:2])
        assert engine.entered.wait(10)
        admission = client.app.state.service.admission
        wait_until(lambda: admission.num_held == 2)
        refused = ask(client, SCENES)
        assert refused.status_code == 429
        assert "3 pictures" in refused.json()["detail"]
        assert refused.headers["retry-after"] == "1"
        assert admission.num_held == 2
        engine.free.set()
        assert first.result(10).status_code == 200
        wait_until(lambda: admission.num_held == 0)
        assert ask(client, [*SCENES, BROKEN]).status_code == 200
        wait_until(lambda: admission.num_held == 0)


def test_an_engine_failure_is_in_each_answer(client, engine):
    engine.fail = True
    results = ask(client, SCENES[:1] * 2).json()["results"]
    statuses = [result["error"]["status"] for result in results]
    assert 500 in statuses
    assert set(statuses) <= {500, 503}, "the other one may come while the engine is being rebuilt"
    assert "secret" not in json.dumps(results)
