"""OverFeat's merge, by hand."""

import numpy as np
import pytest

from service.engines import Detected
from service.merging import distances, merge, merged

A, NEAR_A, FAR = [0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_the_distance_of_a_box_to_itself_is_zero_and_grows() -> None:
    apart = distances(boxes(A, NEAR_A, FAR).astype(float))
    np.testing.assert_allclose(np.diag(apart), 0)
    assert apart[0, 1] == pytest.approx(2 / 10 + 1 - 80 / 120)
    assert apart[0, 2] == pytest.approx(np.hypot(50, 50) / 10 + 1)
    np.testing.assert_allclose(apart, apart.T)


def test_near_boxes_become_their_mean_and_scores_add() -> None:
    rows, sums = merge(boxes(A, FAR, NEAR_A), np.array([0.5, 0.3, 0.4], np.float32), 0.8)
    np.testing.assert_allclose(rows, [[1, 0, 11, 10], FAR])
    np.testing.assert_allclose(sums, [0.9, 0.3], rtol=1e-6)


def test_the_nearest_two_go_first() -> None:
    """Of three in a row, the two on the right; their mean is then too far from the first."""
    left, middle, right = [0, 0, 10, 10], [4, 0, 14, 10], [5, 0, 15, 10]
    rows, sums = merge(boxes(left, middle, right), np.ones(3, np.float32), 0.9)
    np.testing.assert_allclose(rows, [left, [4.5, 0, 14.5, 10]])
    np.testing.assert_allclose(sums, [1, 2])


def test_batches_classes_and_order() -> None:
    rows = np.zeros((2, 4, 4), np.float32)
    rows[0] = boxes(FAR, A, NEAR_A, A)
    scores = np.array([[0.7, 0.6, 0.5, 0.4], [0, 0, 0, 0]], np.float32)
    labels = np.array([[0, 0, 0, 1], [-1, -1, -1, -1]])
    found = merged(Detected(np.array([4, 0]), rows, scores, labels, "features"), 0.8)
    assert found.count.tolist() == [3, 0]
    np.testing.assert_allclose(found.boxes[0], boxes([1, 0, 11, 10], FAR, A, [0, 0, 0, 0]))
    np.testing.assert_allclose(found.scores[0], [1 - np.exp(-1.1), 1 - np.exp(-0.7), 1 - np.exp(-0.4), 0], rtol=1e-6)
    assert found.labels.tolist() == [[0, 0, 1, -1], [-1] * 4]
    assert found.features == "features"
    assert not found.scores[1].any()
