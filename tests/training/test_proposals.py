"""Proposals on their way to a training step: they go wherever their picture goes."""

import dataclasses

import numpy as np
import pytest

from training.augment import Jitter
from training.batches import Batches
from training.compose import Augmentation, Composer
from training.data import read_picture, read_source

PLAIN = Augmentation(flip=0.5, colour=Jitter())


def composer(make_data, tiny, augmentation: Augmentation) -> Composer:
    """Of pictures whose proposals are the boxes of their objects."""
    items = read_source(make_data(masks=False, keypoints=False), ("person",), None)
    boxes = {read_picture(item).tobytes(): item.boxes for item in items}
    return Composer(items, {"toy": 1}, tiny.canvas, (), augmentation, lambda picture: boxes[picture.tobytes()])


@pytest.mark.parametrize(
    "augmentation",
    [
        PLAIN,
        dataclasses.replace(PLAIN, jitter=1.0, scales=(0.5, 0.9)),
        dataclasses.replace(PLAIN, jitter=1.0, scales=(1.2, 1.5), canvases=((64, 96),)),
        dataclasses.replace(PLAIN, mosaic=1.0, canvases=((64, 96),)),
    ],
    ids=["flip", "shrunk", "cut", "mosaic"],
)
def test_they_stay_on_their_objects(make_data, tiny, augmentation):
    made = composer(make_data, tiny, augmentation)
    canvas = (64, 96) if augmentation.canvases else None
    compared = 0
    for seed in range(12):
        objects = made.sample(seed % 4, np.random.default_rng(seed), canvas).objects
        assert (objects.proposals[:, 2:] > objects.proposals[:, :2]).all()
        for box in objects.boxes:
            assert np.abs(objects.proposals - box).max(1).min() < 1e-3
            compared += 1
    assert compared > 12


def test_each_target_has_its_own(make_data, tiny):
    made = composer(make_data, tiny, PLAIN)
    batch = Batches(made, {"toy": 1.0}, 2, seed=0)[0]
    targets = batch.targets(batch.counts.tolist(), batch.ignore_counts.tolist(), batch.proposal_counts.tolist())
    assert [len(each.proposals) for each in targets] == batch.proposal_counts.tolist() == [2, 2]
    for each in targets:
        np.testing.assert_allclose(each.proposals, each.boxes, atol=1e-3)


def test_without_a_rule_there_are_none(make_data, tiny):
    items = read_source(make_data(masks=False, keypoints=False), ("person",), None)
    batch = Batches(Composer(items, {"toy": 1}, tiny.canvas, (), PLAIN), {"toy": 1.0}, 2, seed=0)[0]
    targets = batch.targets(batch.counts.tolist(), batch.ignore_counts.tolist(), batch.proposal_counts.tolist())
    assert [tuple(each.proposals.shape) for each in targets] == [(0, 4), (0, 4)]
