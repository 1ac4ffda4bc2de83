"""The command: `limner serve | predict | models | doctor | bench | train | evaluate | export`.

It exits with 0 when all is well, with 1 when a problem was found, with 2 for wrong use. Each verb imports its package
only when it is called, so that serving needs no torch and `--help` needs nothing.
"""

import socket
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast, get_args

import typer

if TYPE_CHECKING:
    from service.settings import Settings

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Train the R-CNN family, compile it, serve it."
)
export = typer.Typer(no_args_is_help=True, help="Turn a checkpoint into a bundle.")
app.add_typer(export, name="export")

# The verb's own parser reads everything behind the verb, --help included.
FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
TRAIN_MODULES = {"torch", "torchvision", "pycocotools", "faster_coco_eval", "safetensors", "tensorboard", "tqdm"}
EXPORT_MODULES = {"onnx", "onnxscript"}

PREDICT_EXAMPLES = """Examples:

limner predict street.mp4 --out drawn.mp4

limner predict "photos/*.jpg" --out drawn --json results.json --confidence 0.7

limner predict camera:0 --json - --no-masks --max-frames 100

Exits with 1 where something could not be read, with 2 for wrong use. Ctrl-C leaves files that are complete."""

MODELS_EXAMPLES = """Examples:

limner models

limner models --bundles /srv/bundles --json

Exits with 1 where a bundle's files do not match its manifest."""

DOCTOR_EXAMPLES = """Examples:

limner doctor

limner doctor --bundles /srv/bundles --engine onnx --port 80 --json

Exits with 1 where no bundle loads on the chosen engine."""

BENCH_EXAMPLES = """Examples:

limner bench

limner bench --model person@1 --engine onnx --batches 1,8 --threads 4 --json

Exits with 1 where nothing could be timed."""


def main() -> None:
    app()


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        from service.machine import limner_version

        typer.echo(f"limner {limner_version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell the version and exit.")
    ] = False,
) -> None: ...


def _stop(message: str) -> NoReturn:
    """Wrong use."""
    typer.echo(message, err=True)
    raise typer.Exit(2)


def _fail(message: str) -> NoReturn:
    """The use was right, and there is a problem."""
    typer.echo(message, err=True)
    raise typer.Exit(1)


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


@app.command(epilog=MODELS_EXAMPLES)
def models(
    bundles: Annotated[Path | None, typer.Option(help="Directory of bundles.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the bundles: the highest version of each name."""
    from service.bundle import Bundle, BundleError
    from service.store import discover

    directory = _settings(bundles=bundles).bundles
    found = discover(directory)
    if not found:
        _stop(f"no bundle under {directory.resolve()}: it must hold <name>/<version>/manifest.json")
    rows: list[dict[str, Any]] = []
    for each in found:
        row: dict[str, Any] = {"name": each.name, "version": each.version}
        try:
            bundle = Bundle.read(each.directory)
        except BundleError as error:
            rows.append({**row, "file_check": error.detail})
            continue
        manifest = bundle.manifest
        row |= {"stages": list(manifest.stages), "num_classes": len(manifest.classes), "ap": manifest.ap}
        rows.append({**row, "size_bytes": bundle.size_bytes, "file_check": "ok"})
    if json:
        _echo_json(rows)
    else:
        _show_models(rows)
    raise typer.Exit(int(any(row["file_check"] != "ok" for row in rows)))


def _show_models(rows: list[dict[str, Any]]) -> None:
    shown = [
        (
            row["name"],
            row["version"],
            " ".join(row["stages"]),
            str(row["num_classes"]),
            _ap(row["ap"]),
            f"{row['size_bytes'] / 2**20:.1f}",
            "ok",
        )
        if row["file_check"] == "ok"
        else (row["name"], row["version"], "", "", "", "", row["file_check"])
        for row in rows
    ]
    _show_table(("name", "version", "stages", "classes", "AP", "MiB", "file check"), shown)


def _ap(ap: dict[str, object]) -> str:
    """`ap` of a manifest is what `limner evaluate --json` says: one table of numbers for each of COCO's kinds."""
    shown = [f"{kind} {table['AP']:.3f}" for kind, table in ap.items() if isinstance(table, dict) and "AP" in table]
    return ", ".join(shown) or "not measured"


@app.command(epilog=PREDICT_EXAMPLES)
def predict(
    source: Annotated[str, typer.Argument(help="A video, a picture, a folder, a glob in quotes, or camera:0.")],
    out: Annotated[Path | None, typer.Option(help="Drawn: a video (.mp4, .mkv, .mov, .webm) or a folder.")] = None,
    json: Annotated[str | None, typer.Option(help="COCO results; NDJSON if it ends in .ndjson, or is - .")] = None,
    model: Annotated[str | None, typer.Option(help="name or name@version.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Directory of one bundle, before --model.")] = None,
    bundles: Annotated[Path | None, typer.Option(help="Directory of bundles.")] = None,
    confidence: Annotated[float, typer.Option(min=0, max=1, help="Lowest score.")] = 0.5,
    masks: Annotated[bool, typer.Option(help="Compute masks.")] = True,
    keypoints: Annotated[bool, typer.Option(help="Compute keypoints.")] = True,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Most frames run together.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, tensorrt, aoti, onnx or openvino.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16 or int8.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine, 0 for all cores.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
) -> None:
    """Detect on a video, a camera, pictures or one picture, frame by frame."""
    from service.predict import Job
    from service.predict import predict as run

    settings = _settings(bundles=bundles, max_batch=batch, engine=engine, precision=precision, threads=threads)
    job = Job(source, out, json, model, bundle, confidence, masks, keypoints, max_frames)
    raise typer.Exit(run(job, settings, quiet))


@app.command(epilog=DOCTOR_EXAMPLES)
def doctor(
    bundles: Annotated[Path | None, typer.Option(help="Directory of bundles.")] = None,
    engine: Annotated[str | None, typer.Option(help="The engine that must serve.")] = None,
    host: Annotated[str | None, typer.Option(help="Address whose port is looked at.")] = None,
    port: Annotated[int | None, typer.Option(help="Port that should be free.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell what this machine can serve, and why it cannot serve the rest."""
    from service import doctor as doctors

    report = doctors.examine(_settings(bundles=bundles, engine=engine, host=host, port=port))
    if json:
        typer.echo(doctors.as_json(report))
    else:
        _show_table(("what", "", "finding"), list(doctors.rows(report)))
    raise typer.Exit(0 if report["can_serve"] else 1)


@app.command(epilog=BENCH_EXAMPLES)
def bench(
    model: Annotated[str | None, typer.Option(help="name or name@version.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Directory of one bundle, before --model.")] = None,
    bundles: Annotated[Path | None, typer.Option(help="Directory of bundles.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="May be repeated; else those for processors.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16 or int8.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine, 0 for all cores.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(min=0, help="Time for each row, at least 3 runs.")] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Time the stages of a bundle on this machine, by engine and batch size."""
    from service import bench as benches
    from service import local, machine
    from service.engines import EngineChoice
    from service.errors import ServiceError

    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        _stop(f"--batches {batches}: give numbers from 1, comma separated, such as 1,2,4")
    settings = _settings(bundles=bundles, precision=precision, threads=threads)
    known = {each["name"]: each for each in machine.engines()}
    choices = [name for name in get_args(EngineChoice) if name != "auto"]
    if unknown := [name for name in engine or () if name not in choices]:
        _stop(f"there is no engine {unknown[0]}: give one of {', '.join(choices)}")
    names = engine or [name for name, each in known.items() if each["works"]]
    chosen = cast(list[EngineChoice], names)
    try:
        rows = list(benches.measure(settings, local.bundle_of(settings, model, bundle), chosen, sizes, seconds))
    except ServiceError as error:
        _fail(error.detail)
    if json:
        _echo_json(rows)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("runs", "canvas")))
        _show_table(names, [[_cell(row.get(name, "")) for name in names] for row in rows])
    raise typer.Exit(0 if any("total_ms" in row for row in rows) else 1)


def _cell(value: Any) -> str:
    return (
        f"{value:.1f}"
        if isinstance(value, float)
        else "x".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def _show_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, since brackets in a finding are no markup
    Console().print(table)


def _echo_json(value: object) -> None:
    typer.echo(dumps(value, indent=2))


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


@export.command("cascade", context_settings=FORWARD, add_help_option=False)
def export_cascade(context: typer.Context) -> None:
    """One of OpenCV's cascades as a bundle: `limner export cascade --help` lists the options."""
    _forward("export.to_cascade", "export", context.args)


@export.command("trt", context_settings=FORWARD, add_help_option=False)
def export_trt(context: typer.Context) -> None:
    """TensorRT plans for this machine's GPU, into a bundle: `limner export trt --help` lists the options."""
    _forward("export.to_trt", "export", context.args)


@export.command("aoti", context_settings=FORWARD, add_help_option=False)
def export_aoti(context: typer.Context) -> None:
    """AOTInductor packages for this machine's GPU, into a bundle: `limner export aoti --help` lists the options."""
    _forward("export.to_aoti", "export", context.args)


@export.command("svd", context_settings=FORWARD, add_help_option=False)
def export_svd(context: typer.Context) -> None:
    """Thinner fully connected layers, as a checkpoint: `limner export svd --help` lists the options."""
    _forward("export.svd", "export", context.args, measure=_measure_model)


def _measure_model(model: Any, spec: Any, images: Path, annotations: Path, limit: int) -> dict[str, float]:
    """AP by kind. `export` may not know `training`, so what it needs of it is handed in."""
    return _measure(_module("training.engine", "train").torch_detector(model, spec), images, annotations, limit)


@export.command("int8", context_settings=FORWARD, add_help_option=False)
def export_int8(context: typer.Context) -> None:
    """A bundle's graphs in eight bits for CPUs: `limner export int8 --help` lists the options."""
    _forward("export.quantize", "export", context.args, measure=_measure_bundle)


def _measure_bundle(directory: Path, precision: Any, images: Path, annotations: Path, limit: int) -> dict[str, float]:
    from service.bundle import Bundle
    from service.detector import Detector
    from service.engines import open_engine

    bundle = Bundle.read(directory)
    opened = open_engine(bundle, "openvino", precision=precision)
    try:
        return _measure(Detector(bundle, opened.engine), images, annotations, limit)
    finally:
        opened.engine.close()


def _measure(detector: Any, images: Path, annotations: Path, limit: int) -> dict[str, float]:
    training = _module("training.evaluate", "train")
    scores = training.evaluate(detector, images, annotations, limit)
    return {kind: numbers["AP"] for kind, numbers in scores.items()}


def _forward(module: str, extra: str, arguments: list[str], **more: object) -> NoReturn:
    verb: Callable[..., int | None] = _module(module, extra).main
    sys.exit(verb(arguments, **more) or 0)


def _module(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in TRAIN_MODULES | EXPORT_MODULES:
            raise
        _stop(f'{missing} is not installed: pip install -e ".[{extra}]"')


if __name__ == "__main__":
    main()
