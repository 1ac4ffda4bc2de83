"""Tensors of the Open Inference Protocol as they travel: in JSON, or behind it as the binary data extension has them.

    body = JSON [+ the binary data of each tensor that says "binary_data_size", in order, without gaps]

The length of the JSON is then in the header Inference-Header-Content-Length. Numbers are little-endian and row-major,
a BYTES element is preceded by its length in 4 bytes. In JSON an element of BYTES is text: base64 in a request, as it
holds a picture, and itself in an answer. This module is functions on bytes, and knows neither models nor routes.
"""

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import MalformedRequest
from service.wire import from_base64, short

Array = npt.NDArray[Any]

DATATYPES = {"uint8": "UINT8", "int64": "INT64", "float32": "FP32"}
HEADER_LENGTH = "inference-header-content-length"
_LENGTH = struct.Struct("<I")
_TOLD = 3  # errors of a request that are listed; one list of wrong numbers can have millions


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputParameters(_Strict):
    binary_data_size: int | None = Field(
        None, strict=True, ge=0, description="Bytes of this tensor behind the JSON, instead of `data`."
    )


class InferInput(_Strict):
    name: str
    datatype: Literal["BYTES", "UINT8"]
    shape: list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]] = Field(min_length=1, max_length=4)
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="Row by row, flat or nested as the shape is; BYTES as base64.")


class OutputParameters(_Strict):
    binary_data: bool | None = Field(None, strict=True, description="Whether this output comes behind the JSON.")


class InferOutput(_Strict):
    name: str
    parameters: OutputParameters | None = None


class InferRequest(_Strict):
    id: str | None = Field(None, description="Returned in the answer.")
    parameters: dict[str, Any] | None = Field(
        None, description="The options of POST /detect, and binary_data_output: outputs come behind the JSON."
    )
    inputs: list[InferInput] = Field(min_length=1, max_length=16)
    outputs: list[InferOutput] | None = Field(
        None, max_length=16, description="What the answer holds; without it, every array that the options allow."
    )


@dataclass(frozen=True, slots=True)
class Tensor:
    """The elements of BYTES are a flat list, row by row; those of numbers an array of this shape."""

    name: str
    shape: tuple[int, ...]
    values: Array | list[bytes]

    @property
    def datatype(self) -> str:
        return "BYTES" if isinstance(self.values, list) else DATATYPES[self.values.dtype.name]


def read(body: bytes, header_length: str | None) -> tuple[InferRequest, list[Tensor]]:
    """`header_length` is the header's text. Every length is checked against what is there before it is believed."""
    end = len(body) if header_length is None else _header_length(header_length, len(body))
    request = _parse(body[:end])
    rest = memoryview(body)[end:]
    tensors: list[Tensor] = []
    for described in request.inputs:
        tensor, rest = _read_tensor(described, rest)
        tensors.append(tensor)
    if rest:
        raise MalformedRequest(f"{len(rest)} bytes are left over behind the binary data that the inputs declare")
    return request, tensors


def write(head: Mapping[str, Any], outputs: Sequence[tuple[Tensor, bool]]) -> tuple[bytes, int | None]:
    """An answer's body, of tensors each with whether it goes behind the JSON; and the JSON's length where one does."""
    described, behind = [], []
    for tensor, is_binary in outputs:
        row: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if is_binary:
            behind.append(_to_binary(tensor.values))
            row["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            row["data"] = _to_json(tensor.values)
        described.append(row)
    document = orjson.dumps({**head, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([document, *behind]), len(document) if behind else None


def _header_length(text: str, body_length: int) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise MalformedRequest(f"Inference-Header-Content-Length is {short(repr(text))}: it must be a number of bytes")
    if int(text) > body_length:
        raise MalformedRequest(f"Inference-Header-Content-Length is {int(text)}, the body has {body_length} bytes")
    return int(text)


def _parse(document: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate(orjson.loads(document))
    except orjson.JSONDecodeError as error:
        told = f"the {len(document)} bytes of the request's JSON cannot be read ({error})"
        raise MalformedRequest(f"{told}: is Inference-Header-Content-Length right?") from error
    except ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc'])) or 'request'}: {item['msg']}" for item in error.errors()]
        raise MalformedRequest("; ".join(short(each) for each in found[:_TOLD])) from None


def _read_tensor(described: InferInput, rest: memoryview) -> tuple[Tensor, memoryview]:
    """The tensor, and what is behind its binary data."""
    name, shape = f"input {short(repr(described.name))}", tuple(described.shape)
    size = described.parameters.binary_data_size if described.parameters else None
    if (size is None) == (described.data is None):
        raise MalformedRequest(f'{name} must have either "data" or the parameter "binary_data_size"')
    is_bytes = described.datatype == "BYTES"
    if size is None:
        flat = _flat(described.data or [], shape, name)
        return Tensor(described.name, shape, _texts(flat, name) if is_bytes else _numbers(flat, shape, name)), rest
    if size > len(rest):
        raise MalformedRequest(f"{name} declares {size} bytes of binary data, {len(rest)} are there")
    data, rest = rest[:size], rest[size:]
    return Tensor(described.name, shape, _elements(data, shape, name) if is_bytes else _raw(data, shape, name)), rest


def _flat(data: list[Any], shape: tuple[int, ...], name: str) -> list[Any]:
    """Flat or nested as the shape is. Never through numpy, which would make rows of the longest text there is."""
    for length in shape[1:]:
        if not data or not all(type(row) is list for row in data):
            break
        if any(len(row) != length for row in data):
            raise MalformedRequest(f"the data of {name} is not nested as its shape {list(shape)}")
        data = list(chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise MalformedRequest(f"the data of {name} has {len(data)} elements, its shape is {list(shape)}")
    return data


def _texts(data: list[Any], name: str) -> list[bytes]:
    if not all(type(text) is str for text in data):
        raise MalformedRequest(f"the data of {name} must be texts, each a picture's bytes in base64")
    return [from_base64(text, f"element {index} of {name}") for index, text in enumerate(data)]


def _numbers(data: list[Any], shape: tuple[int, ...], name: str) -> Array:
    wrong = f"the data of {name} must be whole numbers from 0 to 255"
    if set(map(type, data)) - {int}:
        raise MalformedRequest(wrong)
    try:
        return np.frombuffer(bytes(data), np.uint8).reshape(shape)
    except ValueError:
        raise MalformedRequest(wrong) from None


def _raw(data: memoryview, shape: tuple[int, ...], name: str) -> Array:
    if len(data) != math.prod(shape):
        raise MalformedRequest(f"{name} has {len(data)} bytes, its shape {list(shape)} needs {math.prod(shape)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _elements(data: memoryview, shape: tuple[int, ...], name: str) -> list[bytes]:
    elements: list[bytes] = []
    while data:
        if len(data) < _LENGTH.size:
            raise MalformedRequest(f"{name} ends within the length of element {len(elements)}")
        (length,) = _LENGTH.unpack_from(data)
        if length > len(data) - _LENGTH.size:
            there = len(data) - _LENGTH.size
            raise MalformedRequest(f"element {len(elements)} of {name} declares {length} bytes, {there} are there")
        elements.append(bytes(data[_LENGTH.size : _LENGTH.size + length]))
        data = data[_LENGTH.size + length :]
    if len(elements) != math.prod(shape):
        raise MalformedRequest(f"{name} has {len(elements)} elements, its shape is {list(shape)}")
    return elements


def _to_binary(values: Array | list[bytes]) -> bytes:
    if isinstance(values, list):
        return b"".join(part for value in values for part in (_LENGTH.pack(len(value)), value))
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _to_json(values: Array | list[bytes]) -> Any:
    if isinstance(values, list):
        return [value.decode("utf-8") for value in values]
    return np.ascontiguousarray(values).ravel()
