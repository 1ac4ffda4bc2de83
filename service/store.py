"""The models of one service: finds bundles, opens each on an engine, and holds it to its golden outputs.

A model is loading, then ready or failed, with the reason in words. `load_all` runs in a thread of its own while the
service already answers; the rest only reads. Knows nothing of requests or batches.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import structlog

from service.bundle import MANIFEST, Bundle
from service.detector import Detector
from service.engines import Agreement, Opened, verify_golden
from service.errors import BundleError, NotReady, ServiceError, UnknownModel

log = structlog.get_logger()

State = Literal["loading", "ready", "failed"]
Opener = Callable[[Bundle], Opened]


@dataclass(frozen=True, slots=True)
class Found:
    """The highest version of one name."""

    name: str
    version: str
    directory: Path


@dataclass(frozen=True, slots=True)
class Model:
    found: Found
    state: State = "loading"
    reason: str = "it is being loaded"
    detector: Detector | None = None
    engine_reason: str = ""
    agreement: Agreement | None = None
    load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that can be asked."""

    name: str
    version: str
    detector: Detector


def discover(directory: Path) -> list[Found]:
    """The highest version of each name, by name. Dot directories are unfinished exports."""
    highest: dict[str, Found] = {}
    for manifest in sorted(directory.glob(f"*/*/{MANIFEST}")):
        name, version = manifest.parent.parent.name, manifest.parent.name
        if name.startswith(".") or version.startswith("."):
            continue
        known = highest.get(name)
        if known is None or version_key(version) > version_key(known.version):
            highest[name] = Found(name, version, manifest.parent)
    return [highest[name] for name in sorted(highest)]


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Numbers compare as numbers: 10 is above 9, 1.10 above 1.9."""
    parts = re.findall(r"\d+|[^\d._-]+", version)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


class Store:
    def __init__(self, directory: Path, opener: Opener, default_model: str | None = None) -> None:
        self._directory = directory
        self._opener = opener
        self._default_model = default_model
        self._models = {found.name: Model(found) for found in discover(directory)}

    @property
    def models(self) -> list[Model]:
        return list(self._models.values())

    @property
    def is_loading(self) -> bool:
        return any(model.state == "loading" for model in self._models.values())

    @property
    def default_name(self) -> str | None:
        """The setting, else the first by name that has not failed, else the first."""
        if self._default_model is not None or not self._models:
            return self._default_model
        usable = [name for name, model in self._models.items() if model.state != "failed"]
        return (usable or list(self._models))[0]

    def load_all(self) -> None:
        """The default model first: most requests ask for it."""
        for name in sorted(self._models, key=lambda name: (name != self.default_name, name)):
            self._models[name] = self._load(self._models[name].found)

    def named(self, name: str | None) -> Model:
        """The model as it is, whatever its state."""
        name = name if name is not None else self.default_name
        if name is None:
            raise NotReady(f"no bundle was found under {self._directory}: put one there and start again")
        if name not in self._models:
            known = ", ".join(self._models) or "none"
            raise UnknownModel(f"there is no model {name!r}; there is: {known}")
        return self._models[name]

    def ready(self, name: str | None) -> Ready:
        model = self.named(name)
        if model.state != "ready" or model.detector is None:
            raise NotReady(f"model {model.found.name!r} is not ready: {model.reason}")
        return Ready(model.found.name, model.found.version, model.detector)

    def close(self) -> None:
        for model in self._models.values():
            if model.detector is not None:
                model.detector.engine.close()

    def _load(self, found: Found) -> Model:
        started = time.monotonic()
        try:
            model = self._open(found)
        except ServiceError as error:
            log.error("model failed", model=found.name, version=found.version, reason=error.detail)
            return Model(found, "failed", error.detail)
        except Exception as error:  # one broken model must not take the others along; the log has the traceback
            log.exception("model failed", model=found.name, version=found.version)
            return Model(found, "failed", f"{type(error).__name__} while loading; the log has the rest")
        model = replace(model, load_seconds=time.monotonic() - started)
        log.info("model ready", model=found.name, version=found.version, seconds=round(model.load_seconds, 2))
        return model

    def _open(self, found: Found) -> Model:
        bundle = Bundle.read(found.directory)
        if (bundle.name, bundle.version) != (found.name, found.version):
            raise BundleError(
                f"{found.directory} holds {bundle.name}/{bundle.version}: name the directories as the manifest says"
            )
        opened = self._opener(bundle)
        # This also warms the engine: the golden batch goes through every stage.
        agreement = verify_golden(opened.engine, bundle)
        detector = Detector(bundle, opened.engine)
        return Model(found, "ready", "", detector, opened.reason, agreement)
