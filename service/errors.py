"""Every way in which the service refuses or fails, one class each.

    ServiceError
    ├── RequestError                 the client can fix it
    │   ├── EmptyBody                400
    │   ├── MalformedRequest         400
    │   ├── UnknownModel             404
    │   ├── UnknownRoute             404
    │   ├── WrongMethod              405
    │   ├── BodyTimeout              408
    │   ├── BodyTooLarge             413
    │   ├── ImageTooLarge            413
    │   ├── UnsupportedType          415
    │   ├── NotAnImage               415
    │   ├── BrokenImage              422
    │   ├── InvalidOption            422
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
        └── EngineFailed             500, fails its batch alone

A class owns its `code`, `status` and `title`; the instance brings the `detail`, which says what was found, what was
expected and what to do. `problem` is the one place that turns an error into RFC 9457 members. This module knows nothing
of HTTP frameworks.
"""

from typing import ClassVar


class ServiceError(Exception):
    """Root of the tree; never raised itself."""

    code: ClassVar[str] = "service-error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "The service failed"
    retry_after_s: ClassVar[int | None] = None

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


class NotReady(CapacityError):
    code = "not-ready"
    title = "The model is not ready"
    retry_after_s = 5


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
    title = "The engine failed on this batch"


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


def all_errors() -> list[type[ServiceError]]:
    """Every class of the tree that a client can meet, for the documentation and the completeness test."""
    grouping = {ServiceError, RequestError, CapacityError}
    found: list[type[ServiceError]] = []
    waiting: list[type[ServiceError]] = [ServiceError]
    while waiting:
        error = waiting.pop()
        waiting.extend(error.__subclasses__())
        if error not in grouping:
            found.append(error)
    return sorted(found, key=lambda error: (error.status, error.code))
