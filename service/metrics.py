"""What the service tells its operator: Prometheus metrics (`limner_*`) and structured logs.

Each application has its own registry, so that two in one process (tests) do not add up. Knows nothing of requests.
`Metrics` is the whole service's, `ModelMetrics` what it counts of one model.
"""

import logging
import sys
import time
from collections import Counter as TallyCounter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client import generate_latest as _generate_latest

from service import triton
from service.admission import Admission
from service.batching import Run
from service.detector import Detections, Ran, Wants
from service.encoded import Given
from service.errors import ServiceError
from service.policy import CloseReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
FRACTIONS = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1)

MODEL = ("model", "version")
ENGINE = (*MODEL, "engine", "precision")

Outcome = Literal["success", "rejected", "cancelled", "failed", "refused"]


@dataclass(frozen=True, slots=True)
class Described:
    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


class Metrics:
    """Labels come from bundles, routes and lists in the code, never from requests, so that their number is bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.described: list[Described] = []
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.request_seconds = self._histogram(
            "limner_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ("route", "code"),
            SECONDS,
        )
        self.outcome_seconds = self._histogram(
            "limner_inference_duration_seconds",
            "The same for requests to a model, by how they ended: success, rejected (no capacity, not ready, too "
            "late), cancelled by the client, failed, refused (the request was wrong). The model is empty where "
            "it was not yet known.",
            (*MODEL, "outcome"),
            SECONDS,
        )
        self.stage_seconds = self._histogram(
            "limner_stage_duration_seconds",
            "Time that one request spent in each stage that it went through: fetch, decode, fit, queue, detect, masks, "
            "keypoints, encode. A batch's time counts for each of its requests.",
            (*ENGINE, "stage"),
            SECONDS,
        )
        self.batch_seconds = self._histogram(
            "limner_batch_duration_seconds",
            "Time of one batch on the device, heads included, and decoding and waiting where a lane does that.",
            ENGINE,
            SECONDS,
        )
        self.batch_size = self._histogram("limner_batch_size", "Pictures run together.", ENGINE, SIZES)
        self.batch_padding = self._histogram(
            "limner_batch_padding_ratio", "Fraction of a batch's canvas pixels that are padding.", MODEL, FRACTIONS
        )
        self.batch_failures = self._counter("limner_batch_failures", "Batches that the engine failed on.", ENGINE)
        self.rebuilds = self._counter(
            "limner_engine_rebuilds", "Engines that broke or hung and were replaced while the service ran.", ENGINE
        )
        self.batches_closed = self._counter(
            "limner_batch_close",
            "Why a batch stopped growing: full (LIMNER_MAX_BATCH), shared (the others were left to other batches), "
            "pixels (LIMNER_MAX_BATCH_PIXELS), shape (only other canvases waited), drained (nobody else waited).",
            (*MODEL, "reason"),
        )
        self.queued = self._gauge("limner_queue_depth", "Requests that wait for the engine.", MODEL)
        self.retried = self._counter(
            "limner_cluster_retries", "Times that a picture was asked of another replica (docs/cluster.md).", MODEL
        )
        self.permits_held = self._gauge("limner_permits_held", "Requests under way.", ())
        self.permits_limit = self._gauge("limner_permits_limit", "Most requests under way: LIMNER_MAX_REQUESTS.", ())
        self.expected_wait = self._gauge(
            "limner_expected_wait_seconds",
            "Wait that a request has to expect which comes now: what LIMNER_MAX_WAIT_MS bounds.",
            (),
        )
        self.ready = self._gauge("limner_ready", "1 where /readyz says ready, else 0.", ())
        self.detected = self._counter("limner_detections", "Detections answered, by class.", (*MODEL, "label"))
        self._models: dict[tuple[str, ...], ModelMetrics] = {}

    def request(self, route: str, code: int, seconds: float) -> None:
        self.request_seconds.labels(route, str(code)).observe(seconds)

    def inference(self, code: int, seconds: float, model: "ModelMetrics | None") -> None:
        """A request to a model; None where it ended before its model was known."""
        who = model.labels[: len(MODEL)] if model is not None else ("", "")
        self.outcome_seconds.labels(*who, _outcome(code)).observe(seconds)

    def permits(self, admission: Admission, limit: int) -> None:
        self.permits_held.set_function(lambda: admission.num_held)
        self.permits_limit.set(limit)
        self.expected_wait.set_function(lambda: admission.wait_s)

    def readiness(self, is_ready: Callable[[], bool]) -> None:
        self.ready.set_function(lambda: float(is_ready()))

    def of(self, model: str, version: str, engine: str, precision: str) -> "ModelMetrics":
        """What watches one version of one model on its engine."""
        labels = (model, version, engine, precision)
        if labels not in self._models:
            self._models[labels] = ModelMetrics(self, labels)
        return self._models[labels]

    def render(self) -> bytes:
        found = triton.totals(self.outcome_seconds, self.stage_seconds, self.batch_size, self.queued)
        return _generate_latest(self.registry) + triton.exposition(found)

    def _histogram(self, name: str, meaning: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        self.described.append(Described(name, "histogram", labels, meaning))
        return Histogram(name, meaning, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, meaning: str, labels: tuple[str, ...]) -> Counter:
        self.described.append(Described(f"{name}_total", "counter", labels, meaning))
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, labels: tuple[str, ...]) -> Gauge:
        self.described.append(Described(name, "gauge", labels, meaning))
        return Gauge(name, meaning, labels, registry=self.registry)


class ModelMetrics:
    """The `batching.Observer` of one model; `watched` goes around what runs its batches."""

    def __init__(self, metrics: Metrics, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self._metrics = metrics
        self._model = labels[: len(MODEL)]
        # There from the start: Prometheus sees no increase in a counter whose first value is 1.
        metrics.batch_failures.labels(*labels)
        metrics.rebuilds.labels(*labels)

    def rebuilt(self) -> None:
        self._metrics.rebuilds.labels(*self.labels).inc()

    def stages(self, timings_ms: Mapping[str, float]) -> None:
        for stage, passed_ms in timings_ms.items():
            self._metrics.stage_seconds.labels(*self.labels, stage).observe(passed_ms / 1000)

    def detections(self, labels: Iterable[str]) -> None:
        for label, number in TallyCounter(labels).items():
            self._metrics.detected.labels(*self._model, label).inc(number)

    def batch(self, size: int, closed_by: CloseReason) -> None:
        self._metrics.batches_closed.labels(*self._model, closed_by).inc()

    def queue_depth(self, model: str, depth: int) -> None:
        self._metrics.queued.labels(*self._model).set(depth)

    def watched(self, run: Run) -> Run:
        """`run`, with its size, padding, time and failures counted: what ran, however the batch came about."""

        def watched_run(
            given: Sequence[Given], wants: Sequence[Wants], is_wide: bool = True
        ) -> Sequence[Ran | ServiceError]:
            started = time.perf_counter()
            try:
                raws = run(given, wants, is_wide)
            except Exception:
                self._metrics.batch_failures.labels(*self.labels).inc()
                raise
            self._metrics.batch_seconds.labels(*self.labels).observe(time.perf_counter() - started)
            self._metrics.batch_size.labels(*self.labels).observe(len(given))
            self._metrics.batch_padding.labels(*self._model).observe(padding_fraction(given))
            return raws

        return watched_run


def padding_fraction(canvases: Sequence[Given]) -> float:
    """Of the batch's pixels, all canvases being padded to the largest, how much is no picture."""
    covered = sum(canvas.size[0] * canvas.size[1] for canvas in canvases)
    height, width = (max(canvas.shape[axis] for canvas in canvases) for axis in (0, 1))
    return 1 - covered / (len(canvases) * height * width)


def ran(detections: Detections) -> dict[str, float]:
    """The timings of the stages that worked on this picture; a head that had nothing to do has none."""
    heads = {
        "masks": detections.masks is not None or detections.probabilities is not None,
        "keypoints": detections.keypoints is not None,
    }
    has_any = len(detections.labels) > 0
    worked = {stage for stage in detections.timings_ms if stage not in heads or (has_any and heads[stage])}
    return {stage: passed_ms for stage, passed_ms in detections.timings_ms.items() if stage in worked}


def table() -> str:
    """Every metric as a Markdown table, for docs/operations.md."""
    aliases = [Described(alias.name, alias.kind, MODEL, alias.meaning) for alias in triton.ALIASES]
    aliases.append(Described(triton.FAILURE, "counter", (*MODEL, "reason"), triton.FAILURE_MEANING))
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for item in [*Metrics().described, *aliases]:
        labels = ", ".join(f"`{label}`" for label in item.labels)
        rows.append(f"| `{item.name}` | {item.kind} | {labels} | {item.meaning} |")
    return "\n".join(rows)


def _outcome(code: int) -> Outcome:
    if code < 400:
        return "success" if code else "failed"  # 0: nothing was answered
    if code == 499:
        return "cancelled"
    if code in (429, 503, 504):
        return "rejected"
    return "failed" if code >= 500 else "refused"


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
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
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
