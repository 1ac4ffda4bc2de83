"""A batch is a function of seed and step, however it is made."""

import dataclasses

import numpy as np
import torch

from models.checkpoint import COCO_PERSON
from training.batches import Batch, batches_from
from training.data import read_source
from training.train import make_batches


def dataset(make_data, recipe, count=6, **more):
    sources = [make_data("toy", count=count, **more), make_data("other", count=2, masks=False, weight=1.5)]
    items = [item for source in sources for item in read_source(source, ("person",), COCO_PERSON)]
    return make_batches(recipe, items, sources, seed=3)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_workers_change_nothing(make_data, tiny):
    data = dataset(make_data, tiny)
    alone = list(batches_from(data, 0, 8, workers=0, pin=False))
    assert all(same(a, b) for a, b in zip(alone, batches_from(data, 0, 8, workers=2, pin=False), strict=True))
    assert all(same(a, b) for a, b in zip(alone[5:], batches_from(data, 5, 8, workers=1, pin=False), strict=True))
    assert not same(alone[0], alone[1])


def test_an_epoch_sees_each_picture_as_often_as_its_weight(make_data, tiny):
    data = dataset(make_data, dataclasses.replace(tiny, batch_size=1))
    assert data.steps_per_epoch == 6 + 3
    seen = np.concatenate([data._indices(step) for step in range(data.steps_per_epoch)])
    assert (np.bincount(seen, minlength=8)[:6] == 1).all()
    assert np.bincount(seen, minlength=8)[6:].sum() == 3


def test_portraits_go_with_portraits(make_data, tiny):
    data = dataset(make_data, tiny, count=16)
    mixed = sum(len(set(data.portrait[data._indices(step)])) > 1 for step in range(data.steps_per_epoch))
    assert mixed <= 1


def test_targets_belong_to_their_pictures(make_data, tiny):
    data = dataset(make_data, tiny)
    for step in range(4):
        batch = data[step]
        targets = batch.targets(batch.counts.tolist(), batch.ignore_counts.tolist(), batch.proposal_counts.tolist())
        assert [len(t.boxes) for t in targets] == batch.counts.tolist()
        for target in targets:
            assert target.masks.shape == (len(target.boxes), *batch.images.shape[1:3])
            np.testing.assert_array_equal(target.masks.flatten(1).any(dim=1), target.has_mask)
    assert sum(map(len, (data[step].masks for step in range(8)))) > 0


def test_fewer_pictures_than_a_batch(make_data, tiny):
    data = dataset(make_data, dataclasses.replace(tiny, batch_size=16))
    assert data[0].images.shape[0] == 16
