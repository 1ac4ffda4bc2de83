import asyncio
import threading
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching import Admission, Batcher, BatchLimits, Device, next_batch
from service.detector import Wants
from service.errors import DeadlineExceeded, Draining, EngineFailed, Overloaded
from service.images import Canvas
from tests.service.toy import picture


@dataclass(frozen=True)
class Waiting:
    age: int
    shape: tuple[int, int]
    deadline_s: float = 100.0
    is_abandoned: bool = False


SHAPES = [(32, 32), (32, 64), (64, 32), (64, 64)]
queues = st.lists(
    st.builds(
        Waiting,
        age=st.just(0),
        shape=st.sampled_from(SHAPES),
        deadline_s=st.sampled_from([5.0, 100.0]),
        is_abandoned=st.booleans(),
    ),
    max_size=20,
).map(lambda rows: [Waiting(age, row.shape, row.deadline_s, row.is_abandoned) for age, row in enumerate(rows)])
bounds = st.builds(BatchLimits, max_batch=st.integers(1, 8), max_pixels=st.integers(1, 64 * 64 * 6))


@given(queues, bounds)
def test_policy(waiting, limits):
    batch = next_batch(waiting, 10.0, limits)
    alive = [entry for entry in waiting if not entry.is_abandoned and entry.deadline_s > 10]
    # Everybody alive is in exactly one place, in order of age; abandoned ones are nowhere.
    assert sorted([*batch.taken, *batch.left], key=lambda entry: entry.age) == alive
    assert batch.expired == [entry for entry in waiting if not entry.is_abandoned and entry.deadline_s <= 10]
    assert batch.taken == sorted(batch.taken, key=lambda entry: entry.age)
    assert batch.left == sorted(batch.left, key=lambda entry: entry.age)
    if not alive:
        assert batch.taken == []
        return
    assert batch.taken[0] is alive[0]
    assert len({entry.shape for entry in batch.taken}) == 1
    height, width = alive[0].shape
    assert len(batch.taken) <= limits.max_batch
    assert len(batch.taken) == 1 or len(batch.taken) * height * width <= limits.max_pixels
    same_left = [entry for entry in batch.left if entry.shape == alive[0].shape]
    expected = ("full", "pixels") if same_left else ("shape",) if batch.left else ("drained",)
    assert batch.closed_by in expected


@given(queues, bounds)
def test_nobody_starves(waiting, limits):
    """Each batch takes the oldest, so a queue of n is empty after at most n batches, newcomers or not."""
    newcomers = 0
    oldest = [entry for entry in waiting if not entry.is_abandoned and entry.deadline_s > 10]
    for _ in range(len(oldest)):
        batch = next_batch(waiting, 10.0, limits)
        newcomers += 1
        waiting = [*batch.left, Waiting(1000 + newcomers, SHAPES[newcomers % 4])]
    assert not set(oldest) & set(waiting)


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


class Observed:
    def __init__(self) -> None:
        self.batches: list[tuple[int, str]] = []
        self.depth = 0

    def batch(self, size, closed_by):
        self.batches.append((size, closed_by))

    def queue_depth(self, model, depth):
        self.depth = depth


class Bench:
    """A batcher on a function that answers each canvas with itself; `free` holds the device."""

    def __init__(self, max_batch: int = 4) -> None:
        self.now = 0.0
        self.free = threading.Event()
        self.free.set()
        self.fail = False
        self.ran: list[int] = []
        self.observed = Observed()
        self.device = Device()
        limits = BatchLimits(max_batch, 10**9)
        self.batcher = Batcher("m", self.run, self.device, limits, self.observed, clock=lambda: self.now)

    def run(self, canvases, wants):
        assert self.free.wait(10)
        if self.fail:
            raise RuntimeError("broken")
        self.ran.append(len(canvases))
        return list(canvases)

    def submit(self, seed: int = 0, deadline_s: float = 1e9, shape: tuple[int, int] = (32, 32)):
        pixels = picture(*shape, seed=seed)
        return self.batcher.submit(Canvas(pixels, shape, shape), Wants(), deadline_s)

    async def close(self):
        self.free.set()
        await self.batcher.drain(5)
        self.device.close()


def bench(scenario):
    async def run() -> None:
        made = Bench()
        try:
            await asyncio.wait_for(scenario(made), 10)
        finally:
            await made.close()

    asyncio.run(run())


async def occupy(made: Bench):
    """The device is busy with one request when this returns."""
    made.free.clear()
    first = made.submit()
    while not made.observed.batches:
        await asyncio.sleep(0)
    return first


def test_a_lone_request_does_not_wait():
    async def scenario(made: Bench):
        started = time.perf_counter()
        answer = await made.submit()
        assert time.perf_counter() - started < 1
        assert answer.raw.shape == (32, 32)
        assert made.observed.batches == [(1, "drained")]

    bench(scenario)


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
