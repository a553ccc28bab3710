"""A frozen teacher as the student's images reach it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from timm.layers import Conv2dSame

from gld_zoo import GlobalLocal
from gld_zoo.distillation.folding import fold_batch_norm
from gld_zoo.distillation.maps import Grid


class Teacher(nn.Module):
    """A frozen teacher: the student's images to its logits.

    The images are renormalised from the student's mean and std to the teacher's own. Batch norm is
    folded into the convolutions before it where the model is one of this package's.

    Args:
        model: The teacher, in eval mode.
        grid: Cells along each side of its feature map, or several such numbers; None for a model
            that is to `classify` alone, which then need not have local logits.
        mean, std: With which the images were normalised.
    """

    def __init__(
        self, model: nn.Module, grid: Grid | None, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = fold_batch_norm(model).to(memory_format=torch.channels_last)
        self.logits = self.model if grid is None else GlobalLocal(self.model, grid)
        config = resolve_model_data_config(model)
        device = next(model.parameters()).device
        statistics = (config["mean"], config["std"], mean, std)
        own_mean, own_std, their_mean, their_std = torch.tensor(statistics, device=device)[
            ..., None, None
        ]
        self.same = torch.equal(own_mean, their_mean) and torch.equal(own_std, their_std)
        self.scale = nn.Buffer(their_std / own_std, persistent=False)
        self.shift = nn.Buffer((their_mean - own_mean) / own_std, persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def keep_in(self, dtype: torch.dtype | None) -> None:
        """Keep the weights that autocast would cast at each step in its type, to the same bits.

        They are those of convolutions and linear layers before the head, which is in float32. From
        here on the teacher runs under autocast alone.

        Args:
            dtype: Autocast's; None changes nothing.
        """
        if dtype is None:
            return
        model: Any = self.model
        width = model.num_features
        in_head: set[nn.Module] = set()

        def note(module: nn.Module, *_: Any) -> None:
            in_head.add(module)

        hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
        parameter = next(model.parameters())
        model.forward_head(parameter.new_zeros(1, width, 1, 1))
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            # those alone that multiply by their weight as it is
            if type(module) in (nn.Conv2d, Conv2dSame, nn.Linear) and module not in in_head:
                module.to(dtype)

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images to the teacher's logits `[B, K]`."""
        return self.model(self.renormalize(images))

    def renormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's normalised images to the teacher's."""
        return images if self.same else torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images `[B, 3, H, W]` to logits `[B, 1+L, K]`, the local ones last."""
        return self.logits(self.renormalize(images))
