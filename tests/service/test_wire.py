import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidOption, RequestError
from service.wire import Options, parse_options, parse_upload

KINDS = [
    "",
    "image/jpeg",
    "IMAGE/PNG; x=y",
    "application/json",
    "application/json; charset=utf-8",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    'multipart/form-data; boundary="x"',
    "multipart/form-data; boundary*=utf-8''x",
    "multipart/form-data; boundary=" + "y" * 300,
    "text/plain",
    ";;;",
    "é",
]
PARTS = [
    b"--x\r\n",
    b"--x--\r\n",
    b"--x",
    b"\r\n",
    b"\r\n\r\n",
    b"picture",
    b"\x00\xff",
    b'{"image":',
    b'"aGk="',
    b"}",
    b'Content-Disposition: form-data; name="image"',
    b'Content-Disposition: form-data; name="file"; filename="a"',
    b"Content-Disposition: form-data; name=confidence",
    b"Content-Disposition: attachment",
    b"Content-Disposition:",
    b"Content-Transfer-Encoding: base64\r\n",
    b"0.5",
    b'"confidence":',
    b",",
    b"[",
    b"1e999",
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.sampled_from(PARTS), max_size=14).map(b"".join))
def test_whatever_is_sent_gives_an_upload_or_our_error(kind, body):
    try:
        upload = parse_upload(kind, body, [])
    except RequestError as error:
        told = error.detail
    else:
        told = "" if upload.image else "an upload without an image"
    assert len(told) < 500
    assert told != "an upload without an image"


def test_long_words_are_not_told_back_in_full():
    for given_options in ([("x" * 5000, "1")], [("masks", "y" * 5000)], [("model", "a" * 5000), ("model", "b" * 5000)]):
        with pytest.raises(InvalidOption) as caught:
            parse_options(given_options)
        assert len(caught.value.detail) < 500


def test_the_same_value_twice_is_no_conflict():
    assert parse_options([("confidence", "0.5"), ("confidence", "0.5")]) == Options(confidence=0.5)
