"""Entry points for `torch.hub.load('<owner>/gld_zoo', 'gld_resnet20', pretrained=True)`."""

import functools
from collections.abc import Callable as _Callable
from typing import Any as _Any

from gld_zoo.models import cifar_resnet as _cifar_resnet
from gld_zoo.models import cifar_wrn as _cifar_wrn
from gld_zoo.models import gld_resnet as _gld_resnet

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub"]

_ARGUMENTS = """
Args:
    pretrained: Load the weights that come with the package; a model without any says so.
    **kwargs: As for timm.create_model: num_classes, in_chans, drop_rate, global_pool, ...

Returns:
    A timm model: normalised images [B, in_chans, H, W] to logits [B, num_classes].
    timm.data.resolve_model_data_config(model) tells its images' size, mean and std.
"""


def _entry_point(build: _Callable[..., _Any]) -> _Callable[..., _Any]:
    """Return a model's builder with the docstring that `torch.hub.help` shows."""

    @functools.wraps(build)
    def entry_point(pretrained: bool = False, **kwargs: _Any) -> _Any:
        return build(pretrained, **kwargs)

    entry_point.__doc__ = f"{build.__doc__}\n{_ARGUMENTS}"
    return entry_point


gld_resnet18 = _entry_point(_gld_resnet.gld_resnet18)
gld_resnet34 = _entry_point(_gld_resnet.gld_resnet34)
gld_resnet20 = _entry_point(_cifar_resnet.gld_resnet20)
gld_resnet32 = _entry_point(_cifar_resnet.gld_resnet32)
gld_resnet44 = _entry_point(_cifar_resnet.gld_resnet44)
gld_resnet56 = _entry_point(_cifar_resnet.gld_resnet56)
gld_resnet110 = _entry_point(_cifar_resnet.gld_resnet110)
gld_wrn16_1 = _entry_point(_cifar_wrn.gld_wrn16_1)
gld_wrn16_2 = _entry_point(_cifar_wrn.gld_wrn16_2)
gld_wrn16_4 = _entry_point(_cifar_wrn.gld_wrn16_4)
gld_wrn22_4 = _entry_point(_cifar_wrn.gld_wrn22_4)

__all__ = [name for name in dir() if name.startswith("gld_")]
