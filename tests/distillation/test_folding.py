"""Folded batch norm: the same logits, only where a convolution comes right before."""

import pytest
import timm
import torch
from torch import nn

from gld_zoo.distillation.folding import fold_batch_norm


def with_statistics(name, **options):
    """A model in eval mode whose batch norms change what they are given."""
    model = timm.create_model(name, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.2)
    return model


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
@pytest.mark.parametrize("name", timm.list_models("gld_*"))
def test_logits_stay(name):
    model = with_statistics(name, num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    expected, norms = model(images), len(norms_of(model))
    folded = fold_batch_norm(model, (3, 32, 32))
    # pre-activation blocks keep the norm before their first convolution, and the final one
    assert len(norms_of(folded)) == ((norms + 1) // 2 if "wrn" in name else 0)
    assert (folded(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", 0),
        ("tf_efficientnet_lite0", 0),
        ("mobilenetv3_small_050", 0),
        ("regnety_002", 0),
        ("densenet121", 62),  # of 121: each layer's first norm takes what is joined
        ("vit_tiny_patch16_224", 0),
    ],
)
def test_other_models_logits_stay(name, left):
    model = with_statistics(name)
    images = torch.randn(1, 3, 224, 224)
    expected = model(images)
    folded = fold_batch_norm(model, (3, 224, 224))
    assert len(norms_of(folded)) == left
    assert (folded(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


class Twice(nn.Module):
    """Something else takes what the convolution gives, before or beside the norm."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "changed in place":
            y += 1
        if self.kind == "called twice":
            y = self.conv(nn.functional.pad(y, (1, 1, 1, 1)))
        z = self.bn(y)
        if self.kind == "no number":
            return z.mean((2, 3)) * float("nan")
        return (z + y if self.kind.startswith("added") else z).mean((2, 3)) + self.bias


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    ["changed in place", "called twice", "added", "added, all far from 0", "no number", "alone"],
)
def test_what_something_else_takes_too_is_left(kind):
    torch.manual_seed(0)
    model = Twice(kind).eval()
    model.bn.running_mean.normal_()
    if kind == "added, all far from 0":
        model.bias.fill_(1000)
    images = torch.randn(2, 3, 8, 8)
    expected, parts = model(images), (model.conv, model.bn)
    folded = fold_batch_norm(model, (3, 8, 8))
    assert ((folded.conv, folded.bn) == parts) == (kind != "alone")
    torch.testing.assert_close(folded(images), expected, equal_nan=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parts)
    assert not any(module.training for module in folded.modules())


@torch.no_grad()
@pytest.mark.parametrize("raises", ["first", "second"])
def test_a_model_that_raises_is_left_as_it_was(raises):
    model, calls = Twice("alone").eval(), []

    def stop(*_):
        calls.append(raises)
        if len(calls) == ("first", "second").index(raises) + 1:
            raise RuntimeError("stopped")

    model.register_forward_pre_hook(stop)
    parts = (model.conv, model.bn)
    with pytest.raises(RuntimeError, match="stopped"):
        fold_batch_norm(model, (3, 8, 8))
    assert (model.conv, model.bn) == parts
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parts)


@pytest.mark.parametrize("of", ["model", "norm"])
def test_training_is_refused(of):
    model = timm.create_model("resnet18").eval()
    (model if of == "model" else model.bn1).train()
    with pytest.raises(ValueError, match="eval mode only"):
        fold_batch_norm(model, (3, 32, 32))
