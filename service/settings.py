"""Every setting, its default and its trade-off. `LIMNER_<NAME>` in the environment sets it; a flag of `limner serve`
overrides that. A wrong value stops the start with words, not with a traceback."""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.access import read_keys
from service.engines import EngineChoice, PrecisionChoice
from service.images import DecodeLimits
from service.loading import Warming
from service.store import Policy, VersionPolicy

PREFIX = "LIMNER_"
SECRETS = ("api_keys",)  # never printed, and no flags: every user of a machine can read its command lines
ALIASES = {"default_model": ("--model",)}

# Visible ASCII, which any header carries, without the comma that separates keys. 16 are beyond guessing if random.
API_KEY = re.compile(r"[!-+\--~]{16,}")
KEY_RULE = "a key is 16 or more visible ASCII characters without a comma, e.g. from `openssl rand -hex 32`"
ORIGIN = re.compile(r"\*|https?://[^/\s?#@]+")

Access = Literal["open", "key", "off"]
UrlInput = Literal["off", "https", "any"]


class SettingsError(Exception):
    """Told to whoever starts the service; no request ever meets it."""


def _auto(given: Any) -> Any:
    return None if given == "auto" else given


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0 opens the service to the network.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    bundles: Path = Field(Path("bundles"), description="Directory that holds <name>/<version>/manifest.json.")
    default_model: str | None = Field(
        None, description="Model of a request that names none. Unset: the first ready one by name."
    )
    versions: VersionPolicy = Field(
        "latest", description="Versions loaded of each model: latest is the newest that loads, all is every one."
    )
    max_models: int = Field(
        0,
        ge=0,
        description="Most versions loaded; 0 is no bound. With one, a request for another loads it, and the least "
        "recently asked one that nobody uses makes room. During a swap the old and the new version are in memory both.",
    )
    poll_seconds: float = Field(
        0,
        ge=0,
        description="How often to look for new, changed and removed bundles; 0 is never: then POST "
        "/models/{name}/load does. A swap needs memory for both versions.",
    )
    warm_seconds: float = Field(
        10,
        ge=0,
        description="Longest time for running the likely canvas shapes before a version is asked. 0 is ready sooner, "
        "and early requests wait where the engine compiles a shape.",
    )
    load_seconds: float = Field(
        300,
        gt=0,
        description="A version that takes longer to load, warming included, has hung: it fails, and others can load. "
        "Raise it for slow disks and machines.",
    )
    admin_key: SecretStr | None = Field(
        None, description="Opens POST /models/{name}/load and unload. Without a key these routes are off."
    )
    admin_key_file: Path | None = Field(
        None, description="File with such a key on each line, read at start: two lines while a key is being changed."
    )
    engine: EngineChoice = Field(
        "auto",
        description="What runs the graphs. auto takes the first that fits: on a GPU the bundle's TensorRT plans, its "
        "AOTInductor packages, ONNX Runtime with CUDA; on a processor openvino, else onnx. /models says which, and why "
        "not the others.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="Threads of the engine; 0 is all cores. Fewer leave room for decoding pictures."
    )
    engine_streams: Annotated[int | None, BeforeValidator(_auto)] = Field(
        None,
        ge=1,
        le=64,
        description="Batches that run at once under load, each with its part of the threads; a lone request has all of "
        "them either way. auto tries what is fastest here, and whether batches of several pictures gain anything, "
        "which takes up to half of LIMNER_WARM_SECONDS a model. Whether they are threads or processes is tried for a "
        "number too: a process holds the model once more. 1 never starts any.",
    )
    precision: PrecisionChoice = Field(
        "auto",
        description="auto is that of the plans or packages that run on the GPU, else float32. bfloat16 is faster on "
        "CPUs that multiply in it (AVX-512 BF16, AMX) and moves boxes and scores a little (openvino). int8 is faster "
        "still, loses more, and needs bundles that `limner export int8` added it to (openvino).",
    )
    max_body_bytes: int = Field(
        20 * 2**20, ge=1, description="Largest request body. Higher takes larger files, and more memory per request."
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="Most pixels of a picture, checked before decoding. One costs 3 to 7 bytes."
    )
    max_side: int = Field(20_000, ge=1, description="Longest side of a picture.")
    max_frames: int = Field(
        1000,
        ge=1,
        description="Most frames or pages of one file, of which the first is read. 1 refuses animations and documents, "
        "so that nobody takes the first frame's answer for that of all.",
    )
    max_requests: int = Field(
        64, ge=1, description="Requests under way; more get 429. Higher rides out bursts, and costs memory and delay."
    )
    max_wait_ms: float = Field(
        0,
        ge=0,
        description="A request that would wait longer for the engine gets 429 at once, by what pictures took lately "
        "and how many are under way; 0 is no such bound. Low keeps answers quick under overload and refuses bursts "
        "that would have been over soon. One that finds the service idle is always taken.",
    )
    max_batch: int = Field(
        8, ge=1, description="Most pictures run together. Higher gives throughput under load, and longer single waits."
    )
    max_batch_pixels: int = Field(
        16_000_000, ge=1, description="Most canvas pixels run together: the bound on the engine's memory."
    )
    batch_padding: float = Field(
        0,
        ge=0,
        lt=1,
        description="Most of a batch that may be padding because canvases of several shapes share it. "
        "Above 0 mixed traffic makes larger batches, and near its borders a picture's answer changes a little.",
    )
    linger_ms: float = Field(
        0,
        ge=0,
        le=1000,
        description="How long the oldest request waits for company. It costs every lone request as "
        "much; batches form under load without it.",
    )
    engine_seconds: float = Field(
        60,
        gt=0,
        description="A batch that takes longer, or twice as long where another may go before it, has hung: it fails, "
        "and the engine is rebuilt.",
    )
    max_pictures: int = Field(
        16,
        ge=1,
        description="Most pictures in one request. Each counts as a request, so high values let one client fill all.",
    )
    stream_frames: int = Field(
        4,
        ge=1,
        description="Most frames of one /stream under way. Each counts as a request. More fill batches; with late=drop "
        "there are at most 2, as more would be older.",
    )
    deadline_seconds: float = Field(
        30, gt=0, description="Longest wait for the engine, then 504. Lower sheds load that clients gave up on."
    )
    body_seconds: float = Field(
        30, gt=0, description="Longest time a body may take to arrive, then 408. A slow upload holds a permit."
    )
    drain_seconds: float = Field(
        20, ge=0, description="Time for requests under way at shutdown. Keep it below the supervisor's kill delay."
    )
    log_format: Literal["console", "json"] = Field("console", description="console reads well, json parses well.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="API keys, comma separated; a request must carry one. Without any, whoever reaches the port may "
        "call. Other processes of the same user can read an environment: prefer the file.",
    )
    api_keys_file: Path | None = Field(
        None, description="File with one API key a line, in addition to LIMNER_API_KEYS; read at the start."
    )
    metrics: Access = Field(
        "key", description="Who reads /metrics: open is everybody, key is who has an API key (if there are any)."
    )
    docs: Access = Field(
        "open",
        description="The same for the page (/ and /web), /docs and /openapi.json. A browser has no API key to show: "
        "key hides them.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins, comma separated, whose web pages may call, e.g. https://app.example.org; * is any page, "
        "also on a visitor's own network.",
    )
    url_input: UrlInput = Field(
        "off",
        description="Whether a request may name its picture by URL. https, and any, which adds http, save clients an "
        "upload, and let them make this machine fetch from public addresses.",
    )
    url_ports: Annotated[tuple[int, ...], NoDecode] = Field(
        (80, 443), description="Ports that such a URL may name, comma separated. More of them reach more than the web."
    )
    url_seconds: float = Field(
        10, gt=0, le=600, description="Longest time to fetch a picture by URL. It holds a permit meanwhile."
    )
    otel_endpoint: str | None = Field(
        None,
        description="OTLP/HTTP collector, e.g. http://collector:4318, that gets a span for each request; needs the "
        "extra otel. Unset: none are made.",
    )

    @field_validator("api_keys", "cors_origins", "url_ports", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        items = [item for part in given.split(",") if (item := part.strip())]
        if not items:  # most likely a variable that was meant to expand: taken as "no keys" it would open the door
            raise ValueError("it is set and holds nothing: give a value, or unset it")
        return items

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        _check_api_keys(key.get_secret_value() for key in keys)
        return keys

    @field_validator("api_keys_file")
    @classmethod
    def _check_key_file(cls, path: Path | None) -> Path | None:
        if path is not None and not _check_api_keys(_lines(path)):
            raise ValueError("the file holds no key: nobody could call")
        return path

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [origin for origin in origins if not ORIGIN.fullmatch(origin)]:
            raise ValueError(f"{wrong[0]!r} is no origin: scheme and host without a path, e.g. https://app.example.org")
        return origins

    @field_validator("url_ports")
    @classmethod
    def _check_ports(cls, ports: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 < port < 2**16 for port in ports):
            raise ValueError("a port is from 1 to 65535")
        return ports

    @field_validator("otel_endpoint")
    @classmethod
    def _check_collector(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
            raise ValueError("it must be a URL such as http://collector:4318")
        if not _is_installed("opentelemetry.sdk") or not _is_installed("opentelemetry.exporter.otlp.proto.http"):
            raise ValueError('OpenTelemetry is not installed: pip install -e ".[otel]"')
        return endpoint

    def all_api_keys(self) -> list[SecretStr]:
        """Those given and those of the file; none means that no key is asked for."""
        return [*self.api_keys, *(SecretStr(line) for line in _lines(self.api_keys_file))]

    @field_validator("admin_key_file")
    @classmethod
    def _readable(cls, path: Path | None) -> Path | None:
        try:
            read_keys(None, path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot be read ({error}): give a text file with one key on each line") from None
        return path

    @property
    def store_policy(self) -> Policy:
        warming = Warming(self.max_batch, self.max_batch_pixels, self.warm_seconds, self.engine_streams)
        return Policy(self.versions, self.max_models, warming, self.load_seconds)

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(self.max_pixels, self.max_side, self.max_frames)


def load_settings(**flags: Any) -> Settings:
    """Flags that are None were not given. Raises `SettingsError` with one line for each wrong value."""
    if wrong := [name for name in unknown_variables() if name.startswith(f"{PREFIX}API_KEY")]:
        # Any other misspelt name is a warning; this one would open the door that it means to lock.
        raise SettingsError(
            f"{wrong[0]} is no setting: {PREFIX}API_KEYS holds keys, {PREFIX}API_KEYS_FILE names a file"
        )
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = str(item["loc"][0]) if item["loc"] else "?"
            shown = "(hidden)" if name in SECRETS else repr(item["input"])
            lines.append(f"{PREFIX}{name.upper()} = {shown}: {item['msg'].removeprefix('Value error, ')}")
        raise SettingsError("\n".join(lines)) from None


def read_flags(arguments: Sequence[str]) -> dict[str, str]:
    """What the flags of `limner serve` set, still as text. Every setting is a flag; `--help` tells what each trades."""
    secret = "\n".join(f"  {_variable(name)}: {Settings.model_fields[name].description}" for name in SECRETS)
    parser = argparse.ArgumentParser(
        "limner serve",
        description="Serve the bundles over HTTP. A flag overrides the variable that is named with it.",
        epilog="Examples: limner serve --port 9000 --engine onnx; LIMNER_API_KEYS_FILE=keys limner serve --host "
        f"0.0.0.0. Only in the environment: {secret.strip()}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        if name not in SECRETS:
            default = f", default {shown}" if (shown := _default(name)) else ""
            told = f"{field.description} [{_variable(name)}{default}]".replace("%", "%%")
            flag = "--" + name.replace("_", "-")
            parser.add_argument(flag, *ALIASES.get(name, ()), dest=name, metavar=_values(name), help=told)
    return vars(parser.parse_args(arguments))


def table() -> str:
    """Every setting as a Markdown table, for docs/operations.md."""
    rows = ["| variable | values | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{shown}`" if (shown := _default(name)) else ""
        values = _values(name).replace("|", ", ")
        rows.append(f"| `{_variable(name)}` | {values} | {default} | {field.description} |")
    return "\n".join(rows)


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _default(name: str) -> str:
    field = Settings.model_fields[name]
    default = "auto" if field.annotation == int | None else field.default
    return ",".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)


def _values(name: str) -> str:
    """The choices of a setting, or the kind of its value."""
    annotation = Settings.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    kinds = {int: "number", int | None: "auto|number", float: "number", Path: "path", Path | None: "path"}
    return kinds.get(annotation, "list" if get_origin(annotation) is tuple else "text")


def _lines(path: Path | None) -> list[str]:
    """A file's lines, without empty ones and comments."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"the file cannot be read: {reason}") from None
    return [line for row in text.splitlines() if (line := row.strip()) and not line.startswith("#")]


def _check_api_keys(keys: Iterable[str]) -> int:
    """How many keys there are. The error says which one is wrong by its place, never by itself."""
    number = 0
    for number, key in enumerate(keys, start=1):
        if not API_KEY.fullmatch(key):
            raise ValueError(f"key {number} is not a key: {KEY_RULE}")
    return number


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def unknown_variables() -> list[str]:
    """LIMNER_* variables that set nothing here: most likely misspelt, so the start mentions them."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name.upper() not in known)
