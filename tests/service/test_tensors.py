"""The framing of tensors: what is written is read, and whatever is sent gives tensors or our error."""

import gzip
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import connection
from service.errors import BodyTooLarge, RequestError
from service.settings import Settings
from service.tensors import Tensor, read, write

SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)
ODD = st.sampled_from([-1, 0, 1, 2, 5, 9, 2**31 - 1, 2**31, 2**63, 2**64, 1.5, True, None, "1", [], {}])


def body_of(tensors: list[dict[str, Any]], behind: bytes = b"") -> tuple[bytes, str]:
    document = json.dumps({"inputs": tensors}).encode()
    return document + behind, str(len(document))


@st.composite
def inputs(draw: st.DrawFn) -> tuple[dict[str, Any], bytes, Any]:
    """A tensor as a request describes it, what is behind the JSON, and its values."""
    shape = draw(SHAPES)
    count = int(np.prod(shape))
    described: dict[str, Any] = {"name": draw(st.text(max_size=5)), "shape": shape}
    if draw(st.booleans()):
        values = draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
        behind = b"".join(struct.pack("<I", len(value)) + value for value in values)
        return {**described, "datatype": "BYTES", "parameters": {"binary_data_size": len(behind)}}, behind, values
    array = np.array(draw(st.lists(st.integers(0, 255), min_size=count, max_size=count)), np.uint8).reshape(shape)
    described["datatype"] = "UINT8"
    if draw(st.booleans()):
        data = array.tolist() if draw(st.booleans()) else array.ravel().tolist()
        return {**described, "data": data}, b"", array
    return {**described, "parameters": {"binary_data_size": array.size}}, array.tobytes(), array


@settings(max_examples=200, deadline=None)
@given(st.lists(inputs(), min_size=1, max_size=3))
def test_what_was_described_is_read(given_inputs):
    body, length = body_of([each[0] for each in given_inputs], b"".join(each[1] for each in given_inputs))
    _, tensors = read(body, length)
    for tensor, (described, _, values) in zip(tensors, given_inputs, strict=True):
        assert (tensor.name, tensor.shape, tensor.datatype) == (
            described["name"],
            described["shape"],
            described["datatype"],
        )
        if isinstance(values, list):
            assert tensor.values == values
        else:
            np.testing.assert_array_equal(tensor.values, values)


@settings(max_examples=400, deadline=None)
@given(inputs(), st.data())
def test_lies_are_our_error(described, data):
    """One member replaced, a byte more or fewer, or another length of the JSON: read as it then is, or refused."""
    tensor, behind, _ = described
    where = data.draw(st.sampled_from(["shape", "size", "member", "behind", "length", "cut"]))
    if where == "shape":
        tensor = {**tensor, "shape": data.draw(st.lists(ODD, max_size=5))}
    elif where == "size":
        tensor = {**tensor, "parameters": {"binary_data_size": data.draw(ODD)}}
    elif where == "member":
        tensor = {**tensor, data.draw(st.sampled_from([*tensor, "data", "extra"])): data.draw(ODD)}
    elif where == "behind":
        behind = data.draw(st.sampled_from([behind[:-1], behind + b"x", behind[::-1], b"\xff" * len(behind)]))
    body, length = body_of([tensor], behind)
    if where == "length":
        length = data.draw(st.one_of(st.text(max_size=20), st.integers(-5, len(body) + 5).map(str)))
    elif where == "cut":
        body = body[: data.draw(st.integers(0, len(body)))]
    error, tensors = None, []
    try:
        _, tensors = read(body, length)
    except RequestError as refused:
        error = refused
    assert error is None or (400 <= error.status < 500 and len(error.detail) < 500)
    for each in tensors:
        held = len(each.values) if isinstance(each.values, list) else each.values.size
        assert held == int(np.prod(each.shape))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.one_of(st.none(), st.text(max_size=4)))
def test_noise_is_our_error(body, length):
    with pytest.raises(RequestError):
        read(body, length)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(inputs(), st.booleans()), max_size=4))
def test_what_is_written_is_as_long_as_it_says(outputs):
    tensors = [
        (Tensor(described["name"], described["shape"], values), binary or isinstance(values, list))
        for (described, _, values), binary in outputs
    ]
    content, length = write({"model_name": "toy"}, tensors)
    document = json.loads(content[:length])
    behind = content[len(content) if length is None else length :]
    for row, (tensor, binary), ((_, expected, values), _) in zip(document["outputs"], tensors, outputs, strict=True):
        assert (row["name"], tuple(row["shape"]), row["datatype"]) == (tensor.name, tensor.shape, tensor.datatype)
        assert ("data" in row) != binary
        if binary:
            size = row["parameters"]["binary_data_size"]
            assert behind[:size] == (expected if isinstance(values, list) else values.tobytes())
            behind = behind[size:]
        else:
            assert row["data"] == values.ravel().tolist()
    assert behind == b""


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_numbers_are_written_little_endian(dtype):
    values = np.array([[1, 2, -1]], dtype)
    for given_values in (values, values.astype(values.dtype.newbyteorder(">"))):
        content, length = write({}, [(Tensor("x", (1, 3), given_values), True)])
        assert content[length:] == values.astype(f"<{values.dtype.str[1:]}").tobytes()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["gzip", "deflate", "GZIP", "identity"]))
def test_whatever_is_inflated_gives_bytes_or_our_error(body, encoding):
    try:
        status = 200 if isinstance(connection.inflated(body, encoding, Settings()), bytes) else 0
    except RequestError as error:
        status = error.status
    assert status == 200 if encoding == "identity" else status in (200, 400)


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_inflating_stops_at_the_cap(encoding, pack):
    capped = Settings(max_body_bytes=1000)
    assert connection.inflated(pack(b"x" * 1000), encoding, capped) == b"x" * 1000
    with pytest.raises(BodyTooLarge):
        connection.inflated(pack(b"x" * 1001), encoding, capped)
