"""Convolutions of maps of few cells as one matrix product, which CPUs compute in less time.

oneDNN sums the gradient of a convolution's weights image by image. Where an image has four cells, a
product over four rows leaves most of the instruction idle; over the rows of all images it does not.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

CELLS = 16  # of an output map, at most; of 64 it is the convolution that takes less time
# of the layers that are multiplied: kernel, padding, dilation, groups, how the border is padded
SETTINGS = ((3, 3), (1, 1), (1, 1), 1, "zeros")


class SmallMapConv2d(nn.Conv2d):
    """A 3 x 3 convolution of padding 1 that trains as a matrix product where its map is small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` to `[B, D, ceil(H / stride), ceil(W / stride)]`."""
        down, across = self.stride
        height, width = -(-x.shape[2] // down), -(-x.shape[3] // across)
        if not self.training or height * width > CELLS:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        shifts = [
            padded[:, i : i + down * height : down, j : j + across * width : across]
            for i in range(3)
            for j in range(3)
        ]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [D, 9 C]
        return F.linear(torch.cat(shifts, -1), weight, self.bias).permute(0, 3, 1, 2)


def multiply_on_small_maps(model: nn.Module) -> nn.Module:
    """Let a model's 3 x 3 convolutions become `SmallMapConv2d`; weights and names stay."""
    for module in model.modules():
        if type(module) is not nn.Conv2d:
            continue
        settings = (module.kernel_size, module.padding, module.dilation, module.groups)
        if (*settings, module.padding_mode) == SETTINGS:
            module.__class__ = SmallMapConv2d
    return model
