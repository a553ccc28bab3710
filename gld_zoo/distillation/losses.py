"""The GLD loss: normalised distillation of global and local logits, and their relations.

Kim et al., "Distilling Global and Local Logits with Densely Connected Relations", ICCV 2021.

Shapes: B images, L cells (grid², or their sum over several grids), K classes, N = B(1+L) rows of
logits; the global row comes first.
Everything here is computed in float32, or in float64 for float64 input, with autocast off.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from gld_zoo.distillation.relations import relation, working_dtype


def logit_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    standardise: bool = True,
) -> torch.Tensor:
    """Compute T² KL(softmax(teacher / T) || softmax(student / T)) of standardised or raw logits.

    Standardised logits are divided by their own standard deviation over the K classes, the unbiased
    one; a constant row stands for the uniform distribution. The defaults are GLD's.

    Args:
        student: Logits `[..., K]`.
        teacher: Logits `[..., K]`; receives no gradient.
        temperature: T, above 0.
        standardise: Whether to divide by the standard deviation; False takes the logits as they
            are.

    Returns:
        One divergence a row `[...]`, in nats.

    Source: GLD (ICCV 2021), section 3, the global and the local distillation, with T = 1; Hinton et
    al., "Distilling the Knowledge in a Neural Network", 2015, raw; Sun et al., "Logit
    Standardization in Knowledge Distillation", CVPR 2024, standardised with T = 2.
    """
    dtype = working_dtype(student)

    def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
        logits = _divide_by_std(logits.to(dtype)) if standardise else logits.to(dtype)
        return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)

    with torch.autocast(student.device.type, enabled=False):
        log_p, log_q = log_probabilities(teacher.detach()), log_probabilities(student)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return divergence if temperature == 1 else temperature**2 * divergence


def _divide_by_std(logits: torch.Tensor) -> torch.Tensor:
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    # what rounding leaves of a constant row is not a spread; nor may 1 / std overflow in the
    # backward pass
    info = torch.finfo(logits.dtype)
    floor = (4 * info.eps * logits.detach().abs().amax(-1, keepdim=True)).square() + info.tiny**0.5
    return centred * torch.where(variance > floor, variance, 1.0).rsqrt()


class GLDLoss(nn.Module):
    """The GLD loss and its family: cross-entropy, two distillation terms and the relation.

    `ce_weight CE + global_weight KL_0 + local_weight sum_l w_l KL_l + beta relation`, where CE and
    each `KL = T² KL(softmax(t / T) || softmax(s / T))`, of logits standardised or raw, are means
    over the batch, and the local term is a sum over the L cells. A weight of 0 turns its term off.
    `w_l` is `disagreement` where exactly one of the teacher's global and local answers is the
    label, else 1.

    The defaults are the paper's. Other members, each with `beta=0`:

    - Hinton's distillation: `standardise=False, temperature=4, local_weight=0`.
    - Logit standardisation: `temperature=2, ce_weight=0.1, global_weight=9, local_weight=0`.
    - Scale-decoupled distillation: `standardise=False, temperature=4, disagreement=2,
      ce_weight=0.1, global_weight=0.9/21, local_weight=0.9/21` on rows of `grid=(2, 4)`, whose 21
      it averages.

    The relation scales as 1/N: `beta=500` belongs to a batch of 64 images and grid 2 (N = 320). To
    keep the balance at another batch or grid, scale beta by N / 320.

    Args:
        alpha: Share of the global distillation against cross-entropy, from 0 to 1.
        beta: Weight of the relation.
        local_weight: Weight of the local distillation.
        global_batch: Take the relation over the batches of all processes together, while gradients
            are enabled and a process group is initialised. The other terms stay means over the
            local batch.
        temperature: T of both distillation terms, from 0.001 to 1000.
        standardise: Divide each row of logits by its standard deviation in both of them.
        disagreement: Weight of a cell as above.
        ce_weight: Weight of cross-entropy; None takes `1 - alpha`.
        global_weight: Weight of the global distillation; None takes `alpha`.

    Raises:
        ValueError: If a weight or the temperature is out of its range.

    Source: GLD (ICCV 2021), section 3, the total loss; Wei et al., "Scale Decoupled Distillation",
    CVPR 2024, for `disagreement`; those of `logit_kl`.
    """

    def __init__(
        self,
        alpha: float = 0.7,
        beta: float = 500.0,
        *,
        local_weight: float = 1.0,
        global_batch: bool = False,
        temperature: float = 1.0,
        standardise: bool = True,
        disagreement: float = 1.0,
        ce_weight: float | None = None,
        global_weight: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is not between 0 and 1")
        self.ce_weight = 1 - alpha if ce_weight is None else ce_weight
        self.global_weight = alpha if global_weight is None else global_weight
        self.beta = beta
        self.local_weight = local_weight
        self.disagreement = disagreement
        for name in ("ce_weight", "global_weight", "beta", "local_weight", "disagreement"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        if not 1e-3 <= temperature <= 1e3:  # beyond, float32 overflows
            raise ValueError(f"temperature={temperature} must lie between 0.001 and 1000")
        self.temperature = temperature
        self.standardise = standardise
        self.global_batch = global_batch

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute the loss and its weighted terms.

        Args:
            student: Logits `[B, 1+L, K]`, global row first.
            teacher: Logits `[B, 1+L, K]`; receive no gradient.
            target: Class indices `[B]`, or probabilities `[B, K]` where `disagreement` is 1.

        Returns:
            Scalars `loss`, and its summands `loss_ce`, `loss_global`, `loss_local`,
            `loss_relation`.

        Raises:
            ValueError: If the shapes do not fit each other.
        """
        _check_shapes(student, teacher, target)
        if self.disagreement != 1 and target.ndim != 1:
            raise ValueError(
                f"disagreement={self.disagreement} asks which answers are right, so target must be "
                f"class indices [B], got {list(target.shape)}; use disagreement=1 with mixed or "
                "smoothed labels"
            )
        dtype = working_dtype(student)
        student, teacher = student.to(dtype), teacher.detach().to(dtype)
        target = target.to(dtype) if target.ndim == 2 else target
        zero = student.new_zeros(())
        with torch.autocast(student.device.type, enabled=False):
            each = logit_kl(
                student, teacher, temperature=self.temperature, standardise=self.standardise
            )  # [B, 1+L]
            if self.disagreement != 1:
                each = each * self._cell_weights(teacher, target)
            divergence = each.mean(0)
            terms = dict(
                loss_ce=self.ce_weight * F.cross_entropy(student[:, 0], target)
                if self.ce_weight
                else zero,
                loss_global=self.global_weight * divergence[0] if self.global_weight else zero,
                loss_local=self.local_weight * divergence[1:].sum() if self.local_weight else zero,
                loss_relation=self.beta * self._relation(student, teacher) if self.beta else zero,
            )
            return dict(loss=torch.stack(list(terms.values())).sum(), **terms)

    def _cell_weights(self, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a weight a row `[B, 1+L]`; the global one agrees with itself."""
        right = teacher.argmax(-1) == target[:, None]
        return torch.where(right == right[:, :1], 1.0, self.disagreement).to(teacher.dtype)

    def _relation(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        global_batch = self.global_batch and torch.is_grad_enabled()
        return relation(student.flatten(0, 1), teacher.flatten(0, 1), global_batch=global_batch)

    def extra_repr(self) -> str:
        """Show the weights."""
        names = ["ce_weight", "global_weight", "local_weight", "beta", "temperature"]
        names += ["standardise", "disagreement", "global_batch"]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class RelationLoss(nn.Module):
    """The relations of features alone, of a teacher without the student's classes or without any.

    `ce_weight CE + beta relation`, the relation being that of the global and local features of both
    models, whose widths may differ; cross-entropy is left out where there are no labels.

    Args:
        beta: Weight of the relation; scaled as for `GLDLoss`.
        ce_weight: Weight of cross-entropy.
        global_batch: As for `GLDLoss`.

    Raises:
        ValueError: If a weight is out of its range.

    Source: GLD (ICCV 2021), section 3, for the relation; that of features alone is ours.
    """

    def __init__(
        self, beta: float = 500.0, *, ce_weight: float = 1.0, global_batch: bool = False
    ) -> None:
        super().__init__()
        self.beta, self.ce_weight, self.global_batch = beta, ce_weight, global_batch
        for name in ("beta", "ce_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        logits: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss and its weighted terms.

        Args:
            student: Features `[B, 1+L, K]`, global row first.
            teacher: Features `[B, 1+L, D]`; receive no gradient.
            logits: The student's of the whole images, `[B, C]`; None leaves cross-entropy out.
            target: Class indices `[B]`, or probabilities `[B, C]`.

        Returns:
            Scalars `loss`, `loss_relation`, and with logits `loss_ce`.

        Raises:
            ValueError: If the numbers of rows differ.
        """
        if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"features must be [B, 1+L, D] of the same images and cells, got "
                f"{list(student.shape)} and {list(teacher.shape)}; both models need the same grid"
            )
        global_batch = self.global_batch and torch.is_grad_enabled()
        rows = student.flatten(0, 1), teacher.flatten(0, 1)
        terms = dict(loss_relation=self.beta * relation(*rows, global_batch=global_batch))
        if logits is not None and target is not None:
            with torch.autocast(logits.device.type, enabled=False):
                entropy = F.cross_entropy(logits.to(working_dtype(logits)), target)
                terms = dict(loss_ce=self.ce_weight * entropy, **terms)
        return dict(loss=torch.stack(list(terms.values())).sum(), **terms)

    def extra_repr(self) -> str:
        """Show the weights."""
        names = ("ce_weight", "beta", "global_batch")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _check_shapes(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> None:
    if student.ndim != 3 or student.shape[1] < 2 or not student.numel():
        raise ValueError(
            f"student logits must be [B, 1+L, K] with B, L and K at least 1, got "
            f"{list(student.shape)}"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher logits {list(teacher.shape)} differ from student logits "
            f"{list(student.shape)}; both models need the same grid and the same classes"
        )
    batch, _, classes = student.shape
    if target.shape not in ((batch,), (batch, classes)):
        raise ValueError(
            f"target must hold a class index an image, [{batch}], or probabilities, "
            f"[{batch}, {classes}], got {list(target.shape)}"
        )
