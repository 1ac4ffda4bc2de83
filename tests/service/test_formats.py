"""Every form of answer through the application, and which one a request gets."""

import base64
import io
import json
from typing import Any, get_args

import numpy as np
import orjson
import PIL.Image
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO
from starlette.testclient import TestClient

from service import answers, schemas, wire
from service.app import create_app
from service.engines import Opened
from service.formats import FORMATS, WRITING
from service.keypoints import VISIBLE
from service.masks import decode
from service.settings import Settings
from tests.service.toy import encoded, picture, wait_until, write_bundle

BODY = encoded(picture(seed=2))  # bright, since the toy's masks are as sure as the picture is bright
JSON_FORMS = [name for name, form in FORMATS.items() if not form.shows_picture and name != "ndjson"]


def ask(client: Any, accept: str | None = None, **options: Any) -> Any:
    answer = client.post("/detect", content=BODY, params=options, headers={"accept": accept} if accept else {})
    assert answer.status_code == 200, answer.text
    return answer


def detections(client: Any, **options: Any) -> list[dict[str, Any]]:
    document = ask(client, **options).json()
    schemas.Answer.model_validate(document)
    return document["detections"]


def pixels(client: Any) -> list[np.ndarray]:
    found = [decode(row["mask"]) for row in detections(client)]
    assert len(found) == 3
    assert all(mask.any() for mask in found)
    return found


def window(mask: dict[str, Any], crop: np.ndarray) -> np.ndarray:
    full = np.zeros((64, 96), np.uint8)
    (x, y), (rows, columns) = mask["offset"], mask["size"]
    full[y : y + rows, x : x + columns] = crop
    return full


def test_every_name_has_its_function():
    assert set(FORMATS) == set(get_args(wire.AnswerFormat))
    assert {*answers.MASKS, "none"} == set(get_args(wire.MaskFormat))
    assert set(answers.KEYPOINTS) == set(get_args(wire.KeypointFormat))
    assert len({form.media_type for form in FORMATS.values()}) == len(FORMATS)
    assert (
        {option for form in FORMATS.values() for option in form.takes} == set(WRITING) <= set(wire.Options.model_fields)
    )


def test_polygons_are_the_mask(client):
    for row, expected in zip(detections(client, masks="polygon"), pixels(client), strict=True):
        assert row["mask"]["format"] == "polygon"
        assert row["mask"]["holes"] == []
        assert (coco.decode(coco.merge(coco.frPyObjects(row["mask"]["polygons"], 64, 96))) == expected).all()


def test_polygon_tolerance_takes_corners_away(client):
    exact, less = (detections(client, masks="polygon", polygon_tolerance=tolerance) for tolerance in (0, 1.5))
    for one, other in zip(exact, less, strict=True):
        assert 6 <= len(other["mask"]["polygons"][0]) < len(one["mask"]["polygons"][0])


def test_png_and_bitmap_are_the_mask(client):
    rows = zip(detections(client, masks="png"), detections(client, masks="bitmap"), pixels(client), strict=True)
    for png, bitmap, expected in rows:
        shown = PIL.Image.open(io.BytesIO(base64.b64decode(png["mask"]["data"])))
        assert (window(png["mask"], np.asarray(shown)) == expected).all()
        columns = bitmap["mask"]["size"][1]
        packed = np.frombuffer(base64.b64decode(bitmap["mask"]["data"]), np.uint8)
        bits = np.unpackbits(packed.reshape(-1, -(-columns // 8)), axis=1, count=columns)
        assert (window(bitmap["mask"], bits) == expected).all()


def test_probabilities_are_sent_as_they_are_and_nothing_is_pasted(client, engine, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("pasted though nobody asked for it")

    monkeypatch.setattr("service.detector.PASTE", {"bilinear": never, "bicubic": never})
    rows = detections(client, masks="probability", box_format="cxcywh")
    assert engine.rois["masks"] == [len(rows)]
    for row in rows:
        assert row["mask"]["size"] == [28, 28]
        assert len(row["mask"]["data"]) == 1048
        x1, y1, x2, y2 = row["mask"]["box"]
        assert row["box"] == [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def test_threshold_and_interpolation(client):
    areas = [
        sum(int(decode(row["mask"]).sum()) for row in detections(client, mask_threshold=level))
        for level in (0.05, 0.5, 0.6)
    ]
    assert areas[0] > areas[1] > areas[2] > 0
    assert areas[1] == sum(map(np.sum, pixels(client)))
    smooth = [decode(row["mask"]) for row in detections(client, mask_interpolation="bicubic")]
    for one, other in zip(smooth, pixels(client), strict=True):
        assert 0.9 < (one & other).sum() / (one | other).sum() <= 1


def test_boxes_in_three_ways(client):
    ways = [[row["box"] for row in detections(client, box_format=name)] for name in get_args(wire.BoxFormat)]
    for (x1, y1, x2, y2), sized, centred in zip(*ways, strict=True):
        assert sized == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.011)
        assert centred == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], abs=0.011)


def test_keypoints_flat_with_visibility(client):
    points = np.array([[[1.254, 2, 0.9], [3, 4, 0.049]], [[5, 6, VISIBLE], [7, 8, 0]]], np.float32)
    assert answers.KEYPOINTS["coco"](points) == [[1.25, 2, 2, 3, 4, 1], [5, 6, 2, 7, 8, 1]]
    for row, flat in zip(detections(client), detections(client, keypoint_format="coco"), strict=True):
        assert flat["keypoints"][:2] == row["keypoints"][0][:2]
        assert len(flat["keypoints"]) == 3 * len(row["keypoints"])


def test_ndjson_is_the_same_in_lines(client):
    answer = ask(client, "application/x-ndjson", masks="png")
    head, *rows = (json.loads(line) for line in answer.text.splitlines())
    assert answer.text.endswith("\n")
    assert list(head) == ["model", "image", "num_detections", "timings_ms"]
    assert rows == detections(client, masks="png")
    assert head["num_detections"] == len(rows)


def test_coco_results_are_loaded_by_pycocotools(client):
    rows = ask(client, "application/vnd.coco.results+json", image_id=7).json()
    ours = detections(client)
    truth = COCO()
    truth.dataset = {"images": [{"id": 7, "height": 64, "width": 96}], "categories": [{"id": 1}, {"id": 2}]}
    truth.createIndex()
    loaded = truth.loadRes(rows).loadAnns(truth.loadRes(rows).getAnnIds())
    assert [one["category_id"] for one in loaded] == [row["class_id"] + 1 for row in ours]
    for one, row, expected in zip(loaded, ours, pixels(client), strict=True):
        assert (truth.annToMask({**one, "image_id": 7}) == expected).all()
        assert one["score"] == row["score"]
        for (x, y, v), (ours_x, ours_y, _) in zip(np.reshape(one["keypoints"], (-1, 3)), row["keypoints"], strict=True):
            assert (x, y) == pytest.approx((ours_x - 0.5, ours_y - 0.5), abs=0.011)
            assert v in (1, 2)


@pytest.mark.parametrize("name", ["jpeg", "png"])
def test_drawn_pictures(client, name):
    answer = ask(client, format=name)
    assert answer.headers["content-type"] == f"image/{name}"
    drawn = PIL.Image.open(io.BytesIO(answer.content))
    assert (drawn.format, drawn.size) == (name.upper(), (96, 64))


def test_drawn_pictures_stand_upright(client):
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    stream = io.BytesIO()
    PIL.Image.fromarray(picture()).save(stream, "JPEG", exif=turned)
    answer = client.post("/detect?format=png", content=stream.getvalue())
    assert PIL.Image.open(io.BytesIO(answer.content)).size == (64, 96)


@pytest.mark.parametrize("name", FORMATS)
def test_every_form_with_nothing_found_and_with_nothing_asked(client, name):
    nothing = client.post(f"/detect?format={name}", content=encoded(picture(red=0)))
    assert nothing.status_code == 200, nothing.text
    bare = ask(client, format=name, masks="none", keypoints=False)
    for answer in (nothing, bare):
        assert answer.headers["content-type"].partition(";")[0] == FORMATS[name].media_type
    if name in JSON_FORMS:
        assert "rle" not in bare.text
        assert "mask" not in bare.json()
        json.loads(nothing.text)


def test_a_model_without_heads_answers_in_every_form(tmp_path, engine):
    write_bundle(tmp_path, heads=())
    app = create_app(Settings(bundles=tmp_path), opener=lambda bundle: Opened(engine, "a test"))
    with TestClient(app) as client:
        wait_until(lambda: not app.state.service.store.is_loading)
        for name in FORMATS:
            ask(client, format=name)
        for masks in get_args(wire.MaskFormat):
            assert all("mask" not in row for row in detections(client, masks=masks))


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("image/png", "image/png"),
        ("IMAGE/PNG", "image/png"),
        ("image/*", "image/jpeg"),
        ("text/html, image/webp;q=0.9, image/png;q=0.5, image/jpeg;q=0.8", "image/jpeg"),
        ("application/x-ndjson;q=0.5, application/json;q=0.9", "application/json"),
        ("application/json;q=0, application/x-ndjson", "application/x-ndjson"),
        ("application/vnd.coco.results+json; charset=utf-8", "application/vnd.coco.results+json"),
        ("image/png;q=high, application/x-ndjson;q=0.1", "application/x-ndjson"),
        (";;,,=/", "application/json"),
    ],
)
def test_accept_chooses(client, accept, media_type):
    answer = client.post("/detect", content=BODY, headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type


def test_the_option_goes_before_accept_in_all_three_ways(client):
    given = {"accept": "image/png"}
    text = base64.b64encode(BODY).decode()
    for answer in (
        client.post("/detect?format=coco", content=BODY, headers=given),
        client.post("/detect", files={"image": BODY}, data={"format": "coco", "image_id": "3"}, headers=given),
        client.post("/detect", json={"image": text, "format": "coco", "image_id": 3}, headers=given),
    ):
        assert answer.headers["content-type"] == FORMATS["coco"].media_type
        assert answer.json()[0]["category_id"] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "coco", "masks": "polygon"}, "give masks=rle or masks=none, or leave masks=polygon out"),
        ({"format": "coco", "box_format": "xywh"}, "leave out box_format"),
        ({"format": "jpeg", "keypoint_format": "coco"}, "leave out keypoint_format"),
        ({"format": "cvat", "masks": "png"}, "masks=png"),
        ({"format": "labelstudio", "polygon_tolerance": 1}, "leave out polygon_tolerance"),
        ({"image_id": 3}, "leave out image_id"),
    ],
)
def test_what_a_form_cannot_obey_is_refused(client, options, told):
    answer = client.post("/detect", content=BODY, params=options)
    assert answer.status_code == 422
    assert told in answer.json()["detail"]


def test_values_that_are_defaults_are_no_conflict(client):
    defaults = {name: field.default for name, field in wire.Options.model_fields.items() if field.default is not None}
    for name in FORMATS:
        ask(client, **{**defaults, "format": name})


def test_openapi_has_every_option_and_every_form(client):
    operation = client.get("/openapi.json").json()["paths"]["/detect"]["post"]
    content = operation["responses"]["200"]["content"]
    assert list(content) == [form.media_type for form in FORMATS.values()]
    for name, form in FORMATS.items():
        assert content[form.media_type].get("example") or content[form.media_type]["examples"], name
        if name != "json":
            assert form.description in content[form.media_type]["schema"]["description"]
    assert set(content["application/json"]["examples"]) == set(answers.MASKS)
    choices = content["application/json"]["schema"]["anyOf"]
    assert [choice["$ref"].rsplit("/", 1)[-1] for choice in choices] == ["Answer", "Answers"]
    enums = {item["name"]: item["schema"].get("enum") for item in operation["parameters"]}
    assert enums["format"] == list(FORMATS)
    assert enums["masks"] == list(get_args(wire.MaskFormat))
    assert enums["box_format"] == list(get_args(wire.BoxFormat))
    assert enums["keypoint_format"] == list(get_args(wire.KeypointFormat))
    assert enums["mask_interpolation"] == ["bilinear", "bicubic"]
    assert all(item["description"] for item in operation["parameters"])
    for form in ("multipart/form-data", "application/json"):
        assert set(enums) <= set(operation["requestBody"]["content"][form]["schema"]["properties"])


@pytest.mark.parametrize("masks", answers.MASKS)
def test_examples_are_valid(masks):
    document = schemas.example("json", masks)
    assert schemas.Answer.model_validate(document).detections[0].mask
    assert orjson.loads(orjson.dumps(document)) == document


def test_the_docs_page_shows_every_form(client):
    page = client.get("/docs").text
    assert all(form.media_type in page for form in FORMATS.values())
