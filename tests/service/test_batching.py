import asyncio
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

from service.admission import Admission, Pace
from service.batching import MOST_FINISHING, Batcher
from service.detector import Wants
from service.device import Device
from service.errors import (
    BrokenImage,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineOutOfMemory,
    EngineStuck,
    NotReady,
    Overloaded,
)
from service.images import Canvas
from service.policy import BatchLimits
from tests.service.toy import picture


def test_permits_are_given_back_whatever_happens():
    admission = Admission(1)
    with admission.permit(), pytest.raises(Overloaded, match="LIMNER_MAX_REQUESTS"), admission.permit():
        pass
    with pytest.raises(ZeroDivisionError), admission.permit():
        raise ZeroDivisionError
    with admission.permit():
        assert admission.num_held == 1
    admission.close()
    with pytest.raises(Draining), admission.permit():
        pass
    assert admission.num_held == 0


def test_a_wait_beyond_the_bound_is_refused_with_the_time_until_it_is_within():
    admission = Admission(100, max_wait_s=2.0)
    admission.pace.ran(1, 1.0, 1.0)  # a second a picture
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(admission.enter())  # 0, 1 and 2 s to wait
        with pytest.raises(Overloaded, match="LIMNER_MAX_WAIT_MS") as refused:
            admission.enter()
        assert refused.value.retry_after_s == 1
        held.enter_context(admission.permit())  # a further picture of one that is in
        for _ in range(3):
            held.enter_context(admission.permit())
        with pytest.raises(Overloaded) as refused:
            admission.enter()
        assert refused.value.retry_after_s == 5  # 7 s to wait, 2 are allowed
        assert admission.wait_s == 7.0
    with admission.enter():
        pass
    admission.close()
    with pytest.raises(Draining), admission.enter():
        pass


def test_who_finds_nobody_is_taken_however_slow_the_engine_was():
    admission = Admission(2, max_wait_s=0.001)
    admission.pace.ran(1, 1.0, 3600.0)
    with admission.enter(), pytest.raises(Overloaded), admission.enter():
        pass
    with Admission(2).enter() as first, Admission(2).enter() as second:  # no bound
        assert (first, second) == (None, None)


def test_a_picture_costs_its_part_of_a_batch_and_of_the_device():
    pace = Pace()
    pace.ran(1, 1.0, 0.1)
    assert pace.seconds == pytest.approx(0.1)
    for _ in range(60):
        pace.ran(4, 0.5, 0.4)  # four pictures on half of the device
    assert pace.seconds == pytest.approx(0.05, rel=1e-4)


class Observed:
    def __init__(self) -> None:
        self.batches: list[tuple[int, str]] = []
        self.depth = 0

    def batch(self, size, closed_by):
        self.batches.append((size, closed_by))

    def queue_depth(self, model, depth):
        self.depth = depth

    @property
    def sizes(self) -> list[int]:
        return [size for size, _ in self.batches]


class Bench:
    """A batcher on a function that answers each canvas with itself; `free` holds the device."""

    def __init__(self, rebuild=None, **limits) -> None:
        self.now = 0.0
        self.free = threading.Event()
        self.free.set()
        self.fail = False
        self.poisonous: set[int] = set()  # seeds
        self.refused: set[int] = set()
        self.room = 1000
        self.entered = threading.Event()
        self.ran: list[int] = []
        self.observed = Observed()
        self.device = Device()
        bounds = BatchLimits(**{"max_batch": 4, "max_pixels": 10**9, **limits})
        self.pace = Pace()
        self.batcher = Batcher(
            "m", self.run, self.device, bounds, self.observed, lambda: self.now, rebuild=rebuild, pace=self.pace
        )

    def run(self, canvases, wants, is_wide=True):
        self.entered.set()
        assert self.free.wait(10)
        if self.fail:
            raise RuntimeError("broken")
        if any(self.is_among(self.poisonous, canvas) for canvas in canvases):
            raise ValueError("poison")
        if len(canvases) > self.room:
            raise EngineOutOfMemory("no room")
        self.ran.append(len(canvases))
        return [BrokenImage("a test") if self.is_among(self.refused, canvas) else canvas for canvas in canvases]

    def is_among(self, seeds: set[int], canvas: Canvas) -> bool:
        return any((canvas.pixels == picture(*canvas.shape, seed=seed)).all() for seed in seeds)

    def submit(
        self, seed: int = 0, deadline_s: float = 1e9, shape: tuple[int, int] = (32, 32), priority="normal", finish=None
    ):
        pixels = picture(*shape, seed=seed)
        return self.batcher.submit(Canvas(pixels, shape, shape), Wants(), deadline_s, priority, finish)

    async def close(self):
        self.free.set()
        await self.batcher.drain(5)
        self.device.close()


def bench(scenario, rebuild=None, **limits):
    async def run() -> None:
        made = Bench(rebuild, **limits)
        try:
            await asyncio.wait_for(scenario(made), 10)
        finally:
            await made.close()

    asyncio.run(run())


async def turns() -> None:
    """Of the loop: enough for whatever it does by itself."""
    for _ in range(100):
        await asyncio.sleep(0)


async def occupy(made: Bench):
    """The device is busy with one request when this returns."""
    made.free.clear()
    made.entered.clear()
    first = made.submit()
    while not made.entered.is_set():
        await asyncio.sleep(0.001)
    return first


def test_who_waits_is_told_at_the_deadline_and_not_when_the_engine_frees():
    async def scenario(made: Bench):
        first = await occupy(made)
        late = made.submit(deadline_s=made.now + 0.02)
        with pytest.raises(DeadlineExceeded):
            await late
        assert not made.free.is_set()
        made.free.set()
        assert (await first).raw is not None
        assert made.ran == [1]

    bench(scenario)


def test_a_lone_request_does_not_wait():
    async def scenario(made: Bench):
        started = time.perf_counter()
        answer = await made.submit()
        assert time.perf_counter() - started < 1
        assert answer.raw.shape == (32, 32)
        assert made.observed.batches == [(1, "drained")]

    bench(scenario)


def test_a_lone_request_is_finished_where_it_ran_and_the_device_is_free_meanwhile():
    async def scenario(made: Bench):
        finishing, go_on = threading.Event(), threading.Event()

        def finish(answer):
            finishing.set()
            assert go_on.wait(10)
            return answer.raw.shape, threading.current_thread().name

        first = made.submit(finish=finish)
        await asyncio.to_thread(finishing.wait, 10)
        assert not first.done()  # nobody wants the device, so it is told once, when all is done
        assert (await made.submit(seed=1)).raw is not None  # runs while the first is still being finished
        assert first.done()
        go_on.set()
        assert await first.result().finished == ((32, 32), "device")

    bench(scenario)


def test_finishing_is_no_part_of_the_engines_time():
    async def scenario(made: Bench):
        def finish(answer) -> str:
            time.sleep(0.8)
            made.now = 100.0
            return "done"

        answer = await made.submit(finish=finish)
        assert await answer.finished == "done"
        assert made.ran == [1]
        assert made.pace.seconds == 0

    bench(scenario, engine_s=0.4)


def test_what_finishing_raises_is_the_callers_and_no_failure_of_the_engine():
    async def scenario(made: Bench):
        answer = await made.submit(finish=lambda answer: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await answer.finished
        assert answer.raw is not None
        assert made.ran == [1]

    bench(scenario)


def test_a_picture_that_the_engine_refuses_is_not_finished():
    async def scenario(made: Bench):
        made.refused = {3}
        finished: list[object] = []
        with pytest.raises(BrokenImage):
            await made.submit(3, finish=finished.append)
        assert not finished

    bench(scenario)


def test_of_a_batch_of_several_finishing_is_left_to_who_submitted():
    async def scenario(made: Bench):
        first = await occupy(made)
        rest = [made.submit(seed, shape=shape, finish=id) for seed, shape in enumerate([(32, 32), (32, 32), (64, 64)])]
        made.free.set()
        answers = await asyncio.gather(*rest)
        assert [answer.finished is None for answer in answers] == [True, True, False]
        assert (await first).finished is None

    bench(scenario)


def test_few_threads_finish_at_once():
    async def scenario(made: Bench):
        go_on, finishing = threading.Event(), threading.Semaphore(0)

        def finish(answer) -> bool:
            finishing.release()
            return go_on.wait(10)

        answers = []
        for seed in range(MOST_FINISHING):
            answers.append(made.submit(seed, finish=finish))
            assert await asyncio.to_thread(finishing.acquire, timeout=10)
        late = [await made.submit(seed, finish=finish) for seed in range(2)]
        answers = [*await asyncio.gather(*answers), *late]
        assert [answer.finished is None for answer in answers] == [False] * MOST_FINISHING + [True] * 2
        go_on.set()
        assert all([await answer.finished for answer in answers if answer.finished])
        assert (await made.submit(finish=lambda answer: "done")).finished is not None

    bench(scenario)


@pytest.mark.parametrize(("ahead", "handed_out"), [(False, [2, 2]), (True, [2, 2, 2, 2])])
def test_a_lane_has_one_batch_or_besides_one_that_waits_there(ahead, handed_out):
    async def scenario(made: Bench):
        made.free.clear()
        running = [made.submit(seed) for seed in range(8)]
        await turns()
        assert made.observed.sizes == handed_out
        made.free.set()
        await asyncio.gather(*running)
        assert sum(made.observed.sizes) == 8

    bench(scenario, num_lanes=2, ahead=ahead)


def test_what_waits_at_a_lane_is_a_whole_part_of_all():
    """Two lanes have one picture each; a second and a third wait for company, and leave when it comes."""

    async def scenario(made: Bench):
        made.free.clear()
        running = [made.submit(seed) for seed in range(2)]
        await turns()
        running += [made.submit(seed) for seed in range(2, 5)]  # 5 in all, for 4 places: 2 each
        await turns()
        assert made.observed.sizes == [1, 1, 2]
        running.append(made.submit(5))
        await turns()
        assert made.observed.sizes == [1, 1, 2, 2]
        running.append(made.submit(6))
        made.free.set()
        await asyncio.gather(*running)
        assert made.observed.sizes == [1, 1, 2, 2, 1]

    bench(scenario, num_lanes=2, ahead=True)


def test_an_engine_that_hangs_leaves_nothing_to_finish_and_its_thread_behind():
    async def scenario(made: Bench):
        made.free.clear()
        with pytest.raises(EngineStuck):
            await made.submit(finish=id)
        made.free.set()
        answer = await made.submit(finish=lambda answer: answer.raw.shape)
        assert await answer.finished == (32, 32)

    bench(scenario, engine_s=0.05)


def test_what_waits_goes_together_and_each_gets_its_own():
    async def scenario(made: Bench):
        first = await occupy(made)
        rest = [made.submit(seed) for seed in range(1, 7)]
        assert made.observed.depth == 6
        made.free.set()
        await first
        answers = await asyncio.gather(*rest)
        assert made.ran == [1, 4, 2]
        assert made.observed.batches == [(1, "drained"), (4, "full"), (2, "drained")]
        for seed, answer in enumerate(answers, start=1):
            assert (answer.raw.pixels == picture(32, 32, seed=seed)).all()

    bench(scenario)


def test_shapes_do_not_mix_and_the_oldest_goes_first():
    async def scenario(made: Bench):
        first = await occupy(made)
        rest = [made.submit(shape=shape) for shape in ((32, 64), (32, 32), (32, 64))]
        made.free.set()
        await asyncio.gather(first, *rest)
        assert made.observed.batches[1:] == [(2, "shape"), (1, "drained")]

    bench(scenario)


def test_who_left_is_dropped_before_the_engine_and_others_are_served():
    async def scenario(made: Bench):
        first = await occupy(made)
        rest = [made.submit(seed) for seed in range(3)]
        rest[1].cancel()
        made.free.set()
        await asyncio.gather(first, rest[0], rest[2])
        assert made.ran == [1, 2]

    bench(scenario)


def test_who_leaves_while_running_harms_nobody():
    async def scenario(made: Bench):
        first = await occupy(made)
        first.cancel()
        second = made.submit()
        made.free.set()
        assert (await second).raw is not None
        assert made.ran == [1, 1]

    bench(scenario)


def test_a_passed_deadline_is_refused_without_running():
    async def scenario(made: Bench):
        first = await occupy(made)
        late, patient = made.submit(deadline_s=5), made.submit(deadline_s=50)
        made.now = 10.0
        made.free.set()
        with pytest.raises(DeadlineExceeded):
            await late
        answer = await patient
        assert answer.queue_ms == 10_000
        await first
        assert made.ran == [1, 1]

    bench(scenario)


def test_an_engine_error_fails_its_batch_alone():
    async def scenario(made: Bench):
        made.fail = True
        with pytest.raises(EngineFailed, match="RuntimeError"):
            await made.submit()
        made.fail = False
        assert (await made.submit()).raw is not None

    bench(scenario)


def test_an_error_that_is_one_pictures_answer_fails_nobody_else_and_nothing_is_tried_again():
    def refuse() -> None:
        raise AssertionError("the engine is well")

    async def scenario(made: Bench):
        first = await occupy(made)
        made.refused = {2}
        rest = [made.submit(seed) for seed in range(1, 5)]
        made.free.set()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [isinstance(answer, BrokenImage) for answer in answers] == [False, False, True, False, False]
        with pytest.raises(BrokenImage):
            await made.submit(2)
        assert made.ran == [1, 4, 1]

    bench(scenario, rebuild=lambda may_keep: refuse())


def test_a_poisonous_picture_fails_alone():
    async def scenario(made: Bench):
        first = await occupy(made)
        made.poisonous = {3}
        rest = [made.submit(seed) for seed in range(1, 9)]
        made.free.set()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [isinstance(answer, EngineFailed) for answer in answers] == [seed == 3 for seed in range(9)]
        assert made.ran == [1, *[1] * 7]
        assert made.observed.batches == [(1, "drained"), (8, "drained")]

    bench(scenario, max_batch=8)


def test_exhausted_memory_halves_the_batch_for_good():
    async def scenario(made: Bench):
        first = await occupy(made)
        made.room = 2
        rest = [made.submit(seed) for seed in range(16)]
        made.free.set()
        await asyncio.gather(first, *rest)
        assert made.ran == [1, *[2] * 8]
        assert [size for size, _ in made.observed.batches] == [1, 8, *[2] * 4]

    bench(scenario, max_batch=8)


def test_one_picture_that_does_not_fit_is_told_so():
    async def scenario(made: Bench):
        made.room = 0
        with pytest.raises(EngineOutOfMemory):
            await made.submit()
        made.room = 1
        assert (await made.submit()).raw is not None

    bench(scenario)


def test_an_engine_that_fails_everything_is_looked_after():
    asked = []

    async def scenario(made: Bench):
        def rebuild(may_keep: bool):
            asked.append(may_keep)
            assert made.batcher.is_broken == (not may_keep)
            if len(asked) < 3:
                raise RuntimeError("not yet")
            made.fail = False
            return made.run

        made.batcher._rebuild = rebuild
        first = await occupy(made)
        rest = [made.submit(seed) for seed in range(5)]
        made.fail = True
        made.free.set()
        with pytest.raises(EngineFailed):
            await first
        answers = await asyncio.gather(*rest, return_exceptions=True)
        assert all(isinstance(answer, NotReady) for answer in answers), "who waited is told, not kept"
        with pytest.raises(NotReady):
            made.submit()
        while made.batcher.is_broken:
            await asyncio.sleep(0.01)
        assert asked == [True, False, False]
        assert (await made.submit()).raw is not None

    bench(scenario)


def test_an_engine_that_hangs_is_left_behind():
    release = threading.Event()

    async def scenario(made: Bench):
        calls = []

        def rebuild(may_keep: bool):
            calls.append(may_keep)
            return lambda canvases, wants, is_wide: list(canvases)

        made.batcher._rebuild = rebuild
        made.batcher._run = lambda canvases, wants, is_wide: release.wait(30) and []
        stuck, waits = made.submit(), made.submit(1, shape=(32, 64))
        with pytest.raises(EngineStuck, match="LIMNER_ENGINE_SECONDS"):
            await stuck
        assert (await waits).raw is not None, "who waited is served by the new engine"
        assert calls == [False]

    try:
        bench(scenario, engine_s=0.05)
    finally:
        release.set()


def test_priority_goes_first_and_is_not_waited_for():
    async def scenario(made: Bench):
        first = await occupy(made)
        order: list[str] = []
        low = [made.submit(seed) for seed in range(4)]
        made.now = 0.5
        high = made.submit(9, priority="high")
        late = made.submit(8)
        for name, future in [*((f"low {i}", f) for i, f in enumerate(low)), ("high", high), ("late", late)]:
            future.add_done_callback(lambda _, name=name: order.append(name))
        made.free.set()
        await asyncio.gather(first, *low, high, late)
        assert order == ["high", "low 0", "low 1", "low 2", "low 3", "late"]

    bench(scenario, max_batch=1)


def test_lingering_waits_for_company_but_not_for_ever():
    async def scenario(made: Bench):
        made.batcher._clock = time.monotonic
        started = time.monotonic()
        rest = [made.submit(seed) for seed in range(2)]
        await asyncio.sleep(0.01)
        rest += [made.submit(seed) for seed in range(2, 4)]
        await asyncio.gather(*rest)
        assert made.ran == [4], "full before its time"
        assert time.monotonic() - started < 5
        made.batcher._limits = replace(made.batcher._limits, linger_s=0.05)
        started = time.monotonic()
        await made.submit()
        assert 0.045 < time.monotonic() - started < 5

    bench(scenario, linger_s=8.0)


def test_drain_finishes_what_waits_and_admits_nobody():
    async def scenario(made: Bench):
        first = await occupy(made)
        second = made.submit()
        draining = asyncio.create_task(made.batcher.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            made.submit()
        made.free.set()
        await asyncio.gather(first, second, draining)
        assert made.ran == [1, 1]

    bench(scenario)


def test_drain_gives_up_after_its_time_and_tells_everybody():
    async def scenario(made: Bench):
        first = await occupy(made)
        second = made.submit()
        await made.batcher.drain(0.01)
        for future in (first, second):
            with pytest.raises(Draining):
                await future
        made.free.set()

    bench(scenario)


def test_models_share_the_device():
    async def scenario(made: Bench):
        first = await occupy(made)
        other = Batcher("n", made.run, made.device, BatchLimits(4, 10**9), made.observed)
        shape = (32, 32)
        rest = [other.submit(Canvas(picture(*shape), shape, shape), Wants(), 1e18) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert len(made.observed.batches) == 1  # the other model's batch is formed only when the device is free
        made.free.set()
        await asyncio.gather(first, *rest)
        assert made.ran == [1, 3]
        await other.drain(1)

    bench(scenario)
