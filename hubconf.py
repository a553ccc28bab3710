"""Entry points for `torch.hub.load('<owner>/gld_zoo', 'gld_resnet20', pretrained=True)`."""

from gld_zoo.cifar_resnet import (
    gld_resnet20,
    gld_resnet32,
    gld_resnet44,
    gld_resnet56,
    gld_resnet110,
)
from gld_zoo.cifar_wrn import gld_wrn16_1, gld_wrn16_2, gld_wrn16_4, gld_wrn22_4
from gld_zoo.gld_resnet import gld_resnet18, gld_resnet34

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub"]

__all__ = [
    "gld_resnet18",
    "gld_resnet20",
    "gld_resnet32",
    "gld_resnet34",
    "gld_resnet44",
    "gld_resnet56",
    "gld_resnet110",
    "gld_wrn16_1",
    "gld_wrn16_2",
    "gld_wrn16_4",
    "gld_wrn22_4",
]
