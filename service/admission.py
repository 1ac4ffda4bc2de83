"""Who may come in: a permit each, and a look at how long the engine will take for those who are in.

Knows neither HTTP nor batches; `service.batching` tells the pace.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from service.errors import Draining, Overloaded

DRAINING = "the service is shutting down: send the request to another instance, or again soon"


class Pace:
    """How long the device takes for a picture, lately. A batch on a share of the device costs that share of its time:
    as many others run beside it."""

    SWAY = 0.2  # of the newest batch

    def __init__(self) -> None:
        self.seconds = 0.0

    def ran(self, num_pictures: int, share: float, seconds: float) -> None:
        each_s = seconds * share / num_pictures
        self.seconds += (self.SWAY if self.seconds else 1.0) * (each_s - self.seconds)


class Admission:
    """Permits: taken before a body is read, given back in `finally`. Overload is refused at the door, not queued.

    `max_wait_s` bounds the wait that is to be expected: as long as the device takes for all who are under way. 0 is no
    such bound. Who finds nobody is always taken.
    """

    def __init__(self, max_requests: int, max_wait_s: float = 0.0) -> None:
        self._max_requests = max_requests
        self._max_wait_s = max_wait_s
        self._num_held = 0
        self._is_closed = False
        self.pace = Pace()

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def wait_s(self) -> float:
        """That a request has to expect which comes now."""
        return self._num_held * self.pace.seconds

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        self._is_closed = True

    def enter(self) -> AbstractContextManager[None]:
        """The permit of a request that comes now."""
        if self._max_wait_s and not self._is_closed and (wait_s := self.wait_s) > self._max_wait_s:
            raise Overloaded(
                f"the wait would be about {wait_s * 1000:.0f} ms, more than {self._max_wait_s * 1000:g} ms are not "
                "taken: retry after the time in Retry-After, or raise LIMNER_MAX_WAIT_MS",
                math.ceil(wait_s - self._max_wait_s),
            )
        return self.permit()

    @contextmanager
    def permit(self) -> Iterator[None]:
        """Without a look at the wait, for who has come in already."""
        if self._is_closed:
            raise Draining(DRAINING)
        if self._num_held >= self._max_requests:
            raise Overloaded(
                f"{self._max_requests} requests are under way, no more are taken: retry after the time in Retry-After, "
                "or raise LIMNER_MAX_REQUESTS"
            )
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1
