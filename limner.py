"""The command: `limner serve | models | train | evaluate | export`.

Each verb imports its package only when it is called, so that serving needs no torch and `--help` needs nothing.
"""

import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from service.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train the R-CNN family, compile it, serve it.")
export = typer.Typer(no_args_is_help=True, help="Turn a checkpoint into a bundle.")
app.add_typer(export, name="export")

# The verb's own parser reads everything behind the verb, --help included.
FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
TRAIN_MODULES = {"torch", "torchvision", "pycocotools", "faster_coco_eval", "safetensors", "tensorboard", "tqdm"}
EXPORT_MODULES = {"onnx", "onnxscript"}


def main() -> None:
    app()


def _stop(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


@app.command(context_settings=FORWARD, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve the bundles over HTTP: `limner serve --help` lists every setting and what it trades."""
    from service.settings import read_flags

    settings = _settings(**read_flags(context.args))
    _check_bundles(settings)
    listener = _listen(settings.host, settings.port)
    from service.server import run

    host_shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    typer.echo(f"limner listens on http://{host_shown}:{listener.getsockname()[1]}", err=True)
    run(settings, listener)


def _settings(**flags: object) -> "Settings":
    from service.settings import SettingsError, load_settings

    try:
        return load_settings(**flags)
    except SettingsError as error:
        _stop(f"wrong settings:\n{error}")


def _check_bundles(settings: "Settings") -> None:
    from service.store import discover

    found = [model.name for model in discover(settings.bundles)]
    if not found and settings.poll_seconds:
        return  # they may come later
    if not found:
        _stop(
            f"no bundle under {settings.bundles.resolve()}: it must hold <name>/<version>/manifest.json.\n"
            "Export one with `limner export onnx`, or say where they are with --bundles or LIMNER_BUNDLES."
        )
    if settings.default_model is not None and settings.default_model not in found:
        _stop(f"the default model {settings.default_model!r} is not among the bundles: {', '.join(found)}")


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded: a taken port should not cost the loading of a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listening now, or two servers could both bind; connections wait in the backlog until the server takes them.
        listener.listen(2048)
    except OSError as error:
        _stop(f"cannot listen on {host} port {port} ({error.strerror}): choose another with --port or LIMNER_PORT")
    return listener


@app.command()
def models(bundles: Annotated[Path | None, typer.Option(help="Directory of bundles.")] = None) -> None:
    """List the bundles: the highest version of each name."""
    from rich.console import Console
    from rich.table import Table

    from service.bundle import Bundle, BundleError
    from service.store import discover

    directory = _settings(bundles=bundles).bundles
    found = discover(directory)
    if not found:
        _stop(f"no bundle under {directory.resolve()}: it must hold <name>/<version>/manifest.json")
    table = Table("name", "version", "stages", "classes", "AP", "MiB", "file check")
    for each in found:
        try:
            bundle = Bundle.read(each.directory)
        except BundleError as error:
            table.add_row(each.name, each.version, "", "", "", "", error.detail)
            continue
        manifest = bundle.manifest
        size = f"{bundle.size_bytes / 2**20:.1f}"
        stages = " ".join(manifest.stages)
        table.add_row(each.name, each.version, stages, str(len(manifest.classes)), _ap(manifest.ap), size, "ok")
    Console().print(table)


def _ap(ap: dict[str, object]) -> str:
    """`ap` of a manifest is what `limner evaluate --json` says: one table of numbers for each of COCO's kinds."""
    shown = [f"{kind} {table['AP']:.3f}" for kind, table in ap.items() if isinstance(table, dict) and "AP" in table]
    return ", ".join(shown) or "not measured"


@app.command(context_settings=FORWARD, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model: `limner train --help` lists the options."""
    _forward("training.train", "train", context.args)


@app.command(context_settings=FORWARD, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Measure AP of a checkpoint or a bundle: `limner evaluate --help` lists the options."""
    _forward("training.evaluate", "train", context.args)


@export.command("onnx", context_settings=FORWARD, add_help_option=False)
def export_onnx(context: typer.Context) -> None:
    """Portable ONNX graphs, checked by the service itself: `limner export onnx --help` lists the options."""
    _forward("export.to_onnx", "export", context.args)


@export.command("trt", context_settings=FORWARD, add_help_option=False)
def export_trt(context: typer.Context) -> None:
    """TensorRT plans for this machine's GPU, into a bundle: `limner export trt --help` lists the options."""
    _forward("export.to_trt", "export", context.args)


def _forward(module: str, extra: str, arguments: list[str]) -> NoReturn:
    try:
        verb: Callable[[list[str]], int | None] = import_module(module).main
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in TRAIN_MODULES | EXPORT_MODULES:
            raise
        _stop(f'{missing} is not installed: pip install -e ".[{extra}]"')
    sys.exit(verb(arguments) or 0)


if __name__ == "__main__":
    main()
