"""The models of one service: which are loaded, which one answers, and how one takes over from another.

What is new is loaded aside and takes over in one step; what it replaces ends when the last request lets go of it
(`service.leases`). Loading is for one thread at a time and takes a while; everything else is quick and may come from
any thread. Knows nothing of requests or batches.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import structlog

from service import loading
from service.bundle import Bundle
from service.errors import BundleError, Draining, NotReady, ServiceError
from service.leases import Lease, Ready
from service.loading import Fingerprint, Opener, Warming, by_version, discover, find_all, fingerprint, version_key
from service.shelf import ON_REQUEST, Model, Shelf

__all__ = ["Model", "Opener", "Policy", "Ready", "Store", "VersionPolicy", "discover", "version_key"]

log = structlog.get_logger()

VersionPolicy = Literal["latest", "all"]

OLDER = "a newer version took over"
NO_ROOM = "LIMNER_MAX_MODELS leaves no room"
REMOVED = "it was removed from the disk"


@dataclass(frozen=True, slots=True)
class Policy:
    versions: VersionPolicy = "latest"
    max_models: int = 0
    warming: Warming = Warming()
    load_seconds: float = 300.0  # who takes longer has hung


class Store:
    """`on_end` is told of each version that ended, just before its engine is closed, on a thread of the store."""

    def __init__(
        self,
        directory: Path,
        opener: Opener,
        default_model: str | None = None,
        policy: Policy | None = None,
        on_end: Callable[[Ready], None] = lambda ready: None,
    ) -> None:
        self._directory = directory
        self._opener = opener
        self._default_model = default_model
        self._first_default: str | None = None
        self._policy = policy or Policy()
        self._on_end = on_end
        self._shelf = Shelf()
        self._idle = threading.Condition(self._shelf.lock)
        self._loader = threading.Lock()
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="closer")
        self._open: set[Ready] = set()  # whose engines are open, retired ones that are still held included
        self._is_starting = True
        self._is_stopping = False
        self._is_closed = False
        self._shelf.add(find_all(directory))
        self._plan()

    @property
    def models(self) -> list[Model]:
        """For each name the version that a request for it gets, or why it gets none."""
        return self._shelf.answering

    def versions(self, name: str) -> list[Model]:
        """From the highest down."""
        return self._shelf.versions(name)

    @property
    def is_loading(self) -> bool:
        """Until what was there at the start is loaded or has failed; what comes later is loaded aside."""
        return self._is_starting

    @property
    def default_name(self) -> str | None:
        """The setting, else the first by name at the start, else the first by name: among those that can answer."""
        models = self.models
        if self._default_model is not None or not models:
            return self._default_model
        usable = [model.found.name for model in models if model.state != "failed" and not model.is_dismissed]
        if self._first_default in usable:
            return self._first_default  # a name that is copied in later must not become the default by its letters
        return (usable or [model.found.name for model in models])[0]

    def named(self, spec: str | None) -> Model:
        """`name` or `name@version`, as it is, whatever its state."""
        spec = spec if spec is not None else self.default_name
        if spec is None:
            raise NotReady(f"no bundle was found under {self._directory}: put one there, and load it or start again")
        return self._shelf.named(spec)

    def ready(self, spec: str | None) -> Ready:
        """The version that answers, for a look at it; `lease` is for using its engine."""
        model = self.named(spec)
        if model.ready is not None:
            return model.ready
        told = f"model {model.found.name!r} is not ready: {model.reason}"
        if self.can_load(model):
            raise NotReady(f"{told}. A request for {model.found} loads it", to_load=spec or model.found.name)
        if model.state == "unloaded":
            told += f". POST /models/{model.found.name}/load?version={model.found.version} loads it"
        raise NotReady(told)

    def can_load(self, model: Model) -> bool:
        """Whether a request may have it loaded: only where a bound keeps requests from filling the memory."""
        waits = model.state == "unloaded" or (model.state == "loading" and not self._is_starting)
        return waits and not model.is_dismissed and self._policy.max_models > 0

    def lease(self) -> Lease:
        """Holds what one request asks for until the request is over."""
        return Lease(self._hold)

    def _hold(self, spec: str | None) -> Ready:
        with self._shelf.lock:  # so that nothing is evicted between the look and the hold
            ready = self.ready(spec)
            if not ready.hold():
                raise NotReady(f"{ready.found} was unloaded: send the request again")
            ready.touch()
            return ready

    def load_all(self) -> None:
        """At the start, as far as there is room. The default model first: most requests ask for it."""
        with self._loader:
            for name in sorted(self._shelf.names, key=lambda name: (name != self.default_name, name)):
                self._settle(name)
            self._first_default = self.default_name
            self._is_starting = False

    def load(self, name: str, version: str | None = None, wait_s: float = 0) -> Model:
        """Loads what is on disk now, the highest version unless one is named; raises why it could not.

        Does nothing where that is loaded and unchanged. Where it needs room and all that are loaded are in use, waits
        for one of them to be idle.
        """
        with self._loader:
            self._shelf.add(find_all(self._directory))
            model = self._shelf.named(f"{name}@{version}") if version else self._highest(name)
            self._bring(model, time.monotonic() + wait_s)
            loaded = self._shelf.named(str(model.found))
        if loaded.ready is None or loaded.reason:
            raise BundleError(f"{loaded.found} was not loaded: {loaded.reason}")
        return loaded

    def load_asked(self, spec: str, wait_s: float) -> None:
        """For a request that met `NotReady.to_load`. How that went is known by asking again.

        Does nothing where something answers meanwhile: a newer version may have come while this waited for its turn.
        """
        with self._loader:
            model = self._shelf.named(spec)
            if self.can_load(model):
                self._load(model, time.monotonic() + wait_s)

    def unload(self, name: str, version: str | None = None) -> list[Model]:
        """One version or all of a name: at once for new requests, in its own time for those that hold it."""
        with self._loader:
            model = self._shelf.named(f"{name}@{version}" if version else name)
            gone = [model] if version or "@" in name else self._shelf.versions(name)
            for each in gone:
                self._drop(each, ON_REQUEST)
            return [self._shelf.named(str(each.found)) for each in gone]

    def refresh(self) -> None:
        """Follows the directory: loads what is new or was changed, and unloads what was removed."""
        with self._loader:
            found = find_all(self._directory)
            if not found and self._shelf.names:
                # This is how a volume looks that is not mounted at the moment.
                log.warning("no bundle found: what is loaded stays", directory=str(self._directory))
                return
            self._shelf.add(found)
            for name in self._shelf.names:
                self._settle(name)
            for model in self._shelf.all():
                if not model.found.directory.is_dir():
                    self._drop(model, REMOVED)
                    self._shelf.forget(model.found)
            self._first_default = self._first_default or self.default_name

    def stop_loading(self) -> None:
        """What is being loaded is given up at the next step."""
        with self._idle:
            self._is_stopping = True
            self._idle.notify_all()

    def close(self) -> None:
        """Closes every engine, held or not: call it when nothing runs any more."""
        self.stop_loading()
        self._is_closed = True
        self._closer.shutdown(wait=True)
        for ready in self._open:
            ready.detector.close()

    def _plan(self) -> None:
        """At the start: says of what `load_all` will load that it is being loaded."""
        for name in self._shelf.names:
            for model in self._shelf.versions(name)[: 1 if self._policy.versions == "latest" else None]:
                self._shelf.put(Model(model.found))

    def _highest(self, name: str) -> Model:
        """On disk, as far as it is there."""
        known = self._shelf.named(name)
        if "@" in name:
            return known
        return next((model for model in self._shelf.versions(name) if model.found.directory.is_dir()), known)

    def _settle(self, name: str) -> None:
        """Brings one name to what the policy wants: every version, or the newest that loads."""
        for model in self._shelf.versions(name):
            if model.is_dismissed or not model.found.directory.is_dir():
                continue
            if model.tried is None or model.tried != fingerprint(model.found.directory):
                self._bring_if_room(model)
            if self._policy.versions == "latest" and self._shelf.named(str(model.found)).state != "failed":
                return

    def _bring_if_room(self, model: Model) -> None:
        if self._num_over(model) <= 0:
            self._bring(model, time.monotonic())
        elif model.ready is None:
            self._shelf.put(Model(model.found, "unloaded", NO_ROOM))

    def _bring(self, model: Model, until_s: float) -> None:
        """Ready from what is on disk now. Nothing is loaded twice, not even after a mistake that was put right."""
        if model.ready is not None and model.ready.fingerprint == fingerprint(model.found.directory):
            self._shelf.put(Model(model.found, "ready", "", model.ready, model.ready.fingerprint))
        else:
            self._load(model, until_s)

    def _load(self, model: Model, until_s: float) -> None:
        """To ready or failed. A version that is ready stays so until its successor is."""
        found, started_s, tried = model.found, time.monotonic(), fingerprint(model.found.directory)
        if model.ready is None:
            self._shelf.put(Model(found))
        try:
            bundle = loading.read(found)  # before anything has to make room for it
            self._make_room(model, until_s)
            loaded = self._open_bundle(bundle)
        except (NotReady, Draining):  # nothing is wrong with the bundle: it may be tried again as it is
            self._shelf.put(replace(model, state="unloaded", reason=NO_ROOM) if model.ready is None else model)
            raise
        except Exception as error:  # one broken model must not take the others along
            self._fail(model, tried, error)
        else:
            self._swap(Ready(found, loaded, tried, time.monotonic() - started_s, self._freed))

    def _open_bundle(self, bundle: Bundle) -> loading.Loaded:
        policy = self._policy
        return loading.open_within(policy.load_seconds, bundle, self._opener, policy.warming, lambda: self._is_stopping)

    def _fail(self, model: Model, tried: Fingerprint, error: Exception) -> None:
        expected = isinstance(error, ServiceError)
        reason = error.detail if expected else f"{type(error).__name__} while loading; the log has the rest"
        if reason != model.reason:  # a bundle that is still being copied fails at each look: once is enough
            found = model.found
            log.error("model failed", model=found.name, version=found.version, reason=reason, exc_info=not expected)
        if model.ready is not None:
            self._shelf.put(replace(model, reason=reason, tried=tried))
        else:
            self._shelf.put(Model(model.found, "failed", reason, tried=tried))

    def _swap(self, ready: Ready) -> None:
        with self._shelf.lock:
            replaced = self._replaced_by(ready.found)
            for old in replaced:
                self._shelf.put(Model(old.found, "unloaded", OLDER))
            self._shelf.put(Model(ready.found, "ready", "", ready, ready.fingerprint))
            self._open.add(ready)
        for old in replaced:
            old.retire()
        seconds = round(ready.load_seconds, 2)
        log.info("model ready", model=ready.name, version=ready.version, seconds=seconds)

    def _replaced_by(self, found: loading.Found) -> list[Ready]:
        """The loaded ones that go when this version comes: itself before, and older ones unless all are wanted."""

        def goes(version: str) -> bool:
            is_older = by_version(version) < by_version(found.version)
            return version == found.version or (is_older and self._policy.versions == "latest")

        return [ready for ready in self._shelf.loaded if ready.name == found.name and goes(ready.version)]

    def _num_over(self, coming: Model) -> int:
        """How many of the loaded versions have to go before this one may come."""
        if not self._policy.max_models:
            return 0
        num_after = len(self._shelf.loaded) - len(self._replaced_by(coming.found)) + 1
        return num_after - self._policy.max_models

    def _make_room(self, coming: Model, until_s: float) -> None:
        """Unloads who was least recently asked and is not in use, and comes back when their memory is free."""
        with self._idle:
            while self._num_over(coming) > 0:
                if self._evict_one(coming):
                    continue
                left_s = until_s - time.monotonic()
                if self._is_stopping or left_s <= 0:
                    raise NotReady(f"all {self._policy.max_models} loaded models are in use: raise LIMNER_MAX_MODELS")
                self._idle.wait(left_s)
        self._closer.submit(lambda: None).result()

    def _evict_one(self, coming: Model) -> bool:
        kept = self._replaced_by(coming.found)  # they go when it comes, and answer until then
        for ready in sorted(self._shelf.loaded, key=lambda ready: ready.asked_s):
            if ready not in kept and ready.retire_if_idle():
                reason = f"it made room for {coming.found} (LIMNER_MAX_MODELS)"
                self._shelf.put(Model(ready.found, "unloaded", reason, tried=ready.fingerprint))
                log.info("model unloaded", model=ready.name, version=ready.version, reason=reason)
                return True
        return False

    def _drop(self, model: Model, reason: str) -> None:
        self._shelf.put(Model(model.found, "unloaded", reason))
        log.info("model unloaded", model=model.found.name, version=model.found.version, reason=reason)
        if model.ready is not None:
            model.ready.retire()

    def _freed(self, ready: Ready, has_ended: bool) -> None:
        """Called by whoever lets go last, the event loop perhaps: closing an engine is left to another thread."""
        if self._is_closed:
            return
        if has_ended:
            self._closer.submit(self._end, ready)
        elif self._policy.max_models:
            with self._idle:
                self._idle.notify_all()

    def _end(self, ready: Ready) -> None:
        try:
            self._on_end(ready)
            ready.detector.close()
            self._open.discard(ready)
        except Exception:  # it answers nobody any more; what it held may be lost, and the log says so
            log.exception("engine did not close", model=ready.name, version=ready.version)
