import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.policy import BatchLimits, next_batch


@dataclass(frozen=True)
class Waiting:
    age: int
    shape: tuple[int, int]
    deadline_s: float = 100.0
    is_abandoned: bool = False
    head_start: int = 0

    @property
    def rank_s(self) -> float:
        return self.age - self.head_start


SHAPES = [(32, 32), (32, 64), (64, 32), (64, 64)]
queues = st.lists(
    st.builds(
        Waiting,
        age=st.just(0),
        shape=st.sampled_from(SHAPES),
        deadline_s=st.sampled_from([5.0, 100.0]),
        is_abandoned=st.booleans(),
        head_start=st.sampled_from([0, 5]),
    ),
    max_size=20,
).map(lambda rows: [replace(row, age=age) for age, row in enumerate(rows)])
bounds = st.builds(
    BatchLimits,
    max_batch=st.integers(1, 8),
    max_pixels=st.integers(1, 64 * 64 * 6),
    max_padding=st.sampled_from([0.0, 0.3, 0.6]),
    num_lanes=st.integers(1, 3),
)


def rank(entry: Waiting) -> tuple[float, int]:
    return entry.rank_s, entry.age


def cost(entries: list[Waiting]) -> tuple[int, float]:
    """Pixels of a batch, and the fraction of them that is there only for its company."""
    height, width = max(e.shape[0] for e in entries), max(e.shape[1] for e in entries)
    pixels = len(entries) * height * width
    return pixels, 1 - sum(e.shape[0] * e.shape[1] for e in entries) / pixels


@given(queues, bounds, st.integers(0, 20), st.booleans())
def test_everybody_is_somewhere_in_order_and_within_the_limits(waiting, limits, num_beside, is_early):
    batch = next_batch(waiting, 10.0, limits, num_beside, is_early)
    alive = [entry for entry in waiting if not entry.is_abandoned and entry.deadline_s > 10]
    # Everybody alive is in exactly one place, in order of rank; abandoned ones are nowhere.
    assert sorted([*batch.taken, *batch.left], key=rank) == sorted(alive, key=rank)
    assert sorted(batch.expired, key=rank) == sorted(
        [entry for entry in waiting if not entry.is_abandoned and entry.deadline_s <= 10], key=rank
    )
    assert batch.taken == sorted(batch.taken, key=rank)
    assert batch.left == sorted(batch.left, key=rank)
    if not alive:
        assert batch.taken == []
        return
    part = len(alive) if limits.num_lanes == 1 else math.ceil((len(alive) + num_beside) / limits.num_lanes / 2)
    if not batch.taken:  # too few, and every lane is busy
        assert is_early
        assert len(alive) < min(limits.max_batch, part)
        return
    assert batch.taken[0] is min(alive, key=rank)
    pixels, padding = cost(batch.taken)
    assert len(batch.taken) <= min(limits.max_batch, part)
    assert len(batch.taken) == 1 or pixels <= limits.max_pixels
    assert padding <= limits.max_padding
    # Nobody is passed over without need: whoever is left did not fit beside those of the batch that go before.
    for entry in batch.left:
        before = [other for other in batch.taken if (other.rank_s, other.age) < (entry.rank_s, entry.age)]
        pixels, padding = cost([*before, entry])
        assert len(before) == min(limits.max_batch, part) or pixels > limits.max_pixels or padding > limits.max_padding
    assert (batch.closed_by == "drained") == (not batch.left)
    if limits.max_padding == 0 and batch.closed_by == "shape":
        assert all(entry.shape != batch.taken[0].shape for entry in batch.left)


@given(queues, bounds)
def test_nobody_starves(waiting, limits):
    """Whoever comes later, also with priority, overtakes by its head start at most: the first by rank always goes."""
    newcomers = 0
    alive = [entry for entry in waiting if not entry.is_abandoned and entry.deadline_s > 10]
    for _ in range(len(alive)):
        batch = next_batch(waiting, 10.0, limits)
        newcomers += 1
        waiting = [*batch.left, Waiting(1000 + newcomers, SHAPES[newcomers % 4], head_start=5 * (newcomers % 2))]
    assert not set(alive) & set(waiting)


def test_padding_is_shared_within_its_budget():
    waiting = [Waiting(0, (64, 96)), Waiting(1, (96, 64)), Waiting(2, (64, 64)), Waiting(3, (64, 96))]
    apart = next_batch(waiting, 0.0, BatchLimits(8, 10**9))
    assert [entry.age for entry in apart.taken] == [0, 3]
    assert apart.closed_by == "shape"
    some = next_batch(waiting, 0.0, BatchLimits(8, 10**9, max_padding=0.2))
    assert [entry.age for entry in some.taken] == [0, 2, 3]
    all_of_them = next_batch(waiting, 0.0, BatchLimits(8, 10**9, max_padding=0.45))
    assert [entry.age for entry in all_of_them.taken] == [0, 1, 2, 3]


@pytest.mark.parametrize(("num_waiting", "num_taken", "reason"), [
    (1, 1, "drained"), (2, 1, "shared"), (5, 2, "shared"), (8, 2, "shared"), (9, 3, "shared"), (40, 4, "full"),
])  # fmt: skip
def test_a_lane_leaves_the_other_its_part_and_so_much_waiting(num_waiting, num_taken, reason):
    waiting = [Waiting(age, SHAPES[0]) for age in range(num_waiting)]
    batch = next_batch(waiting, 0.0, BatchLimits(4, 10**9, num_lanes=2))
    assert [entry.age for entry in batch.taken] == list(range(num_taken))
    assert batch.closed_by == reason
    assert len(batch.left) == num_waiting - num_taken
