"""Pictures on their way through the service: what a request asks of each, and several of one request together.

Each of several goes the way of a lone one and counts as a request: under a permit, into the queue and batches of all.
Knows neither the form of the request nor that of the answer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.admission import Admission
from service.answers import Found
from service.bundle import Manifest
from service.detector import Masks, Wants
from service.encoded import Given
from service.errors import InvalidOption, Overloaded, ServiceError, TooManyPictures
from service.leases import Ready
from service.settings import Settings
from service.wire import Options

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks of a picture."""

    model: Ready
    options: Options
    wants: Wants

    @classmethod
    def of(cls, model: Ready, options: Options, most_seconds: float) -> "Asked":
        """`most_seconds` is the longest that the service lets a request wait, from now on."""
        return cls(model, options, _wants(options, model.detector.bundle.manifest, most_seconds))


@dataclass(frozen=True, slots=True)
class Picture(Generic[T]):
    """One picture, fitted to the model's canvas or to be. `encode` makes its answer of what was found."""

    asked: Asked
    given: Given
    encode: Callable[[Found], T]
    timings_ms: dict[str, float]  # of each stage it went through so far
    upload: bytes = b""  # unless the answer shows the picture


def _wants(options: Options, manifest: Manifest, most_seconds: float) -> Wants:
    _check_proposals(options, manifest)
    most = manifest.limits.max_detections
    asked = options.max_detections if options.max_detections is not None else most
    if asked > most:
        raise InvalidOption(f"max_detections = {asked}: model {manifest.name!r} gives at most {most}")
    masks: Masks = "none" if options.masks == "none" else "probability" if options.masks == "probability" else "rle"
    seconds = most_seconds if options.timeout_ms is None else min(options.timeout_ms / 1000, most_seconds)
    return Wants(
        options.confidence,
        asked,
        masks,
        options.keypoints,
        options.mask_threshold,
        options.mask_interpolation,
        time.monotonic() + seconds,
        options.allow_partial,
    )


def _check_proposals(options: Options, manifest: Manifest) -> None:
    rule, given = manifest.proposals, options.proposals
    if rule is None:
        if given is not None or options.max_proposals is not None:
            raise InvalidOption(f"model {manifest.name!r} finds its own boxes: leave out proposals and max_proposals")
        return
    if given is not None and options.max_proposals is not None:
        raise InvalidOption("max_proposals is for a search, and proposals bring what there is: give one of them")
    count = options.max_proposals if given is None else len(given)
    if count is not None and count > rule.max_proposals:
        name = "max_proposals" if given is None else "number of proposals"
        raise InvalidOption(f"{name} = {count}: model {manifest.name!r} takes at most {rule.max_proposals}")


def check_several(options: Options, num_pictures: int) -> None:
    """Of a request with so many pictures."""
    if num_pictures > 1 and options.proposals is not None:
        raise InvalidOption("proposals are of one picture: send each picture with its own in a request of its own")


@contextmanager
def further_permits(num_pictures: int, admission: Admission, settings: Settings) -> Iterator[None]:
    """All or none. The request's own permit, which the caller holds, is that of the first picture."""
    most = min(settings.max_pictures, settings.max_requests)
    if num_pictures > most:
        raise TooManyPictures(
            f"the request holds {num_pictures} pictures, at most {most} are taken: send them in several requests, or "
            "raise LIMNER_MAX_PICTURES and, where it is lower, LIMNER_MAX_REQUESTS"
        )
    with ExitStack() as held:
        try:
            for _ in range(num_pictures - 1):
                held.enter_context(admission.permit())
        except Overloaded:
            raise Overloaded(
                f"the request's {num_pictures} pictures count as a request each, and there is no room for all of them: "
                "retry after the time in Retry-After, send fewer at once, or raise LIMNER_MAX_REQUESTS"
            ) from None
        yield


async def results_of(running: Sequence[Awaitable[T]]) -> list[T | ServiceError]:
    """In order, each with its result or its own failure; what nobody expected fails them all."""
    results: list[T | ServiceError] = []
    for result in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, ServiceError):
            raise result
        results.append(result)
    return results
