"""Pictures by URL: what may be asked, what is connected to, and what comes back. No name is looked up outside."""

import asyncio
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest

from service import fetch
from service.errors import BodyTooLarge, UrlFailed, UrlRefused
from service.fetch import Fetcher, Limits, is_public, parse
from service.settings import SettingsError, load_settings
from tests.service.toy import encoded, picture

HERE = "127.0.0.1"
NAME = "pictures.test"  # a top-level domain that never exists
PICTURE = encoded(picture())


class Site:
    """A local web server. `pages` maps a path to a function of the handler; `seen` holds what was asked."""

    def __init__(self, server):
        self.port = server.server_address[1]
        self.pages = {}
        self.seen = []

    def url(self, path="/photo.png", scheme="http", host=NAME):
        return f"{scheme}://{host}:{self.port}{path}"


@contextmanager
def running(context=None):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.seen.append((self.path, dict(self.headers)))
            site.pages[self.path.partition("?")[0]](self)

        def log_message(self, format, *arguments):
            pass

    server = ThreadingHTTPServer((HERE, 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.handle_error = lambda request, client_address: None
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    site = Site(server)
    site.pages["/photo.png"] = lambda handler: send(handler, PICTURE)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def site():
    with running() as started:
        yield started


def send(handler, body, status=200, **headers):
    handler.send_response(status)
    for name, value in {"content_length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def redirect(to):
    return lambda handler: send(handler, b"", 302, location=to)


class Names:
    """A resolver of its own. A list of lists answers differently each time, as a rebinding server does."""

    def __init__(self, **known):
        self.known = {NAME: [[HERE]], **{name.replace("_", "."): answers for name, answers in known.items()}}
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append(host)
        if host not in self.known:
            raise OSError("no such name")
        answers = self.known[host]
        return answers[min(self.asked.count(host), len(answers)) - 1]


def allow_here(address):
    """Public addresses, and the one of the test's own server; not the rest of 127/8."""
    return is_public(address) or str(address) == HERE


def limits(site, **changed):
    return replace(Limits(("http", "https"), (80, 443, site.port)), **changed)


def get(site, url, names=None, check=allow_here, context=None, **changed):
    fetcher = Fetcher(limits(site, **changed), names or Names(), check, context)
    return asyncio.run(fetcher.fetch(url))


def refusal(site, url, error=UrlFailed, **how):
    with pytest.raises(error) as caught:
        get(site, url, **how)
    assert "secret" not in caught.value.detail, "more than the host is told"
    assert HERE not in caught.value.detail
    return caught.value.detail


# What is asked, and of whom


def test_a_picture_comes_whole_and_little_is_told(site, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site.pages["/a%20b/%C3%BC.png"] = site.pages["/photo.png"]
    names = Names()
    assert get(site, site.url("/a%20b/ü.png?x=1&y=%2F#there"), names) == PICTURE
    path, headers = site.seen[0]
    assert path == "/a%20b/%C3%BC.png?x=1&y=%2F"
    assert headers == {
        "Host": f"{NAME}:{site.port}",
        "User-Agent": "limner",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    assert names.asked == [NAME]


def test_a_second_answer_of_the_dns_changes_nothing(site):
    """The checked address is the one that is connected to: the name is not looked up again, here or in the system."""
    names = Names(rebinding_test=[[HERE], ["169.254.169.254"]])
    assert get(site, site.url(host="rebinding.test"), names) == PICTURE
    assert names.asked == ["rebinding.test"]
    refusal(site, site.url(host="rebinding.test"), UrlRefused, names=names)
    assert len(site.seen) == 1


@pytest.mark.parametrize("hidden", ["10.0.0.1", "127.0.0.2", "::1", "fd00::1", "fe80::1%eth0", "::ffff:10.0.0.1"])
def test_one_address_that_is_not_public_refuses_the_host(site, hidden):
    for answer in ([hidden], [HERE, hidden], [hidden, HERE]):
        told = refusal(site, site.url("/secret"), UrlRefused, names=Names(pictures_test=[answer]))
        assert told == f"host '{NAME}' may not be asked: it is not on the public internet"
    assert site.seen == []


def test_the_next_address_is_tried(site):
    assert get(site, site.url(), Names(pictures_test=[["127.0.0.9", HERE]]), check=lambda address: True) == PICTURE


def test_unknown_and_unreachable_hosts(site, monkeypatch):
    assert "no such host" in refusal(site, site.url(host="absent.test"))
    assert "no such host" in refusal(site, site.url(), names=Names(pictures_test=[[]]))
    assert "no such host" in refusal(site, site.url(), names=Names(pictures_test=[["nonsense"]]))

    async def hang(*arguments, **options):
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio, "open_connection", hang)
    assert "cannot be reached" in refusal(site, site.url(), connect_s=0.05)


ODD = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "0.0.0.0",
    "localhost", "127.0.0.1.", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]",
    "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]",
    "①②⑦.⓪.⓪.①", "127。0。0。1", "１２７.0.0.1", "%31%32%37.0.0.1", "[::1%25lo]", "[fe80::1%25lo]", "LOCALHOST",
]  # fmt: skip


@pytest.mark.parametrize("host", ODD)
def test_odd_ways_to_write_this_machine(host, monkeypatch):
    """With the system's resolver and the real check, and nothing is ever connected to."""

    async def never(*arguments, **options):
        raise AssertionError(f"connected to {arguments}")

    monkeypatch.setattr(asyncio, "open_connection", never)
    for url in (f"http://{host}/", f"https://{host}:443/x"):
        with pytest.raises((UrlRefused, UrlFailed)):
            asyncio.run(Fetcher(Limits(("http", "https"))).fetch(url))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://pictures.test/", "scheme must be https"),
        ("file:///etc/passwd", "scheme must be https"),
        ("http://pictures.test/", "scheme must be https"),
        ("gopher://pictures.test:70/", "scheme must be https"),
        ("data:image/png;base64,AAAA", "scheme must be https"),
        ("//pictures.test/", "scheme must be https"),
        ("pictures.test/photo.jpg", "scheme must be https"),
        ("", "scheme must be https"),
        ("https://", "cannot be read"),
        ("https:///path", "cannot be read"),
        ("https://pictures.test:22/", "port 22 is not asked, only 80, 443"),
        ("https://pictures.test:0/", "port 0 is not asked"),
        ("https://pictures.test:99999/", "cannot be read"),
        ("https://pictures.test:4x/", "cannot be read"),
        ("https://user:secret@pictures.test/", "credentials"),
        ("https://@pictures.test/", "credentials"),
        ("https://pictures.test\\@evil.test/", "cannot be read"),
        ("https://pictures.test/\r\nHost: evil.test", "cannot be read"),
        ("https://pictures.test/a b", "cannot be read"),
        ("https://pict\tures.test/", "cannot be read"),
        ("https://pictures.test/\x00", "cannot be read"),
        ("https://-pictures.test/", "cannot be read"),
        ("https://[::1/", "cannot be read"),
        ("https://[pictures]/", "cannot be read"),
        ("https://pictures.test/" + "x" * 2048, "at most 2048"),
    ],
)
def test_what_is_not_a_url_to_ask(url, told):
    with pytest.raises(UrlRefused) as caught:
        parse(url, Limits())
    assert told in caught.value.detail
    assert "secret" not in caught.value.detail
    assert "/etc" not in caught.value.detail


def test_what_a_url_says():
    target = parse("HTTPS://Pictures.TEST", Limits())
    assert (target.scheme, target.host, target.port, target.path) == ("https", NAME, 443, "/")
    assert target.authority == NAME
    assert parse("http://[2606:4700::1111]:8080/x?", Limits(("http",), (8080,))).authority == "[2606:4700::1111]:8080"
    assert parse("https://bücher.example/", Limits()).host == "xn--bcher-kva.example"


PUBLIC = ["8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.0", "172.32.0.1", "2606:4700::1111", "2a00:1450::1",
          "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]  # fmt: skip
NOT_PUBLIC = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1", "127.255.255.255",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "::", "::1", "::2", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:7f00:1",
    "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:4136:e378::1",
    "2001:10::1", "2001:20::1", "2001:db8::1", "2002:a00:1::1", "2002:7f00:1::1", "3fff::1", "5f00::1", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "ff0e::1",
]  # fmt: skip


def test_public_and_other_addresses():
    assert [text for text in PUBLIC if not is_public(ip_address(text))] == []
    assert [text for text in NOT_PUBLIC if is_public(ip_address(text))] == []


# Redirects


def test_redirects_are_followed_and_checked_again(site):
    site.pages["/old"] = redirect("/older?a=1")
    site.pages["/older"] = redirect(site.url(host="moved.test"))
    names = Names(moved_test=[[HERE]])
    assert get(site, site.url("/old"), names) == PICTURE
    assert names.asked == [NAME, NAME, "moved.test"]
    assert [headers["Host"].partition(":")[0] for _, headers in site.seen] == [NAME, NAME, "moved.test"]


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("http://127.0.0.2:{port}/secret", "not on the public internet"),
        ("http://localhost:{port}/secret", "not on the public internet"),
        ("http://[::1]:{port}/secret", "not on the public internet"),
        ("http://hidden.test/secret", "not on the public internet"),
        ("//hidden.test/secret", "not on the public internet"),
        ("file:///secret", "scheme must be"),
        ("http://pictures.test:25/secret", "port 25 is not asked"),
        ("http://user:secret@pictures.test/", "credentials"),
    ],
)
def test_redirects_to_where_nobody_may_go(site, to, told):
    site.pages["/old"] = redirect(to.format(port=site.port))
    names = Names(hidden_test=[["192.168.0.1"]], localhost=[["127.0.0.2"]])
    names.known |= {"127.0.0.2": [["127.0.0.2"]], "::1": [["::1"]]}
    with pytest.raises(UrlRefused) as caught:
        get(site, site.url("/old"), names)
    assert told in caught.value.detail
    assert "secret" not in caught.value.detail
    assert len(site.seen) == 1


def test_redirects_end(site):
    site.pages["/loop"] = redirect("/loop")
    assert "more than 3 redirects" in refusal(site, site.url("/loop"))
    assert len(site.seen) == 4


# What comes back


def chunked(pieces, pause_s=0.0):
    def page(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(pause_s)
        handler.wfile.write(b"0\r\n\r\n")

    return page


def test_the_cap_holds_declared_and_streamed(site):
    site.pages["/streamed"] = chunked([b"x" * 100] * 10)
    assert len(get(site, site.url("/streamed"), max_bytes=1000)) == 1000
    for path in ("/photo.png", "/streamed"):
        told = refusal(site, site.url(path), BodyTooLarge, max_bytes=999)
        assert "exceeds 999 bytes" in told
        assert "LIMNER_MAX_BODY_BYTES" in told


def test_slow_sites_are_left(site):
    gone = threading.Event()
    site.pages["/silent"] = lambda handler: gone.wait(10)
    site.pages["/drip"] = chunked([b"x"] * 400, pause_s=0.02)
    started = time.monotonic()
    assert "nothing came for 0.2 s" in refusal(site, site.url("/silent"), read_s=0.2)
    assert "not there after 0.3 s" in refusal(site, site.url("/silent"), total_s=0.3)
    assert "not there after 0.3 s" in refusal(site, site.url("/drip"), total_s=0.3, read_s=0.2)
    assert time.monotonic() - started < 3
    gone.set()


def test_who_gives_up_closes_the_connection(site):
    """As when the client of the service leaves: the site is not kept waiting either."""
    closed = threading.Event()

    def page(handler):
        if handler.connection.recv(1) == b"":
            closed.set()

    async def leave():
        task = asyncio.create_task(Fetcher(limits(site), Names(), allow_here).fetch(site.url("/silent")))
        while not site.seen:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    site.pages["/silent"] = page
    asyncio.run(leave())
    assert closed.wait(2)


def test_slow_redirects_share_one_time(site):
    def slow(handler):
        time.sleep(0.15)
        redirect("/slow")(handler)

    site.pages["/slow"] = slow
    assert "not there after 0.3 s" in refusal(site, site.url("/slow"), total_s=0.3)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret", "it answered 404"),
        (b"HTTP/1.1 503 secret\r\n\r\n", "it answered 503"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "it answered 302"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "it answered 204"),
        (b"SSH-2.0-secret\r\n", "does not speak HTTP"),
        (b"", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsecret", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx", "compressed"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n", "does not speak HTTP"),
    ],
)
def test_answers_that_are_no_picture(site, raw, told):
    site.pages["/"] = lambda handler: handler.wfile.write(raw)
    assert told in refusal(site, site.url("/"))


def test_early_hints_and_old_servers(site):
    site.pages["/hints"] = lambda handler: handler.wfile.write(
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    )
    site.pages["/old"] = lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nok")
    assert get(site, site.url("/hints")) == b"ok"
    assert get(site, site.url("/old")) == b"ok"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: it makes the certificate of the test's server")
    folder = tmp_path_factory.mktemp("certificate")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{NAME}", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def test_names_and_certificates_are_those_of_the_host(certificate):
    told = []
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
    server.sni_callback = lambda connection, name, context: told.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate / "certificate.pem"))
    with running(server) as site:
        assert get(site, site.url(scheme="https"), context=trusting) == PICTURE
        assert told == [NAME]
        assert site.seen[0][1]["Host"] == f"{NAME}:{site.port}"
        names = Names(other_test=[[HERE]])
        other = refusal(site, site.url(scheme="https", host="other.test"), names=names, context=trusting)
        assert other == "host 'other.test': its certificate is not valid for it"
        assert "certificate is not valid" in refusal(site, site.url(scheme="https"))
        assert len(site.seen) == 1
        site.pages["/old"] = redirect(site.url())
        with pytest.raises(UrlRefused, match="scheme must be https"):
            get(site, site.url("/old", "https"), context=trusting, schemes=("https",))


# In the service


def problem(answer):
    return answer.status_code, answer.json()["type"].removeprefix("urn:limner:problem:")


def test_off_by_default(client):
    for answer in (
        client.post("/detect", json={"url": "https://pictures.test/"}),
        client.post("/detect", params={"url": "https://pictures.test/"}),
    ):
        assert problem(answer) == (422, "url-refused")
        assert "LIMNER_URL_INPUT=https" in answer.json()["detail"]


def test_the_same_answer_by_url(serve, site):
    with serve(url_input="any") as client:
        client.app.state.service.fetcher = Fetcher(limits(site), Names(), allow_here)
        expected = client.post("/detect?confidence=0.3", content=PICTURE).json()["detections"]
        by_json = client.post("/detect", json={"url": site.url(), "confidence": 0.3})
        by_query = client.post("/detect", params={"url": site.url(), "confidence": 0.3})
        assert by_json.json()["detections"] == by_query.json()["detections"] == expected
        assert by_query.headers["server-timing"].startswith("fetch;dur=")
        drawn = client.post("/detect", json={"url": site.url(), "format": "png"})
        assert drawn.headers["content-type"] == "image/png"
        assert 'stage="fetch"' in client.get("/metrics").text


def test_the_decoder_decides_what_is_a_picture(serve, site):
    site.pages["/page"] = lambda handler: send(handler, b"<html>hello", content_type="image/png")
    site.pages["/photo.txt"] = lambda handler: send(handler, PICTURE, content_type="text/html")
    site.pages["/empty"] = lambda handler: send(handler, b"")
    with serve(url_input="any") as client:
        client.app.state.service.fetcher = Fetcher(limits(site), Names(), allow_here)
        assert problem(client.post("/detect", json={"url": site.url("/page")})) == (415, "not-an-image")
        assert client.post("/detect", json={"url": site.url("/photo.txt")}).status_code == 200
        assert problem(client.post("/detect", json={"url": site.url("/empty")})) == (400, "empty-body")


def test_errors_in_the_service(serve):
    with serve(url_input="https") as client:
        for url in ("https://127.0.0.1/secret", "https://[::1]/secret", "http://pictures.test/secret"):
            answer = client.post("/detect", json={"url": url})
            assert problem(answer) == (422, "url-refused")
            assert "secret" not in answer.text
        both = client.post("/detect", params={"url": "https://pictures.test/secret"}, content=PICTURE)
        assert problem(both) == (422, "invalid-option")
        twice = client.post("/detect?url=https://a.test/secret&url=https://b.test/secret")
        assert problem(twice) == (422, "invalid-option")
        wrong = client.post("/detect", json={"url": "https://pictures.test/secret", "confidence": 7})
        assert problem(wrong) == (422, "invalid-option")
        assert not any("secret" in answer.text for answer in (both, twice, wrong))
        assert problem(client.post("/detect", json={"url": 5})) == (400, "malformed-request")
        assert client.post("/detect", content=PICTURE).status_code == 200


def test_a_slow_site_holds_no_thread(serve, site):
    """More slow pictures than there are threads, and a plain request is still answered at once."""
    release = threading.Event()
    site.pages["/silent"] = lambda handler: release.wait(10)
    with serve(url_input="any") as client:
        client.app.state.service.fetcher = Fetcher(limits(site), Names(), allow_here)
        slow = [
            threading.Thread(target=client.post, args=("/detect",), kwargs={"json": {"url": site.url("/silent")}})
            for _ in range(12)
        ]
        for thread in slow:
            thread.start()
        while len(site.seen) < len(slow):
            time.sleep(0.01)
        assert client.post("/detect", content=PICTURE).status_code == 200
        release.set()
        for thread in slow:
            thread.join()


def test_settings_make_the_limits(monkeypatch):
    monkeypatch.setenv("LIMNER_URL_INPUT", "https")
    monkeypatch.setenv("LIMNER_URL_PORTS", "443, 8443")
    settings = load_settings(url_seconds="3", max_body_bytes="1000")
    fetcher = fetch.from_settings(settings)
    assert fetcher is not None
    assert fetcher._limits == Limits(("https",), (443, 8443), 1000, 3.0)
    assert fetcher._check is is_public
    with pytest.raises(SettingsError):
        load_settings(url_ports="0")
    assert fetch.from_settings(load_settings(url_input="off")) is None
