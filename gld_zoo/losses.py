"""The GLD loss: normalised distillation of global and local logits, and their relations.

Kim et al., "Distilling Global and Local Logits with Densely Connected Relations", ICCV 2021.

Shapes: B images, L = grid² cells, K classes, N = B(1+L) rows of logits; the global row comes first.
Everything here is computed in float32, or in float64 for float64 input, with autocast off.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from gld_zoo.relations import relation, working_dtype


def logit_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute KL(teacher || student) of logits over their own standard deviation.

    The standard deviation over the K classes is the unbiased one; there is no temperature. A
    constant row stands for the uniform distribution.

    Args:
        student: Logits `[..., K]`.
        teacher: Logits `[..., K]`; receives no gradient.

    Returns:
        One divergence a row `[...]`, in nats.

    Source: GLD (ICCV 2021), section 3, the global and the local distillation.
    """
    dtype = working_dtype(student)
    with torch.autocast(student.device.type, enabled=False):
        log_p = F.log_softmax(_divide_by_std(teacher.detach().to(dtype)), dim=-1)
        log_q = F.log_softmax(_divide_by_std(student.to(dtype)), dim=-1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _divide_by_std(logits: torch.Tensor) -> torch.Tensor:
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    # what rounding leaves of a constant row is not a spread; nor may 1 / std overflow in the
    # backward pass
    info = torch.finfo(logits.dtype)
    floor = (4 * info.eps * logits.detach().abs().amax(-1, keepdim=True)).square() + info.tiny**0.5
    return centred * torch.where(variance > floor, variance, 1.0).rsqrt()


class GLDLoss(nn.Module):
    """The GLD loss: weighs cross-entropy, the two distillation terms and the relation.

    `(1 - alpha) CE + alpha KL_global + local_weight sum_l KL_l + beta relation`, where KL and CE
    are means over the batch and the local term is a sum over the L cells. A weight of 0 turns its
    term off.

    The relation scales as 1/N: `beta=500` belongs to a batch of 64 images and grid 2 (N = 320). To
    keep the balance at another batch or grid, scale beta by N / 320.

    Args:
        alpha: Share of the global distillation against cross-entropy, from 0 to 1.
        beta: Weight of the relation.
        local_weight: Weight of the local distillation.
        global_batch: Take the relation over the batches of all processes together, while gradients
            are enabled and a process group is initialised. The other terms stay means over the
            local batch.

    Raises:
        ValueError: If a weight is out of its range.

    Source: GLD (ICCV 2021), section 3, the total loss.
    """

    def __init__(
        self,
        alpha: float = 0.7,
        beta: float = 500.0,
        *,
        local_weight: float = 1.0,
        global_batch: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is not between 0 and 1")
        if not (0 <= beta < math.inf and 0 <= local_weight < math.inf):
            raise ValueError(
                f"beta={beta} and local_weight={local_weight} must be finite and not negative"
            )
        self.alpha = alpha
        self.beta = beta
        self.local_weight = local_weight
        self.global_batch = global_batch

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute the loss and its weighted terms.

        Args:
            student: Logits `[B, 1+L, K]`, global row first.
            teacher: Logits `[B, 1+L, K]`; receive no gradient.
            target: Class indices `[B]`.

        Returns:
            Scalars `loss`, and its summands `loss_ce`, `loss_global`, `loss_local`,
            `loss_relation`.

        Raises:
            ValueError: If the shapes do not fit each other.
        """
        _check_shapes(student, teacher, target)
        dtype = working_dtype(student)
        student, teacher = student.to(dtype), teacher.detach().to(dtype)
        zero = student.new_zeros(())
        with torch.autocast(student.device.type, enabled=False):
            divergence = logit_kl(student, teacher).mean(0)  # [1+L]
            terms = dict(
                loss_ce=(1 - self.alpha) * F.cross_entropy(student[:, 0], target)
                if self.alpha < 1
                else zero,
                loss_global=self.alpha * divergence[0] if self.alpha else zero,
                loss_local=self.local_weight * divergence[1:].sum() if self.local_weight else zero,
                loss_relation=self.beta * self._relation(student, teacher) if self.beta else zero,
            )
            return dict(loss=torch.stack(list(terms.values())).sum(), **terms)

    def _relation(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        global_batch = self.global_batch and torch.is_grad_enabled()
        return relation(student.flatten(0, 1), teacher.flatten(0, 1), global_batch=global_batch)

    def extra_repr(self) -> str:
        """Show the weights."""
        return (
            f"alpha={self.alpha}, beta={self.beta}, local_weight={self.local_weight}, "
            f"global_batch={self.global_batch}"
        )


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
    if target.shape != student.shape[:1]:
        raise ValueError(
            f"target must hold one class index an image, [{len(student)}], got {list(target.shape)}"
        )
