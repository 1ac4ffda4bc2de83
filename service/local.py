"""A detector in this process, without a service around it, for the commands. Errors are `ServiceError`s."""

from pathlib import Path

from service.bundle import Bundle
from service.engines import EngineChoice, open_engine
from service.errors import UnknownModel
from service.loading import Found, Loaded, Warming, find_all, open_bundle, read
from service.settings import Settings


def choose(settings: Settings, model: str | None) -> Found:
    """`name`, `name@version` or None: the default model of the settings, else the first by name. The highest version,
    where none is named."""
    found = find_all(settings.bundles)
    if not found:
        raise UnknownModel(
            f"no bundle under {settings.bundles.resolve()}: it must hold <name>/<version>/manifest.json; "
            "say where they are with --bundles or LIMNER_BUNDLES"
        )
    wanted = model or settings.default_model or found[0].name
    for each in found:
        if wanted in (each.name, str(each)):
            return each
    raise UnknownModel(f"no model {wanted!r}; there are: {', '.join(map(str, found))}")


def load(settings: Settings, bundle: Bundle, engine: EngineChoice | None = None) -> Loaded:
    """Held to the golden outputs, as in the service."""

    def opener(bundle: Bundle):
        return open_engine(bundle, engine or settings.engine, settings.threads, settings.precision)

    return open_bundle(bundle, opener, Warming(seconds=0), lambda: False)


def bundle_of(settings: Settings, model: str | None, directory: Path | None) -> Bundle:
    """The bundle in `directory` where one is given, else the chosen one of the settings' directory."""
    return Bundle.read(directory) if directory is not None else read(choose(settings, model))
