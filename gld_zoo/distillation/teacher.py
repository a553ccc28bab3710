"""A frozen teacher as the student's images reach it, and what the student learns from it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_model_data_config

from gld_zoo.distillation.folding import CONVOLUTIONS
from gld_zoo.distillation.heads import check_classifier, check_head, classify_rows, head_dtype
from gld_zoo.distillation.maps import FeatureMap, Grid, feature_map

HEAD_FILE = "teacher_head.safetensors"  # of the head that a run fitted to its teacher
FILTERS = ("bilinear", "bicubic")  # that torch resizes tensors by, antialiased


class Teacher(nn.Module):
    """A frozen teacher: the student's images to its rows, global row first.

    The images are resized and renormalised from the student's mean and std to the teacher's own.
    Rows are features averaged over the map's cells, then classified by `head`.

    Args:
        model: The teacher, in eval mode.
        grid: Cells along each side of its feature map, or several such numbers; None for a model
            that is to `classify` alone, which then need not have a map.
        mean, std: With which the images were normalised.
        size: Side in pixels to which the images are resized; None leaves them as they are.
        head: 'own' for the model's classifier, 'fit' for one that `set_head` brings, 'none' for
            rows of features.
        columns: For each class of the dataset, its place among the model's own.

    Source: GLD (ICCV 2021), section 3, for the local logits and the classifier that is fitted to
    frozen features; the head of any model and the resizing are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        grid: Grid | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        size: int | None = None,
        head: str = "own",
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if head == "own" and grid is not None:
            check_classifier(model)
        self.model = model.to(memory_format=torch.channels_last)
        self.size, self.kind = size, head
        config = resolve_model_data_config(model)
        self.filter = config["interpolation"]
        if self.filter not in FILTERS:
            self.filter = FILTERS[0]
        device = next(model.parameters()).device
        self.statistics = (config["mean"], config["std"], mean, std)
        own_mean, own_std, their_mean, their_std = torch.tensor(self.statistics, device=device)[
            ..., None, None
        ]
        self.same = torch.equal(own_mean, their_mean) and torch.equal(own_std, their_std)
        self.scale = nn.Buffer(their_std / own_std, persistent=False)
        self.shift = nn.Buffer((their_mean - own_mean) / own_std, persistent=False)
        self.columns = None if columns is None else torch.tensor(columns, device=device)
        self.fitted: nn.Module | None = None
        self.rows = None if grid is None else _Rows(self.model, grid, head)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what computes the features; the head is small."""
        if self.rows is not None:
            self.rows.compile(*args, **kwargs)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    def set_head(self, head: nn.Module) -> None:
        """Classify by a head `[..., D] -> [..., K]` that was fitted to the features."""
        self.fitted = head

    @property
    def layout(self) -> FeatureMap:
        """The form and the size of the map, as the first images showed them."""
        assert self.rows is not None
        assert self.rows.layout is not None
        return self.rows.layout

    @torch.no_grad()
    def keep_in(self, dtype: torch.dtype | None) -> None:
        """Keep the weights that autocast would cast at each step in its type, to the same bits.

        They are those of convolutions and linear layers before the head, which is in float32. From
        here on the teacher, which has been shown images before, runs under autocast alone.

        Args:
            dtype: Autocast's; None changes nothing.
        """
        if dtype is None:
            return
        model: Any = self.model
        in_head: set[nn.Module] = set()

        def note(module: nn.Module, *_: Any) -> None:
            in_head.add(module)

        hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
        parameter = next(model.parameters())
        model.forward_head(self.layout.of_one_place(parameter.new_zeros(1, model.num_features)))
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            # those alone that multiply by their weight as it is
            if type(module) in (*CONVOLUTIONS, nn.Linear) and module not in in_head:
                module.to(dtype)

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images to the model's own logits `[B, K]`."""
        return self._in_order(self.model(self.prepare(images)))

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's normalised images to the teacher's, in size and scale."""
        if self.size is not None and self.size != images.shape[-1]:
            images = F.interpolate(
                images, (self.size, self.size), mode=self.filter, antialias=True
            ).contiguous(memory_format=torch.channels_last)
        return images if self.same else torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images `[B, 3, H, W]` to features `[B, 1+L, D]`, in float32."""
        assert self.rows is not None
        return self.rows(self.prepare(images))

    @torch.no_grad()
    def classify_rows(self, features: torch.Tensor) -> torch.Tensor:
        """Map features `[B, R, D]` to the rows that teach: logits `[B, R, K]`, or themselves."""
        if self.kind == "none":
            return features
        with torch.autocast(features.device.type, enabled=False):
            if self.kind == "fit":
                assert self.fitted is not None
                return self.fitted(features)
            rows = features.to(head_dtype(self.model))
            return self._in_order(classify_rows(self.model, rows, self.layout))

    @torch.no_grad()
    def head_is_affine(self) -> bool:
        """Tell whether the mean of rows is classified as the mean of their logits."""
        if self.kind != "own":
            return True
        generator = torch.Generator().manual_seed(0)
        width = self.layout.values.shape[1]
        noise = torch.randn((1, 4, width), generator=generator).to(self.shift.device)
        each, mean = self.classify_rows(noise), self.classify_rows(noise.mean(1, keepdim=True))
        return bool((each.mean(1) - mean[:, 0]).abs().max() <= 1e-5 * each.abs().max())

    def _in_order(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.columns is None else logits[..., self.columns]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images `[B, 3, H, W]` to rows `[B, 1+L, K]`, the local ones last."""
        return self.classify_rows(self.features(images))


class LinearHead(nn.Module):
    """A frozen linear classifier of standardised features: a teacher's fitted head, or a probe's.

    Args:
        mean, std: Of the features, `[D]`, in the type to compute in.
        weight: Of standardised features, `[K, D]`.
        bias: `[K]`.
    """

    def __init__(
        self, mean: torch.Tensor, std: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> None:
        super().__init__()
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)
        self.weight, self.bias = nn.Buffer(weight), nn.Buffer(bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features `[..., D]` to logits `[..., K]`."""
        standardised = (features.to(self.mean.dtype) - self.mean) / self.std
        return F.linear(standardised, self.weight, self.bias)


def side_of(model: nn.Module, size: int | Literal["own"] | None) -> int | None:
    """Return the side in pixels that a `teacher_size` means; None leaves images as they are."""
    return resolve_model_data_config(model)["input_size"][-1] if size == "own" else size


def take_size(model: Any, size: int) -> None:
    """Let a model that takes one size of images take square ones of another, where timm can.

    Transformers resample the embedding of positions; what cannot be done, its forward tells.
    """
    cfg = model.pretrained_cfg
    if (
        cfg.get("fixed_input_size")
        and tuple(cfg["input_size"][1:]) != (size, size)
        and hasattr(model, "set_input_size")
        and not getattr(getattr(model, "patch_embed", None), "dynamic_img_pad", False)
    ):
        with contextlib.suppress(AssertionError, RuntimeError, ValueError):
            model.set_input_size(img_size=(size, size))


class _Rows(nn.Module):
    """The teacher's images to its features `[B, 1+L, D]`, in the type that its weights had."""

    def __init__(self, model: nn.Module, grid: Grid, head: str) -> None:
        super().__init__()
        self.model, self.grid, self.head = model, grid, head
        self.dtype = next(model.parameters()).dtype
        self.layout: FeatureMap | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = feature_map(self.model, images, self.grid)
        if not torch.compiler.is_compiling():
            if self.head == "own":
                check_head(self.model, found)
            self.layout = found.described()
        with torch.autocast(images.device.type, enabled=False):
            return found.to(self.dtype).rows(self.grid)
