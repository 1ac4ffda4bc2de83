"""Rates, groups and the moving average."""

import dataclasses

import pytest
import torch
from torch import nn

from models import checkpoint
from training.optimise import MovingAverage, learning_rate, make_optimizer, set_learning_rate
from training.recipes import mask_rcnn_r50_fpn


def test_the_standard_schedule():
    recipe = mask_rcnn_r50_fpn()
    assert learning_rate(recipe, 0) == pytest.approx(0.02 / 1000)
    assert learning_rate(recipe, 1000) == pytest.approx(0.02)
    assert learning_rate(recipe, 59_999) == pytest.approx(0.02)
    assert learning_rate(recipe, 60_000) == pytest.approx(0.002)
    assert learning_rate(recipe, 80_000) == pytest.approx(0.0002)


def test_the_cosine_ends_near_zero():
    recipe = dataclasses.replace(mask_rcnn_r50_fpn(), schedule="cosine", steps=2000)
    rates = [learning_rate(recipe, step) for step in range(1000, 2000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.011 * recipe.base_lr


def test_biases_do_not_decay_and_the_trunk_has_its_rate(tiny):
    model = checkpoint.build(tiny.spec())
    optimizer = make_optimizer(model, tiny)
    set_learning_rate(optimizer, 1.0)
    trunk = {id(p) for p in model.backbone.trunk.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1)
            assert group["lr"] == (tiny.trunk_lr_multiplier if id(parameter) in trunk else 1.0)


def test_relative_steps_follow_the_size_of_a_weight_and_leave_its_decay(tiny):
    recipe = dataclasses.replace(tiny, trunk_relative_steps=True, weight_decay=0.05)
    model = checkpoint.build(recipe.spec())
    trunk = [p for p in model.backbone.trunk.parameters() if p.dim() > 1 and p.requires_grad]
    with torch.no_grad():
        for index, parameter in enumerate(trunk):
            parameter.normal_(std=0.01 * 2**index)
    optimizer = make_optimizer(model, recipe)
    set_learning_rate(optimizer, 1.0)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter in trunk:
        size = parameter.square().mean().sqrt().item()
        group = group_of[id(parameter)]
        assert group["lr"] == pytest.approx(recipe.trunk_lr_multiplier * size / 0.05)
        assert group["lr"] * group["weight_decay"] == pytest.approx(recipe.trunk_lr_multiplier * 0.05)
    others = [p for p in model.parameters() if p.requires_grad and all(p is not each for each in trunk)]
    assert {group_of[id(p)]["lr"] for p in others} == {1.0, recipe.trunk_lr_multiplier}


def test_the_average_ramps_up_and_follows():
    model = nn.Linear(1, 1)
    average = MovingAverage(model, 0.99)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.state["weight"].zero_()
    average.update(model, 0)
    torch.testing.assert_close(average.state["weight"], torch.full((1, 1), 0.9))
    for step in range(1, 1000):
        average.update(model, step)
    torch.testing.assert_close(average.state["weight"], torch.ones(1, 1))
