"""Shares of the device, batches that run at once, and the measurement that decides how many."""

import asyncio
import threading
import time

import pytest

from service import lanes
from service.batching import Batcher
from service.bundle import Bundle
from service.detector import Detector, Lanes, Wants
from service.device import WHOLE, Device
from service.engines import EngineUnavailable, Opened, open_engine
from service.errors import EngineMismatch
from service.images import Canvas
from service.lanes import Plan, again, planned
from service.policy import BatchLimits
from tests.service.toy import ToyEngine, picture, write_bundle

HALF = WHOLE // 2


def run(scenario, seconds: float = 20):
    return asyncio.run(asyncio.wait_for(scenario, seconds))


def test_shares_are_given_in_order_and_never_beyond_the_whole():
    async def scenario():
        device = Device()
        first, second = await device.claim(HALF), await device.claim(HALF)
        large = asyncio.create_task(device.claim(WHOLE))
        small = asyncio.create_task(device.claim(HALF))
        await asyncio.sleep(0)
        first.release()
        await asyncio.sleep(0)
        assert not large.done()
        assert not small.done()  # there is room for it, but the large one came first
        second.release()
        held = await large
        assert not small.done()
        held.release()
        (await small).release()
        assert device.taken == 0

    run(scenario())


def test_who_gives_up_waiting_for_a_share_leaves_it_to_the_next():
    async def scenario():
        device = Device()
        held = await device.claim(WHOLE)
        gone = asyncio.create_task(device.claim(WHOLE))
        waits = asyncio.create_task(device.claim(HALF))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        held.release()
        (await waits).release()
        granted = asyncio.create_task(device.claim(WHOLE))
        await asyncio.sleep(0)
        granted.cancel()  # just after it was granted, before it could go on
        await asyncio.gather(granted, return_exceptions=True)
        if not granted.cancelled():
            granted.result().release()
        assert device.taken == 0

    run(scenario())


def test_widening_takes_only_what_nobody_has_or_wants():
    async def scenario():
        device = Device()
        first, second = await device.claim(HALF), await device.claim(HALF)
        assert not first.widen()
        second.release()
        waits = asyncio.create_task(device.claim(WHOLE))
        await asyncio.sleep(0)
        assert not first.widen()
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        assert first.widen()
        assert device.taken == WHOLE
        first.release()
        assert device.taken == 0

    run(scenario())


class Observed:
    def batch(self, size, closed_by): ...
    def queue_depth(self, model, depth): ...


class Runs:
    """Records each batch as it starts, and holds it until it is let go."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.wide: list[bool] = []
        self.free = threading.Event()

    def __call__(self, canvases, wants, is_wide):
        with self.lock:
            self.wide.append(is_wide)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.free.wait(10)
        with self.lock:
            self.at_once -= 1
        return list(canvases)


def canvas(seed: int = 0) -> Canvas:
    return Canvas(picture(32, 32, seed=seed), (32, 32), (32, 32))


def batcher(runs, device, **options) -> Batcher:
    return Batcher("m", runs, device, BatchLimits(1, 10**9, num_lanes=2), Observed(), **options)


async def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.001)


def test_a_lone_request_has_the_whole_device_and_a_crowd_shares_it():
    async def scenario():
        runs, device = Runs(), Device()
        made = batcher(runs, device)
        alone = made.submit(canvas(), Wants(), 1e9)
        await until(lambda: runs.wide == [True])
        crowd = [made.submit(canvas(seed), Wants(), 1e9) for seed in range(4)]
        await asyncio.sleep(0.01)
        assert runs.wide == [True]  # they wait for the wide one: it is the quickest way to be done with it
        runs.free.set()
        await asyncio.gather(alone, *crowd)
        assert runs.most_at_once <= 2
        assert runs.wide[1] is False
        await made.drain(5)
        assert device.taken == 0
        device.close()

    run(scenario())


def test_two_run_at_once_and_a_third_waits():
    async def scenario():
        runs, device = Runs(), Device()
        made = batcher(runs, device)
        answers = [made.submit(canvas(seed), Wants(), 1e9) for seed in range(3)]
        await until(lambda: runs.at_once == 2)
        await asyncio.sleep(0.01)
        assert runs.wide == [False, False]
        runs.free.set()
        await asyncio.gather(*answers)
        assert runs.most_at_once == 2
        await made.drain(5)
        device.close()

    run(scenario())


def test_one_rebuild_is_enough_for_two_lanes_that_break_at_once():
    async def scenario():
        together, rebuilt = threading.Barrier(2), []

        def breaks(canvases, wants, is_wide):
            together.wait(10)
            raise RuntimeError("broken")

        def works(canvases, wants, is_wide):
            return list(canvases)

        def rebuild(may_keep):
            rebuilt.append(may_keep)
            return works

        device = Device()
        made = batcher(breaks, device, rebuild=rebuild)
        lost = await asyncio.gather(
            *(made.submit(canvas(seed), Wants(), 1e9) for seed in range(2)), return_exceptions=True
        )
        assert [type(error).__name__ for error in lost] == ["EngineFailed"] * 2
        assert await made.submit(canvas(), Wants(), 1e9)
        assert rebuilt == [True]
        await made.drain(5)
        device.close()

    run(scenario())


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return Bundle.read(write_bundle(tmp_path))


class Held:
    """A lane that is at its batches until it is let go."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.go = threading.Semaphore(0)

    def answer(self, given, wants):
        self.num_asked += 1
        assert self.go.acquire(timeout=10)
        return given

    def close(self) -> None: ...


def test_a_batch_goes_to_the_lane_with_the_fewest(bundle):
    async def scenario():
        first, second = Held(), Held()
        detector = Detector(bundle, ToyEngine(), Lanes(Plan(2, 1, {}, processes=True), [first, second]))
        running = []

        async def ask(expected: tuple[int, int]) -> None:
            running.append(asyncio.create_task(asyncio.to_thread(detector.answer_beside, [], [])))
            await until(lambda: (first.num_asked, second.num_asked) == expected)

        for expected in ((1, 0), (1, 1), (2, 1), (2, 2)):
            await ask(expected)
        second.go.release(2)
        await until(lambda: sum(each.done() for each in running) == 2)
        for expected in ((2, 3), (2, 4)):  # the first still has two, whoever's turn it is
            await ask(expected)
        first.go.release(2)
        second.go.release(2)
        await asyncio.gather(*running)

    run(scenario())


@pytest.fixture
def measured(monkeypatch):
    """Replaces the clock: pictures/s by number of engines and batch size."""

    def put(rates: dict[tuple[int, int], float]) -> None:
        monkeypatch.setattr(lanes._Trial, "rate", lambda trial, each, size: rates[len(each), size])

    return put


def test_a_moment_in_which_the_machine_was_busy_hides_no_gain(bundle, monkeypatch):
    # The whole; two lanes, twice; batches of 2, twice; of 4; of 8, twice.
    rates = iter([10, 4, 14, 6, 20, 25, 25.5, 25.6])
    monkeypatch.setattr(lanes._Trial, "rate", lambda trial, each, size: next(rates))
    chosen = planned(Opened(ToyEngine(), "a test", 2, Splits()), bundle, canvas(), None, 8, 1000)
    assert (chosen.plan.num_lanes, chosen.plan.max_batch) == (2, 4)
    tried = {"2 lanes": 14, "batches of 2": 20, "batches of 4": 25, "batches of 8": 25.6}
    assert chosen.plan.rates == {"1 lane": 10, **tried}


class Splits:
    def __init__(self) -> None:
        self.made: list[ToyEngine] = []

    def __call__(self, num: int) -> list[ToyEngine]:
        self.made.extend(ToyEngine() for _ in range(num))
        return self.made[-num:]


def test_as_many_lanes_as_are_faster_and_no_batches_that_gain_nothing(bundle, measured):
    measured({(1, 1): 10, (2, 1): 14, (4, 1): 18, (8, 1): 18.5, (4, 2): 18.6})
    split = Splits()
    chosen = planned(Opened(ToyEngine(), "a test", 8, split), bundle, canvas(), None, 8, 1000)
    assert (chosen.plan.num_lanes, chosen.plan.max_batch) == (4, 1)
    assert chosen.plan.rates["2 lanes"] == 14
    assert [engine.closed for engine in split.made] == [True] * 2 + [False] * 4 + [True] * 8
    chosen.close()
    assert all(engine.closed for engine in split.made)


def test_a_whole_engine_stays_whole_where_splitting_gains_nothing_and_batches_may(bundle, measured):
    measured({(1, 1): 10, (2, 1): 10.2, (1, 2): 15, (1, 4): 20, (1, 8): 20.5})
    split = Splits()
    chosen = planned(Opened(ToyEngine(), "a test", 2, split), bundle, canvas(), None, 8, 1000)
    assert (chosen.plan.num_lanes, chosen.plan.max_batch) == (1, 4)
    assert chosen.each == ()
    assert [engine.closed for engine in split.made] == [True, True]


@pytest.mark.parametrize(("rate", "processes"), [(14.6, True), (14.8, False)])
def test_processes_unless_threads_are_faster_by_enough(bundle, monkeypatch, rate, processes):
    made: list[Splits] = [Splits(), Splits()]
    monkeypatch.setattr(lanes, "_workers", lambda opened, bundle, plan: made[1](plan.num_lanes))
    again = [rate] if processes else []  # threads that lose are looked at twice, and so are batches of 2
    rates = iter([10, 14, rate, *again, 14, 14])  # the whole, two processes, two threads, batches
    monkeypatch.setattr(lanes._Trial, "rate", lambda trial, each, size: next(rates))
    opened = Opened(ToyEngine(), "a test", 2, made[0], is_portable=True)
    chosen = planned(opened, bundle, canvas(), None, 8, 1000)
    assert chosen.plan == Plan(2, 1, {"1 lane": 10, "2 processes": 14, "2 lanes": rate, "batches of 2": 14}, processes)
    assert [engine.closed for engine in made[processes].made] == [False] * 2
    assert [engine.closed for engine in made[not processes].made] == [True] * 2


def test_where_no_process_can_be_started_threads_do(bundle, monkeypatch):
    def refused(opened, bundle, plan):
        raise OSError("no more processes")

    monkeypatch.setattr(lanes, "_workers", refused)
    monkeypatch.setattr(lanes._Trial, "rate", lambda trial, each, size: len(each))
    chosen = planned(Opened(ToyEngine(), "a test", 2, Splits(), is_portable=True), bundle, canvas(), None, 8, 1000)
    assert (chosen.plan.num_lanes, chosen.plan.processes) == (2, False)


def test_what_is_measured_is_what_runs(bundle):
    """Not how fast, which no test can know: every engine runs, and the rates are counts over time."""
    engines = [ToyEngine(), ToyEngine()]
    split = [Detector(bundle, engine) for engine in engines]
    rate = lanes._Trial(split[0], canvas(), 0).rate(split, 2)
    assert all(set(engine.batches) == {2} and len(engine.batches) >= 5 for engine in engines)
    assert 0 < rate <= sum(sum(engine.batches) for engine in engines) / lanes.SPELL_SECONDS


def test_no_time_to_try_or_nothing_to_split_means_one_lane_and_full_batches(bundle):
    def split(num):
        raise AssertionError("not asked for")

    assert planned(Opened(ToyEngine(), "a test", 2, split), bundle, canvas(), 1, 8, 30).plan == Plan(1, 8, {})
    assert planned(Opened(ToyEngine(), "a test"), bundle, canvas(), None, 8, 30).plan == Plan(1, 8, {})
    assert planned(Opened(ToyEngine(), "a test"), bundle, canvas(), 4, 8, 30).plan == Plan(1, 8, {})
    assert planned(Opened(ToyEngine(), "a test", 2, split), bundle, canvas(), None, 8, 0).plan.num_lanes == 1


def test_a_lane_that_disagrees_with_the_golden_outputs_is_refused(bundle):
    wrong = ToyEngine()
    wrong.masks = lambda features, rois, labels: ToyEngine.masks(wrong, features, rois, labels) + 0.5
    split = [ToyEngine(), wrong]
    with pytest.raises(EngineMismatch, match="mask differs"):
        planned(Opened(ToyEngine(), "a test", 2, lambda num: split), bundle, canvas(), 2, 8, 30)
    assert all(lane.closed for lane in split)


@pytest.mark.parametrize("choice", ["onnx", "openvino"])
@pytest.mark.parametrize(("threads", "processes"), [(2, False), (4, False), (2, True)])
def test_lanes_of_a_real_engine_answer_as_the_whole_one_does(bundle, choice, threads, processes):
    try:
        opened = open_engine(bundle, choice, threads)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    chosen = again(opened, bundle, Plan(2, 8, {}, processes))
    assert len(chosen.each) == 2
    detector = Detector(bundle, opened.engine, chosen)
    canvases = [Canvas(picture(64, 96, seed=seed), (64, 96), (64, 96)) for seed in range(24)]
    alone = [detector.finish(detector.run([each], [Wants()])[0]) for each in canvases]
    shared: list = [None] * len(canvases)

    def work(start):
        for index in range(start, len(canvases), 2):
            shared[index] = detector.finish(detector.answer_beside([canvases[index]], [Wants()])[0])

    threads_ = [threading.Thread(target=work, args=(start,)) for start in range(2)]
    for thread in threads_:
        thread.start()
    for thread in threads_:
        thread.join()
    for one, two in zip(alone, shared, strict=True):
        assert (one.labels == two.labels).all()
        assert one.boxes == pytest.approx(two.boxes, abs=1e-4)
        assert one.masks == two.masks
        assert one.keypoints == pytest.approx(two.keypoints, abs=1e-2)
    detector.close()
