"""Triton's metric names for what this service counts under its own, so that dashboards made for Triton show it.

Names, units (microseconds) and meanings are those of Triton's metrics.md; nothing is counted twice, all is read from
the `limner_*` metrics at each scrape. Left out are the GPU's own numbers, which NVIDIA's exporter has for any process,
and the response cache, which does not exist here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Sample

Who = tuple[str, str]  # model, version
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
FAILURES = {"rejected": "REJECTED", "cancelled": "CANCELED", "failed": "BACKEND", "refused": "OTHER"}


@dataclass(slots=True)
class Totals:
    """What one version of one model has done so far."""

    requests: dict[str, float] = field(default_factory=dict)  # by outcome
    request_seconds: float = 0.0
    pictures: float = 0.0
    batches: float = 0.0
    waiting: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def micros(self, *stages: str) -> float:
        return 1e6 * sum(self.stage_seconds.get(stage, 0.0) for stage in stages)


@dataclass(frozen=True, slots=True)
class Alias:
    name: str
    kind: str
    meaning: str
    value: Callable[[Totals], float]


ALIASES = (
    Alias(
        "nv_inference_request_success",
        "counter",
        "Requests answered with detections.",
        lambda totals: totals.requests.get("success", 0.0),
    ),
    Alias("nv_inference_count", "counter", "Pictures run.", lambda totals: totals.pictures),
    Alias("nv_inference_exec_count", "counter", "Batches run.", lambda totals: totals.batches),
    Alias("nv_inference_pending_request_count", "gauge", "Requests that wait.", lambda totals: totals.waiting),
    Alias(
        "nv_inference_request_duration_us",
        "counter",
        "Time of the answered requests.",
        lambda totals: 1e6 * totals.request_seconds,
    ),
    Alias(
        "nv_inference_queue_duration_us",
        "counter",
        "Time of requests in the queue.",
        lambda totals: totals.micros("queue"),
    ),
    Alias(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Time of requests in decode and fit.",
        lambda totals: totals.micros("decode", "fit"),
    ),
    Alias(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Time of requests in detect, masks and keypoints.",
        lambda totals: totals.micros("detect", "masks", "keypoints"),
    ),
    Alias(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Time of requests in encode.",
        lambda totals: totals.micros("encode"),
    ),
)
FAILURE = "nv_inference_request_failure"
FAILURE_MEANING = "Requests without detections: refused for overload, left by the client, failed in the engine, others."


def totals(
    requests: MetricWrapperBase, stages: MetricWrapperBase, sizes: MetricWrapperBase, depth: MetricWrapperBase
) -> dict[Who, Totals]:
    """Sums of the service's own metrics by model and version."""
    found: defaultdict[Who, Totals] = defaultdict(Totals)
    for who, sample in _samples(requests):
        outcome = sample.labels["outcome"]
        if sample.name.endswith("_count"):
            found[who].requests[outcome] = found[who].requests.get(outcome, 0.0) + sample.value
        elif sample.name.endswith("_sum") and outcome == "success":
            found[who].request_seconds += sample.value
    for who, sample in _samples(stages):
        if sample.name.endswith("_sum"):
            spent = found[who].stage_seconds
            spent[sample.labels["stage"]] = spent.get(sample.labels["stage"], 0.0) + sample.value
    for who, sample in _samples(sizes):
        found[who].pictures += sample.value if sample.name.endswith("_sum") else 0
        found[who].batches += sample.value if sample.name.endswith("_count") else 0
    for who, sample in _samples(depth):
        found[who].waiting += sample.value
    return dict(found)


def _samples(metric: MetricWrapperBase) -> Iterator[tuple[Who, Sample]]:
    for family in metric.collect():
        for sample in family.samples:
            yield (sample.labels["model"], sample.labels["version"]), sample


def exposition(found: dict[Who, Totals]) -> bytes:
    """Prometheus text. By hand, since the client library adds _total to a counter's name."""
    lines: list[str] = []
    for alias in ALIASES:
        rows = [(_labels(who), alias.value(each)) for who, each in found.items()]
        lines += _family(alias.name, alias.kind, alias.meaning, rows)
    failures = [
        (_labels(who, ("reason", reason)), _failed(each, reason)) for who, each in found.items() for reason in REASONS
    ]
    lines += _family(FAILURE, "counter", FAILURE_MEANING, failures)
    return "".join(f"{line}\n" for line in lines).encode()


def _failed(found: Totals, reason: str) -> float:
    return sum(number for outcome, number in found.requests.items() if FAILURES.get(outcome) == reason)


def _family(name: str, kind: str, meaning: str, rows: Iterable[tuple[str, float]]) -> list[str]:
    return [
        f"# HELP {name} {meaning}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value!r}" for labels, value in rows),
    ]


def _labels(who: Who, *more: tuple[str, str]) -> str:
    pairs = [("model", who[0]), ("version", who[1]), *more]
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
