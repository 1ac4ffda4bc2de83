"""How many batches an engine runs at once, and of what size: measured on this machine, not guessed.

One run that has all cores is the quickest answer, and seldom the best use of them: threads of one run wait for each
other. So under load an engine that can be split runs one batch per *lane*, each with its part of the cores, while a
request that is alone keeps all of them. A lane is a process of its own (`service.worker`), or a part of the engine in
this process where that is faster. Where larger batches gain nothing they only make everybody in them wait.
"""

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import PIL.Image
import structlog

from service.bundle import Bundle
from service.detector import Detector, Lane, LaneLost, Lanes, Plan, Wants
from service.encoded import Encoded, Given
from service.engines import Opened, verify_golden
from service.errors import ServiceError
from service.images import Canvas, DecodeLimits
from service.worker import Worker, WorkerError

log = structlog.get_logger()

GAIN = 1.05  # a split or a larger batch has to be so much faster, or the simpler way stays
SPELL_SECONDS = 0.3  # each candidate is measured twice for so long at least
BATCHES = (2, 4, 8, 16)
UPLOAD = (640, 480)  # width and height of the JPEG that is answered in the trial
WANTS = Wants(confidence=0, max_detections=4)  # so that the heads run, whatever the model thinks of the picture
MOST_WORKERS = 8  # unless a number is asked for: each holds the model once more


def planned(
    opened: Opened, bundle: Bundle, canvas: Canvas, num_lanes: int | None, max_batch: int, seconds: float
) -> Lanes:
    """`num_lanes` None: whatever answers `canvas` fastest within about `seconds` of trying. A number leaves the choice
    between threads and processes to try, and is threads without time.

    Every lane is held to the golden outputs. Engines that cannot be split, those of GPUs above all, stay whole.
    """
    whole = Lanes(Plan(1, max_batch, {}))
    if opened.split is None or num_lanes == 1 or opened.threads < 2 or (num_lanes is None and seconds <= 0):
        return whole
    if num_lanes is not None and seconds <= 0:
        return again(opened, bundle, Plan(num_lanes, max_batch, {}))
    trial = _Trial(Detector(bundle, opened.engine), canvas, seconds)
    if num_lanes is None:
        trial.measure(whole)
    try:
        for num in _counts(opened.threads) if num_lanes is None else [num_lanes]:
            fastest = trial.fastest
            for processes in _kinds(opened, num, num_lanes is None):
                if not trial.is_over or not trial.rates:
                    trial.compare(opened, Plan(num, max_batch, {}, processes))
            if trial.fastest == fastest:
                break  # more lanes gain nothing, and each costs memory
        size = trial.useful_batch(max_batch) if num_lanes is None else max_batch
    except BaseException:
        trial.best.close()
        raise
    rates = {words: round(rate, 2) for words, rate in trial.rates.items()}
    plan = replace(trial.best.plan, max_batch=size, rates=rates)
    told = {"processes": plan.processes, "max_batch": plan.max_batch, **rates}
    log.info("engine measured", model=bundle.name, lanes=plan.num_lanes, **told)
    return Lanes(plan, trial.best.each)


def again(opened: Opened, bundle: Bundle, plan: Plan) -> Lanes:
    """Lanes as planned, for an engine that was just opened."""
    if plan.num_lanes == 1:
        return Lanes(plan)
    return Lanes(plan, _workers(opened, bundle, plan) if plan.processes else _split(opened, bundle, plan.num_lanes))


def _counts(threads: int) -> list[int]:
    """Lane counts that leave every lane a whole number of threads, up to one each."""
    return [num for num in range(2, threads + 1) if threads % num == 0]


def _kinds(opened: Opened, num: int, is_auto: bool) -> tuple[bool, ...]:
    """Whether lanes are processes: where they can be they are, unless threads are so much faster. The trial flatters
    threads: nothing of the service runs yet that would take turns with them in this interpreter."""
    return (True, False) if opened.is_portable and (num <= MOST_WORKERS or not is_auto) else (False,)


def _workers(opened: Opened, bundle: Bundle, plan: Plan) -> list[Lane]:
    threads = max(1, opened.threads // plan.num_lanes)
    workers: list[Worker] = []
    try:
        for _ in range(plan.num_lanes):
            workers.append(Worker(bundle, opened.engine.name, opened.engine.precision, threads))
        for worker in workers:
            worker.wait()
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    return list(workers)


def _split(opened: Opened, bundle: Bundle, num: int) -> list[Lane]:
    assert opened.split is not None
    engines = opened.split(num)
    try:
        for engine in engines:
            verify_golden(engine, bundle)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return [Detector(bundle, engine) for engine in engines]


class _Trial:
    """Answers one picture again and again, in several lanes at once, and keeps the lanes that were fastest.

    From JPEG to detections, each lane decoding for itself: that, too, takes cores and interpreters.
    """

    def __init__(self, detector: Detector, canvas: Canvas, seconds: float) -> None:
        self._detector = detector
        self._given = canvas if detector.bundle.takes_proposals else _uploaded(canvas, detector.bundle)
        self._left_s = seconds  # of running; opening what runs is not counted
        self.best = Lanes(Plan(1, 1, {}))
        self.fastest = 0.0
        self.rates: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        return self._left_s <= 0

    def measure(self, lanes: Lanes) -> None:
        """Takes over `lanes`: they are the best from now on, or closed. Who loses is looked at twice: a moment in which
        the machine did something else looks the same."""
        num, kind = lanes.plan.num_lanes, "processes" if lanes.plan.processes else "lanes"
        try:
            each = lanes.each or [self._detector]
            rate = self.rate(each, 1)
            if rate < GAIN * self.fastest and not self.is_over:
                rate = max(rate, self.rate(each, 1))
            self.rates["1 lane" if num == 1 else f"{num} {kind}"] = rate
            if rate > GAIN * self.fastest:
                lanes, self.best, self.fastest = self.best, lanes, rate
        finally:
            lanes.close()

    def compare(self, opened: Opened, plan: Plan) -> None:
        try:
            self.measure(again(opened, self._detector.bundle, plan))
        except (LaneLost, WorkerError, OSError) as error:  # a machine may not allow them: it is served without
            log.warning("workers did not start", model=self._detector.bundle.name, reason=str(error))

    def useful_batch(self, max_batch: int) -> int:
        """The smallest size above which nothing is gained; without time to try, as large as allowed. Looked at twice,
        too."""
        useful, fastest = 1, self.fastest
        for size in [size for size in BATCHES if size <= max_batch]:
            if self.is_over:
                return max_batch
            lanes = self.best.each or [self._detector]
            try:
                rate = self.rate(lanes, size)
                if rate < GAIN * fastest:
                    rate = max(rate, self.rate(lanes, size))
            except LaneLost:  # too large for the memory, most likely
                return useful
            self.rates[f"batches of {size}"] = rate
            if rate < GAIN * fastest:
                return useful
            useful, fastest = size, rate
        return max_batch

    def rate(self, lanes: Sequence[Lane], size: int) -> float:
        """Pictures a second of all together, after one batch each to warm up. The better of two spells: whatever else
        the machine did meanwhile made it worse."""
        began_s = time.monotonic()
        given, wants = [self._given] * size, [WANTS] * size

        def answer(lane: Lane) -> None:
            for ran in lane.answer(given, wants):
                if isinstance(ran, ServiceError):
                    raise ran
                self._detector.finish(ran)

        def spell() -> float:
            started_s = time.monotonic()
            counts = [0] * len(lanes)

            def work(index: int) -> None:
                while counts[index] < 2 or time.monotonic() < started_s + SPELL_SECONDS:
                    answer(lanes[index])
                    counts[index] += 1

            _at_once([partial(work, index) for index in range(len(lanes))])
            return sum(counts) * size / (time.monotonic() - started_s)

        _at_once([partial(answer, lane) for lane in lanes])
        best = max(spell(), spell())
        self._left_s -= time.monotonic() - began_s
        return best


def _uploaded(canvas: Canvas, bundle: Bundle) -> Given:
    height, width = canvas.size
    file = io.BytesIO()
    PIL.Image.fromarray(canvas.pixels[:height, :width]).resize(UPLOAD).save(file, "JPEG", quality=85)
    return Encoded.of(file.getvalue(), DecodeLimits(), bundle.manifest.canvas) or canvas


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
