"""What the service tells its operator: Prometheus metrics (`limner_*`) and structured logs.

Each application has its own registry, so that two in one process (tests) do not add up. Knows nothing of requests.
"""

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client import generate_latest as _generate_latest

from service.batching import CloseReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = Histogram(
            "limner_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ("route", "code"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._stages = Histogram(
            "limner_stage_duration_seconds",
            "Time that one request spent in each stage; a batch's time counts for each of its requests.",
            ("stage",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batch_size = Histogram(
            "limner_batch_size", "Pictures run together.", buckets=SIZES, registry=self.registry
        )
        self._closed_by = Counter(
            "limner_batch_close", "Why a batch stopped growing.", ("reason",), registry=self.registry
        )
        self._queue_depth = Gauge(
            "limner_queue_depth", "Requests that wait for the engine.", ("model",), registry=self.registry
        )
        self._detections = Counter("limner_detections", "Detections answered.", ("label",), registry=self.registry)

    def request(self, route: str, code: int, seconds: float) -> None:
        self._requests.labels(route, str(code)).observe(seconds)

    def stages(self, timings_ms: Mapping[str, float]) -> None:
        for stage, passed_ms in timings_ms.items():
            self._stages.labels(stage).observe(passed_ms / 1000)

    def detections(self, labels: Iterable[str]) -> None:
        for label in labels:
            self._detections.labels(label).inc()

    def batch(self, size: int, closed_by: CloseReason) -> None:
        self._batch_size.observe(size)
        self._closed_by.labels(closed_by).inc()

    def queue_depth(self, model: str, depth: int) -> None:
        self._queue_depth.labels(model).set(depth)

    def render(self) -> bytes:
        return _generate_latest(self.registry)


def configure_logs(log_format: Literal["console", "json"]) -> None:
    """To stderr; the standard library's records (uvicorn's) go the same way."""
    as_json = log_format == "json"
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        shared.append(structlog.processors.format_exc_info)
    colours = sys.stderr.isatty()
    # A plain traceback: the pretty one would print local variables, that is, users' pictures.
    console = structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=structlog.dev.plain_traceback)
    renderer = structlog.processors.JSONRenderer() if as_json else console
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # It warns at each malformed form, which is the client's affair and answered with a 400.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
