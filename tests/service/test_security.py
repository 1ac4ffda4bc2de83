"""Who may call: keys, the switches of /metrics and the pages, CORS, and the headers of every answer."""

import base64
import logging

import pytest
import structlog
from pydantic import SecretStr
from starlette.websockets import WebSocketDisconnect

from service import formats, security
from service.access import Keys
from service.security import FIXED_HEADERS, HEALTH_ROUTES
from service.settings import Settings, SettingsError, load_settings
from tests.service.toy import encoded, picture

FIRST, SECOND, OTHER = "first-key-0123456789", "second-key-0123456789", "other-key-0123456789"
ORIGIN = "https://app.example.org"
BOTH = (SecretStr(FIRST), SecretStr(SECOND))


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def detect(client, **headers):
    return client.post("/detect", content=encoded(picture()), headers=headers)


def test_without_keys_everybody_may_call(client):
    assert detect(client).status_code == 200
    assert client.get("/metrics").status_code == 200
    assert detect(client, authorization=f"Bearer {OTHER}").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [bearer(FIRST), bearer(SECOND), {"authorization": f"bearer   {FIRST} "}, {"x-api-key": SECOND}],
    ids=["first", "second", "spaces", "x-api-key"],
)
def test_any_key_opens_in_either_header(serve, headers):
    with serve(api_keys=BOTH) as client:
        assert detect(client, **headers).status_code == 200
        assert client.get("/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({}, "an API key is needed"),
        (bearer(OTHER), "not known here"),
        (bearer(FIRST[:-1]), "not known here"),
        (bearer(FIRST + "x"), "not known here"),
        (bearer(f"{FIRST},{SECOND}"), "not known here"),
        ({"x-api-key": OTHER}, "not known here"),
        ({"authorization": "Basic " + base64.b64encode(f"a:{FIRST}".encode()).decode()}, "an API key is needed"),
        ({"authorization": "Bearer"}, "an API key is needed"),
        ({"authorization": FIRST}, "an API key is needed"),
        ({"x-api-key": b"\xff\xfe not ascii"}, "not known here"),
    ],
)
def test_other_keys_are_refused_before_the_body(serve, engine, headers, told):
    with serve(api_keys=BOTH) as client:
        answer = detect(client, **headers)
        assert answer.status_code == 401
        body = answer.json()
        assert body["type"] == "urn:limner:problem:unauthorized"
        assert told in body["detail"]
        assert "X-API-Key" in body["detail"]
        assert answer.headers["www-authenticate"] == 'Bearer realm="limner"'
        assert body["request_id"] == answer.headers["x-request-id"]
        assert not any(key in answer.text for key in (FIRST, SECOND, OTHER))
        assert engine.batches == []


@pytest.mark.parametrize("path", ["/models", "/models/toy", "/nothing", "/detect/", "//healthz", "/healthz/", "/v2"])
def test_what_is_not_named_asks_for_a_key(serve, path):
    with serve(api_keys=BOTH) as client:
        assert client.get(f"http://testserver{path}").status_code == 401


def test_health_stays_open_with_keys(serve):
    with serve(api_keys=BOTH) as client:
        for path in HEALTH_ROUTES:
            assert client.get(path).status_code in (200, 404), path  # 404: not a route of this application
        assert client.get("/readyz").json()["model"] == "toy"


@pytest.mark.parametrize(("setting", "paths"), [("metrics", security.METRICS_ROUTES), ("docs", security.DOCS_ROUTES)])
def test_metrics_and_docs_have_their_own_switch(serve, setting, paths):
    expected = {"open": (200, 200), "key": (401, 200), "off": (404, 404)}
    for access, (without, having) in expected.items():
        with serve(api_keys=BOTH, **{setting: access}) as client:
            for path in paths:
                assert client.get(path).status_code == without
                assert client.get(path, headers=bearer(FIRST)).status_code == having
            assert client.get("/healthz").status_code == 200


def test_off_is_off_without_keys_too(serve):
    with serve(metrics="off", docs="off") as client:
        for path in (*security.METRICS_ROUTES, *security.DOCS_ROUTES):
            answer = client.get(path)
            assert answer.status_code == 404
            assert "switched off" in answer.json()["detail"]


def test_all_keys_are_compared_whichever_matches(monkeypatch):
    compared = []

    def counting(a, b):
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr("service.access.hmac.compare_digest", counting)
    keys = Keys((FIRST.encode(), SECOND.encode()))
    for given, expected in ((FIRST, True), (SECOND, True), ("x", False)):
        compared.clear()
        assert (given.encode() in keys) is expected
        assert compared == [(32, 32)] * 2


def test_keys_from_a_file_add_to_the_others(serve, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# for the annotators\n\n  {SECOND}\r\n")
    with serve(api_keys=(SecretStr(FIRST),), api_keys_file=file) as client:
        for key, status in ((FIRST, 200), (SECOND, 200), (OTHER, 401), ("# for the annotators", 401)):
            assert detect(client, **bearer(key)).status_code == status


def refused(**flags):
    with pytest.raises(SettingsError) as caught:
        load_settings(**flags)
    return str(caught.value)


def test_wrong_keys_stop_the_start_without_showing_them(monkeypatch, tmp_path):
    monkeypatch.setenv("LIMNER_API_KEYS", f"{FIRST},short-secret")
    told = refused()
    assert "key 2 is not a key" in told
    assert FIRST not in told
    assert "short-secret" not in told
    monkeypatch.setenv("LIMNER_API_KEYS", "")
    assert "it is set and holds nothing" in refused()
    monkeypatch.delenv("LIMNER_API_KEYS")
    file = tmp_path / "keys"
    file.write_text("secret words\n")
    told = refused(api_keys_file=file)
    assert "key 1 is not a key" in told
    assert "secret words" not in told
    file.write_text("# nothing\n")
    assert "holds no key" in refused(api_keys_file=file)
    assert "cannot be read: No such file" in refused(api_keys_file=tmp_path / "absent")
    assert "cannot be read" in refused(api_keys_file=tmp_path)


def test_a_misspelt_key_variable_does_not_open_the_door(monkeypatch):
    monkeypatch.setenv("LIMNER_API_KEY", FIRST)
    told = refused()
    assert "LIMNER_API_KEY is no setting: LIMNER_API_KEYS" in told
    assert FIRST not in told


def test_websockets_of_any_path_need_a_key_too(serve):
    with serve(api_keys=BOTH) as client:
        with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect("/detect"):
            raise AssertionError("connected")
        assert caught.value.status_code == 401
        assert caught.value.headers["www-authenticate"] == 'Bearer realm="limner"'


def test_keys_appear_nowhere(serve, monkeypatch, capfd, caplog):
    monkeypatch.setenv("LIMNER_API_KEYS", f"{FIRST},{SECOND}")
    settings = load_settings()
    assert [key.get_secret_value() for key in settings.api_keys] == [FIRST, SECOND]
    shown = [repr(settings), str(settings), settings.model_dump_json()]
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as logs, serve(api_keys=settings.api_keys) as client:
        for path in ("/models", "/metrics", "/docs", "/openapi.json", "/models/toy"):
            shown.append(client.get(path, headers=bearer(FIRST)).text)
            shown.append(client.get(path, headers=bearer(OTHER)).text)
    shown += [str(logs), caplog.text, *capfd.readouterr()]
    assert not any(key in text for text in shown for key in (FIRST, SECOND, OTHER))


def preflight(client, origin, path="/detect"):
    headers = {"origin": origin, "access-control-request-method": "POST"}
    return client.options(path, headers={**headers, "access-control-request-headers": "x-api-key,content-type"})


def test_cors_is_off_by_default(client):
    assert "access-control-allow-origin" not in preflight(client, ORIGIN).headers
    assert "access-control-allow-origin" not in detect(client, origin=ORIGIN).headers


def test_cors_serves_the_listed_origins_and_preflights_need_no_key(serve):
    with serve(api_keys=BOTH, cors_origins=(ORIGIN,)) as client:
        allowed = preflight(client, ORIGIN)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "x-api-key" in allowed.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in allowed.headers
        assert preflight(client, "https://other.example.org").status_code == 400
        answer = detect(client, origin=ORIGIN, **bearer(FIRST))
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        refused = detect(client, origin=ORIGIN)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN  # or a page could not read why
        other = detect(client, origin="https://other.example.org", **bearer(FIRST))
        assert "access-control-allow-origin" not in other.headers
        assert client.options("/detect").status_code == 401  # not a preflight


def test_cors_origins_are_a_list_and_checked(monkeypatch):
    monkeypatch.setenv("LIMNER_CORS_ORIGINS", f"{ORIGIN}, http://localhost:5173")
    assert load_settings().cors_origins == (ORIGIN, "http://localhost:5173")
    for wrong in (f"{ORIGIN}/", "app.example.org", "https://a@b", "null"):
        assert "is no origin" in refused(cors_origins=wrong)


def test_headers_are_on_every_answer(serve, monkeypatch):
    with serve(api_keys=BOTH, cors_origins=(ORIGIN,)) as client:
        answers = [
            client.get("/models", headers=bearer(FIRST)),
            detect(client, **bearer(FIRST)),
            detect(client),
            client.get("/nothing", headers=bearer(FIRST)),
            preflight(client, ORIGIN),
        ]
        monkeypatch.setattr(formats, "chosen", None)
        answers.append(detect(client, **bearer(FIRST)))
        assert answers[-1].status_code == 500  # nobody's error, answered by the last net
        for answer in answers:
            for name, value in FIXED_HEADERS.items():
                assert answer.headers[name] == value, answer.url
            assert answer.headers.get_list("x-request-id", split_commas=True)


@pytest.mark.parametrize("path", ["/", "/web/page.js", "/docs"])
def test_pages_have_their_own_policy_and_the_other_headers(client, path):
    headers = client.get(path).headers
    assert "style-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    for name in ("X-Content-Type-Options", "Referrer-Policy"):
        assert headers[name] == FIXED_HEADERS[name]


def test_settings_hold_keys_as_secrets():
    for name in ("api_keys",):
        assert "SecretStr" in str(Settings.model_fields[name].annotation)
