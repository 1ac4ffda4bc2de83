"""`limner doctor`: what this machine can serve, and why it cannot serve the rest.

Every bundle is loaded on every engine that imports, and held to its golden outputs, exactly as the service does it.
"""

import dataclasses
import errno
import socket
from collections.abc import Iterator
from typing import Any, get_args

import orjson

from service import local, machine
from service.bundle import BundleError
from service.engines import EngineChoice, on_gpu
from service.errors import ServiceError
from service.loading import Found, find_all, read
from service.machine import Facts
from service.settings import Settings


def examine(settings: Settings) -> Facts:
    """`can_serve` is whether some bundle loads on the engine that the settings choose."""
    engines = machine.engines()
    working = [each["name"] for each in engines if each["works"]]
    found = find_all(settings.bundles)
    installed = [each["name"] for each in engines if each["installed"]]
    ways = [each for one in found for each in _on_gpu(settings, one)]
    # As `open_engine` takes them, whether it works or not.
    auto = next((each["engine"] for each in ways if each["works"]), "openvino" if "openvino" in installed else "onnx")
    chosen = auto if settings.engine == "auto" else settings.engine
    # One that is not for the portable graphs is tried where it is what is served.
    working += [chosen] if chosen not in working and chosen in ("tensorrt", "aoti") else []
    # The engines that were not chosen are tried in the precision that all have.
    plain = settings.model_copy(update={"precision": "float32"})
    bundles = [_bundle(settings if engine == chosen else plain, each, engine) for each in found for engine in working]
    return {
        "can_serve": any(each["loads"] and each["engine"] == chosen for each in bundles),
        "engine": chosen,
        "python": machine.python(),
        "cpu": machine.cpu(),
        "memory": machine.memory(),
        "engines": engines,
        "graphics": machine.graphics(),
        "on_gpu": ways,
        "optional": machine.optional(),
        "bundles": bundles,
        "bundles_directory": str(settings.bundles),
        "port": _port(settings.host, settings.port),
    }


def _on_gpu(settings: Settings, found: Found) -> Iterator[Facts]:
    """Which of the ways that auto prefers this bundle can go on this machine, and why not the others."""
    try:
        bundle = read(found)
    except BundleError:  # said of every engine below
        return
    for name, reason, opened in on_gpu(bundle, settings.precision):
        told = {"name": found.name, "version": found.version, "way": name, "engine": name.partition(" ")[0]}
        try:
            opened().close()
        except ServiceError as error:
            yield {**told, "works": False, "reason": error.detail}
        except Exception as error:  # as below
            yield {**told, "works": False, "reason": f"{type(error).__name__}: {error}"}
        else:
            yield {**told, "works": True, "reason": reason}


def _bundle(settings: Settings, found: Found, engine: EngineChoice) -> Facts:
    told: Facts = {"name": found.name, "version": found.version, "engine": engine}
    assert engine in get_args(EngineChoice)
    try:
        loaded = local.load(settings, read(found), engine)
    except (BundleError, ServiceError) as error:
        return {**told, "loads": False, "reason": error.detail}
    except Exception as error:  # an engine may fail in its own ways, and that is what is asked here
        return {**told, "loads": False, "reason": f"{type(error).__name__}: {error}"}
    loaded.detector.close()
    agreement = {name: value for name, value in dataclasses.asdict(loaded.agreement).items() if value is not None}
    return {**told, "loads": True, "precision": settings.precision, "agreement": agreement}


def _port(host: str, port: int) -> Facts:
    told: Facts = {"host": host, "port": port}
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        taken = "something listens there already, perhaps limner" if error.errno == errno.EADDRINUSE else error.strerror
        return {**told, "free": False, "reason": taken}
    return {**told, "free": True}


def as_json(report: Facts) -> str:
    return orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode()


def rows(report: Facts) -> Iterator[tuple[str, str, str]]:
    """What, how it stands (ok, no, or nothing to judge), and the finding."""
    cpu, memory, graphics, port = (report[name] for name in ("cpu", "memory", "graphics", "port"))
    yield "Python", "ok", f"{report['python']['version']} on {report['python']['platform']}"
    yield "processor", "", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores"
    features = cpu["features"]
    yield "features", "", "this system does not say" if features is None else " ".join(features) or "none that help"
    yield "memory", "", _memory(memory)
    for each in report["engines"]:
        yield f"engine {each['name']}", _mark(each["works"]), _engine(each)
    cards = [f"{each['name']}, driver {each['driver_version']}, {each['memory.total']}" for each in graphics["cards"]]
    yield "graphics", "", "; ".join(cards) or graphics["reason"]
    yield "TensorRT", "", graphics["tensorrt"] or "not installed"
    for each in report["optional"]:
        told = each["version"] or f'not installed: pip install -e ".[{each["extra"]}]"'
        yield f"module {each['module']}", "", told
    for each in report["on_gpu"]:
        yield f"{each['name']}@{each['version']}, {each['way']}", "ok" if each["works"] else "", each["reason"]
    for each in report["bundles"]:
        told = _agreement(each) if each["loads"] else each["reason"]
        yield f"{each['name']}@{each['version']} on {each['engine']}", _mark(each["loads"]), told
    if not report["bundles"]:
        yield "bundles", "no", f"none under {report['bundles_directory']}, or no engine works"
    yield f"port {port['port']}", _mark(port["free"]), f"free on {port['host']}" if port["free"] else port["reason"]
    verdict = f"yes, on {report['engine']}" if report["can_serve"] else f"no bundle loads on {report['engine']}"
    yield "can serve", _mark(report["can_serve"]), verdict


def _mark(is_good: bool) -> str:
    return "ok" if is_good else "no"


def _memory(memory: Facts) -> str:
    shown = {name: value / 2**30 for name, value in memory.items() if value is not None}
    told = [f"{name.removesuffix('_bytes')} {value:.1f} GiB" for name, value in shown.items()]
    return ", ".join(told) or "this system does not say"


def _engine(each: Facts) -> str:
    if not each["works"]:
        return each["reason"]
    precisions = each.get("cpu_precisions")
    return f"{each['version']}, devices {' '.join(each['devices'])}" + (
        f", precisions {' '.join(precisions)}" if precisions else ""
    )


def _agreement(each: Facts) -> str:
    strays: dict[str, Any] = each["agreement"]
    told = [f"{name} {value:.2g}" for name, value in strays.items() if isinstance(value, float)]
    return f"loads and agrees: {strays['num_matched']} boxes, off by {', '.join(told)}"
