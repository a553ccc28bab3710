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
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2), (5, 1), (4, 4), (7, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution(stride, size, memory_format):
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 6, 3, stride, 1).double()
    ours = multiply_on_small_maps(copy.deepcopy(theirs))
    assert type(ours) is SmallMapConv2d
    results = []
    for layer in (theirs.to(memory_format=memory_format), ours.to(memory_format=memory_format)):
        x = torch.linspace(-1, 1, 3 * 4 * size[0] * size[1], dtype=torch.float64)
        x = x.reshape(3, 4, *size).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x)
        (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stride", "size"), [(1, 2), (1, 4), (2, 4)])
def test_in_bfloat16_it_is_as_exact_as_the_convolution(stride, size):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, 3, stride, 1)
    layers = [copy.deepcopy(layer).double(), layer, multiply_on_small_maps(copy.deepcopy(layer))]
    images = torch.randn(16, 64, size, size)
    results = []
    for each in layers:
        x = images.to(each.weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=each is not layers[0]):
            y = each(x)
        y.backward(torch.linspace(-1, 1, y.numel()).sin().to(y.dtype).view_as(y))
        results.append([y.detach(), x.grad, each.weight.grad, each.bias.grad])
    exact, theirs, ours = results
    for a, b, c in zip(exact, theirs, ours, strict=True):
        assert b.dtype == c.dtype
        assert 0 < (c - a).norm() <= 1.01 * (b - a).norm()


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_what_needs_no_gradient_has_none_and_the_others_theirs(frozen):
    layer = multiply_on_small_maps(nn.Conv2d(2, 3, 3, padding=1))
    inputs = dict(layer.named_parameters(), x=torch.ones(1, 2, 2, 2, requires_grad=True))
    layer(inputs["x"]).square().sum().backward()
    whole = {name: value.grad.clone() for name, value in inputs.items()}
    for name, value in inputs.items():
        value.grad = None
        value.requires_grad_(name != frozen)
    layer(inputs["x"]).square().sum().backward()
    assert inputs[frozen].grad is None
    for name in set(inputs) - {frozen}:
        torch.testing.assert_close(inputs[name].grad, whole[name])


def test_its_output_can_be_changed_in_place():
    """As a block adds its shortcut."""
    layer = multiply_on_small_maps(nn.Conv2d(2, 2, 3, padding=1))
    x = torch.linspace(-1, 1, 8).view(1, 2, 2, 2)
    gradients = []
    for each in (lambda: layer(x).add_(x).relu_(), lambda: (layer(x) + x).relu()):
        layer.zero_grad()
        each().square().sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(("stride", "size"), [(1, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_compiles_into_one_graph(stride, size, autocast):
    torch.manual_seed(0)
    layer = multiply_on_small_maps(nn.Conv2d(2, 3, 3, stride, padding=1))
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 2, size, size).contiguous(memory_format=torch.channels_last)
    gradients = []
    for each in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = each(x)
        y.float().square().sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients)


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


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 2, 2)])
def test_an_image_alone_and_float64_are_as_in_a_convolution(shape):
    layer, x = nn.Conv2d(2, 2, 3, padding=1).double(), torch.zeros(shape).double()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        found = multiply_on_small_maps(layer)(x)
    torch.testing.assert_close(found, expected)


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


def test_the_trainers_student_has_them_on_a_cpu_and_its_teacher_has_folded_norms():
    recipe = Recipe(student="gld_wrn16_1", teacher="gld_wrn16_2", seed=0)
    models = build_models(recipe, [str(i) for i in range(100)], Accelerator(cpu=True))
    kinds = [type(module) for module in models.student.modules()]
    assert kinds.count(SmallMapConv2d) == 13  # the stem, and two in each of six blocks
    kinds = [type(module) for module in models.teacher.modules()]
    assert SmallMapConv2d not in kinds
    assert kinds.count(nn.BatchNorm2d) == 7  # the first of each block, and the last, of 13
