import pytest

from service.buckets import bucket, canvas_for, chunks
from service.errors import EngineFailed


def test_a_batch_runs_in_the_next_size() -> None:
    assert [bucket(n, [8, 1, 4]) for n in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, 8]
    assert list(chunks(21, [4, 16])) == [(0, 16, 16), (16, 5, 16)]
    assert list(chunks(3, [4, 16])) == [(0, 3, 4)]


def test_a_picture_runs_on_the_smallest_canvas_that_holds_it() -> None:
    assert canvas_for((60, 60), [(96, 64), (64, 96), (64, 64)]) == (64, 64)
    with pytest.raises(EngineFailed, match="there are 64x96: make one"):
        canvas_for((96, 64), [(64, 96)])
