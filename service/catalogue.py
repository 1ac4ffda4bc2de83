"""The routes under /models: what there is, in which state, and loading and unloading it.

Who looks needs no key; who changes something needs an administrator's. Loading takes its time on the loader thread,
while the service answers.
"""

from dataclasses import asdict
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from service import errors, openapi, schemas
from service.shelf import Model
from service.store import Store

router = APIRouter()


def _store(request: Request) -> Store:
    return request.app.state.service.store


def _only_admin(request: Request) -> None:
    keys = request.app.state.service.admin_keys
    if not keys:
        raise errors.AdminOff(
            "there is no key for them: start the service with LIMNER_ADMIN_KEY or LIMNER_ADMIN_KEY_FILE"
        )
    if not keys.are_in(request.headers):
        raise errors.KeyRequired("send the administrator's key as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'")


REFUSALS = openapi.problems(
    errors.KeyRequired, errors.AdminOff, errors.UnknownModel, errors.BundleError, errors.NotReady, errors.Draining
)


@router.get("/models", response_model=schemas.Models)
async def models(request: Request) -> Response:
    """Every model with its versions and their states, and which one answers requests that name none."""
    store = _store(request)
    listed = [{**_summary(model), "versions": _versions(store, model.found.name)} for model in store.models]
    return _json({"default": store.default_name, "models": listed})


@router.get("/models/{name}", responses=openapi.problems(errors.UnknownModel), response_model=schemas.ModelDetails)
async def model(request: Request, name: str) -> Response:
    """One model, `name` or `name@version`: classes, keypoints, canvas, accuracy, and how closely its engine agrees with
    the export."""
    store = _store(request)
    found = store.named(name)
    return _json({**_details(found), "versions": _versions(store, found.found.name)})


@router.post(
    "/models/{name}/load",
    responses=REFUSALS,
    response_model=schemas.LoadedVersion,
    dependencies=[Depends(_only_admin)],
)
async def load(request: Request, name: str, version: str | None = None) -> Response:
    """Loads what is on disk, the highest version unless one is named, and answers when it serves. Until then, and where
    it fails, what was loaded goes on."""
    service = request.app.state.service
    wait_s = service.settings.deadline_seconds
    loaded = await service.in_loader(lambda: service.store.load(name, version, wait_s))
    return _json({"name": loaded.found.name, **_version(loaded)})


@router.post(
    "/models/{name}/unload",
    responses=REFUSALS,
    response_model=schemas.Unloaded,
    dependencies=[Depends(_only_admin)],
)
async def unload(request: Request, name: str, version: str | None = None) -> Response:
    """Unloads one version or all of them. Requests that hold it are finished first; new ones get 503 until it is
    loaded again."""
    service = request.app.state.service
    gone = await service.in_loader(lambda: service.store.unload(name, version))
    return _json({"name": gone[0].found.name, "versions": [_version(model) for model in gone]})


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _summary(model: Model) -> dict[str, Any]:
    summary = {"name": model.found.name, **_version(model)}
    if model.ready is None:
        return summary
    manifest = model.ready.detector.bundle.manifest
    stages = [stage for stage in ("detect", "masks", "keypoints") if stage in manifest.stages]
    return {**summary, "stages": stages, "num_classes": len(manifest.classes), "ap": manifest.ap}


def _versions(store: Store, name: str) -> list[dict[str, Any]]:
    return [_version(model) for model in store.versions(name)]


def _version(model: Model) -> dict[str, Any]:
    """`reason` where there is one: a ready version has one where a change of its files could not be loaded."""
    version: dict[str, Any] = {"version": model.found.version, "state": model.state}
    if model.reason:
        version["reason"] = model.reason
    if model.ready is not None:
        version["engine"] = model.ready.detector.engine.name
        version["load_seconds"] = round(model.ready.load_seconds, 3)
        version["last_used"] = model.ready.last_used
    return version


def _details(model: Model) -> dict[str, Any]:
    if model.ready is None:
        return _summary(model)
    loaded, detector = model.ready.loaded, model.ready.detector
    shown = detector.bundle.manifest.model_dump(
        mode="json",
        include={
            "created",
            "classes",
            "keypoints",
            "canvas",
            "limits",
            "thresholds",
            "proposals",
            "ap",
            "parity",
            "compression",
        },
    )
    engine = {"name": detector.engine.name, "precision": detector.engine.precision}
    running = {**engine, "reason": loaded.engine_reason, **asdict(detector.lanes.plan)}
    running["golden"] = asdict(loaded.agreement)
    return {**_summary(model), **shown, "size_bytes": detector.bundle.size_bytes, "engine": running}
