"""Every way in which the service refuses or fails, one class each.

    ServiceError
    ├── RequestError                 the client can fix it
    │   ├── EmptyBody                400
    │   ├── MalformedRequest         400
    │   ├── Unauthorized             401
    │   ├── KeyRequired              401
    │   ├── AdminOff                 403
    │   ├── OriginRefused            403
    │   ├── UnknownModel             404
    │   ├── UnknownRoute             404
    │   ├── WrongMethod              405
    │   ├── BodyTimeout              408
    │   ├── BodyTooLarge             413
    │   ├── ImageTooLarge            413
    │   ├── TooManyFrames            413
    │   ├── TooManyPictures          413
    │   ├── UnsupportedType          415
    │   ├── NotAnImage               415
    │   ├── BrokenImage              422
    │   ├── InvalidOption            422
    │   ├── UrlRefused               422
    │   ├── UrlFailed                424
    │   └── ClientGone               499, logged and never sent
    ├── CapacityError                the same request may succeed later
    │   ├── Overloaded               429
    │   ├── NotReady                 503
    │   ├── Draining                 503
    │   └── DeadlineExceeded         504
    ├── BundleError                  503, a bundle on disk that cannot be served
    │   └── EngineMismatch           503, the engine disagrees with the golden outputs
    ├── EngineUnavailable            503, the chosen runtime is not installed
    └── InternalError                500
        └── EngineFailed             500, fails its picture alone
            ├── EngineOutOfMemory    500, the batch is tried again in halves before
            └── EngineStuck          500, the engine is rebuilt

A class owns its `code`, `status` and `title`; the instance brings the `detail`, which says what was found, what was
expected and what to do. `problem` is the one place that turns an error into RFC 9457 members. This module knows nothing
of HTTP frameworks.
"""

from collections.abc import Sequence
from typing import ClassVar, TypeVar

T = TypeVar("T")

EXPIRED = "the deadline passed in the queue: send fewer requests at once, or give them more time (timeout_ms)"


class ServiceError(Exception):
    """Root of the tree; never raised itself."""

    code: ClassVar[str] = "service-error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "The service failed"
    retry_after_s: int | None = None
    challenge: ClassVar[str | None] = None  # what WWW-Authenticate says

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class RequestError(ServiceError):
    code = "request-error"
    status = 400
    title = "The request cannot be served"


class EmptyBody(RequestError):
    code = "empty-body"
    title = "The request holds no image"


class MalformedRequest(RequestError):
    code = "malformed-request"
    title = "The request cannot be read"


class Unauthorized(RequestError):
    code = "unauthorized"
    status = 401
    title = "The request carries no valid API key"
    challenge = 'Bearer realm="limner"'


class KeyRequired(RequestError):
    code = "key-required"
    status = 401
    title = "The administrator's key is missing or wrong"
    challenge = 'Bearer realm="limner"'


class AdminOff(RequestError):
    code = "admin-off"
    status = 403
    title = "The administrative routes are off"


class OriginRefused(RequestError):
    code = "origin-refused"
    status = 403
    title = "Pages of this origin may not connect"


class UnknownModel(RequestError):
    code = "unknown-model"
    status = 404
    title = "No such model"


class UnknownRoute(RequestError):
    code = "unknown-route"
    status = 404
    title = "No such route"


class WrongMethod(RequestError):
    code = "wrong-method"
    status = 405
    title = "This route does not take this method"


class BodyTimeout(RequestError):
    code = "body-timeout"
    status = 408
    title = "The body did not arrive in time"


class BodyTooLarge(RequestError):
    code = "body-too-large"
    status = 413
    title = "The body is too large"


class ImageTooLarge(RequestError):
    code = "image-too-large"
    status = 413
    title = "The image has too many pixels"


class TooManyFrames(RequestError):
    code = "too-many-frames"
    status = 413
    title = "The file has too many frames or pages"


class TooManyPictures(RequestError):
    code = "too-many-pictures"
    status = 413
    title = "The request holds too many pictures"


class UnsupportedType(RequestError):
    code = "unsupported-type"
    status = 415
    title = "The content type is not one that holds an image"


class NotAnImage(RequestError):
    code = "not-an-image"
    status = 415
    title = "The body is not an image of a known format"


class BrokenImage(RequestError):
    code = "broken-image"
    status = 422
    title = "The image cannot be decoded"


class InvalidOption(RequestError):
    code = "invalid-option"
    status = 422
    title = "An option is unknown or out of range"


class UrlRefused(RequestError):
    code = "url-refused"
    status = 422
    title = "The URL may not be fetched"


class UrlFailed(RequestError):
    code = "url-failed"
    status = 424
    title = "The URL gave no picture"


class ClientGone(RequestError):
    code = "client-gone"
    status = 499
    title = "The client closed the connection"


class CapacityError(ServiceError):
    code = "no-capacity"
    status = 503
    title = "The service cannot take the request now"
    retry_after_s = 1


class Overloaded(CapacityError):
    code = "overloaded"
    status = 429
    title = "Too many requests are under way"

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class NotReady(CapacityError):
    code = "not-ready"
    title = "The model is not ready"
    retry_after_s = 5

    def __init__(self, detail: str, to_load: str | None = None) -> None:
        super().__init__(detail)
        self.to_load = to_load  # what was asked for, where a request may have it loaded


class Draining(CapacityError):
    code = "draining"
    title = "The service is shutting down"
    retry_after_s = 5


class DeadlineExceeded(CapacityError):
    code = "deadline-exceeded"
    status = 504
    title = "The deadline passed before the engine was free"


class BundleError(ServiceError):
    code = "bundle-unusable"
    status = 503
    title = "The model's bundle cannot be served"


class EngineMismatch(BundleError):
    code = "engine-mismatch"
    title = "The engine disagrees with the bundle's golden outputs"


class EngineUnavailable(ServiceError):
    code = "engine-unavailable"
    status = 503
    title = "The chosen engine cannot run here"


class InternalError(ServiceError):
    code = "internal-error"
    status = 500
    title = "The service failed"


class EngineFailed(InternalError):
    code = "engine-failed"
    title = "The engine failed on this picture"


class EngineOutOfMemory(EngineFailed):
    code = "engine-out-of-memory"
    title = "The engine has not enough memory for this picture"


class EngineStuck(EngineFailed):
    code = "engine-stuck"
    title = "The engine did not answer"


def problem(error: ServiceError, instance: str, request_id: str) -> dict[str, str | int]:
    """The members of an `application/problem+json` answer (RFC 9457)."""
    return {
        "type": f"urn:limner:problem:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "request_id": request_id,
    }


def none_failed(results: Sequence[T | ServiceError]) -> list[T]:
    """The results of one request's pictures, for answers that have no place for an error; raises the first."""
    served: list[T] = []
    for index, result in enumerate(results):
        if isinstance(result, ServiceError):
            where = f"picture {index + 1} of {len(results)}: " if len(results) > 1 else ""
            raise type(result)(f"{where}{result.detail}")
        served.append(result)
    return served


def all_errors() -> list[type[ServiceError]]:
    """Every kind that a client can be told of, for the documentation and the completeness test: those of this module,
    of which others may be made that are told alike."""
    grouping = {ServiceError, RequestError, CapacityError}
    found: list[type[ServiceError]] = []
    waiting: list[type[ServiceError]] = [ServiceError]
    while waiting:
        error = waiting.pop()
        waiting.extend(error.__subclasses__())
        if error not in grouping and error.__module__ == __name__:
            found.append(error)
    return sorted(found, key=lambda error: (error.status, error.code))
