"""Every setting, its default and its trade-off. `LIMNER_<NAME>` in the environment sets it; a flag of `limner serve`
overrides that. A wrong value stops the start with words, not with a traceback."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.engines import EngineChoice, Precision
from service.images import DecodeLimits

PREFIX = "LIMNER_"


class SettingsError(Exception):
    """Told to whoever starts the service; no request ever meets it."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0 opens the service to the network.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    bundles: Path = Field(Path("bundles"), description="Directory that holds <name>/<version>/manifest.json.")
    default_model: str | None = Field(
        None, description="Model of a request that names none. Unset: the first ready one by name."
    )
    engine: EngineChoice = Field("auto", description="What runs the graphs. auto takes openvino where installed.")
    threads: int = Field(
        0, ge=0, le=1024, description="Threads of the engine; 0 is all cores. Fewer leave room for decoding pictures."
    )
    precision: Precision = Field(
        "float32", description="bfloat16 is faster on CPUs with AMX and moves boxes and scores a little (openvino)."
    )
    max_body_bytes: int = Field(
        20 * 2**20, ge=1, description="Largest request body. Higher takes larger files, and more memory per request."
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="Most pixels of a picture, checked before decoding. One costs 3 to 7 bytes."
    )
    max_side: int = Field(20_000, ge=1, description="Longest side of a picture.")
    max_requests: int = Field(
        64, ge=1, description="Requests under way; more get 429. Higher rides out bursts, and costs memory and delay."
    )
    max_batch: int = Field(
        8, ge=1, description="Most pictures run together. Higher gives throughput under load, and longer single waits."
    )
    max_batch_pixels: int = Field(
        16_000_000, ge=1, description="Most canvas pixels run together: the bound on the engine's memory."
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

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(self.max_pixels, self.max_side)


def load_settings(**flags: Any) -> Settings:
    """Flags that are None were not given. Raises `SettingsError` with one line for each wrong value."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = str(item["loc"][0]) if item["loc"] else "?"
            lines.append(f"{PREFIX}{name.upper()} = {item['input']!r}: {item['msg']}")
        raise SettingsError("\n".join(lines)) from None


def unknown_variables() -> list[str]:
    """LIMNER_* variables that set nothing here: most likely misspelt, so the start mentions them."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name.upper() not in known)
