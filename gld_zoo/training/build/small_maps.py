"""Convolutions of maps of few cells as matrix products, which CPUs compute in less time.

oneDNN sums the gradient of a convolution's weights image by image. Where an image has four cells, a
product over four rows leaves most of the instruction idle; over the rows of all images it does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

# measured on an Intel Xeon with AMX (benchmarks/README.md)
CELLS = 16  # of an output map, at most; of 64 it is the convolution that takes less time
INPUT_CELLS = 4  # likewise, for the gradient of the input; of 16 it is the convolution
# of the layers that are multiplied: kernel, padding, dilation, groups, how the border is padded
SETTINGS = ((3, 3), (1, 1), (1, 1), 1, "zeros")


class SmallMapConv2d(nn.Conv2d):
    """A 3 x 3 convolution of padding 1 that trains as matrix products where its map is small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` to `[B, D, ceil(H / stride), ceil(W / stride)]`."""
        if not self.training or x.dim() != 4:
            return super().forward(x)
        height, width = (-(-n // step) for n, step in zip(x.shape[2:], self.stride, strict=True))
        if height * width > CELLS:
            return super().forward(x)
        weight, bias, kind = self.weight, self.bias, x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which autocast leaves
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        rows = _Multiplied.apply(x, weight, bias, self.stride, (height, width))
        return rows.unflatten(0, (len(x), height, width)).permute(0, 3, 1, 2)


class _Multiplied(torch.autograd.Function):
    """The output and its gradients, each as one product, so that sums are float32's in bf16 too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        size: tuple[int, int],
    ) -> torch.Tensor:
        """Return the output's cells as rows: `[B h w, D]`."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.size = stride, size
        by_rows = weight.permute(0, 2, 3, 1).flatten(1)  # [D, 9 C]
        return F.linear(_neighbourhoods(x, stride, size), by_rows, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _of_input(gradient, x, weight, ctx.stride, ctx.size)
        if ctx.needs_input_grad[1]:
            product = gradient.T @ _neighbourhoods(x, ctx.stride, ctx.size)  # [D, 9 C]
            of_weight = product.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_x, of_weight, of_bias, None, None


def _of_input(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    size: tuple[int, int],
) -> torch.Tensor:
    """Return the gradient of `x` from that of the output's cells, `[B h w, D]`."""
    of_map = gradient.unflatten(0, (len(x), *size)).permute(0, 3, 1, 2)
    if stride == (1, 1) and size[0] * size[1] <= INPUT_CELLS:
        # an input's cell was multiplied by the kernel's opposite places
        opposite = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)  # [9 D, C]
        product = _neighbourhoods(of_map, stride, size) @ opposite
        return product.unflatten(0, (len(x), *size)).permute(0, 3, 1, 2)
    of_x, _, _ = torch.ops.aten.convolution_backward(
        of_map, x, weight, None, stride, (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
    )
    return of_x


def _neighbourhoods(
    x: torch.Tensor, stride: tuple[int, ...], size: tuple[int, int]
) -> torch.Tensor:
    """Return the 3 x 3 cells, zero outside, around each of an output of a size: `[B h w, 9 C]`."""
    (down, across), (height, width) = stride, size
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifts = [
        padded[:, i : i + down * height : down, j : j + across * width : across]
        for i in range(3)
        for j in range(3)
    ]
    return torch.cat(shifts, -1).flatten(0, 2)


def multiply_on_small_maps(model: nn.Module) -> nn.Module:
    """Let a model's 3 x 3 convolutions become `SmallMapConv2d`, in place; names stay."""
    for module in model.modules():
        if type(module) is not nn.Conv2d:
            continue
        settings = (module.kernel_size, module.padding, module.dilation, module.groups)
        if (*settings, module.padding_mode) == SETTINGS:
            module.__class__ = SmallMapConv2d
    return model
