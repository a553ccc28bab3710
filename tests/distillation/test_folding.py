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


@torch.no_grad()
@pytest.mark.parametrize("name", timm.list_models("gld_*"))
def test_logits_stay(name):
    model = with_statistics(name, num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    folded = fold_batch_norm(model)
    left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    # pre-activation blocks keep the norm before their first convolution, and the final one
    assert len(left) == ((len(norms) + 1) // 2 if "wrn" in name else 0)
    assert (folded(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_other_models_are_left_alone_and_training_is_refused():
    model = timm.create_model("resnet18")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="eval mode only"):
        fold_batch_norm(model)
    fold_batch_norm(model.eval())
    assert {name: type(module) for name, module in model.named_modules()} == before
