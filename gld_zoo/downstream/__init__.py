"""SSD300 and DeepLabV3+ on any timm backbone."""

from gld_zoo.downstream.saving import load_downstream, save_downstream

__all__ = ["load_downstream", "save_downstream"]
