"""Any optimiser of timm, as the recipe says, whose whole state comes back, or an error."""

import json
import math

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from gld_zoo.training.common.errors import ModelError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine import optimizers
from gld_zoo.training.engine.optimizers import (
    build_optimizer,
    clip_gradients,
    load_optimizer_state,
    optimizer_state,
)

# timm's that need a GPU and packages of their own, or more than gradients
ELSEWHERE = ("bnb", "fused", "adahessian")


def recipe(**options):
    return Recipe(student="gld_wrn16_1", **options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))


def steps(model, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()


def weights(model):
    return torch.cat([weight.flatten() for weight in model.parameters()])


def test_the_default_is_plain_sgd_in_one_group_in_the_parameters_order():
    model, other = network(), network()
    options = recipe(lr=0.05)
    ours = build_optimizer(options, model, fused=True)
    plain = torch.optim.SGD(
        other.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )
    assert type(ours) is torch.optim.SGD
    (group,) = ours.param_groups
    assert [id(weight) for weight in group["params"]] == list(map(id, model.parameters()))
    for trained, optimizer in ((model, ours), (other, plain)):
        steps(trained, optimizer, range(5))
    assert torch.equal(weights(model), weights(other))


def test_nesterov_is_timms_sgd():
    model, other = network(), network()
    ours = build_optimizer(recipe(nesterov=True), model, fused=False)
    theirs = create_optimizer_v2(
        list(other.parameters()), "sgd", lr=0.1, momentum=0.9, weight_decay=5e-4
    )
    for trained, optimizer in ((model, ours), (other, theirs)):
        steps(trained, optimizer, range(5))
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("name", ["sgdw", "adamp", "lars", "muon"])
def test_nesterovs_momentum_is_what_the_recipe_says_whatever_timms_default(name):
    for nesterov in (False, True):
        optimizer = build_optimizer(recipe(opt=name, nesterov=nesterov), network(), fused=False)
        assert optimizer.param_groups[0]["nesterov"] == nesterov


def test_frozen_weights_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    for options in (recipe(), recipe(decay_norm=False)):
        optimizer = build_optimizer(options, model, fused=False)
        trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        assert len(trained) == 4


def test_norms_and_biases_are_decayed_or_left_out():
    model = network()
    optimizer = build_optimizer(recipe(decay_norm=False), model, fused=False)
    decay = {
        id(w): group["weight_decay"] for group in optimizer.param_groups for w in group["params"]
    }
    for name, weight in model.named_parameters():
        assert decay[id(weight)] == (5e-4 if weight.ndim > 1 else 0.0), name


def test_layers_further_from_the_classifier_learn_more_slowly():
    import timm

    model = timm.create_model("gld_wrn16_1", num_classes=4)
    optimizer = build_optimizer(recipe(layer_decay=0.5), model, fused=False)
    scale = {id(w): group["lr_scale"] for group in optimizer.param_groups for w in group["params"]}
    stem, head = scale[id(model.stem.conv.weight)], scale[id(model.fc.weight)]
    assert head == 1.0
    assert stem < scale[id(model.layer2[0].conv1.weight)] < head


@pytest.mark.parametrize(
    "name",
    [
        # the first of this kind has torch compile parts of it
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith("kron") else [])
        for name in list_optimizers()
        if not name.startswith(ELSEWHERE)
    ],
)
def test_every_optimiser_comes_back_to_the_same_bits_or_is_refused(name):
    options = recipe(opt=name, lr=0.01, decay_norm=False)
    model, other = network(), network()
    if name.startswith("kron"):  # which keeps lists of tensors
        with pytest.raises(ModelError, match=f"opt='{name}' does not come back from a checkpoint"):
            build_optimizer(options, model, fused=True)
        return
    optimizer = build_optimizer(options, model, fused=True)
    steps(model, optimizer, range(4))
    tensors, plain = optimizer_state(optimizer, model)
    tensors = {key: value.clone() for key, value in tensors.items()}
    plain = json.loads(json.dumps(plain))
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(options, other, fused=True)
    load_optimizer_state(resumed, other, tensors, plain)
    for trained, each in ((model, optimizer), (other, resumed)):
        steps(trained, each, range(4, 9))
    assert torch.equal(weights(model), weights(other))


def test_an_optimiser_that_forgets_is_refused_by_name(monkeypatch):
    class Forgetful(torch.optim.SGD):
        """Keeps a number outside its state."""

        def step(self, closure=None):
            self.count = getattr(self, "count", 0) + 1
            for group in self.param_groups:
                group["lr"] = 0.01 * self.count
            return super().step(closure)

    create = optimizers.create_optimizer_v2
    monkeypatch.setattr(
        optimizers,
        "create_optimizer_v2",
        lambda weights, name, **options: (
            Forgetful(weights, lr=0.1) if name == "adamw" else create(weights, name, **options)
        ),
    )
    with pytest.raises(ModelError, match="opt='adamw' does not come back from a checkpoint"):
        build_optimizer(recipe(opt="adamw"), network(), fused=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(opt="sdg"), "opt='sdg' is not an optimiser of timm; it has .*adamw"),
        (dict(opt="adahessian"), "opt='adahessian' needs second derivatives"),
        (dict(opt="fusedadam"), "opt='fusedadam' cannot be used here"),
        (dict(opt="adamw", momentum=0.8), "momentum=0.8 is not for opt='adamw'"),
        (dict(opt="adamw", nesterov=True), "nesterov=True is not for opt='adamw'"),
        (dict(nesterov=True, momentum=0.0), "opt='sgd' refuses what it is given: Nesterov"),
        (dict(layer_decay=0.5), "layer_decay=0.5 finds no layers in this model"),
        (dict(betas=[0.9, 0.99]), r"betas=\[0.9, 0.99\]: opt='sgd' has none"),
        (dict(opt="adan", betas=[0.9, 0.99]), r"betas=\[0.9, 0.99\]: opt='adan' has 3"),
    ],
)
def test_what_an_optimiser_has_not_is_named(options, message):
    with pytest.raises(ModelError, match=message):
        build_optimizer(recipe(**options), network(), fused=False)


def test_betas_and_momentum_reach_the_optimiser():
    adamw = build_optimizer(recipe(opt="adamw", betas=[0.8, 0.95]), network(), fused=False)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.95)
    muon = build_optimizer(recipe(opt="muon", momentum=0.8), network(), fused=False)
    assert muon.param_groups[0]["momentum"] == 0.8


def test_gradients_are_clipped_by_their_norm_or_unit_by_unit():
    model = network()
    before = {}
    for name, weight in model.named_parameters():
        weight.grad = torch.randn_like(weight)
        before[name] = weight.grad.clone()
    norm = math.sqrt(sum(grad.square().sum().item() for grad in before.values()))
    clip_gradients(recipe(clip_grad=0.5), model)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, before[name] * 0.5 / norm, rtol=1e-4, atol=1e-7)
        weight.grad = before[name].clone()
    model.get_classifier = lambda: model[3]
    clip_gradients(recipe(clip_grad=0.01, clip_mode="agc"), model)
    filters, head = model[0].weight, model[3].weight
    limit = 0.01 * filters.flatten(1).norm(dim=1).clamp_min(1e-3)
    torch.testing.assert_close(filters.grad.flatten(1).norm(dim=1), limit, rtol=1e-3, atol=0)
    assert torch.equal(head.grad, before["3.weight"])  # agc leaves the classifier alone


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("linear", lambda z: 1 - z),
        ("rex", lambda z: (1 - z) / (1 / 2 + (1 - z) / 2)),
        ("cosine", lambda z: (1 + math.cos(math.pi * z)) / 2),
        ("poly", lambda z: (1 - z) ** 0.9),
    ],
)
def test_schedules_fall_to_nothing_by_their_formula_after_a_warm_up(schedule, factor):
    options = recipe(epochs=8, lr=0.4, schedule=schedule, warmup_epochs=2)
    for epoch in (0.0, 0.5, 1.0, 2.0, 3.25, 7.9):
        warm = min(1.0, epoch / 2)
        assert options.lr_at(epoch) == pytest.approx(0.4 * warm * factor(epoch / 8), rel=1e-12)
    assert options.lr_at(8.0) == pytest.approx(0.0, abs=1e-12)
