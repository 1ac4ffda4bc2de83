"""How many batches an engine runs at once, and of what size: measured on this machine, not guessed.

One run that has all cores is the quickest answer, and seldom the best use of them: threads of one run wait for each
other. So under load an engine that can be split runs one batch per *lane*, each with its part of the cores, while a
request that is alone keeps all of them. Where larger batches gain nothing they only make everybody in them wait.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.bundle import Bundle
from service.engines import Engine, Opened, golden_inputs, verify_golden

log = structlog.get_logger()

GAIN = 1.05  # a split or a larger batch has to be so much faster, or the simpler way stays
RUN_SECONDS = 0.4  # each candidate is measured for so long at least
BATCHES = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """`num_lanes` batches at once of at most `max_batch` pictures; `rates`, pictures/s of what was tried, by words."""

    num_lanes: int
    max_batch: int
    rates: dict[str, float]


@dataclass(frozen=True, slots=True)
class Lanes:
    """`engines` are empty where the whole engine is the only lane."""

    plan: Plan
    engines: tuple[Engine, ...] = ()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def planned(opened: Opened, bundle: Bundle, num_lanes: int | None, max_batch: int, seconds: float) -> Lanes:
    """`num_lanes` None: whatever runs the golden picture fastest within about `seconds` of trying.

    Every lane is held to the golden outputs. Engines that cannot be split, those of GPUs above all, stay whole.
    """
    if opened.split is None or num_lanes == 1 or opened.threads < 2 or (num_lanes is None and seconds <= 0):
        return Lanes(Plan(1, max_batch, {}))
    if num_lanes is not None:
        return Lanes(Plan(num_lanes, max_batch, {}), _split(opened, bundle, num_lanes))
    trial = _Trial(bundle, time.monotonic() + seconds)
    rates = {"1 lane": trial.rate([opened.engine], 1)}
    best = Lanes(Plan(1, max_batch, {}), ())
    fastest = rates["1 lane"]
    for num in _candidates(opened.threads):
        if trial.is_over:
            break
        split = _split(opened, bundle, num)
        rates[f"{num} lanes"] = rate = trial.rate(split, 1)
        if rate > GAIN * fastest:
            best.close()
            best, fastest = Lanes(Plan(num, max_batch, {}), split), rate
        else:
            for engine in split:
                engine.close()
    size = _useful_batch(trial, best.engines or (opened.engine,), max_batch, fastest, rates)
    plan = Plan(best.plan.num_lanes, size, {words: round(rate, 2) for words, rate in rates.items()})
    log.info("engine measured", model=bundle.name, lanes=plan.num_lanes, max_batch=plan.max_batch, **plan.rates)
    return Lanes(plan, best.engines)


def again(opened: Opened, bundle: Bundle, plan: Plan) -> Lanes:
    """The same lanes for an engine that was opened again."""
    engines = _split(opened, bundle, plan.num_lanes) if plan.num_lanes > 1 else ()
    return Lanes(plan, engines)


def _candidates(threads: int) -> list[int]:
    """Lane counts that leave every lane a whole number of threads, up to one each."""
    return [num for num in range(2, threads + 1) if threads % num == 0]


def _split(opened: Opened, bundle: Bundle, num: int) -> tuple[Engine, ...]:
    assert opened.split is not None
    engines = opened.split(num)
    try:
        for engine in engines:
            verify_golden(engine, bundle)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return tuple(engines)


def _useful_batch(
    trial: "_Trial", engines: Sequence[Engine], max_batch: int, fastest: float, rates: dict[str, float]
) -> int:
    """The smallest size above which nothing is gained; without time to try, as large as allowed."""
    if trial.is_over:
        return max_batch
    useful = 1
    for size in [size for size in BATCHES if size <= max_batch]:
        rates[f"batches of {size}"] = rate = trial.rate(engines, size)
        if rate < GAIN * fastest:
            return useful
        useful, fastest = size, rate
        if trial.is_over:
            break
    return max_batch


class _Trial:
    """Runs the golden picture on several engines at once."""

    def __init__(self, bundle: Bundle, end_s: float) -> None:
        self._golden = bundle.golden()
        self._end_s = end_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end_s

    def rate(self, engines: Sequence[Engine], size: int) -> float:
        """Pictures a second of all together, after one run each to warm up."""
        inputs = golden_inputs(self._golden, size)
        _at_once([lambda engine=engine: engine.detect(*inputs) for engine in engines])
        started_s = time.monotonic()
        counts = [0] * len(engines)

        def work(lane: int) -> None:
            while counts[lane] < 2 or time.monotonic() < started_s + RUN_SECONDS:
                engines[lane].detect(*inputs)
                counts[lane] += 1

        _at_once([lambda lane=lane: work(lane) for lane in range(len(engines))])
        return sum(counts) * size / (time.monotonic() - started_s)


def _at_once(jobs: Sequence[Callable[[], object]]) -> None:
    """Each on a thread of its own; raises what the first of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
