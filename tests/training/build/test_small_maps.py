"""Convolutions of small maps as matrix products: the same function, under the same names."""

import copy

import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator

from gld_zoo.training.build import small_maps
from gld_zoo.training.build.run_models import build_models
from gld_zoo.training.build.small_maps import SmallMapConv2d, multiply_on_small_maps
from gld_zoo.training.config.recipe import Recipe


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2), (5, 1), (4, 5), (9, 9)])
def test_it_is_the_convolution(stride, size):
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 6, 3, stride, 1).double()
    ours = multiply_on_small_maps(copy.deepcopy(theirs))
    assert type(ours) is SmallMapConv2d
    results = []
    for layer in (theirs, ours):
        x = torch.linspace(-1, 1, 3 * 4 * size[0] * size[1], dtype=torch.float64)
        x = x.reshape(3, 4, *size).requires_grad_()
        y = layer(x)
        (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("training", "size", "multiplied"), [(True, 4, 1), (True, 5, 0), (False, 4, 0)]
)
def test_only_small_maps_in_training_are_multiplied(training, size, multiplied, monkeypatch):
    """What is measured is computed as by the model that a file is loaded into."""
    calls = []
    linear = small_maps.F.linear
    monkeypatch.setattr(small_maps.F, "linear", lambda *a: calls.append(1) or linear(*a))
    layer = multiply_on_small_maps(nn.Conv2d(2, 2, 3, padding=1)).train(training)
    layer(torch.zeros(1, 2, size, size))
    assert len(calls) == multiplied


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 2, 3, padding=1, groups=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=2, dilation=2),
        nn.Conv1d(2, 2, 3, padding=1),
    ],
)
def test_other_convolutions_stay(layer):
    kind = type(layer)
    model = nn.Sequential(layer)
    names = set(model.state_dict())
    assert type(multiply_on_small_maps(model)[0]) is kind
    assert set(model.state_dict()) == names


def test_the_trainers_student_has_them_on_a_cpu_and_its_teacher_stays():
    recipe = Recipe(student="gld_wrn16_1", teacher="gld_wrn16_2", seed=0)
    models = build_models(recipe, [str(i) for i in range(100)], Accelerator(cpu=True))
    kinds = [type(module) for module in models.student.modules()]
    assert kinds.count(SmallMapConv2d) == 13  # the stem, and two in each of six blocks
    assert SmallMapConv2d not in map(type, models.teacher.modules())
