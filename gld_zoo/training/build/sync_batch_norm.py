"""Batch norm over the batches of all processes, also on CPUs, where torch has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import convert_sync_batchnorm

from gld_zoo.training.common.errors import ModelError


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the global batch, on any backend."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` to the same shape; every process holds as many images."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _all_reduce(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _all_reduce(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        buffers: Any = self
        buffers.num_batches_tracked += 1
        buffers.running_mean.lerp_(mean.to(buffers.running_mean.dtype), self.momentum)
        buffers.running_var.lerp_(variance.to(buffers.running_var.dtype), self.momentum)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let a model's batch norms see the batches of all processes; weights and names stay.

    On a CPU the layers become `SyncBatchNorm2d`, elsewhere torch's own.

    Raises:
        ModelError: If a layer on a CPU is a batch norm of another kind.
    """
    if device.type != "cpu":
        return convert_sync_batchnorm(model)
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.momentum is not None:
            module.__class__ = SyncBatchNorm2d
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"sync_batch_norm on a CPU knows nn.BatchNorm2d only, {name} is "
                f"{type(module).__name__}; train on GPUs or without it"
            )
    return model


class _AllReduce(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        grad_output = grad_output.contiguous().clone()
        dist.all_reduce(grad_output)
        return grad_output


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    return _AllReduce.apply(tensor)
