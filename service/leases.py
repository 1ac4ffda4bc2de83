"""Who holds a loaded version: counted, so that its engine is closed when the last one lets go and not before.

A version is held by each request that it answers and by each batch that runs on it. Retiring one is final: it ends for
good when nobody holds it, and cannot be held again.
"""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType

from service.detector import Detector, Ran, Wants
from service.encoded import Given
from service.errors import ClientGone, NotReady, ServiceError
from service.loading import Fingerprint, Found, Loaded


class Ready:
    """A loaded version. `on_idle` is told each time that nobody holds it any more, and once that this ended it."""

    def __init__(
        self,
        found: Found,
        loaded: Loaded,
        fingerprint: Fingerprint,
        load_seconds: float,
        on_idle: Callable[["Ready", bool], None],
    ) -> None:
        self.found = found
        self.loaded = loaded
        self.fingerprint = fingerprint
        self.load_seconds = load_seconds
        self.asked_s = time.monotonic()
        self.last_used: datetime | None = None
        self._on_idle = on_idle
        self._lock = threading.Lock()
        self._num_holders = 0
        self._is_retired = False

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def version(self) -> str:
        return self.found.version

    @property
    def detector(self) -> Detector:
        return self.loaded.detector

    @property
    def num_holders(self) -> int:
        return self._num_holders

    @property
    def has_ended(self) -> bool:
        return self._is_retired and not self._num_holders

    def hold(self) -> bool:
        """False once it has ended: then look for its successor."""
        with self._lock:
            if self.has_ended:
                return False
            self._num_holders += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._num_holders -= 1
            is_idle, has_ended = not self._num_holders, self.has_ended
        if is_idle:
            self._on_idle(self, has_ended)

    def retire(self) -> None:
        """Ends it when the last holder lets go, now if there is none."""
        with self._lock:
            ends = not self._is_retired and not self._num_holders
            self._is_retired = True
        if ends:
            self._on_idle(self, True)

    def retire_if_idle(self) -> bool:
        with self._lock:
            if self._num_holders or self._is_retired:
                return False
            self._is_retired = True
        self._on_idle(self, True)
        return True

    def touch(self) -> None:
        self.asked_s = time.monotonic()
        self.last_used = datetime.now(UTC)

    def run(self, given: Sequence[Given], wants: Sequence[Wants], is_wide: bool = True) -> Sequence[Ran | ServiceError]:
        """`Detector.answer` or `answer_beside`, held meanwhile: all who wait for a batch may leave before it ends."""
        if not self.hold():
            raise NotReady(f"{self.found} was unloaded: send the request again")
        try:
            detector = self.detector
            return detector.answer(given, wants) if is_wide else detector.answer_beside(given, wants)
        finally:
            self.release()


class Lease:
    """What one request holds. `take` may come from any thread, even after the request is over: then it is refused."""

    def __init__(self, held: Callable[[str | None], Ready]) -> None:
        self._hold = held
        self._lock = threading.Lock()
        self._taken: dict[str | None, Ready] = {}
        self._is_over = False
        self.waited_s = 0.0  # for models that had to be loaded first

    def take(self, spec: str | None) -> Ready:
        """The same version each time that one request asks for the same model, whatever is swapped meanwhile."""
        with self._lock:
            if self._is_over:
                raise ClientGone("the request is over")
            if spec not in self._taken:
                self._taken[spec] = self._hold(spec)
            return self._taken[spec]

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_over = True
            taken, self._taken = list(self._taken.values()), {}
        for ready in taken:
            ready.release()
