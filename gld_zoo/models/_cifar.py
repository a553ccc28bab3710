"""What the two 32 x 32 families share: three stages, one head, timm's whole model contract.

`cifar_resnet.py` and `cifar_wrn.py` build a stem, three stages and a final norm; everything timm
asks of a model beyond that (features, pruning, classifier reset, checkpointing) is the same and
lives here.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices

from gld_zoo.distillation.heads import LocalLogits
from gld_zoo.models._weights import CIFAR100_LABELS, embedded

CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)


def cifar_cfg(weights: str = "", **kwargs: Any) -> dict[str, Any]:
    """Return a timm pretrained cfg for CIFAR-100, with the file of `weights` (arch.tag) if any."""
    return dict(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
        first_conv="stem.conv",
        classifier="fc",
        license="apache-2.0",
        label_names=CIFAR100_LABELS if weights else None,
        **embedded(weights),
        **kwargs,
    )


class StagePlan(NamedTuple):
    """Geometry of a stage: its first block strides and has a dilation of its own."""

    stride: int
    first_dilation: int
    dilation: int
    reduction: int


def plan_stages(output_stride: int) -> list[StagePlan]:
    """Return the three stages' geometry; strides beyond `output_stride` become dilation.

    Raises:
        ValueError: If it is not 1, 2 or 4.
    """
    if output_stride not in (1, 2, 4):
        raise ValueError(
            f"output_stride={output_stride} is not 1, 2 or 4, the strides of a 32 x 32 network"
        )
    stages, reduction, dilation = [], 1, 1
    for stride in (1, 2, 2):
        first_dilation = dilation
        if reduction * stride > output_stride:
            dilation *= stride
            stride = 1
        reduction *= stride
        stages.append(StagePlan(stride, first_dilation, dilation, reduction))
    return stages


class CifarNet(LocalLogits, nn.Module):
    """A stem, three stages (`layer1` to `layer3`), a final norm and a pooled linear classifier.

    Args:
        stem: Maps `[B, in_chans, H, W]` to the first stage's input at full resolution.
        stages: Three sequences of blocks.
        norm: What follows the last stage, `nn.Identity()` for post-activation blocks.
        widths: Output channels of each stage.
        reductions: Stride of each stage's output with respect to the image.
        num_classes: Classes K; 0 gives pooled features.
        in_chans: Channels of the image.
        global_pool: timm pooling type; '' leaves the map unpooled (needs `num_classes=0`).
        drop_rate: Dropout probability before the classifier, in training only.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Sequential],
        norm: nn.Module,
        *,
        widths: tuple[int, ...],
        reductions: tuple[int, ...],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.stem = stem
        self.layer1, self.layer2, self.layer3 = stages
        self.norm = norm
        self.feature_info = [
            dict(num_chs=width, reduction=reduction, module=f"layer{i}")
            for i, (width, reduction) in enumerate(zip(widths, reductions, strict=True), start=1)
        ]
        self.num_features = widths[-1]
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=device, dtype=dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw convolutions from He's normal distribution, fan-out, as the paper does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns that group parameters by stage (`coarse`) or by block."""
        return dict(stem=r"^stem", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters to keep out of weight decay: none, the paper decays them all."""
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the one classifier, which serves the global and the local logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier of `num_classes`; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the stages' outputs, after the final features unless `intermediates_only`.

        Args:
            x: Images `[B, in_chans, H, W]`.
            indices: Stages to take: the last n for an integer, all for None.
            norm: Apply the final norm to the last stage's output.
            stop_early: Do not run stages past the last one taken.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list alone.

        Returns:
            The final features `[B, D, H/4, W/4]`, and maps of H, H/2 and H/4, of those taken.

        Raises:
            ValueError: If another `output_fmt` is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(
                f"output_fmt={output_fmt!r} is not available; a convolutional network gives 'NCHW'"
            )
        take_indices, max_index = feature_take_indices(3, indices)
        stages = [self.layer1, self.layer2, self.layer3]
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(stages[: max_index + 1] if stop_early else stages):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == 2 else x)
        if intermediates_only:
            return intermediates
        return (x if stop_early and max_index < 2 else self.norm(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages at `indices` do not need; return those indices from 0."""
        take_indices, max_index = feature_take_indices(3, indices)
        prune_end = max_index < 2
        for i in range(max_index + 1, 3):
            setattr(
                self, f"layer{i + 1}", nn.Sequential()
            )  # empty, so that checkpoint_seq can iterate it
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # sized for the last stage
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[B, in_chans, H, W]` to the last feature map `[B, D, H/4, W/4]`."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify a map `[B, D, H, W]`: `[B, K]`, or `[B, D]` with `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[B, in_chans, H, W]` to logits `[B, K]`."""
        return self.forward_head(self.forward_features(x))
