"""The Open Inference Protocol as Triton's own client speaks it, over a real socket, on the toy engine."""

import base64
import gzip
import json
import re
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service import errors
from service.app import create_app
from service.engines import Opened
from service.inference_protocol import INPUTS, OUTPUTS
from service.settings import Settings
from service.wire import Options
from tests.service.toy import D, J, ToyEngine, encoded, picture, wait_until, write_bundle

triton = pytest.importorskip("tritonclient.http", reason='pip install -e ".[dev]"')
utils = pytest.importorskip("tritonclient.utils")

PIXELS = np.stack([picture(64, 96, red, seed=red) for red in (250, 130, 0)])
FILES = [encoded(image) for image in PIXELS]
DOCUMENT = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
BROKEN = encoded(picture(), "JPEG")[:900]


@pytest.fixture(scope="module")
def server(bundles) -> Iterator[tuple[str, ToyEngine]]:
    engine = ToyEngine()
    app = create_app(Settings(bundles=bundles), opener=lambda bundle: Opened(engine, "a test"))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started)
    wait_until(lambda: not app.state.service.store.is_loading)
    yield f"127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", engine
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def engine(server) -> ToyEngine:
    server[1].rois["masks"].clear()
    server[1].rois["keypoints"].clear()
    return server[1]


@pytest.fixture
def asking(server) -> Iterator[Any]:
    with triton.InferenceServerClient(server[0]) as client:
        yield client


@pytest.fixture
def plain(serve) -> Iterator[TestClient]:
    with serve() as client:
        yield client


def image_input(files, binary=True):
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    data = files if binary else [base64.b64encode(file) for file in files]
    return tensor.set_data_from_numpy(np.array(data, dtype=object), binary_data=binary)


def pixels_input(pixels, binary=True):
    return triton.InferInput("pixels", pixels.shape, "UINT8").set_data_from_numpy(pixels, binary_data=binary)


def outputs(*names, binary=True):
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def arrays(answer) -> dict[str, np.ndarray]:
    """Texts as bytes, however they came."""
    found = {output["name"]: answer.as_numpy(output["name"]) for output in answer.get_response()["outputs"]}
    for name, values in found.items():
        if values.dtype == object:
            each = [value.encode() if isinstance(value, str) else value for value in values.ravel()]
            found[name] = np.array(each, dtype=object).reshape(values.shape)
    return found


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def detections(client, **options) -> list[dict[str, Any]]:
    """What /detect says of `FILES`."""
    document = client.post("/detect", files=[("image", file) for file in FILES], params=options).json()
    return [result["detections"] for result in document["results"]]


def test_live_ready_and_metadata(asking):
    assert asking.is_server_live()
    assert asking.is_server_ready()
    assert asking.is_model_ready("toy")
    assert asking.is_model_ready("toy", "1")
    assert not asking.is_model_ready("toy", "2")
    assert not asking.is_model_ready("nobody")
    server = asking.get_server_metadata()
    assert (server["name"], server["extensions"]) == ("limner", ["binary_tensor_data"])
    model = asking.get_model_metadata("toy", "1")
    assert asking.get_model_metadata("toy") == model
    assert (model["name"], model["versions"], model["platform"]) == ("toy", ["1"], "toy")
    assert [row["name"] for row in model["inputs"]] == list(INPUTS)
    shapes = {row["name"]: (row["datatype"], row["shape"]) for row in model["outputs"]}
    assert shapes["boxes"] == ("FP32", [-1, D, 4])
    assert shapes["keypoints"] == ("FP32", [-1, D, J, 3])
    assert shapes["answer"] == ("BYTES", [-1])
    assert list(shapes) == list(OUTPUTS)


def test_outputs_say_what_detect_says(asking, plain):
    answer = asking.infer("toy", [image_input(FILES)], request_id="r 1", parameters={"confidence": 0.3})
    head = answer.get_response()
    assert (head["id"], head["model_name"], head["model_version"]) == ("r 1", "toy", "1")
    assert all("binary_data_size" in row["parameters"] for row in head["outputs"])
    found = arrays(answer)
    assert list(found) == ["count", "boxes", "scores", "class_ids", "keypoints", "masks"]
    expected = detections(plain, confidence=0.3)
    assert found["count"].tolist() == [len(rows) for rows in expected] == [4, 3, 0]
    for index, rows in enumerate(expected):
        count = len(rows)
        np.testing.assert_allclose(found["scores"][index, :count], [row["score"] for row in rows], atol=5e-5)
        assert found["class_ids"][index].tolist() == [row["class_id"] for row in rows] + [-1] * (D - count)
        assert [json.loads(mask) for mask in found["masks"][index, :count]] == [row["mask"] for row in rows]
        assert found["masks"][index, count:].tolist() == [b""] * (D - count)
        for name, key in (("boxes", "box"), ("keypoints", "keypoints")):
            there = found[name][index]
            assert not there[count:].any()
            if count:
                np.testing.assert_allclose(there[:count], [row[key] for row in rows], atol=6e-3)


@pytest.mark.parametrize("names", [(), tuple(OUTPUTS)[:-1]])
def test_every_way_to_send_and_to_answer_gives_the_same(asking, names):
    options = {"parameters": {"confidence": 0.3}}
    expected = arrays(asking.infer("toy", [image_input(FILES)], **options))
    for sent in (image_input(FILES, False), pixels_input(PIXELS), pixels_input(PIXELS, False)):
        for binary in (True, False):
            asked = outputs(*names, binary=binary) or None
            answer = asking.infer("toy", [sent], outputs=asked, **options)
            assert_equal(arrays(answer), expected)
            if names:
                assert all(("data" in row) != binary for row in answer.get_response()["outputs"])
    column = triton.InferInput("image", [3, 1], "BYTES").set_data_from_numpy(np.array(FILES, dtype=object)[:, None])
    assert_equal(arrays(asking.infer("toy", [column], model_version="1", **options)), expected)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_requests(asking, encoding):
    options = {"request_compression_algorithm": encoding, "response_compression_algorithm": encoding}
    expected = arrays(asking.infer("toy", [pixels_input(PIXELS)]))
    assert_equal(arrays(asking.infer("toy", [pixels_input(PIXELS)], **options)), expected)


def test_only_what_is_asked_for_is_computed(asking, engine):
    def ask(*names, **parameters):
        engine.rois["masks"].clear()
        engine.rois["keypoints"].clear()
        answer = asking.infer("toy", [image_input(FILES[:1])], outputs=outputs(*names), parameters=parameters)
        assert list(arrays(answer)) == list(names)
        return [kind for kind, rois in engine.rois.items() if rois]

    assert ask("scores", "boxes") == []
    assert ask("count", "masks") == ["masks"]
    assert ask("keypoints") == ["keypoints"]
    assert ask("answer", "count") == ["masks", "keypoints"]
    assert ask("answer", masks="none") == ["keypoints"]
    left = asking.infer("toy", [image_input(FILES[:1])], parameters={"masks": "none", "keypoints": False})
    assert list(arrays(left)) == ["count", "boxes", "scores", "class_ids"]


def test_answer_is_that_of_detect(asking, plain):
    options = {"box_format": "cxcywh", "masks": "png", "keypoint_format": "coco"}
    answer = asking.infer("toy", [image_input(FILES)], outputs=outputs("answer"), parameters=options)
    documents = [json.loads(text) for text in answer.as_numpy("answer")]
    assert [document["detections"] for document in documents] == detections(plain, **options)


def test_options_shape_the_arrays(asking):
    options = {"box_format": "xywh", "masks": "polygon", "max_detections": 1}
    found = arrays(asking.infer("toy", [pixels_input(PIXELS[:1])], parameters=options))
    assert found["count"].tolist() == [1]
    assert found["boxes"].shape == (1, D, 4)
    assert found["boxes"][0, 0].tolist() == [0, 0, 48, 32]
    assert json.loads(found["masks"][0, 0])["format"] == "polygon"


def test_errors_reach_the_client_in_words(asking):
    for sent, options, status, told in [
        ([image_input([FILES[0], BROKEN])], {}, "422", "picture 2 of 2: the JPEG data"),
        ([image_input([b"text"])], {}, "415", "the 4 bytes are no picture"),
        ([image_input(FILES)], {"parameters": {"confidence": 2}}, "422", "confidence = 2"),
        ([image_input(FILES)], {"parameters": {"model": "other"}}, "422", "the path names the model"),
        ([image_input(FILES)], {"sequence_id": 5}, "422", "nothing is kept"),
        ([image_input(FILES)], {"outputs": outputs("logits")}, "400", "there is no output 'logits'"),
        ([image_input(FILES)], {"outputs": outputs("masks"), "parameters": {"masks": "none"}}, "422", "switched off"),
        ([image_input(FILES)], {"parameters": {"keypoint_format": "coco"}}, "422", "output 'answer'"),
        ([image_input(FILES)], {"model_version": "7"}, "404", "version '7'"),
        ([image_input(FILES), pixels_input(PIXELS)], {}, "400", "there must be one"),
        ([image_input(FILES * 6)], {}, "413", "LIMNER_MAX_PICTURES"),
        ([pixels_input(PIXELS[..., :2])], {}, "400", "[-1, -1, -1, 3]"),
        ([pixels_input(PIXELS[:, :0])], {}, "400", "above 0"),
    ]:
        with pytest.raises(utils.InferenceServerException) as caught:
            asking.infer("toy", sent, **options)
        assert caught.value.status() == status, caught.value
        assert told in caught.value.message()


def test_a_model_without_heads_offers_less(tmp_path, engine):
    write_bundle(tmp_path, heads=())
    app = create_app(Settings(bundles=tmp_path), opener=lambda bundle: Opened(engine, "a test"))
    with TestClient(app) as client:
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        offered = [row["name"] for row in client.get("/v2/models/toy").json()["outputs"]]
        assert offered == ["count", "boxes", "scores", "class_ids", "answer"]
        data = [base64.b64encode(FILES[0]).decode()]
        asked = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": data}]}
        answer = client.post("/v2/models/toy/infer", json=asked).json()
        assert [row["name"] for row in answer["outputs"]] == ["count", "boxes", "scores", "class_ids"]
        assert "id" not in answer
        refused = client.post("/v2/models/toy/infer", json={**asked, "outputs": [{"name": "masks"}]})
        assert (refused.status_code, list(refused.json())) == (400, ["error"])


def test_not_ready_is_a_status(bundles):
    engine = ToyEngine()
    engine.free.clear()  # holds the golden check
    app = create_app(Settings(bundles=bundles), opener=lambda bundle: Opened(engine, "a test"))
    with TestClient(app) as client:
        assert client.get("/v2/health/live").json() == {"live": True}
        for path in ("/v2/health/ready", "/v2/models/toy/ready", "/v2/models/toy"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert list(answer.json()) == ["error"]
        assert client.post("/v2/models/toy/infer").status_code == 503
        engine.free.set()
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        assert client.get("/v2/models/toy/versions/1/ready").json() == {"name": "toy", "ready": True}
        app.state.service.admission.close()
        assert client.get("/v2/models/toy/ready").status_code == 503
        assert "shutting down" in client.post("/v2/models/toy/infer").json()["error"]


def framed(document: Any, behind: bytes = b"", length: str | None = None) -> dict[str, Any]:
    text = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": (str(len(text)) if length is None else length).encode("latin-1")}
    return {"content": text + behind, "headers": headers}


def one(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 9}, **changes}
    return {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}


TEN = b"\x05\0\0\0hello"
TEXT = base64.b64encode(FILES[0]).decode()


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({"content": b""}, "the body is empty"),
        ({"content": b"{"}, "cannot be read"),
        ({"content": b"[]"}, "request: "),
        ({"json": {}}, "inputs: Field required"),
        ({"json": {"inputs": []}}, "inputs: "),
        ({"json": one()}, "declares 9 bytes of binary data, 0 are there"),
        ({"json": one(parameters=None)}, "either"),
        ({"json": one(data=[TEXT])}, "either"),
        (framed(one(), TEN, "-1"), "must be a number"),
        (framed(one(), TEN, "²"), "must be a number"),
        (framed(one(), TEN, "9" * 18), "the body has"),
        (framed(one(), TEN, "3"), "Inference-Header-Content-Length"),
        (framed(one(), TEN[:-1]), "8 are there"),
        (framed(one(), TEN + b"x"), "1 bytes are left over"),
        (framed(one(), b"\x06\0\0\0hello"), "declares 6 bytes, 5 are there"),
        (framed(one(), b"\xff\xff\xff\xffhello"), "declares 4294967295 bytes"),
        (framed(one(shape=[2]), TEN), "has 1 elements"),
        (framed(one(shape=[2**31 - 1] * 4), TEN), "has 1 elements"),
        (framed(one(shape=[]), TEN), "shape"),
        (framed(one(shape=[1.0]), TEN), "shape"),
        (framed(one(shape=[-1]), TEN), "shape"),
        (framed(one(shape=[True]), TEN), "shape"),
        (framed(one(parameters={"binary_data_size": -9}), TEN), "binary_data_size"),
        (framed(one(parameters={"shared_memory_region": "a"}), TEN), "shared_memory_region"),
        (framed(one(datatype="FP32"), TEN), "datatype"),
        (framed(one(datatype="UINT8", name="pixels"), TEN), "has 9 bytes"),
        (framed(one(datatype="UINT8", name="pixels", shape=[1, 3, 1, 3]), TEN), None),
        (framed({**one(), "outputs": [{"name": "count"}, {"name": "count"}]}, TEN), "named twice"),
        (framed({**one(), "outputs": [{"name": "count", "parameters": {"classification": 2}}]}, TEN), "classification"),
        (framed({**one(), "parameters": {"binary_data_output": "yes"}}, TEN), "binary_data_output"),
        (framed({**one(), "id": 5}, TEN), "id: "),
        ({"json": one(parameters=None, data=[5])}, "must be texts"),
        ({"json": one(parameters=None, data=["%%"])}, "element 0 of input 'image' is not base64"),
        ({"json": one(parameters=None, data=[TEXT, TEXT])}, "has 2 elements"),
        ({"json": one(parameters=None, data=[[TEXT], [TEXT, TEXT]], shape=[2, 1])}, "nested"),
        ({"json": one(parameters=None, datatype="UINT8", data=[256], shape=[1])}, "from 0 to 255"),
        ({"json": one(parameters=None, datatype="UINT8", data=[True], shape=[1])}, "from 0 to 255"),
        ({"json": one(parameters=None, datatype="UINT8", data=[[[[["x" * 9]]]]], shape=[1])}, "from 0 to 255"),
        ({"content": b"no gzip", "headers": {"content-encoding": "gzip"}}, "cannot be decompressed"),
        ({"content": gzip.compress(b"{}")[:-4], "headers": {"content-encoding": "gzip"}}, "one whole gzip"),
        ({"content": zlib.compress(b"{}") + b"x", "headers": {"content-encoding": "deflate"}}, "one whole deflate"),
    ],
)
def test_malformed_requests_are_400(plain, sent, told):
    answer = plain.post("/v2/models/toy/infer", **sent)
    assert answer.status_code == (400 if told else 200), answer.text
    if told:
        assert list(answer.json()) == ["error"]
        assert told in answer.json()["error"]
        assert len(answer.content) < 600


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 300), st.just(1e300), st.text(max_size=3), st.just(TEXT))
VALUES = st.recursive(LEAVES, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each))
MEMBERS = {
    "id": st.text(max_size=3) | VALUES,
    "parameters": st.dictionaries(st.sampled_from([*Options.model_fields, "binary_data_output", "timeout"]), VALUES),
    "outputs": st.lists(st.builds(lambda name: {"name": name}, st.sampled_from([*OUTPUTS, "x"])), max_size=3) | VALUES,
    "inputs": st.lists(
        st.fixed_dictionaries(
            {
                "name": st.sampled_from(["image", "pixels", "x"]),
                "datatype": st.sampled_from(["BYTES", "UINT8", "FP32"]),
                "shape": st.sampled_from([[1], [2], [1, 1], [1, 1, 1, 3], [1, 2, 2, 3]]) | VALUES,
                "data": st.sampled_from([[TEXT], [[TEXT]], [7, 8, 9], [[[[7, 8, 9]]]], [0] * 12]) | VALUES,
            }
        ),
        min_size=1,
        max_size=2,
    ),
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.fixed_dictionaries({"inputs": MEMBERS.pop("inputs")}, optional=MEMBERS))
def test_no_request_makes_the_service_fail(plain, document):
    answer = plain.post("/v2/models/toy/infer", json=document)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (document, answer.text)
    assert answer.status_code == 200 or list(answer.json()) == ["error"]


def test_limits_hold(serve):
    with serve(max_body_bytes=10_000) as client:
        bomb = {"content": gzip.compress(b" " * 10**6), "headers": {"content-encoding": "gzip"}}
        answer = client.post("/v2/models/toy/infer", **bomb)
        assert (answer.status_code, "LIMNER_MAX_BODY_BYTES" in answer.json()["error"]) == (413, True)
        brotli = client.post("/v2/models/toy/infer", content=b"x", headers={"content-encoding": "br"})
        assert (brotli.status_code, "gzip, deflate" in brotli.json()["error"]) == (415, True)
    with serve(max_pixels=8) as client:
        sent = framed(one(datatype="UINT8", name="pixels", shape=[1, 3, 1, 3]), TEN)
        assert client.post("/v2/models/toy/infer", **sent).status_code == 200
        sent = framed(one(datatype="UINT8", name="pixels", shape=[1, 3, 3, 3], parameters={"binary_data_size": 27}))
        answer = client.post("/v2/models/toy/infer", headers=sent["headers"], content=sent["content"] + bytes(27))
        assert (answer.status_code, "LIMNER_MAX_PIXELS" in answer.json()["error"]) == (413, True)


def test_an_engine_failure_is_told_as_the_protocol_has_it(asking, engine):
    engine.fail = True
    with pytest.raises(utils.InferenceServerException) as caught:
        asking.infer("toy", [image_input(FILES[:1])])
    engine.fail = False
    wait_until(asking.is_server_ready)
    assert caught.value.status() == "500"
    assert "RuntimeError" in caught.value.message()
    assert "secret" not in caught.value.message()


def test_unknown_routes_and_methods_under_v2(plain):
    for answer, status in ((plain.get("/v2/nothing"), 404), (plain.get("/v2/models/toy/infer"), 405)):
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
        assert answer.headers["content-type"] == "application/json"
    assert "type" in plain.get("/v2x").json()


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_documented_outputs_are_those(name, plain):
    manifest = plain.app.state.service.store.ready("toy").detector.bundle.manifest
    letters = {(): "", (D,): ", D", (D, 4): ", D, 4", (D, J, 3): ", D, J, 3"}
    row = f"| `{name}` | `{OUTPUTS[name].datatype}` | [B{letters[OUTPUTS[name].shape(manifest)]}] |"
    assert row in DOCUMENT


def test_the_documented_client_works(server, tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(FILES[0])
    names: dict[str, Any] = {}
    exec(
        next(code for code in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if "tritonclient" in code), names
    )
    boxes, scores = names["detect"](server[0], "toy", photo)
    assert boxes.shape == (2, 4)
    assert scores.tolist() == sorted(scores, reverse=True)
    assert scores.min() >= 0.7


def test_openapi_describes_the_protocol(plain):
    document = plain.get("/openapi.json").json()
    operation = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert "$ref" not in json.dumps(operation["requestBody"])
    statuses = {
        str(error.status) for error in errors.all_errors() if error.status not in (401, 403, 404, 405, 424, 499)
    }
    assert statuses <= set(operation["responses"])
