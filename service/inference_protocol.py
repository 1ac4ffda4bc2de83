"""The Open Inference Protocol, version 2, so that clients of KServe and Triton work: its routes, inputs and outputs.

    in   image      BYTES (B) or (B, 1)     encoded pictures
      or pixels     UINT8 (B, H, W, 3)      RGB
    out  count      INT64 (B)               detections; behind them each row is padding
         boxes      FP32  (B, D, 4)         image pixels, as box_format says; padding is 0
         scores     FP32  (B, D)            padding is 0
         class_ids  INT64 (B, D)            padding is -1
         keypoints  FP32  (B, D, J, 3)      x, y in image pixels, score; padding is 0
         masks      BYTES (B, D)            JSON as in /detect's "mask"; padding is empty
         answer     BYTES (B)               /detect's JSON of each picture

D is the model's limit whatever a request asks for, so that shapes are fixed. An output that nobody asked for is not
computed. The protocol has no place for the error of one picture: the first fails the request. Pictures go the way of
/detect's, under the same permits and limits; how tensors travel is `service.tensors`' affair.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Path, Request, Response

from service import answers, errors, images, openapi, pictures, schemas, wire
from service.answers import Found
from service.bundle import Manifest
from service.connection import COMPRESSED, inflated, read_body
from service.leases import Lease, Ready
from service.pictures import Asked, Picture
from service.tensors import HEADER_LENGTH, Array, InferOutput, InferRequest, Tensor, read, write

if TYPE_CHECKING:
    from service.pipeline import Service

PREFIX = "/v2"
PROBES = (f"{PREFIX}/health/live", f"{PREFIX}/health/ready")
INFER_ROUTES = (f"{PREFIX}/models/{{name}}/infer", f"{PREFIX}/models/{{name}}/versions/{{version}}/infer")

# Parameters of /detect or of Triton that could not be obeyed here, and why.
REFUSED = {
    "model": "the path names the model",
    "format": "outputs name what the answer holds",
    "image_id": "it is for format=coco",
    "url": "the inputs bring the pictures",
    **dict.fromkeys(("sequence_id", "sequence_start", "sequence_end"), "nothing is kept from request to request"),
}
BINARY_OUTPUT = "binary_data_output"

router = APIRouter(prefix=PREFIX)
Row = Array | list[bytes]
Name = Annotated[str, Path(description="Name of the model.")]
Version = Annotated[str, Path(description="Version of the model.")]


def owns(path: str) -> bool:
    """Whether errors at this path are told as the protocol has them."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


@dataclass(frozen=True, slots=True)
class Input:
    datatype: str
    shape: tuple[int, ...]


INPUTS = {"image": Input("BYTES", (-1,)), "pixels": Input("UINT8", (-1, -1, -1, 3))}


@dataclass(frozen=True, slots=True)
class Output:
    """`shape` is that of one picture's `row`."""

    datatype: str
    shape: Callable[[Manifest], tuple[int, ...]]
    row: Callable[[Found], Row]


def _limit(manifest: Manifest) -> int:
    return manifest.limits.max_detections


def _num_joints(manifest: Manifest) -> int:
    return len(manifest.keypoints.names) if manifest.keypoints else 0


def _padded(found: Found, rows: Array, datatype: type, padding: float = 0) -> Array:
    padded = np.full((_limit(found.manifest), *rows.shape[1:]), padding, datatype)
    padded[: len(rows)] = rows
    return padded


def _keypoints(found: Found) -> Row:
    assert found.detections.keypoints is not None, "asked for, so computed"
    return _padded(found, found.detections.keypoints, np.float32)


def _masks(found: Found) -> Row:
    rows = answers.MASKS[found.options.masks](found.detections, found.options)
    return [answers.dumps(row) for row in rows] + [b""] * (_limit(found.manifest) - len(rows))


OUTPUTS = {
    "count": Output("INT64", lambda _: (), lambda found: np.array(len(found.detections.scores), np.int64)),
    "boxes": Output(
        "FP32",
        lambda manifest: (_limit(manifest), 4),
        lambda found: _padded(found, answers.boxes_as(found.detections, found.options.box_format), np.float32),
    ),
    "scores": Output(
        "FP32",
        lambda manifest: (_limit(manifest),),
        lambda found: _padded(found, found.detections.scores, np.float32),
    ),
    "class_ids": Output(
        "INT64",
        lambda manifest: (_limit(manifest),),
        lambda found: _padded(found, found.detections.labels, np.int64, padding=-1),
    ),
    "keypoints": Output("FP32", lambda manifest: (_limit(manifest), _num_joints(manifest), 3), _keypoints),
    "masks": Output("BYTES", lambda manifest: (_limit(manifest),), _masks),
    "answer": Output("BYTES", lambda _: (), lambda found: [answers.to_json(found)]),
}


@dataclass(frozen=True, slots=True)
class _Call:
    """One infer request. `outputs` has the names in order, each with whether it comes as binary data."""

    asked: Asked
    id: str | None
    pictures: Tensor
    outputs: dict[str, bool]

    @property
    def manifest(self) -> Manifest:
        return self.asked.model.detector.bundle.manifest

    def prepare(self, service: "Service", index: int) -> Picture[dict[str, Row]]:
        return service.prepare(self.asked, partial(self._decode, service.settings.decode_limits, index), self._rows)

    def _decode(self, limits: images.DecodeLimits, index: int) -> images.Image:
        values = self.pictures.values
        if isinstance(values, list):
            return images.decode(values[index], limits)
        images.check_size((values.shape[2], values.shape[1]), limits)
        return values[index]

    def _rows(self, found: Found) -> dict[str, Row]:
        return {name: OUTPUTS[name].row(found) for name in self.outputs}

    def answer(self, rows: Sequence[Mapping[str, Row]]) -> Response:
        model = self.asked.model
        head = {"model_name": model.name, "model_version": model.version}
        head |= {} if self.id is None else {"id": self.id}
        outputs = [(self._output(name, [row[name] for row in rows]), binary) for name, binary in self.outputs.items()]
        content, header_length = write(head, outputs)
        if header_length is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER_LENGTH: str(header_length)}, media_type="application/octet-stream")

    def _output(self, name: str, rows: Sequence[Row]) -> Tensor:
        shape = (len(rows), *OUTPUTS[name].shape(self.manifest))
        if OUTPUTS[name].datatype == "BYTES":
            return Tensor(name, shape, [bytes(element) for row in rows for element in row])
        return Tensor(name, shape, np.stack([np.asarray(row) for row in rows]))


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers. Says nothing of the models."""
    return {"live": True}


_NOT_NOW = openapi.problems(errors.UnknownModel, errors.NotReady, errors.Draining, model=schemas.ProtocolError)


@router.get("/health/ready", responses=_NOT_NOW)
async def ready(request: Request) -> dict[str, bool]:
    """All models are loaded and the default one can be asked. The status says it, as with /readyz."""
    _service(request).ready_default()
    return {"ready": True}


@router.get("")
async def server(request: Request) -> schemas.ServerMetadata:
    """What this server is, and which extensions of the protocol it has."""
    return schemas.ServerMetadata(name="limner", version=request.app.version, extensions=["binary_tensor_data"])


@router.get("/models/{name}", responses=_NOT_NOW)
async def model(request: Request, name: Name) -> schemas.ModelMetadata:
    """A model's tensors. Of the inputs a request holds exactly one."""
    return _metadata(_model(request, name))


@router.get("/models/{name}/versions/{version}", responses=_NOT_NOW)
async def model_version(request: Request, name: Name, version: Version) -> schemas.ModelMetadata:
    """A version's tensors. Of the inputs a request holds exactly one."""
    return _metadata(_model(request, name, version))


@router.get("/models/{name}/ready", responses=_NOT_NOW, response_model=schemas.ModelReadiness)
async def model_ready(request: Request, name: Name) -> Response:
    """The model can be asked."""
    return _readiness(_model(request, name))


@router.get("/models/{name}/versions/{version}/ready", responses=_NOT_NOW, response_model=schemas.ModelReadiness)
async def model_version_ready(request: Request, name: Name, version: Version) -> Response:
    """The version can be asked."""
    return _readiness(_model(request, name, version))


@router.post(
    "/models/{name}/infer",
    openapi_extra=openapi.INFER,
    responses=openapi.INFER_RESPONSES,
    response_model=schemas.InferAnswer,
)
async def infer(request: Request, name: Name) -> Response:
    """Detections of one picture or several, as tensors. The options of POST /detect are its parameters."""
    return await _infer(request, name)


@router.post(
    "/models/{name}/versions/{version}/infer",
    openapi_extra=openapi.INFER,
    responses=openapi.INFER_RESPONSES,
    response_model=schemas.InferAnswer,
)
async def infer_version(request: Request, name: Name, version: Version) -> Response:
    """As without the version."""
    return await _infer(request, name, version)


def _service(request: Request) -> "Service":
    return request.app.state.service


def _model(request: Request, name: str, version: str | None = None) -> Ready:
    service = _service(request)
    if service.admission.is_closed:
        raise errors.Draining("the service is shutting down")
    return service.store.ready(_spec(name, version))


def _spec(name: str, version: str | None) -> str:
    return name if version is None else f"{name}@{version}"


def _readiness(found: Ready) -> Response:
    return Response(orjson.dumps({"name": found.name, "ready": True}), media_type="application/json")


def _metadata(found: Ready) -> schemas.ModelMetadata:
    manifest = found.detector.bundle.manifest
    outputs = {name: OUTPUTS[name] for name in _offered(found)}
    described = {
        "name": found.name,
        "versions": [found.version],
        "platform": found.detector.engine.name,
        "inputs": [{"name": name, "datatype": each.datatype, "shape": each.shape} for name, each in INPUTS.items()],
        "outputs": [
            {"name": name, "datatype": each.datatype, "shape": (-1, *each.shape(manifest))}
            for name, each in outputs.items()
        ],
    }
    return schemas.ModelMetadata.model_validate(described)


def _offered(found: Ready) -> list[str]:
    bundle = found.detector.bundle
    absent = {"masks": not bundle.has_masks, "keypoints": bundle.manifest.keypoints is None}
    return [name for name in OUTPUTS if not absent.get(name)]


async def _infer(request: Request, name: str, version: str | None = None) -> Response:
    service = _service(request)
    spec = _spec(name, version)
    with service.admission.permit(), service.store.lease() as lease:
        body = await read_body(request, service.settings, COMPRESSED)
        call = await service.in_pool_with_model(request, lease, lambda: _open(request, lease, spec, body))
        pictures.check_several(call.asked.options, call.pictures.shape[0])
        prepare = [partial(call.prepare, service, index) for index in range(call.pictures.shape[0])]
        rows = errors.none_failed(await service.run_pictures(request, prepare))
        return await service.in_pool(lambda: call.answer(rows))


def _open(request: Request, lease: Lease, spec: str, body: bytes) -> _Call:
    found = lease.take(spec)
    request.state.watch = _service(request).watch(found)
    body = inflated(body, request.headers.get("content-encoding", "identity"), _service(request).settings)
    if not body:
        raise errors.EmptyBody("the body is empty: send the JSON of an inference request")
    asked, tensors = read(body, request.headers.get(HEADER_LENGTH))
    options = _options(request.query_params.multi_items(), asked.parameters or {})
    outputs = _outputs(asked, found, options)
    if "answer" not in outputs:
        options = _without_answer(options, outputs)
    return _Call(_service(request).asked(lease, spec, options), asked.id, _pictures(tensors), outputs)


def _pictures(tensors: Sequence[Tensor]) -> Tensor:
    """The one input, with pictures along its first axis."""
    names = [tensor.name for tensor in tensors]
    if len(tensors) != 1 or names[0] not in INPUTS:
        told = wire.short(repr(names))
        raise errors.MalformedRequest(f"the inputs are {told}: there must be one, 'image' or 'pixels'")
    (given,) = tensors
    expected = INPUTS[given.name]
    shapes = [expected.shape, (-1, 1)] if given.name == "image" else [expected.shape]
    if given.datatype != expected.datatype or not any(_fits(given.shape, shape) for shape in shapes):
        told = f"{given.datatype} {list(given.shape)}, it must be {expected.datatype} {list(expected.shape)}"
        raise errors.MalformedRequest(f"input {given.name!r} is {told}, where -1 is any length above 0")
    return given


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(side == wanted or (wanted == -1 and side) for side, wanted in pairs)


def _options(query: Sequence[tuple[str, Any]], parameters: Mapping[str, Any]) -> wire.Options:
    given = [*query, *((name, value) for name, value in parameters.items() if name != BINARY_OUTPUT)]
    for name, _ in given:
        if name in REFUSED:
            raise errors.InvalidOption(f"parameter {name!r} is not taken here: {REFUSED[name]}")
    return wire.parse_options(_translated(name, value) for name, value in given)


def _translated(name: str, value: Any) -> tuple[str, Any]:
    """Triton's two parameters that /detect has, too: priority 1 is its highest and 0 its default; microseconds."""
    if isinstance(value, bool) or not isinstance(value, int):
        return name, value
    if name == "timeout":
        return "timeout_ms", value / 1000
    return name, ("high" if value == 1 else "normal") if name == "priority" else value


def _outputs(asked: InferRequest, found: Ready, options: wire.Options) -> dict[str, bool]:
    """Those named, else every array that the options allow; each with whether it comes as binary data."""
    switched_off = {"masks": options.masks == "none", "keypoints": not options.keypoints}
    offered = _offered(found)
    by_default = (asked.parameters or {}).get(BINARY_OUTPUT, False)
    if not isinstance(by_default, bool):
        raise errors.MalformedRequest(f"parameter {BINARY_OUTPUT!r} must be true or false")
    if not asked.outputs:
        return {name: by_default for name in offered if name != "answer" and not switched_off.get(name)}
    for output in asked.outputs:
        if output.name not in offered:
            told = f"there is no output {wire.short(repr(output.name))}"
            raise errors.MalformedRequest(f"{told}; model {found.name!r} has: {', '.join(offered)}")
        if switched_off.get(output.name):
            raise errors.InvalidOption(f"output {output.name!r} is asked for and switched off by the parameters")
    chosen = {output.name: _is_binary(output, by_default) for output in asked.outputs}
    if len(chosen) < len(asked.outputs):
        raise errors.MalformedRequest("an output is named twice: name it once")
    return chosen


def _is_binary(output: InferOutput, by_default: bool) -> bool:
    chosen = output.parameters.binary_data if output.parameters else None
    return by_default if chosen is None else chosen


def _without_answer(options: wire.Options, outputs: Mapping[str, bool]) -> wire.Options:
    """Nothing is computed for an output that is not there, and no option is passed over that only `answer` obeys."""
    if options.keypoint_format != wire.Options.model_fields["keypoint_format"].default:
        raise errors.InvalidOption("keypoint_format is for output 'answer': keypoints come as x, y, score")
    masks = options.masks if "masks" in outputs else "none"
    return options.model_copy(update={"masks": masks, "keypoints": "keypoints" in outputs})
