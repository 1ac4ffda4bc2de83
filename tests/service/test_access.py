import pytest
from pydantic import SecretStr
from starlette.datastructures import Headers

from service.access import Keys, given_keys, read_keys


def test_keys_come_from_both_and_blank_ones_do_not_count(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two  \n", encoding="utf-8")
    assert read_keys(SecretStr("three"), file) == (b"three", b"one", b"two")
    assert read_keys(SecretStr(" "), None) == ()
    assert read_keys(None, None) == ()


@pytest.mark.parametrize(
    ("headers", "given"),
    [
        ({"authorization": "Bearer abc"}, [b"abc"]),
        ({"authorization": "bearer  abc "}, [b"abc"]),
        ({"x-api-key": "abc"}, [b"abc"]),
        ({"authorization": "Basic abc"}, []),
        ({"authorization": "Basic abc", "x-api-key": "key"}, [b"key"]),
        ({"authorization": "Bearer abc", "x-api-key": "key"}, [b"abc", b"key"]),
        ({}, []),
    ],
)
def test_where_a_key_is_looked_for(headers, given):
    assert list(given_keys(Headers(headers))) == given


def test_any_of_the_keys_and_nothing_else():
    keys = Keys(("käse".encode(), b"two"))
    assert "käse".encode() in keys
    assert keys.are_in(Headers({"x-api-key": "käse".encode().decode("latin-1")}))
    for wrong in (b"", b"tw", b"two ", b"three"):
        assert wrong not in keys
    assert b"" not in Keys(())
    assert not Keys(()).are_in(Headers({"x-api-key": "two"}))
