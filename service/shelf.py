"""What there is of each model: every version that is known, and how each one stands.

A version is loading, ready, failed or unloaded, with the reason in words. Everything here is quick and may be called
from any thread. Knows nothing of how a version is loaded, nor of who asks.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from service.errors import UnknownModel
from service.leases import Ready
from service.loading import Fingerprint, Found, by_version

State = Literal["loading", "ready", "failed", "unloaded"]

NEW = "nobody has loaded it so far"
ON_REQUEST = "it was unloaded on request"


@dataclass(frozen=True, slots=True)
class Model:
    """One version as it stands. A ready one may have a reason too: why what is on disk now could not replace it."""

    found: Found
    state: State = "loading"
    reason: str = "it is being loaded"
    ready: Ready | None = None
    tried: Fingerprint | None = None  # the files at the last attempt, so that only a change brings another

    @property
    def is_dismissed(self) -> bool:
        """Unloaded by an operator: only an operator, or a newer version, brings the model back."""
        return self.state == "unloaded" and self.reason == ON_REQUEST


class Shelf:
    """`lock` may be held around several calls that must see and change the same state."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._models: dict[str, dict[str, Model]] = {}  # by name, then by version from the highest down

    @property
    def names(self) -> list[str]:
        with self.lock:
            return list(self._models)

    @property
    def answering(self) -> list[Model]:
        """For each name the version that a request for it gets, or why it gets none."""
        with self.lock:
            return [_answering(versions) for versions in self._models.values()]

    @property
    def loaded(self) -> list[Ready]:
        return [model.ready for model in self.all() if model.ready is not None]

    def all(self) -> list[Model]:
        with self.lock:
            return [model for versions in self._models.values() for model in versions.values()]

    def versions(self, name: str) -> list[Model]:
        """From the highest down."""
        with self.lock:
            return list(self._models.get(name, {}).values())

    def named(self, spec: str) -> Model:
        """`name` or `name@version`, as it is, whatever its state."""
        name, _, version = spec.partition("@")
        with self.lock:
            if name not in self._models:
                known = ", ".join(self._models) or "none"
                raise UnknownModel(f"there is no model {name!r}; there is: {known}")
            versions = self._models[name]
            if not version:
                return _answering(versions)
            if version not in versions:
                raise UnknownModel(f"model {name!r} has no version {version!r}; it has: {', '.join(versions)}")
            return versions[version]

    def add(self, found: Iterable[Found]) -> None:
        """What is new; touches nothing that is known."""
        with self.lock:
            for each in found:
                self._models.setdefault(each.name, {}).setdefault(each.version, Model(each, "unloaded", NEW))
            self._models = {name: _from_the_highest(self._models[name]) for name in sorted(self._models)}

    def put(self, model: Model) -> None:
        with self.lock:
            self._models[model.found.name][model.found.version] = model

    def forget(self, found: Found) -> None:
        with self.lock:
            del self._models[found.name][found.version]
            if not self._models[found.name]:
                del self._models[found.name]


def _answering(versions: dict[str, Model]) -> Model:
    """The highest that is ready, else the highest that may be, else the highest."""

    def rank(model: Model) -> int:
        return ("ready", "loading", "unloaded", "failed").index(model.state) + 4 * model.is_dismissed

    return min(versions.values(), key=rank)


def _from_the_highest(versions: dict[str, Model]) -> dict[str, Model]:
    return {version: versions[version] for version in sorted(versions, key=by_version, reverse=True)}
